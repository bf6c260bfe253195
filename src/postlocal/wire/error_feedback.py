"""Error feedback: what a wire lost of this rank's values is added to the next ones."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from postlocal.checks import number, settle
from postlocal.comm.group import Group
from postlocal.comm.groups import LevelGroups
from postlocal.wire.cargo import Terms
from postlocal.wire.carrier import Carrier, Forgetful, Weights, Wire, is_wire, weight_of
from postlocal.wire.chunks import Parcel
from postlocal.wire.exchange import ChunkWire, Divisor
from postlocal.wire.mean import carry_
from postlocal.wire.residuals import Memory
from postlocal.wire.staging import Staging

decay_of = partial(number, above=0, most=1)
"""The rule for the share of what was lost that is kept."""


@dataclass(frozen=True)
class error_feedback:
    """Keep what a wire lost of this rank's values, and add it to the next ones.

    What a codec rounds away in one synchronization travels in a later one: over many, the mean is
    exact. It costs memory for one fp32 copy of what travels, on each rank. Weights may change from
    one to the next: residuals are kept for a weight of 1, and what the owner of a part loses
    when it encodes the mean is added to the next mean.

    Args:
        inner: a wire that sends codes and remembers nothing, such as ``int8()`` or ``bf16()``.
        decay: share of what was lost that is kept, above 0 and at most 1.

    Raises:
        TypeError: if ``inner`` is no wire, or ``decay`` no number.
        ValueError: if ``decay`` is out of its range, or ``inner`` loses nothing, or keeps what it
            loses itself.

    Example:
        >>> from postlocal.wire import bf16
        >>> error_feedback(bf16(), decay=0.95).payload_bytes(numel=1000, size=2)
        2000

    Source: Seide et al. 2014 for one bit; arXiv 1901.09847, Algorithm 2; the decay is SparseLoCo's
    (arXiv 2508.15706), which takes 0.95.
    """

    inner: Wire
    decay: float = 1.0
    lossy = True

    def __post_init__(self) -> None:
        settle(self, inner=is_wire, decay=decay_of)
        if not self.inner.lossy:
            raise ValueError(
                f"inner must be a wire that loses something, got {self.inner!r}: use it as it is"
            )
        if not isinstance(self.inner, ChunkWire):
            raise ValueError(
                f"inner must be a wire that remembers nothing, got {self.inner!r}, which keeps "
                "what it loses, or gives that to the wire between: use it as it is, or wrap the "
                "wire within"
            )

    def payload_bytes(self, numel: int, size: int, dtype: torch.dtype = torch.float32) -> int:
        return self.inner.payload_bytes(numel, size, dtype)

    def open(self, groups: LevelGroups, level: str, staging: Staging | None = None) -> Carrier:
        assert isinstance(self.inner, ChunkWire)
        return _Remembering(self.inner, groups[level], self.decay, staging)


class _Remembering(Forgetful):
    """Carries what was lost along, one residual a tensor."""

    def __init__(
        self, wire: ChunkWire, group: Group, decay: float, staging: Staging | None
    ) -> None:
        super().__init__(wire, group, staging)
        self._decay = decay
        self._memory = Memory()
        # Marked, not dropped: what this rank owes as an owner stays, and which part of a tensor
        # that is becomes known where it travels.
        self._forgotten: set[str] = set()

    def mean_(
        self,
        tensors: Mapping[str, Tensor],
        divisor: Divisor | None = None,
        weights: Weights | None = None,
    ) -> int:
        if self.group.size == 1:  # nothing is lost
            return super().mean_(tensors, divisor, weights)
        parcels = [
            Parcel(tensor, self._memory.residual(name, tensor), self._terms(name, weights))
            for name, tensor in tensors.items()
        ]
        sent = carry_(parcels, self.group, self._wire, divisor, self._staging)
        self._forgotten.difference_update(tensors)
        _heal_([parcel.residual for parcel in parcels if parcel.residual is not None])
        return sent

    def forget(self, names: Iterable[str] | None = None) -> None:
        known = self._memory.names
        self._forgotten |= known if names is None else known.intersection(names)

    def state_dict(self) -> dict[str, Any]:
        residuals = self._memory.state_dict()
        return {"residuals": residuals, "forgotten": sorted(self._forgotten)} if residuals else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._memory.load_state_dict(state.get("residuals", {}))
        self._forgotten = set(state.get("forgotten", ()))

    def _terms(self, name: str, weights: Weights | None) -> Terms:
        return Terms(weight_of(name, weights), self._decay, name in self._forgotten)


def _heal_(residuals: Sequence[Tensor]) -> None:
    """Zero what is not finite: a gradient that overflowed once would be sent for ever."""
    known = [residual for residual in residuals if residual.numel()]
    if known and not torch.stack([residual.norm() for residual in known]).isfinite().all():
        for residual in known:
            residual.nan_to_num_(0.0, 0.0, 0.0)
