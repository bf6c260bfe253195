"""Exact means: reduce-scatter and all-gather of values from where they lie."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from postlocal.comm.group import Group, Work
from postlocal.wire.api import Divisor, Leg
from postlocal.wire.chunks import Chunk, Staging, chunk_size
from postlocal.wire.mean import ChunkWire, Exchange, Staged

Repair = Callable[[Tensor, Sequence[Tensor]], None]
"""Replaces a contribution, given those of the others in their order, by a mean."""

_TILE = 2**17  # elements summed at a time, that stay in a processor's cache
# The numbers of ranks for which the sum of equal fp32 values, divided again, is the value itself.
_EXACT_IN_FP32 = (2, 4)


@dataclass(frozen=True)
class exact(ChunkWire):
    """Values as they are: 4 bytes a value (8 for fp64 tensors).

    A reduce-scatter and an all-gather: each rank reduces one shard of a chunk. Identical replicas
    stay as they are to the last bit, whatever their number.

    Args:
        repair: takes the mean where a sum is not finite; None: it stays as it is.

    Example:
        >>> exact().payload_bytes(numel=1000, size=2)
        4000
    """

    repair: Repair | None = field(default=None, repr=False)
    lossy = False

    def legs(self, numel: int, rank: int, size: int, dtype: torch.dtype) -> Sequence[Leg]:
        own = shard_numel(numel, rank, size)
        scattered, gathered = numel - own, (size - 1) * own
        return Leg(scattered * dtype.itemsize, size), Leg(gathered * dtype.itemsize, size)

    def limit(self, size: int, numel: int) -> int:
        return chunk_size(numel)

    def staged(self, chunk: Chunk, size: int) -> Staged:
        copied = chunk.copied * chunk.dtype.itemsize
        return Staged(chunk.numel * chunk.dtype.itemsize + copied, copied)

    def start(self, chunk: Chunk, group: Group, divisor: Divisor, staging: Staging) -> Exchange:
        return ExactExchange(chunk.pieces(), group, divisor, staging, self.repair)


def fp32() -> exact:
    """Exact: 4 bytes a value (8 for fp64 tensors).

    Identical replicas stay as they are to the last bit, whatever their number.

    Example:
        >>> fp32().payload_bytes(numel=1000, size=2)
        4000
    """
    return exact()


class ExactExchange:
    """Values under way: a reduce-scatter, and an all-gather of the means.

    Each rank sends as many bytes as in a ring all-reduce, and touches each value once for the sum
    and the division together.

    Args:
        pieces: the values, flat.
        group: who takes part.
        divisor: gives the sum of the weights.
        staging: where memory for contributions comes from.
        repair: takes the mean instead, where the sum is not finite.
        readers: the ranks that gather the means; None: all. The values of others are then worth
            nothing.
    """

    def __init__(
        self,
        pieces: Sequence[Tensor],
        group: Group,
        divisor: Divisor,
        staging: Staging,
        repair: Repair | None = None,
        readers: Collection[int] | None = None,
    ) -> None:
        self._readers = range(group.size) if readers is None else readers
        self._group = group
        self._repair = repair
        self._divisor = divisor
        self._staging = staging
        self._shards = _shards(pieces, group.size)
        own = self._shards[group.rank]
        numel = sum(map(torch.numel, own))
        self._received = staging.allocate((group.size - 1) * numel, pieces[0])
        rows = iter(self._received.view(group.size - 1, numel))
        sizes = [piece.numel() for piece in own]
        self._contributions = [
            () if rank == group.rank else torch.split(next(rows), sizes)
            for rank in range(group.size)
        ]
        self._work: Work = group.all_to_all(self._shards, self._contributions)

    def reduce(self) -> None:
        self._work.wait()
        own = self._shards[self._group.rank]
        divisor = self._divisor()
        others = [pieces for pieces in self._contributions if pieces]
        for index, mean in enumerate(own):
            _take_mean(mean, [pieces[index] for pieces in others], divisor, self._repair)
        self._staging.free(self._received)
        everyone = range(self._group.size)
        sent = [own if rank in self._readers else [] for rank in everyone]
        received = self._shards if self._group.rank in self._readers else [[] for _ in everyone]
        self._work = self._group.all_to_all(sent, received)

    def wait(self) -> None:
        self._work.wait()


def shard_numel(numel: int, rank: int, size: int) -> int:
    """Elements of the shard that a rank reduces, of ``numel``; the last ranks may have fewer.

    Example:
        >>> [shard_numel(10, rank, size=4) for rank in range(4)]
        [3, 3, 3, 1]
    """
    most = math.ceil(numel / size)
    return max(0, min(most, numel - rank * most))


def _shards(pieces: Sequence[Tensor], size: int) -> list[list[Tensor]]:
    """The shards of pieces laid end to end, of `shard_numel` elements each."""
    most = math.ceil(sum(map(torch.numel, pieces)) / size)
    shards: list[list[Tensor]] = [[] for _ in range(size)]
    position = 0
    for piece in pieces:
        start = 0
        while start < piece.numel():
            rank = position // most
            stop = min(piece.numel(), start + (rank + 1) * most - position)
            shards[rank].append(piece[start:stop])
            position += stop - start
            start = stop
    return shards


def _take_mean(
    own: Tensor, others: Sequence[Tensor], divisor: float, repair: Repair | None
) -> None:
    """Replace a contribution by the mean of all, tile by tile within a processor's cache."""
    plain = own.dtype == torch.float64 or len(others) + 1 in _EXACT_IN_FP32
    total = own.new_empty(min(_TILE, own.numel()), dtype=own.dtype if plain else torch.float64)
    for start in range(0, own.numel(), _TILE):
        mean, first, *rest = (values[start : start + _TILE] for values in (own, *others))
        summed = total[: mean.numel()]
        if plain:
            torch.add(mean, first, out=summed)
        else:
            summed.copy_(mean).add_(first)
        for other in rest:
            summed.add_(other)
        if repair is not None and not math.isfinite(summed.sum()):
            repair(mean, [first, *rest])
        else:
            torch.div(summed, divisor, out=mean)
