"""Runs the arithmetic of blocks over whole tensors."""

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

_TILE = 2**15  # elements worked on at a time, that stay in a processor's cache


class Arithmetic(Protocol):
    """What `postlocal.codec.blockwise.Blockwise` codecs are made of."""

    @property
    def block(self) -> int: ...

    def quantise(self, blocks: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]: ...

    def restore(self, parameters: Tensor, codes: Tensor) -> list[Tensor]: ...


def encode(codec: Arithmetic, blocks: Tensor, parameters: Tensor, codes: Tensor) -> None:
    """Write parameters and codes of blocks, shape ``(n, block)``."""
    for first, part in _tiles(blocks):
        parameters[part], codes[part] = codec.quantise(blocks[part].float(), first, codec.block)


def decode(codec: Arithmetic, parameters: Tensor, codes: Tensor, blocks: Tensor) -> None:
    """Write what parameters and codes stand for to blocks, shape ``(n, block)``."""
    for _, part in _tiles(blocks):
        restored = codec.restore(parameters[part], codes[part])
        for section, values in zip(_sections(blocks[part], restored), restored, strict=True):
            section.copy_(values)


def accumulate(codec: Arithmetic, parameters: Tensor, codes: Tensor, blocks: Tensor) -> None:
    """Add what parameters and codes stand for to blocks, shape ``(n, block)``."""
    for _, part in _tiles(blocks):
        restored = codec.restore(parameters[part], codes[part])
        for section, values in zip(_sections(blocks[part], restored), restored, strict=True):
            section.add_(values)


def _sections(blocks: Tensor, restored: list[Tensor]) -> tuple[Tensor, ...]:
    return blocks.view(len(blocks), len(restored), -1).unbind(1)


def _tiles(blocks: Tensor) -> Iterator[tuple[int, slice]]:
    rows = max(1, _TILE // blocks.shape[1])
    for first in range(0, len(blocks), rows):
        yield first, slice(first, first + rows)
