"""What codecs share whose blocks have parameters of their own."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from postlocal.codec import kernels
from postlocal.codec.layout import Layout


class Blockwise(ABC):
    """A codec that is arithmetic on blocks, ``quantise`` and ``restore``, run by `kernels`.

    A block is cut into ``packed`` sections of equal size; the codes of one byte come one from each,
    so that processors that work on many neighbours at a time can pack and unpack them.

    Attributes:
        parameters: fp32 numbers that a block has; what it decodes to is linear in the first.
        packed: codes that share a byte.
    """

    parameters: int = 1
    packed: int = 1

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
            fp32, shape ``(n, parameters)``, and uint8, shape ``(n, block / packed)``.
        """
        ...

    @abstractmethod
    def restore(self, parameters: Tensor, codes: Tensor) -> list[Tensor]:
        """The sections of blocks, fp32, each of shape ``(n, block / packed)``."""
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
            parameters, codes = self.quantise(short, layout.whole, layout.tail)
            for target, source in zip(
                layout.short_block(payload), (parameters, codes), strict=True
            ):
                target.copy_(source)
        layout.clear_padding(payload)

    def decode(self, payload: Tensor, values: Tensor) -> None:
        layout = self.layout(values.numel())
        if layout.whole:
            blocks = values[: layout.whole * layout.block].view(-1, layout.block)
            kernels.decode(self, *layout.whole_blocks(payload), blocks)
        if layout.tail:
            parameters, codes = layout.short_block(payload)
            values[-layout.tail :].copy_(self._short(layout, parameters, codes))

    def accumulate(self, payload: Tensor, values: Tensor, alpha: float = 1.0) -> None:
        layout = self.layout(values.numel())
        if layout.whole:
            blocks = values[: layout.whole * layout.block].view(-1, layout.block)
            parameters, codes = layout.whole_blocks(payload)
            kernels.accumulate(self, _weighted(parameters, alpha), codes, blocks)
        if layout.tail:
            parameters, codes = layout.short_block(payload)
            tail = values[-layout.tail :]
            tail.add_(self._short(layout, _weighted(parameters, alpha), codes))

    def _short(self, layout: Layout, parameters: Tensor, codes: Tensor) -> Tensor:
        return torch.cat(self.restore(parameters, codes), dim=1).view(-1)[: layout.tail]


def _weighted(parameters: Tensor, alpha: float) -> Tensor:
    if alpha == 1:
        return parameters
    weighted = parameters.clone()
    weighted[:, 0].mul_(alpha)
    return weighted


def _padded(values: Tensor, layout: Layout) -> Tensor:
    short = values.new_zeros((1, layout.tail_width), dtype=torch.float32)
    short[0, : layout.tail] = values
    return short


def scales_of(greatest: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """Scales that map greatest magnitudes to a code, and what to divide by.

    Args:
        greatest: of each block, fp32, shape ``(n, 1)``.
        codes: the greatest code.

    Returns:
        Scales, NaN where the magnitude is not finite; and divisors: 1 where the scale is 0, of a
        block of zeros or by underflow, so that the block decodes to zeros.
    """
    scales = torch.where(greatest.isfinite(), greatest / codes, torch.nan)
    return scales, torch.where(scales == 0, 1.0, scales)


def zero_unless(finite: Tensor, codes: Tensor) -> Tensor:
    """Codes, shape ``(n, m)``, zeros in rows that are not finite: what NaN is cast to is undefined.

    Args:
        finite: bool, shape ``(n, 1)``.
        codes: uint8; changed in place.
    """
    return codes.bitwise_and_(finite.to(torch.uint8).neg_())
