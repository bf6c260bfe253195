"""Error feedback: what a wire loses of this rank's values is added to the next ones."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from postlocal.checks import number, settle
from postlocal.codec import Codec
from postlocal.comm.group import Group
from postlocal.comm.groups import LevelGroups
from postlocal.wire.api import Divisor, Leg, Reducer, Tensors, Weights, Wire, is_wire
from postlocal.wire.chunks import Staging, WeightedTensor, Weighting
from postlocal.wire.mean import (
    ChunkWire,
    StatelessReducer,
    check_takes_residuals,
    weight_of,
    weighted_mean_,
)
from postlocal.wire.residuals import Residuals, zero_nonfinite_

decay_of = partial(number, above=0, most=1)
"""The rule for the share of what was lost that is kept."""


@dataclass(frozen=True)
class error_feedback(Wire):
    """Keep what a wire loses of this rank's values, and add it to the next ones.

    What a codec rounds away in one synchronization is sent in a later one: over many, the mean is
    exact. It costs memory for one fp32 copy of what is sent, on each rank. Residuals are stored
    unweighted, so they stay valid when weights change. What a rank loses when it encodes the mean
    of its shard is added to the next mean. The legs are those of the wire within.

    Args:
        inner: a stateless wire that sends codes, such as ``quantised(codec.int8())`` or ``bf16()``.
            One of your own needs `ChunkWire.takes_residuals`.
        decay: share of what was lost that is kept, above 0 and at most 1.

    Raises:
        TypeError: if ``inner`` is no wire, or ``decay`` no number.
        ValueError: if ``decay`` is out of its range, or ``inner`` loses nothing, keeps residuals
            itself, or would not send them.

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
    keeps_residuals = True

    def __post_init__(self) -> None:
        settle(self, inner=is_wire, decay=decay_of)
        if not self.inner.lossy:
            raise ValueError(
                f"inner must be a wire that loses something, got {self.inner!r}: use it as it is"
            )
        if not isinstance(self.inner, ChunkWire):
            raise ValueError(
                f"inner must be a stateless wire, which takes means chunk by chunk, got "
                f"{self.inner!r}: use it as it is, or wrap the wire within"
            )
        check_takes_residuals("inner", self.inner)

    @property
    def codecs(self) -> Sequence[Codec]:
        return self.inner.codecs

    def messages(self, tensors: Tensors, groups: LevelGroups, level: str) -> Sequence[Leg]:
        return self.inner.messages(tensors, groups, level)

    def payload_bytes(self, numel: int, size: int, dtype: torch.dtype = torch.float32) -> int:
        return self.inner.payload_bytes(numel, size, dtype)

    def open(self, groups: LevelGroups, level: str, staging: Staging | None = None) -> Reducer:
        assert isinstance(self.inner, ChunkWire)
        return ErrorFeedbackReducer(self.inner, groups[level], self.decay, staging)


class ErrorFeedbackReducer(StatelessReducer):
    """A reducer that keeps one residual a tensor."""

    def __init__(
        self, wire: ChunkWire, group: Group, decay: float, staging: Staging | None
    ) -> None:
        super().__init__(wire, group, staging)
        self._decay = decay
        self._residuals = Residuals()
        # Marked and dropped later: what this rank lost of means stays, and which shards of a tensor
        # it reduces is known where the tensor is sent.
        self._dropped: set[str] = set()

    def mean_(
        self, tensors: Tensors, divisor: Divisor | None = None, weights: Weights | None = None
    ) -> int:
        if self.group.size == 1:  # nothing is lost
            return super().mean_(tensors, divisor, weights)
        weighted = [
            WeightedTensor(tensor, self._residuals.of(name, tensor), self._weighting(name, weights))
            for name, tensor in tensors.items()
        ]
        sent = weighted_mean_(weighted, self.group, self._wire, divisor, self._staging)
        self._dropped.difference_update(tensors)
        zero_nonfinite_([each.residual for each in weighted if each.residual is not None])
        return sent

    def drop_residuals(self, names: Iterable[str] | None = None) -> None:
        known = self._residuals.names
        self._dropped |= known if names is None else known.intersection(names)

    def state_dict(self) -> dict[str, Any]:
        residuals = self._residuals.state_dict()
        return {"residuals": residuals, "dropped": sorted(self._dropped)} if residuals else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._residuals.load_state_dict(state.get("residuals", {}))
        self._dropped = set(state.get("dropped", ()))

    def _weighting(self, name: str, weights: Weights | None) -> Weighting:
        return Weighting(weight_of(name, weights), self._decay, name in self._dropped)
