"""Noise for stochastic rounding: a hash of what is rounded, so that encoding has no state.

The same values give the same bits, whether before or after a resume, eager or compiled.
"""

import torch
from torch import Tensor

# The finaliser of MurmurHash3 (Austin Appleby, public domain), as signed numbers of 32 bits.
_FIRST = 0x85EBCA6B - 2**32
_SECOND = 0xC2B2AE35 - 2**32

GOLDEN = 0x9E3779B9 - 2**32
"""Steps of this size spread neighbouring numbers over all of int32."""


def mixed(bits: Tensor) -> Tensor:
    """A hash of int32, all bits of which depend on all bits of the argument.

    Example:
        >>> mixed(torch.tensor([0, 1, 2], dtype=torch.int32))
        tensor([         0,  1364076727,   821347078], dtype=torch.int32)
    """
    bits = bits ^ ((bits >> 16) & 0xFFFF)
    bits = bits * _FIRST
    bits = bits ^ ((bits >> 13) & 0x7FFFF)
    bits = bits * _SECOND
    return bits ^ ((bits >> 16) & 0xFFFF)


def noise(blocks: Tensor, scales: Tensor, first: int) -> Tensor:
    """Random bits for each value, from its bits, its position and its block's scale.

    Args:
        blocks: fp32, shape ``(n, block)``.
        scales: fp32, shape ``(n, 1)``.
        first: index of the first of these blocks among all that are encoded together.

    Returns:
        int32, shape ``(n, block)``.
    """
    rows, columns = blocks.shape
    row = torch.arange(first, first + rows, dtype=torch.int32, device=blocks.device)
    column = torch.arange(columns, dtype=torch.int32, device=blocks.device)
    salt = mixed(scales.view(torch.int32) ^ mixed(row * GOLDEN).unsqueeze(1))
    return mixed((blocks.view(torch.int32) ^ salt) + mixed(column + 1))


def rounded_by_chance(quotients: Tensor, bits: Tensor) -> Tensor:
    """Whole numbers beside quotients of magnitude below 128, in place.

    Up or down with the probability that keeps the expectation, to within 2^-17.

    Args:
        quotients: fp32, shape ``(n, block)``.
        bits: random, int32, of the same shape.

    Example:
        >>> rounded_by_chance(torch.tensor([2.0, 1.5]), torch.tensor([-1, 0], dtype=torch.int32))
        tensor([2., 1.])
    """
    # Halves of 2^-16 keep whole numbers as they are: the sum is exact.
    threshold = ((bits >> 16) & 0xFFFF).to(torch.float32).add_(0.5).mul_(2.0**-16)
    return quotients.add_(threshold).floor_()
