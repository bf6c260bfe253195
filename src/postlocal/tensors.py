"""Tensors as they lie in memory: flat views of them, and sums over all of their elements."""

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

from postlocal.torch_versions import norms_of

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_BLOCK = 2**14


def is_dtensor(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether a tensor is torch's DTensor, spread over the ranks of a mesh.

    The module of DTensor takes half a second to import. Where nobody has imported it there is no
    DTensor, so the question does not import it.

    Example:
        >>> is_dtensor(torch.zeros(2))
        False
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def flat_view(tensor: Tensor) -> Tensor | None:
    """A dense tensor's memory as a 1-D view, whatever its memory format; None if it has gaps.

    Example:
        >>> flat_view(torch.zeros(2, 3).t()).shape
        torch.Size([6])
    """
    size = 1
    for stride, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if length == 1:
            continue
        if stride != size:
            return None
        size *= length
    return tensor.as_strided((tensor.numel(),), (1,))


def end_to_end(tensors: Sequence[Tensor]) -> Tensor | None:
    """Contiguous tensors that lie one after another in memory as one flat view; None if they don't.

    Example:
        >>> halves = torch.arange(4).split(2)
        >>> end_to_end(halves), end_to_end([halves[1], halves[0]])
        (tensor([0, 1, 2, 3]), None)
    """
    first = tensors[0]
    place = first.data_ptr()
    for tensor in tensors:
        shared = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        alike = tensor.dtype == first.dtype and tensor.is_contiguous()
        if not (shared and alike and tensor.data_ptr() == place):
            return None
        place += tensor.nbytes
    return first.as_strided((sum(map(torch.numel, tensors)),), (1,))


def whole_storage(tensor: Tensor) -> Tensor:
    """All of the memory that a tensor is part of, as a flat view of its dtype.

    Example:
        >>> whole_storage(torch.zeros(8)[2:4]).shape
        torch.Size([8])
    """
    numel = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.as_strided((numel,), (1,), 0)


def weigh_(tensors: Iterable[Tensor], weight: float) -> None:
    """Multiply tensors by a weight; by 0 also where they hold infinities or NaN.

    Example:
        >>> values = torch.tensor([1.0, float("nan")])
        >>> weigh_([values], 0.0)
        >>> values
        tensor([0., 0.])
    """
    if weight == 1:
        return
    for tensor in tensors:
        tensor.zero_() if weight == 0 else tensor.mul_(weight)


def squared_norm(tensors: Iterable[Tensor]) -> float:
    """Sum of squares of all elements; not finite if one of them is not.

    Blocks are summed in the tensors' own precision, then in fp64: exact enough to subtract.

    Example:
        >>> round(squared_norm([torch.full((3,), 2.0), torch.ones(2)]), 3)
        14.0
    """
    norms: list[Tensor] = []
    small: dict[torch.dtype, list[Tensor]] = {torch.float32: [], torch.float64: []}
    for tensor in tensors:
        wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        values = tensor.detach()
        flat = flat_view(values)
        flat = values.flatten() if flat is None else flat
        whole = flat.numel() // _BLOCK * _BLOCK
        if whole:
            rows = flat[:whole].view(-1, _BLOCK)
            norms.append(torch.linalg.vector_norm(rows, dim=1, dtype=wide).double())
        if whole < flat.numel():
            small[wide].append(flat[whole:])
    for dtype, parts in small.items():
        if parts:  # one call for all that is less than a block
            norms.append(torch.stack(list(norms_of(parts, dtype))).double())
    return float(torch.cat(norms).square().sum()) if norms else 0.0


def all_finite(tensors: Iterable[Tensor], squares: float) -> bool:
    """Whether all elements are finite, given `squared_norm` of them.

    The squares of large finite values can overflow; only then every element is looked at.
    """
    if squares < float("inf"):
        return True
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
