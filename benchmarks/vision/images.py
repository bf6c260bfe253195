"""Fashion-MNIST: read from its files, dealt to workers, cropped and flipped."""

import gzip
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

PACKAGE = "dataset-fashion-mnist"
"""Debian's package of the files."""

FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where the package puts them."""

MEAN, DEVIATION = 0.286, 0.353  # of the pixels of all training images, of which 1 is white
_PADDING = 2


@dataclass(frozen=True)
class Images:
    """Labelled images.

    Attributes:
        pixels: shape ``(n, 1, height, width)``, fp32, centred and scaled.
        labels: shape ``(n,)``, int64.
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> "Images":
        """The first ``count`` images, which are in no order."""
        return Images(self.pixels[:count], self.labels[:count])


@cache
def load(folder: Path, part: str) -> Images:
    """The images of a part, ``"train"`` or ``"t10k"``.

    Raises:
        FileNotFoundError: with the name of the package that brings the files.
    """
    files = [folder / f"{part}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"{file} is not there: apt-get install {PACKAGE}")
    pixels, labels = (read_idx(file) for file in files)
    return Images((pixels[:, None] / 255 - MEAN) / DEVIATION, labels.long())


def read_idx(file: Path) -> Tensor:
    """A tensor of bytes from a gzipped file in the idx format.

    The format: two zeros, the type (8 is unsigned bytes), the number of dimensions, their lengths
    as 32-bit integers with the highest byte first, and the values.

    Raises:
        ValueError: if it is no such file, or is cut short.
    """
    content = gzip.decompress(file.read_bytes())
    if content[:3] != b"\0\0\x08":
        raise ValueError(f"{file} must hold unsigned bytes in the idx format")
    start = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:start], ">u4").astype(int).tolist()
    values = np.frombuffer(content[start:], np.uint8)
    if len(values) != np.prod(shape):
        raise ValueError(f"{file} must hold {np.prod(shape)} bytes, got {len(values)}")
    return torch.from_numpy(values.reshape(shape).copy())


class Share:
    """A worker's part of each batch: other images than those of the other workers.

    The images are shuffled anew each epoch, and dealt in batches of all workers; what is left
    after the last whole one waits for another epoch, as a sampler does that drops it.

    Args:
        images: of all workers.
        rank: whose part.
        workers: number of parts.
        batch_size: images in a part.
        seed: of order, crops and flips.
    """

    def __init__(self, images: Images, rank: int, workers: int, batch_size: int, seed: int) -> None:
        self._images = images
        self._rank = rank
        self._workers = workers
        self._batch_size = batch_size
        self._seed = seed
        self._random = torch.Generator().manual_seed(seed * 1000 + rank)
        self._epoch, self._order = -1, torch.empty(0)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Images, cropped and flipped at random, and their labels; to be called step by step."""
        epoch, place = divmod(step, len(self._images) // (self._workers * self._batch_size))
        if epoch != self._epoch:
            shuffled = torch.Generator().manual_seed(self._seed * 1000 + epoch)
            self._epoch = epoch
            self._order = torch.randperm(len(self._images), generator=shuffled)
        start = (place * self._workers + self._rank) * self._batch_size
        chosen = self._order[start : start + self._batch_size]
        return augmented(self._images.pixels[chosen], self._random), self._images.labels[chosen]


def augmented(pixels: Tensor, random: torch.Generator) -> Tensor:
    """Each image shifted by up to 2 pixels, black moving in, and half of them mirrored."""
    count, _, height, width = pixels.shape
    padded = torch.nn.functional.pad(pixels, [_PADDING] * 4, value=-MEAN / DEVIATION)
    rows = _shifted(count, height, random)
    columns = _shifted(count, width, random)
    mirrored = torch.rand(count, 1, generator=random) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    image = torch.arange(count)[:, None, None]
    return padded[image, 0, rows[:, :, None], columns[:, None, :]][:, None]


def _shifted(count: int, length: int, random: torch.Generator) -> Tensor:
    return torch.randint(2 * _PADDING + 1, (count, 1), generator=random) + torch.arange(length)
