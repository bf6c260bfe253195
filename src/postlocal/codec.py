"""How values become bytes and back: pure tensor math, with sizes known before it runs.

Quantising codecs cut values into blocks that share their parameters. They work in tiles that stay
in a processor's cache, so that a whole tensor passes through memory once each way.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_TILE = 2**17  # elements worked on at a time


class Codec(Protocol):
    """Turns values into a payload and a payload into values."""

    @property
    def block(self) -> int:
        """Elements that share parameters; parts of a tensor are best cut at multiples of it."""
        ...

    def nbytes(self, numel: int, dtype: torch.dtype = torch.float32) -> int:
        """Exact size of the payload of ``numel`` values of ``dtype``."""
        ...

    def encode(self, values: Tensor, payload: Tensor) -> None:
        """Write values to a payload.

        Args:
            values: contiguous, floating point, shape ``(n,)``.
            payload: uint8, shape ``(m,)``, of at least ``nbytes(n, values.dtype)`` bytes.
        """
        ...

    def decode(self, payload: Tensor, values: Tensor) -> None:
        """Read values, shape ``(n,)``, from the payload that ``n`` values of their dtype gave."""
        ...


@dataclass(frozen=True)
class exact:
    """Values as they are.

    Example:
        >>> exact().nbytes(1000)
        4000
    """

    block = 1

    def nbytes(self, numel: int, dtype: torch.dtype = torch.float32) -> int:
        return numel * dtype.itemsize

    def encode(self, values: Tensor, payload: Tensor) -> None:
        payload[: values.nbytes].view(values.dtype).copy_(values)

    def decode(self, payload: Tensor, values: Tensor) -> None:
        values.copy_(payload[: values.nbytes].view(values.dtype))


@dataclass(frozen=True)
class cast:
    """Values rounded to a narrower dtype; what is too large for it becomes its largest value.

    Args:
        dtype: a floating point dtype.

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

    def nbytes(self, numel: int, dtype: torch.dtype = torch.float32) -> int:
        return numel * self.dtype.itemsize

    def encode(self, values: Tensor, payload: Tensor) -> None:
        if self.dtype == torch.float16:  # bf16 has the range of fp32
            limit = torch.finfo(self.dtype).max
            values = values.clamp(-limit, limit)
        self._codes(payload, values.numel()).copy_(values)

    def decode(self, payload: Tensor, values: Tensor) -> None:
        values.copy_(self._codes(payload, values.numel()))

    def _codes(self, payload: Tensor, numel: int) -> Tensor:
        return payload[: self.nbytes(numel)].view(self.dtype)


@dataclass(frozen=True)
class symmetric:
    """Integers of 8 bits with one scale a block: a value is ``scale * code``, -127 <= code <= 127.

    The scale is the greatest magnitude of the block over 127, fp32. A block that holds an infinity
    or NaN decodes to NaN throughout.

    Args:
        block: elements that share a scale.

    Raises:
        ValueError: if ``block`` is below 1.

    Example:
        >>> payload, values = torch.zeros(8, dtype=torch.uint8), torch.empty(2)
        >>> symmetric(block=2).encode(torch.tensor([127.0, -3.2]), payload)
        >>> symmetric(block=2).decode(payload, values)
        >>> values
        tensor([127.,  -3.])
    """

    block: int = 256

    def __post_init__(self) -> None:
        _check_block(self.block)

    def nbytes(self, numel: int, dtype: torch.dtype = torch.float32) -> int:
        return _blockwise_bytes(numel, self.block, parameters=1)

    def encode(self, values: Tensor, payload: Tensor) -> None:
        parameters, codes = _split(payload, values.numel(), self.block, 1)
        codes = codes.view(torch.int8)
        for first, tile, part in _tiles(values, self.block):
            scales = tile.abs().amax(dim=1, keepdim=True).div_(127)
            parameters[first : first + len(tile)] = scales
            # A scale of 0, of a block of zeros or by underflow, decodes to zeros.
            tile.div_(scales.masked_fill_(scales == 0, 1)).round_().clamp_(-127, 127)
            codes[part].copy_(_whole(tile, part))

    def decode(self, payload: Tensor, values: Tensor) -> None:
        parameters, codes = _split(payload, values.numel(), self.block, 1)
        codes = codes.view(torch.int8)
        for first, tile, part in _tiles(codes, self.block):
            tile.mul_(parameters[first : first + len(tile)])
            values[part].copy_(_whole(tile, part))


