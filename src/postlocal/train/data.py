"""Bytes of text files as training sequences: memory-mapped, shared out, the same in every run.

All files of a corpus count as one string of bytes, cut into windows of the sequence length. Every
twentieth stretch of windows is held out for validation; the others are dealt out to the ranks.
"""

import sysconfig
from bisect import bisect_right
from collections.abc import Sequence
from glob import glob
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_HELD_OUT = 20
_LONGEST_STRETCH = 64

Batch = tuple[Tensor, Tensor]


def find_files(data: Sequence[str]) -> list[Path]:
    """Files that paths, folders and globs stand for, sorted; folders are searched below too.

    Args:
        data: paths, folders or globs; empty: the Python standard library's own sources.

    Raises:
        ValueError: if an entry matches nothing.
    """
    if not data:
        return sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    files: set[Path] = set()
    for entry in data:
        matches = [Path(match) for match in glob(entry, recursive=True)] or [Path(entry)]
        found = [file for match in matches for file in _files_of(match)]
        if not found:
            raise ValueError(f"data must be files, folders or globs that exist, got {entry!r}")
        files.update(found)
    return sorted(files)


def _files_of(path: Path) -> list[Path]:
    if path.is_dir():
        return [file for file in path.rglob("*") if file.is_file()]
    return [path] if path.is_file() else []


class Corpus:
    """Files as one string of bytes, read from disk where they are looked at.

    Args:
        files: in the order in which they are joined.

    Raises:
        ValueError: if they hold no bytes.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._maps = [np.memmap(file, mode="r") for file in files if file.stat().st_size]
        self._ends = list(accumulate(len(mapped) for mapped in self._maps))
        if not self._maps:
            raise ValueError(f"data must hold text, got {len(files)} empty files")

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, start: int, length: int) -> NDArray[np.uint8]:
        """``length`` bytes from ``start`` on, across files where need be."""
        parts = []
        index = bisect_right(self._ends, start)
        while length:
            mapped = self._maps[index]
            offset = start - (self._ends[index] - len(mapped))
            part = mapped[offset : offset + length]
            parts.append(part)
            start += len(part)
            length -= len(part)
            index += 1
        return np.concatenate(parts)


class Windows:
    """A corpus cut into sequences, some of them held out.

    Args:
        corpus: the bytes.
        length: bytes a sequence, at least 1.

    Attributes:
        training: numbers of the windows to train on.
        held_out: numbers of those for validation.

    Raises:
        ValueError: if there is not at least one of each.
    """

    def __init__(self, corpus: Corpus, length: int) -> None:
        self._corpus = corpus
        self._length = length
        count = (len(corpus) - 1) // length
        numbers = np.arange(count)
        stretch = min(_LONGEST_STRETCH, max(1, count // (2 * _HELD_OUT)))
        held_out = (numbers // stretch) % _HELD_OUT == _HELD_OUT - 1
        self.training = numbers[~held_out]
        self.held_out = numbers[held_out]
        if not len(self.held_out):
            raise ValueError(
                f"data must hold at least {_HELD_OUT} sequences of {length} bytes, got "
                f"{len(corpus)} bytes: pass more data or a shorter sequence length"
            )

    def batch(self, windows: Sequence[int] | NDArray[np.int64]) -> Batch:
        """Inputs and targets, one byte apart, each int64 of shape ``(windows, length)``."""
        rows = [self._corpus.read(int(w) * self._length, self._length + 1) for w in windows]
        tokens = torch.from_numpy(np.stack(rows)).long()
        return tokens[:, :-1], tokens[:, 1:]


class Share:
    """One rank's part of the training windows, in an order of its own each epoch.

    A batch is a function of seed, rank and step: what a resumed run reads is what the first one
    would have read.

    Args:
        windows: the corpus.
        rank: whose share, from 0.
        world: number of shares.
        batch_size: sequences a batch, at least 1.
        seed: of the order.

    Raises:
        ValueError: if the share is smaller than a batch.
    """

    def __init__(self, windows: Windows, rank: int, world: int, batch_size: int, seed: int) -> None:
        self._windows = windows
        self._own = windows.training[rank::world]
        self._batch_size = batch_size
        self._key = [seed, rank]
        self._epoch = -1
        self._order = self._own
        if len(windows.training) // world < batch_size:
            raise ValueError(
                f"data must hold at least one batch for each worker: {len(windows.training)} "
                f"sequences for {world} workers are fewer than batch size {batch_size} each; pass "
                "more data, a smaller batch or shorter sequences"
            )

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0."""
        first = step * self._batch_size
        return self._windows.batch(
            [self._window(position) for position in range(first, first + self._batch_size)]
        )

    def _window(self, position: int) -> int:
        epoch, index = divmod(position, len(self._own))
        if epoch != self._epoch:
            generator = np.random.default_rng([*self._key, epoch])
            self._order = generator.permutation(self._own)
            self._epoch = epoch
        return int(self._order[index])
