"""Codecs of one value at a time: as it is, or rounded to a narrower dtype."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from postlocal.checks import shown
from postlocal.codec.protocol import round_up

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_TILE = 2**15  # elements worked on at a time, that stay in a processor's cache


@dataclass(frozen=True)
class exact:
    """Values as they are.

    Values of 2 bytes are padded to a multiple of 4 bytes.

    Example:
        >>> exact().nbytes(1000)
        4000
    """

    block = 1

    def nbytes(self, numel: int, dtype: torch.dtype = torch.float32) -> int:
        return round_up(numel * dtype.itemsize, 4)

    def encode(self, values: Tensor, payload: Tensor) -> None:
        _view(payload, values.numel(), values.dtype).copy_(values)
        payload[values.nbytes : self.nbytes(values.numel(), values.dtype)].zero_()

    def decode(self, payload: Tensor, values: Tensor) -> None:
        values.copy_(_view(payload, values.numel(), values.dtype))

    def accumulate(self, payload: Tensor, values: Tensor, alpha: float = 1.0) -> None:
        values.add_(_view(payload, values.numel(), values.dtype), alpha=alpha)


@dataclass(frozen=True)
class cast:
    """Values rounded to a narrower dtype; a finite one too large for it becomes its largest value.

    Infinities and NaN stay what they are, so that guards and a GradScaler see them. What is beyond
    the range of bf16, which is that of fp32, becomes infinite there.

    Args:
        dtype: a floating point dtype of 16 bits or more.

    Raises:
        TypeError: if ``dtype`` is no dtype.
        ValueError: if it is none of these.

    Example:
        >>> payload, values = torch.zeros(4, dtype=torch.uint8), torch.empty(2)
        >>> codec = cast(torch.float16)
        >>> codec.encode(torch.tensor([0.5, 1e6]), payload)
        >>> codec.decode(payload, values)
        >>> values
        tensor([5.0000e-01, 6.5504e+04])
    """

    dtype: torch.dtype
    block = 1

    def __post_init__(self) -> None:
        rule = f"dtype must be one of {', '.join(map(str, _DTYPES))}, got {shown(self.dtype)}"
        if not isinstance(self.dtype, torch.dtype):
            raise TypeError(rule)
        if self.dtype not in _DTYPES:
            raise ValueError(rule)

    def nbytes(self, numel: int, dtype: torch.dtype = torch.float32) -> int:
        return round_up(numel * self.dtype.itemsize, 4)

    def encode(self, values: Tensor, payload: Tensor) -> None:
        codes = _view(payload, values.numel(), self.dtype)
        limit = torch.finfo(self.dtype).max
        narrow = limit < torch.finfo(torch.bfloat16).max
        for part in _parts(values.numel()):
            given = values[part]
            codes[part] = _bounded(given, limit) if narrow else given
        payload[codes.nbytes : self.nbytes(values.numel())].zero_()

    def decode(self, payload: Tensor, values: Tensor) -> None:
        values.copy_(_view(payload, values.numel(), self.dtype))

    def accumulate(self, payload: Tensor, values: Tensor, alpha: float = 1.0) -> None:
        codes = _view(payload, values.numel(), self.dtype)
        for part in _parts(values.numel()):
            values[part].add_(codes[part].to(values.dtype), alpha=alpha)


def _view(payload: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
    return payload[: numel * dtype.itemsize].view(dtype)


def _parts(numel: int) -> Iterator[slice]:
    for start in range(0, numel, _TILE):
        yield slice(start, start + _TILE)


def _bounded(values: Tensor, limit: float) -> Tensor:
    return values.clamp(-limit, limit).where(values.isfinite(), values)
