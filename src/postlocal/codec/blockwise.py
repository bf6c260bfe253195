"""What codecs share whose blocks have parameters of their own."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from postlocal.codec import kernels
from postlocal.codec.layout import Layout

_TINY = torch.finfo(torch.float32).tiny
_HUGE = torch.finfo(torch.float32).max * (1 - 2.0**-22)  # rounding may add half of 2^-23, twice


class Blockwise(ABC):
    """A codec that is arithmetic on blocks, ``quantise`` and ``restore``, run by `kernels`.

    A block is cut into ``packed`` sections of equal size; the codes of one byte come one from each,
    so that processors that work on many neighbours at a time can pack and unpack them.

    Attributes:
        parameters: fp32 numbers that a block has.
        packed: codes that share a byte.
        compiled: whether `kernels` may compile the arithmetic.
    """

    parameters: int = 1
    packed: int = 1
    compiled: bool = True

    @property
    @abstractmethod
    def block(self) -> int:
        """Elements that share parameters."""
        ...

    @abstractmethod
    def quantise(self, blocks: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Parameters and codes of blocks.

        Args:
            blocks: fp32, shape ``(n, block)``; stays as it is.
            first: index of the first of these blocks among all that are encoded together.
            count: how many values of each block are no padding.

        Returns:
            fp32, shape ``(n, parameters)``, and uint8, shape ``(n, block / packed)``. Parameters
            that are not finite travel as NaN.
        """
        ...

    @abstractmethod
    def restore(self, parameters: Tensor, codes: Tensor) -> tuple[list[Tensor], Tensor]:
        """What codes stand for.

        Returns:
            Numbers of any dtype that fp32 holds, one tensor of shape ``(n, block / packed)`` for
            each section; and the scales, fp32, shape ``(n, 1)``, to multiply them by.
        """
        ...

    def layout(self, numel: int) -> Layout:
        """Where things lie in a payload."""
        return Layout(numel, self.block, self.parameters, self.packed)

    def nbytes(self, numel: int, dtype: torch.dtype = torch.float32) -> int:
        return self.layout(numel).nbytes

    def encode(self, values: Tensor, payload: Tensor) -> None:
        layout = self.layout(values.numel())
        if layout.whole:
            blocks = values[: layout.whole * layout.block].view(-1, layout.block)
            kernels.encode(self, blocks, *layout.whole_blocks(payload))
        if layout.tail:
            short = _padded(values[-layout.tail :], layout)
            parameters, codes = layout.short_block(payload)
            measured, codes[:] = self.quantise(short, layout.whole, layout.tail)
            parameters[:] = kernels.finite_or_nan(measured)
        layout.clear_padding(payload)

    def decode(self, payload: Tensor, values: Tensor) -> None:
        layout = self.layout(values.numel())
        if layout.whole:
            blocks = values[: layout.whole * layout.block].view(-1, layout.block)
            kernels.decode(self, *layout.whole_blocks(payload), blocks)
        if layout.tail:
            values[-layout.tail :].copy_(self._short(payload, layout, weight=1.0))

    def accumulate(self, payload: Tensor, values: Tensor, alpha: float = 1.0) -> None:
        layout = self.layout(values.numel())
        weight = torch.tensor(alpha, dtype=torch.float32, device=values.device)
        if layout.whole:
            blocks = values[: layout.whole * layout.block].view(-1, layout.block)
            kernels.accumulate(self, *layout.whole_blocks(payload), blocks, weight)
        if layout.tail:
            values[-layout.tail :].add_(self._short(payload, layout, weight))

    def _short(self, payload: Tensor, layout: Layout, weight: Tensor | float) -> Tensor:
        numbers, scales = self.restore(*layout.short_block(payload))
        block = torch.cat([part.float() for part in numbers], dim=1).mul_(scales * weight)
        return block.view(-1)[: layout.tail]


def _padded(values: Tensor, layout: Layout) -> Tensor:
    short = values.new_zeros((1, layout.tail_width), dtype=torch.float32)
    short[0, : layout.tail] = values
    return short


def scales_of(greatest: Tensor, code: int) -> Tensor:
    """Scales of blocks: what code 1 stands for.

    They follow from what the payload keeps, the greatest magnitude, rather than being kept
    themselves: a compiled encoder then passes through memory once.

    Args:
        greatest: magnitude of each block, fp32, shape ``(n, 1)``.
        code: the greatest.

    Returns:
        fp32, shape ``(n, 1)``; never below 2^-126, since subnormal numbers are too coarse, and
        never so great that the greatest code overflows.

    Example:
        >>> scales_of(torch.tensor([[254.0], [torch.nan]]), 127)
        tensor([[2.],
                [nan]])
    """
    return (greatest / code).clamp(_TINY, _HUGE / code)


def zero_unless(finite: Tensor, codes: Tensor) -> Tensor:
    """Codes, shape ``(n, m)``, zeros in rows that are not finite: what NaN is cast to is undefined.

    Args:
        finite: bool, shape ``(n, 1)``.
        codes: uint8; changed in place.
    """
    return codes.bitwise_and_(finite.to(torch.uint8).neg_())
