"""Exact means: parts travel from where they lie to their owners, and means back."""

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from postlocal.comm.group import Group, Work
from postlocal.wire.exchange import Divisor, Repair
from postlocal.wire.staging import Staging

_TILE = 2**17  # elements summed at a time, that stay in a processor's cache
# The numbers of ranks for which the sum of equal fp32 values, divided again, is the value itself.
_EXACT_IN_FP32 = (2, 4)


class Direct:
    """Parts travel from where they lie: to their owners, which take the means, and back.

    Each rank sends as many bytes as in a ring all-reduce, and touches each value once for the sum
    and the division together.

    Args:
        pieces: the values, flat.
        group: who takes part.
        divisor: gives the sum of the weights.
        staging: where memory for contributions comes from.
        repair: takes the mean instead, where the sum is not finite.
        readers: the ranks to which means come back, whole; None: all. The values of others are
            then worth nothing.
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
        self._parts = _divide(pieces, group.size)
        own = self._parts[group.rank]
        numel = sum(map(torch.numel, own))
        self._received = staging.take((group.size - 1) * numel, pieces[0])
        rows = iter(self._received.view(group.size - 1, numel))
        sizes = [piece.numel() for piece in own]
        self._contributions = [
            () if rank == group.rank else torch.split(next(rows), sizes)
            for rank in range(group.size)
        ]
        self._work: Work = group.all_to_all(self._parts, self._contributions)

    def turn(self) -> None:
        self._work.wait()
        own = self._parts[self._group.rank]
        divisor = self._divisor()
        others = [pieces for pieces in self._contributions if pieces]
        for index, mean in enumerate(own):
            _take_mean(mean, [pieces[index] for pieces in others], divisor, self._repair)
        self._staging.give(self._received)
        everyone = range(self._group.size)
        sent = [own if rank in self._readers else [] for rank in everyone]
        received = self._parts if self._group.rank in self._readers else [[] for _ in everyone]
        self._work = self._group.all_to_all(sent, received)

    def wait(self) -> None:
        self._work.wait()


def _divide(pieces: Sequence[Tensor], size: int) -> list[list[Tensor]]:
    """What each of ``size`` ranks owns of pieces laid end to end, the last ones perhaps less."""
    part = math.ceil(sum(map(torch.numel, pieces)) / size)
    parts: list[list[Tensor]] = [[] for _ in range(size)]
    position = 0
    for piece in pieces:
        start = 0
        while start < piece.numel():
            rank = position // part
            stop = min(piece.numel(), start + (rank + 1) * part - position)
            parts[rank].append(piece[start:stop])
            position += stop - start
            start = stop
    return parts


def _take_mean(
    own: Tensor, others: Sequence[Tensor], divisor: float, repair: Repair | None
) -> None:
    """Replace a contribution by the mean of all, tile by tile within a processor's cache."""
    exact = own.dtype == torch.float64 or len(others) + 1 in _EXACT_IN_FP32
    total = own.new_empty(min(_TILE, own.numel()), dtype=own.dtype if exact else torch.float64)
    for start in range(0, own.numel(), _TILE):
        mean, first, *rest = (values[start : start + _TILE] for values in (own, *others))
        summed = total[: mean.numel()]
        if exact:
            torch.add(mean, first, out=summed)
        else:
            summed.copy_(mean).add_(first)
        for other in rest:
            summed.add_(other)
        if repair is not None and not math.isfinite(summed.sum()):
            repair(mean, [first, *rest])
        else:
            torch.div(summed, divisor, out=mean)
