"""Whole numbers of a few bits each, one after the other without gaps."""

import torch
from torch import Tensor


def packed_bytes(numel: int, bits: int) -> int:
    """Bytes that ``numel`` numbers of ``bits`` bits take.

    Example:
        >>> packed_bytes(64, bits=12)
        96
    """
    return -(-numel * bits // 8)


def pack(numbers: Tensor, bits: int) -> Tensor:
    """Rows of numbers as rows of bytes, the lowest bits first.

    Args:
        numbers: int64, shape ``(n, k)``, each from 0 to ``2^bits - 1``.
        bits: how many each takes.

    Returns:
        uint8, shape ``(n, packed_bytes(k, bits))``.

    Example:
        >>> pack(torch.tensor([[1, 2, 3]]), bits=4)
        tensor([[33,  3]], dtype=torch.uint8)
    """
    flat = _bits_of(numbers, bits)
    padded = torch.nn.functional.pad(flat, (0, -flat.shape[1] % 8))
    return _numbers_of(padded, 8).to(torch.uint8)


def unpack(packed: Tensor, bits: int, numel: int) -> Tensor:
    """The numbers that `pack` was given, int64, shape ``(n, numel)``.

    Example:
        >>> unpack(torch.tensor([[33, 3]], dtype=torch.uint8), bits=4, numel=3)
        tensor([[1, 2, 3]])
    """
    return _numbers_of(_bits_of(packed, 8)[:, : numel * bits], bits)


def _bits_of(numbers: Tensor, bits: int) -> Tensor:
    shifts = torch.arange(bits, device=numbers.device, dtype=numbers.dtype)
    return ((numbers.unsqueeze(2) >> shifts) & 1).to(torch.uint8).flatten(1)


def _numbers_of(flat: Tensor, bits: int) -> Tensor:
    shifts = torch.arange(bits, device=flat.device)
    return (flat.view(len(flat), flat.shape[1] // bits, bits).long() << shifts).sum(dim=2)
