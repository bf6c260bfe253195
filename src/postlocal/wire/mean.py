"""Means and maxima of many tensors over a group, in place."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from postlocal.comm.group import Group
from postlocal.tensors import weigh_
from postlocal.wire.chunks import Chunk, Parcel, chunks
from postlocal.wire.exchange import ChunkWire, Divisor, ring_bytes
from postlocal.wire.pipeline import Convoy
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
        residuals: error feedback: what a lossy wire lost, added to what travels next, and then
            replaced by what is lost this time; see `Parcel`.
        staging: memory to use; give the same one again to save its allocation.

    Returns:
        Bytes of payload that this rank sent.

    Raises:
        PeerError: if a rank did not take part in time.
    """
    kept = [None] * len(tensors) if residuals is None else residuals
    parcels = [Parcel(*pair) for pair in zip(tensors, kept, strict=True)]
    return carry_(parcels, group, wire, divisor, staging)


def carry_(
    parcels: Sequence[Parcel],
    group: Group,
    wire: ChunkWire,
    divisor: Divisor | None = None,
    staging: Staging | None = None,
) -> int:
    """As `mean_`, of tensors with weights and residuals: their weighted sum over the divisor."""
    divisor = divisor or (lambda: float(group.size))
    if group.size == 1:
        total = divisor()
        for parcel in parcels:
            weigh_([parcel.tensor], parcel.terms.weight / total)
        return 0
    sent = 0
    staging = staging or Staging()
    convoy = Convoy(wire, group.size)
    for chunk in _cut(parcels, wire, group.size, staging):
        convoy.make_room(chunk)
        convoy.add(chunk, wire.launch(chunk, group, divisor, staging))
        sent += wire.sent_bytes(chunk.numel, group.rank, group.size, chunk.dtype)
    convoy.announce()
    return sent


def payload_bytes(tensors: Iterable[Tensor], group: Group, wire: ChunkWire) -> int:
    """What `mean_` of tensors will return on this rank.

    Example:
        >>> from postlocal.comm.group import Alone
        >>> from postlocal.wire import fp32
        >>> payload_bytes([torch.zeros(1000), torch.zeros(24)], Alone(), fp32())
        0
    """
    if group.size == 1:
        return 0
    cut = _cut(list(map(Parcel, tensors)), wire, group.size, Staging())
    # Most chunks have one size: of thousands of ranks each has as many parts to look at.
    alike = Counter((chunk.numel, chunk.dtype) for chunk in cut)
    return sum(
        times * wire.sent_bytes(numel, group.rank, group.size, dtype)
        for (numel, dtype), times in alike.items()
    )


def _cut(
    parcels: Sequence[Parcel], wire: ChunkWire, size: int, staging: Staging
) -> Iterator[Chunk]:
    numel = sum(parcel.tensor.numel() for parcel in parcels)
    return chunks(parcels, wire.limit(size, numel), staging)


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
        sent += ring_bytes(flat.numel(), group.size, dtype)
    return sent
