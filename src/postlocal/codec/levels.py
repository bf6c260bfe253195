"""How the kept values of a chunk are written: exactly, or as sign and level of magnitude.

The magnitudes between the least and the greatest kept are cut into equal bins and decode to the
middle of theirs. Numbers in fp32 come first: the values, or the least magnitude and a bin's width.
"""

import torch
from torch import Tensor


def numbers_in_fp32(kept: int, bits: int) -> int:
    """How many numbers in fp32 there are.

    Example:
        >>> numbers_in_fp32(kept=64, bits=2), numbers_in_fp32(kept=64, bits=32)
        (2, 64)
    """
    return kept if bits == 32 else 2


def to_levels(kept: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Least magnitude and width of bins, fp32, shape ``(n, 2)``, and codes, int64, ``(n, kept)``.

    Args:
        kept: fp32, finite or all NaN in a row, shape ``(n, kept)``.
        bits: of a code, from 2 to 8; the lowest is the sign.

    Example:
        >>> to_levels(torch.tensor([[1.0, -5.0, 2.9]]), bits=2)
        (tensor([[1., 2.]]), tensor([[0, 3, 0]]))
    """
    levels = 2 ** (bits - 1)
    magnitudes = kept.abs()
    low, high = magnitudes.aminmax(dim=1, keepdim=True)
    widths = (high - low) / levels
    numbers = torch.cat([low, widths], dim=1)
    fractions = (magnitudes - low) / torch.where(widths == 0, 1.0, widths)
    level = fractions.nan_to_num(0.0).clamp_(0, levels - 1).long()
    return numbers, (level << 1) | (kept < 0)


def from_levels(numbers: Tensor, codes: Tensor) -> Tensor:
    """Values, fp32, shape ``(n, kept)``.

    Example:
        >>> from_levels(torch.tensor([[1.0, 2.0]]), torch.tensor([[0, 3]]))
        tensor([[ 2., -4.]])
    """
    low, widths = torch.split(numbers, 1, dim=1)
    magnitudes = ((codes >> 1) + 0.5) * widths + low
    return torch.where((codes & 1).bool(), -magnitudes, magnitudes)
