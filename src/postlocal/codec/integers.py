"""Codecs whose codes are whole numbers, evenly spaced between the extremes of a block."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from postlocal.checks import flag, optional, settle
from postlocal.codec.blockwise import (
    Blockwise,
    PayloadLayout,
    block_of,
    scales_of,
    zero_unless,
)
from postlocal.codec.rounding import noise, rounded_by_chance


@dataclass(frozen=True)
class int8(Blockwise):
    """Integers of 8 bits with one scale a block: a value is ``scale * code``, -127 <= code <= 127.

    The scale is the greatest magnitude of the block, which is sent as fp32, over 127. A
    block that holds an infinity or NaN, or what fp32 cannot hold, decodes to NaN throughout.

    Args:
        block: elements that share a scale.
        stochastic: round up or down with the probability that keeps the expectation; to the
            nearest else.

    Raises:
        TypeError: if an argument is of another type.
        ValueError: if ``block`` is below 1.

    Example:
        >>> payload, values = torch.zeros(8, dtype=torch.uint8), torch.empty(2)
        >>> int8(block=2).encode(torch.tensor([127.0, -3.2]), payload)
        >>> int8(block=2).decode(payload, values)
        >>> values
        tensor([127.,  -3.])
    """

    block: int = 256
    stochastic: bool = False

    def __post_init__(self) -> None:
        settle(self, block=block_of, stochastic=flag)

    def quantise(self, blocks: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
        greatest, codes = _symmetric(blocks, 127, first, self.stochastic)
        return greatest, zero_unless(greatest.isfinite(), codes.to(torch.int8).view(torch.uint8))

    def restore(self, parameters: Tensor, codes: Tensor) -> tuple[list[Tensor], Tensor]:
        return [codes.view(torch.int8)], scales_of(parameters, 127)


@dataclass(frozen=True)
class int4(Blockwise):
    """Integers of 4 bits with one scale a block: a value is ``scale * code``, -7 <= code <= 7.

    The scale is the greatest magnitude of the block, which is sent as fp32, over 7. The low
    halves of bytes hold the first half of the block, the high halves the second. A block that holds
    an infinity or NaN, or what fp32 cannot hold, decodes to NaN throughout.

    Args:
        block: elements that share a scale.
        stochastic: round up or down with the probability that keeps the expectation; to the
            nearest else.

    Raises:
        TypeError: if an argument is of another type.
        ValueError: if ``block`` is below 1 or odd.

    Example:
        >>> payload, values = torch.zeros(8, dtype=torch.uint8), torch.empty(4)
        >>> int4(block=4).encode(torch.tensor([7.0, -3.2, 0.4, 0.6]), payload)
        >>> int4(block=4).decode(payload, values)
        >>> values
        tensor([ 7., -3.,  0.,  1.])
    """

    block: int = 256
    stochastic: bool = False
    packed = 2

    def __post_init__(self) -> None:
        settle(self, block=partial(block_of, packed=self.packed), stochastic=flag)

    def quantise(self, blocks: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
        greatest, codes = _symmetric(blocks, 7, first, self.stochastic)
        low, high = codes.chunk(2, dim=1)
        # Low halves are written from 1 to 15; high halves are the signed numbers themselves.
        pairs = (high * 16).add_(low).add_(8).to(torch.int8)
        return greatest, zero_unless(greatest.isfinite(), pairs.view(torch.uint8))

    def restore(self, parameters: Tensor, codes: Tensor) -> tuple[list[Tensor], Tensor]:
        wide = codes.to(torch.int32)  # compilers do more with these than with bytes
        return [(wide & 15).sub_(8), (wide >> 4).bitwise_xor_(8).sub_(8)], scales_of(parameters, 7)


@dataclass(frozen=True)
class affine(Blockwise):
    """Integers of 8 bits with scale and zero point: a value is ``scale * (code - zero point)``.

    The range of a block is widened to hold 0, which is kept exactly, as by torch's MinMaxObserver.
    A block that holds an infinity or NaN, or whose range fp32 cannot hold, decodes to NaN
    throughout.

    Args:
        channel: elements that share scale and zero point; None: all that are encoded together.

    Raises:
        TypeError: if ``channel`` is no whole number.
        ValueError: if ``channel`` is below 1.

    Example:
        >>> payload, values = torch.zeros(12, dtype=torch.uint8), torch.empty(3)
        >>> affine().encode(torch.tensor([0.0, 1.0, 2.55]), payload)
        >>> affine().decode(payload, values)
        >>> values
        tensor([0.0000, 1.0000, 2.5500])
    """

    channel: int | None = None
    parameters = 2
    compiled = False

    def __post_init__(self) -> None:
        settle(self, channel=optional(block_of))

    @property
    def block(self) -> int:
        return self.channel or 1

    def layout(self, numel: int) -> PayloadLayout:
        return PayloadLayout(numel, self.channel or max(1, numel), self.parameters, self.packed)

    def quantise(self, blocks: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
        low = blocks.amin(dim=1, keepdim=True).clamp_(max=0)
        high = blocks.amax(dim=1, keepdim=True).clamp_(min=0)
        ranges = high - low
        finite = ranges.isfinite()
        scales = ranges / 255
        divisors = torch.where(scales == 0, 1.0, scales)
        zeros = torch.where(finite, low.div_(divisors).neg_().round_().clamp_(0, 255), 0.0)
        codes = (blocks / divisors).round_().add_(zeros).clamp_(0, 255).to(torch.uint8)
        return torch.cat([scales, zeros], dim=1), zero_unless(finite, codes)

    def restore(self, parameters: Tensor, codes: Tensor) -> tuple[list[Tensor], Tensor]:
        scales, zeros = torch.split(parameters, 1, dim=1)
        return [codes - zeros], scales


def _symmetric(blocks: Tensor, code: int, first: int, stochastic: bool) -> tuple[Tensor, Tensor]:
    """Greatest magnitudes, and codes from ``-code`` to ``code``; undefined if not finite."""
    greatest = blocks.abs().amax(dim=1, keepdim=True)
    quotients = blocks / scales_of(greatest, code)
    if not stochastic:
        return greatest, quotients.round_()
    return greatest, rounded_by_chance(quotients, noise(blocks, greatest, first)).clamp_(
        -code, code
    )
