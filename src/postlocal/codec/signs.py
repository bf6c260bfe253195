"""A codec of one bit a value."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from postlocal.checks import settle
from postlocal.codec.blockwise import Blockwise, block_of


@dataclass(frozen=True)
class sign(Blockwise):
    """The sign of each value, times the mean magnitude of its block (arXiv 1901.09847, section 4).

    The mean is fp32, and taken of magnitudes in 2^30 / block steps of the greatest, so that it has
    the same bits in whatever order they are summed. 0 has the sign of its bits. A byte holds the
    signs of one value of each eighth of the block. A block that holds an infinity or NaN, or what
    fp32 cannot hold, decodes to NaN throughout. Meant for use with error feedback.

    Args:
        block: elements that share a magnitude.

    Raises:
        TypeError: if an argument is of another type.
        ValueError: if ``block`` is below 1 or no multiple of 8.

    Example:
        >>> payload, values = torch.zeros(8, dtype=torch.uint8), torch.empty(8)
        >>> sign(block=8).encode(torch.tensor([1.0, -1, 2, -2, 4, -4, 0, 2]), payload)
        >>> sign(block=8).decode(payload, values)
        >>> values
        tensor([ 2., -2.,  2., -2.,  2., -2.,  2.,  2.])
    """

    block: int = 256
    packed = 8

    def __post_init__(self) -> None:
        settle(self, block=partial(block_of, packed=self.packed))

    def quantise(self, blocks: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
        codes = torch.zeros((), dtype=torch.int32, device=blocks.device)
        for position, eighth in enumerate(blocks.view(torch.int32).chunk(self.packed, dim=1)):
            codes = codes | ((eighth >> (31 - position)) & (1 << position))  # the sign is bit 31
        codes = codes.to(torch.uint8)
        return _mean_magnitudes(blocks, count), codes

    def restore(self, parameters: Tensor, codes: Tensor) -> tuple[list[Tensor], Tensor]:
        # The sign in bit 0 becomes 1 - 2 * bit, as int8.
        bits = [(codes >> position) & 1 for position in range(self.packed)]
        return [bit.mul_(254).add_(1).view(torch.int8) for bit in bits], parameters


def _mean_magnitudes(blocks: Tensor, count: int) -> Tensor:
    """Means over ``count`` values a block, to the same bits in whatever order they are summed."""
    magnitudes = blocks.abs()
    greatest = magnitudes.amax(dim=1, keepdim=True)
    divisors = torch.where(greatest == 0, 1.0, greatest)
    steps = 2.0 ** (30 - (blocks.shape[1] - 1).bit_length())  # their sum stays below 2^31
    whole = magnitudes.div_(divisors).mul_(steps).round_().to(torch.int32)
    shares = whole.sum(dim=1, keepdim=True, dtype=torch.int32).double() / (count * steps)
    means = (shares * greatest).float()
    return torch.where(greatest.isfinite(), means, torch.nan)  # what NaN is cast to is undefined
