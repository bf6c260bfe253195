"""Codecs whose codes are floating point numbers of 8 or 4 bits, times a scale a block."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from postlocal.checks import flag, settle
from postlocal.codec.blockwise import Blockwise, block_of, scales_of, zero_unless
from postlocal.codec.rounding import noise


@dataclass(frozen=True)
class fp8(Blockwise):
    """Numbers of 8 bits, 4 of them exponent (e4m3: arXiv 2209.05433), with one scale a block.

    The scale is the greatest magnitude of the block, which is sent as fp32, over 448.
    Values down to 2^-15 of the greatest keep a relative precision of 2^-4. A block that holds an
    infinity or NaN, or what fp32 cannot hold, decodes to NaN throughout.

    Args:
        block: elements that share a scale.

    Raises:
        TypeError: if an argument is of another type.
        ValueError: if ``block`` is below 1.

    Example:
        >>> payload, values = torch.zeros(8, dtype=torch.uint8), torch.empty(3)
        >>> fp8(block=4).encode(torch.tensor([448.0, -3.2, 0.01]), payload)
        >>> fp8(block=4).decode(payload, values)
        >>> values
        tensor([ 4.4800e+02, -3.2500e+00,  9.7656e-03])
    """

    block: int = 256

    def __post_init__(self) -> None:
        settle(self, block=block_of)

    def quantise(self, blocks: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
        greatest = blocks.abs().amax(dim=1, keepdim=True)
        codes = (blocks / scales_of(greatest, 448)).to(torch.float8_e4m3fn).view(torch.uint8)
        return greatest, zero_unless(greatest.isfinite(), codes)

    def restore(self, parameters: Tensor, codes: Tensor) -> tuple[list[Tensor], Tensor]:
        return [codes.view(torch.float8_e4m3fn)], scales_of(parameters, 448)


@dataclass(frozen=True)
class fp4(Blockwise):
    """Numbers of 4 bits, 3 of them exponent (E3M0: arXiv 2501.18512, section 3.3).

    With ``a`` the greatest magnitude of the block, fp32, codes stand for 0 and, with either sign,
    for ``a``, ``a / 2``, ``a / 4``, ... ``a / 64``. The nearest is taken, the greater of two as
    near. The low halves of bytes hold the first half of the block, the high halves the second. A
    block that holds an infinity or NaN, or what fp32 cannot hold, decodes to NaN throughout.

    Args:
        block: elements that share a scale.
        stochastic: round up or down with the probability that keeps the expectation; to the
            nearest else.

    Raises:
        TypeError: if an argument is of another type.
        ValueError: if ``block`` is below 1 or odd.

    Example:
        >>> payload, values = torch.zeros(8, dtype=torch.uint8), torch.empty(4)
        >>> fp4(block=4).encode(torch.tensor([8.0, -3.1, 2.9, 0.01]), payload)
        >>> fp4(block=4).decode(payload, values)
        >>> values
        tensor([ 8., -4.,  2.,  0.])
    """

    block: int = 256
    stochastic: bool = False
    packed = 2

    def __post_init__(self) -> None:
        settle(self, block=partial(block_of, packed=self.packed), stochastic=flag)

    def quantise(self, blocks: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
        greatest = blocks.abs().amax(dim=1, keepdim=True)
        quotients = blocks / torch.where(greatest == 0, 1.0, greatest)
        if self.stochastic:
            magnitudes = _exponents_by_chance(quotients.abs(), noise(blocks, greatest, first))
        else:
            magnitudes = _nearest_exponents(quotients)
        codes = (quotients.view(torch.int32) >> 28).bitwise_and_(8).bitwise_or_(magnitudes)
        low, high = codes.chunk(2, dim=1)
        return greatest, zero_unless(greatest.isfinite(), ((high << 4) | low).to(torch.uint8))

    def restore(self, parameters: Tensor, codes: Tensor) -> tuple[list[Tensor], Tensor]:
        wide = codes.to(torch.int32)
        return [_powers(wide), _powers(wide >> 4)], parameters


# The bits of fp32: 23 of a fraction of 1, then the exponent plus 127, then the sign. 2^-6, the
# least magnitude above 0, has code 1, so that a code is an exponent and the sum below.
_TO_CODE = 7 - 127


def _nearest_exponents(quotients: Tensor) -> Tensor:
    """Codes from 0 to 7 of the powers of 2 nearest to magnitudes up to 1; int32."""
    bits = quotients.view(torch.int32) & 0x7FFFFFFF
    # Half of the fraction carries into the exponent from 1.5 times a power of 2 on. Below 2^-6 the
    # way to 0 is longer, and its middle, 2^-7, is a power of 2 itself.
    nearest = ((bits + 2**22) >> 23).add_(_TO_CODE)
    return torch.maximum(nearest, (bits >= -_TO_CODE << 23).to(torch.int32))


def _exponents_by_chance(magnitudes: Tensor, random: Tensor) -> Tensor:
    """Codes of one of the two powers of 2 beside magnitudes, with their expectation; int32."""
    chance = random & (2**23 - 1)
    # Between powers of 2 the fraction is how far the way up has gone.
    powers = ((magnitudes.view(torch.int32) + chance) >> 23).add_(_TO_CODE)
    ones = (magnitudes * 2.0**29 > chance).to(torch.int32)
    return torch.where(magnitudes < 2.0**-6, ones, powers)


def _powers(codes: Tensor) -> Tensor:
    """What the low 4 bits of int32 stand for, as fp32."""
    bits = ((codes & 7) << 23) | ((codes & 8) << 28)  # 2^(code - 127), or 0
    return bits.view(torch.float32) * 2.0**120
