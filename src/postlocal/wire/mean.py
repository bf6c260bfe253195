"""Means and maxima of many tensors over a group, in place."""

from collections.abc import Iterable, Sequence
from itertools import repeat

import torch
from torch import Tensor

from postlocal.codec import exact
from postlocal.group import Group
from postlocal.tensors import weigh_
from postlocal.wire.chunks import chunks
from postlocal.wire.convoy import Convoy
from postlocal.wire.encoded import exchanged_bytes
from postlocal.wire.exchange import ChunkWire, Divisor
from postlocal.wire.staging import Staging


def mean_(
    tensors: Sequence[Tensor],
    group: Group,
    wire: ChunkWire,
    divisor: Divisor | None = None,
    residuals: Sequence[Tensor] | None = None,
    staging: Staging | None = None,
) -> int:
    """Replace tensors by their mean over a group; all ranks end with identical bits.

    Sums are taken in fp32 or better and divided after. Storage, strides and aliases of the tensors
    stay as they are. Beside them it needs at most 64 MiB of staging.

    Args:
        tensors: floating point, of the same shapes, dtypes and strides on all ranks; no two
            overlap in memory.
        group: who takes part.
        wire: how values travel.
        divisor: gives the sum of the weights; None: the size of the group.
        residuals: error feedback: what a lossy wire lost of this rank's values, added to them
            before they travel, and then replaced by what is lost this time. Of the tensors'
            shapes and strides, in the dtype that they travel in: fp32, or fp64 for fp64 tensors.
        staging: memory to use; give the same one again to save its allocation.

    Returns:
        Bytes of payload that this rank sent.

    Raises:
        PeerError: if a rank did not take part in time.
    """
    divisor = divisor or (lambda: float(group.size))
    if group.size == 1:
        weigh_(tensors, 1 / divisor())
        return 0
    sent = 0
    staging = staging or Staging()
    convoy = Convoy(wire, group.size)
    pairs = zip(tensors, repeat(None) if residuals is None else residuals, strict=False)
    for chunk in chunks(pairs, wire.limit(group.size), staging):
        convoy.make_room(chunk)
        convoy.add(chunk, wire.launch(chunk, group, divisor, staging))
        sent += wire.payload_bytes(chunk.numel, group.size, chunk.dtype)
    convoy.arrive()
    return sent


def payload_bytes(tensors: Iterable[Tensor], size: int, wire: ChunkWire) -> int:
    """What `mean_` of tensors over ``size`` ranks will return.

    Example:
        >>> from postlocal.wire import fp32
        >>> payload_bytes([torch.zeros(1000), torch.zeros(24)], 2, fp32())
        4096
    """
    if size == 1:
        return 0
    pairs = zip(tensors, repeat(None), strict=False)
    return sum(
        wire.payload_bytes(chunk.numel, size, chunk.dtype)
        for chunk in chunks(pairs, wire.limit(size), Staging())
    )


def maximum_(tensors: Sequence[Tensor], group: Group, device: torch.device | None = None) -> int:
    """Replace tensors, of integers or small ones of floats, by their maximum over a group.

    Args:
        tensors: of the same shapes and dtypes on all ranks.
        group: who takes part.
        device: where the group's collectives take tensors from; None: the first tensor's.

    Returns:
        Bytes of payload that this rank sent.
    """
    sent = 0
    for dtype in (torch.int64, torch.float64):
        chosen = [t.detach() for t in tensors if t.is_floating_point() == dtype.is_floating_point]
        if not chosen or group.size == 1:
            continue
        device = device or chosen[0].device
        flat = torch.cat([tensor.flatten().to(device, dtype) for tensor in chosen])
        group.all_reduce(flat, "max").wait()
        parts = torch.split(flat, [tensor.numel() for tensor in chosen])
        for tensor, part in zip(chosen, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))
        sent += exchanged_bytes(exact(), flat.numel(), group.size, dtype)
    return sent