@dataclass(frozen=True)
class affine:
    """Integers of 8 bits with scale and zero point: a value is ``scale * (code - zero point)``.

    The range of a block is widened to hold 0, which is kept exactly, as by torch's MinMaxObserver.
    A block that holds an infinity or NaN decodes to NaN throughout.

    Args:
        block: elements that share scale and zero point; None: all that are encoded together.

    Raises:
        ValueError: if ``block`` is below 1.

    Example:
        >>> payload, values = torch.zeros(11, dtype=torch.uint8), torch.empty(3)
        >>> affine().encode(torch.tensor([0.0, 1.0, 2.55]), payload)
        >>> affine().decode(payload, values)
        >>> values
        tensor([0.0000, 1.0000, 2.5500])
    """

    channel: int | None = None

    def __post_init__(self) -> None:
        if self.channel is not None:
            _check_block(self.channel)

    @property
    def block(self) -> int:
        return self.channel or 1

    def nbytes(self, numel: int, dtype: torch.dtype = torch.float32) -> int:
        return _blockwise_bytes(numel, self.channel or max(1, numel), parameters=2)

    def encode(self, values: Tensor, payload: Tensor) -> None:
        block = self.channel or max(1, values.numel())
        parameters, codes = _split(payload, values.numel(), block, 2)
        for first, tile, part in _tiles(values, block):
            low = tile.amin(dim=1, keepdim=True).clamp_(max=0)
            high = tile.amax(dim=1, keepdim=True).clamp_(min=0)
            scales = (high - low).div_(255)
            divisors = torch.where(scales == 0, 1.0, scales)
            zeros = low.div_(divisors).neg_().round_().clamp_(0, 255)
            parameters[first : first + len(tile)] = torch.cat([scales, zeros], dim=1)
            tile.div_(divisors).round_().add_(zeros).clamp_(0, 255)
            codes[part].copy_(_whole(tile, part))

    def decode(self, payload: Tensor, values: Tensor) -> None:
        block = self.channel or max(1, values.numel())
        parameters, codes = _split(payload, values.numel(), block, 2)
        for first, tile, part in _tiles(codes, block):
            scales, zeros = torch.split(parameters[first : first + len(tile)], 1, dim=1)
            tile.sub_(zeros).mul_(scales)
            values[part].copy_(_whole(tile, part))


def _check_block(block: int) -> None:
    if block < 1:
        raise ValueError(f"block must be at least 1 element, got {block}")


def _blockwise_bytes(numel: int, block: int, parameters: int) -> int:
    blocks = -(-numel // block)
    return 4 * parameters * blocks + -(-numel // 4) * 4  # fp32 of the next part starts aligned


def _split(payload: Tensor, numel: int, block: int, parameters: int) -> tuple[Tensor, Tensor]:
    """A payload's fp32 parameters, shape ``(blocks, parameters)``, and codes, ``(numel,)``."""
    size = 4 * parameters * -(-numel // block)
    head, codes = payload[:size], payload[size : size + numel]
    return head.view(torch.float32).view(-1, parameters), codes


def _tiles(source: Tensor, block: int) -> Iterator[tuple[int, Tensor, slice]]:
    """Copies of runs of blocks as fp32, one after the other in the same memory.

    Yields:
        Index of the first block; the blocks, shape ``(n, block)``, zeros after the end; and where
        they lie in ``source``.
    """
    numel = source.numel()
    rows = max(1, min(_TILE // block, -(-numel // block)))
    scratch = source.new_empty((rows, block), dtype=torch.float32)
    for start in range(0, numel, rows * block):
        part = slice(start, min(start + rows * block, numel))
        length = part.stop - start
        used = -(-length // block)
        flat = scratch.view(-1)
        flat[:length].copy_(source[part])
        flat[length : used * block].zero_()
        yield start // block, scratch[:used], part


def _whole(tile: Tensor, part: slice) -> Tensor:
    return tile.view(-1)[: part.stop - part.start]
