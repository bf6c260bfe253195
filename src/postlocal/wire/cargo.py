"""Values on their way as codes, their weights, and what coding loses of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor

from postlocal.codec import Codec
from postlocal.tensors import weigh_


@dataclass(frozen=True)
class Terms:
    """How a tensor travels, and what becomes of its residual.

    Attributes:
        weight: that it is multiplied by; 0: zeros travel, and its residual waits.
        decay: share of a residual that is kept from one time to the next.
        forgotten: whether what was lost of this rank's values is dropped instead; what the rank
            owes as an owner stays.
    """

    weight: float = 1.0
    decay: float = 1.0
    forgotten: bool = False


PLAIN = Terms()


class Cargo:
    """Flat values that travel as codes, and a flat residual, if what coding loses is kept.

    A part that others own leaves as ``(value + residual) * weight``, and its residual is then what
    was lost over ``weight``: weights may change from one time to the next. The part that this rank
    owns loses nothing on the way out. Its residual is what encoding the mean lost, and is added to
    the next mean, whatever weights and divisor. It is kept times the number of ranks: where another
    rank comes to own the part, as in new buckets, it goes on as what was lost of a contribution.

    Args:
        values: shape ``(n,)``, changed in place.
        residual: as the values, replaced by what is lost now; None: nothing is kept.
        terms: of runs of values, with their lengths, which sum to n.

    Source: error feedback of workers and of the server, arXiv 1905.05957.
    """

    def __init__(
        self, values: Tensor, residual: Tensor | None, terms: Sequence[tuple[int, Terms]]
    ) -> None:
        self.values = values
        self._residual = residual
        self._runs: list[tuple[int, int, Terms]] = []
        start = 0
        for shared, run in groupby(terms, key=lambda entry: entry[1]):
            stop = start + sum(numel for numel, _ in run)
            self._runs.append((start, stop, shared))
            start = stop

    def weigh(self, part: slice) -> Tensor:
        """Values of a part times their weights."""
        for span, terms in self._within(part):
            weigh_([self.values[span]], terms.weight)
        return self.values[part]

    def lend(self, part: slice) -> Tensor:
        """Values of a part and what was lost before, times their weights."""
        if self._residual is not None:
            for span, terms in self._within(part):
                if terms.forgotten:
                    self._residual[span].zero_()
                elif terms.weight:
                    weigh_([self._residual[span]], terms.decay)
                    self.values[span].add_(self._residual[span])
        return self.weigh(part)

    def lose(self, part: slice, payload: Tensor, codec: Codec) -> None:
        """Keep what the payload of a part that was lent lacks of it, for a weight of 1."""
        if self._residual is None:
            return
        spans = list(self._within(part))
        waiting = [(span, self._residual[span].clone()) for span, t in spans if not t.weight]
        self._lack(self._residual, part, payload, codec)
        for span, terms in spans:
            if terms.weight:
                weigh_([self._residual[span]], 1 / terms.weight)
        for span, residual in waiting:
            self._residual[span].copy_(residual)

    def settle(self, part: slice, payload: Tensor, codec: Codec, size: int) -> None:
        """Encode a mean of ``size`` ranks and what earlier ones lacked; keep what it lacks."""
        if self._residual is not None:
            for span, terms in self._within(part):
                self.values[span].add_(self._residual[span], alpha=terms.decay / size)
        codec.encode(self.values[part], payload)
        if self._residual is not None:
            self._lack(self._residual, part, payload, codec)
            self._residual[part].mul_(size)

    def _lack(self, residual: Tensor, part: slice, payload: Tensor, codec: Codec) -> None:
        residual[part].copy_(self.values[part])
        codec.accumulate(payload, residual[part], -1.0)

    def _within(self, part: slice) -> Iterator[tuple[slice, Terms]]:
        for start, stop, terms in self._runs:
            first, last = max(start, part.start), min(stop, part.stop)
            if first < last:
                yield slice(first, last), terms
