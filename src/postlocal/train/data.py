"""Bytes of text files as training sequences: memory-mapped, and the same in every run.

The files of a corpus are joined to one string of bytes, cut into windows of the sequence length.
Every twentieth stretch of windows is held out for validation; each rank gets a share of the others.
"""

import hashlib
import sysconfig
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from postlocal.train.config import TrainConfig

_HELD_OUT = 20
_LONGEST_STRETCH = 64
_HEAD = 8192  # bytes of a file that are searched for NUL
_BLOCK = 2**16
_BLOCKS = 2**10  # digested at most

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Found:
    """The files that data names.

    Attributes:
        texts: files to train on, sorted.
        binary: files with a NUL byte among their first 8192 bytes, which are skipped; sorted.
    """

    texts: tuple[Path, ...]
    binary: tuple[Path, ...] = ()


def find_files(data: Sequence[str]) -> Found:
    """The files that paths, folders and globs name; subfolders are searched too.

    Args:
        data: paths, folders or globs; empty: the Python standard library's own sources.

    Raises:
        ValueError: if an entry matches no file, a file cannot be read, or none of them is text.
    """
    if not data:
        return Found(tuple(sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))))
    files = sorted({file for entry in data for file in _matching(entry)})
    binary = tuple(file for file in files if _is_binary(file))
    texts = tuple(file for file in files if file not in set(binary))
    if not texts:
        count = "1 binary file" if len(files) == 1 else f"{len(files)} binary files"
        raise ValueError(
            f"data must hold text, got {count}, first {binary[0]}, which has a NUL byte among its "
            f"first {_HEAD} bytes"
        )
    return Found(texts, binary)


def _matching(entry: str) -> list[Path]:
    if not entry:
        raise ValueError("data must be files, folders or globs, got an empty name ''")
    matches = [Path(match) for match in glob(entry, recursive=True)] or [Path(entry)]
    try:
        found = [file for match in matches for file in _files_of(match)]
    except OSError as error:
        raise ValueError(f"data must be readable, got {entry!r} ({error.strerror})") from None
    if not found:
        if Path(entry).is_dir():
            raise ValueError(f"data must hold files, got {entry!r}, a folder without any")
        raise ValueError(f"data must be files, folders or globs that exist, got {entry!r}")
    return found


def _files_of(path: Path) -> list[Path]:
    if path.is_dir():
        return [file for file in path.rglob("*") if file.is_file()]
    return [path] if path.is_file() else []


def _is_binary(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            return b"\0" in opened.read(_HEAD)
    except OSError as error:
        raise ValueError(
            f"data must be files that can be read, got {file} ({error.strerror})"
        ) from None


class Corpus:
    """Files as one string of bytes, memory-mapped.

    Args:
        files: in the order in which they are joined.

    Raises:
        ValueError: if they are empty.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._maps = [np.memmap(file, mode="r") for file in files if file.stat().st_size]
        self._ends = list(accumulate(len(mapped) for mapped in self._maps))
        if not self._maps:
            raise ValueError(f"data must hold text, got {len(files)} empty files")

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def digest(self) -> str:
        """A digest of length and bytes, of 16 hexadecimal digits.

        Of more than 64 MiB, 1024 evenly spaced blocks of 64 KiB are digested.
        """
        digest = hashlib.blake2b(str(len(self)).encode(), digest_size=8)
        for start in self._blocks():
            digest.update(self.read(start, min(_BLOCK, len(self) - start)).tobytes())
        return digest.hexdigest()

    def _blocks(self) -> Iterator[int]:
        if len(self) <= _BLOCK * _BLOCKS:
            yield from range(0, len(self), _BLOCK)
        else:
            yield from np.linspace(0, len(self) - _BLOCK, _BLOCKS).astype(int).tolist()

    def read(self, start: int, length: int) -> NDArray[np.uint8]:
        """``length`` bytes from ``start`` on, across files if needed."""
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
        training: indices of the windows to train on.
        held_out: indices of the windows for validation.

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
    """One rank's share of the training windows, in another order each epoch.

    A batch is a function of seed, rank and step, so a resumed run reads the same batches.

    Args:
        windows: the corpus.
        rank: the rank, from 0.
        world: number of shares.
        batch_size: sequences a batch, at least 1.
        seed: seed of the order.

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


def open_data(config: TrainConfig, rank: int, world: int) -> tuple[Windows, Share]:
    """The corpus, and one rank's share of it.

    Raises:
        ValueError: if there is no data, or too little.
    """
    windows = Windows(Corpus(find_files(config.data).texts), config.sequence_length)
    return windows, Share(windows, rank, world, config.batch_size, config.seed)
