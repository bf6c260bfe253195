"""One synchronization of a fragment: started, and applied at once or some steps later."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.futures import Future

from postlocal.comm.background import BackgroundThread
from postlocal.comm.group import Group
from postlocal.errors import NonFiniteError, PeerError
from postlocal.meter import Meter, SyncRecord
from postlocal.schedule import WORLD
from postlocal.sync.anchor import Anchor
from postlocal.sync.fragment import Contribution, Fragment, named, staged
from postlocal.sync.parameters import Replica, floats, others
from postlocal.sync.status import GroupStatus, PendingStatus, RankStatus, gather_status, shares
from postlocal.tensors import squared_norm, weigh_
from postlocal.torch_versions import copy_all_
from postlocal.wire import Divisor, Staging, fp32, maximum_, mean_

logger = logging.getLogger("postlocal")

# A rank that did no step hardly counts, and counts fully where nobody did one.
_IDLE = 1e-9


class Buffers:
    """Buffers of a replica, and frozen parameters that move, to be averaged.

    Floats are averaged, of integers the greatest is taken.

    Args:
        replica: whose buffers.
        apart: whether copies are sent, since training goes on meanwhile.
    """

    def __init__(self, replica: Replica, apart: bool) -> None:
        self._replica = replica
        self._apart = apart
        self.tensors: dict[str, Tensor] = {}
        self._add_missing()

    def reduce(self, group: Group, status: GroupStatus) -> int:
        """Average over a group; returns the bytes of payload that this rank sent."""
        if not status.unanimous("moving"):
            self._replica.moving.update(*group.all_gather_object(self._replica.moving))
            self._add_missing()
        weight, total = status.buffer_weights()
        means = floats(self.tensors.values())
        weigh_(means, weight)
        sent = mean_(means, group, fp32(), lambda: total)
        return sent + maximum_(others(self.tensors.values()), group)

    def apply(self) -> None:
        """Give the replica the result."""
        if not self._apart:
            return
        present = self._replica.averaged
        for name, result in self.tensors.items():
            tensor = present[name]
            integer = not (tensor.is_floating_point() or tensor.is_complex())
            # As int64: not every dtype has a maximum.
            tensor.copy_(torch.maximum(tensor.long(), result.long()) if integer else result)

    def state_dict(self) -> dict[str, Tensor]:
        """What is sent, or the result, by name."""
        return self.tensors

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on with what `state_dict` gave."""
        for name, value in state.items():
            self.tensors[name] = value.clone()

    def _add_missing(self) -> None:
        self.tensors = {
            name: self.tensors.get(name, tensor.clone() if self._apart else tensor)
            for name, tensor in self._replica.averaged.items()
        }


@dataclass(frozen=True)
class Result:
    """What all ranks know once their contributions were reduced.

    Attributes:
        status: what each rank said.
        weights: of each rank's contribution to each module, fp64, shape ``(ranks, modules)``.
    """

    status: GroupStatus
    weights: Tensor

    @property
    def finite(self) -> bool:
        """Whether this rank's contribution was."""
        return bool(self.status.finite[self.status.rank])

    @property
    def excluded(self) -> tuple[int, ...]:
        """Ranks that no module's mean counted."""
        return tuple((self.weights.sum(dim=1) == 0).nonzero().flatten().tolist())

    def shares(self) -> tuple[float, float]:
        """Weight of this rank's optimizer state in its mean, and what the sum is divided by."""
        counted = self.weights.sum(dim=1) > 0
        scaled, divisor = shares(self.status.weights.where(counted, 0.0))
        return float(scaled[self.status.rank]), divisor

    def mean_square(self) -> float:
        """Weighted mean of the contributions' squared norms."""
        totals = self.weights.sum(dim=0)
        squares = self.status.squares.where(self.weights > 0, 0.0)
        sums = (self.weights * squares).sum(dim=0)
        return float((sums / totals.where(totals > 0, 1.0)).sum())

    def reason(self, rank: int) -> str:
        """Why a rank is excluded, in words."""
        if not self.status.finite[rank]:
            return "not finite"
        return "an outlier" if self.status.work[rank] > 0 else "it did no step"


class Synchronization:
    """A synchronization of one fragment, from its start until its result is applied.

    Args:
        fragment: what is synchronized.
        contribution: what this rank sends.
        status: what it says beside it; weight and finiteness are those of the contribution.
        record: where bytes, waiting and drift are noted.
        meter: counts them.
        buffers: reduced along with it; None: they are not.
        result: that of a synchronization that was started before a resume.
    """

    def __init__(
        self,
        fragment: Fragment,
        contribution: Contribution,
        status: RankStatus,
        record: SyncRecord,
        meter: Meter,
        buffers: Buffers | None = None,
        result: Result | None = None,
    ) -> None:
        self.fragment = fragment
        self.contribution = contribution
        self.record = record
        self.buffers = buffers
        self._status = replace(
            status,
            weight=fragment.guard.weight(contribution.finite) * max(status.work, _IDLE),
            finite=contribution.finite,
            changed=contribution.problem is not None,
        )
        self._meter = meter
        self._result = result
        self._future: Future[Tensor] | None = None

    def start(self, background: BackgroundThread | None = None) -> None:
        """Reduce, on this thread or beside it; on one thread for all that share a group.

        Args:
            background: the thread that does it while training goes on; None: this one.

        Raises:
            PeerError: if a rank did not take part in time.
            DisagreementError: if ranks are not at the same step, or plan different rounds.
            ModelChangedError: if the model of any rank cannot be synchronized any more.
        """
        if background is None:
            self._reduce()
        else:
            first = next(iter(self.contribution.tensors.values()))
            self._future = background.submit(first, self._reduce)

    def wait(self) -> Result:
        """Block until the result is here.

        Raises:
            PeerError, DisagreementError, ModelChangedError: as `start` does.
        """
        if self._future is not None:
            self._future.wait()
            self._future = None
        assert self._result is not None, "start() comes before wait()"
        return self._result

    def apply(self, step: int, mix: float) -> Result:
        """Apply the result to anchor, parameters and buffers.

        Args:
            step: of the clock.
            mix: share of its own value that a parameter keeps.

        Raises:
            NonFiniteError: if no contribution at level ``"world"`` was finite and there is no
                anchor.
        """
        result = self.wait()
        self.record.applied = step
        self.record.excluded = result.excluded
        self._warn(result)
        if self.fragment.anchor is None:
            self._apply_in_place(result)
        else:
            self._apply_to(self.fragment.anchor, result, step, mix)
        if self.buffers is not None:
            self.buffers.apply()
        self.release()
        return result

    def restart_moves(self) -> None:
        """Count how far parameters move from the anchor, which they were just given."""
        if self.contribution.moves_from is not None:
            assert self.fragment.anchor is not None
            anchor = list(self.fragment.anchor.tensors.values())
            copy_all_(self.contribution.moves_from, anchor)

    def release(self) -> None:
        """Free the memory of the contribution; the result is no longer needed."""
        self.contribution.release()

    @property
    def in_place(self) -> bool:
        """Whether the parameters hold pseudo-gradients until the result is applied."""
        anchored = self.fragment.anchor is not None
        contribution = self.contribution
        return anchored and contribution.staging is None and contribution.problem is None

    def state_dict(self) -> dict[str, Any]:
        """What is to be applied, once it has been waited for. Nothing is copied."""
        result = self.wait()
        return {
            "fragment": self.fragment.number,
            "record": self.record.state_dict(),
            "contributions": dict(self.contribution.tensors),
            "rows": result.status.rows,
            "weights": result.weights,
            "moves_from": self.contribution.moves_from,
            "buffers": None if self.buffers is None else self.buffers.state_dict(),
        }

    def _reduce(self) -> None:
        fragment, contribution = self.fragment, self.contribution
        pending = gather_status(fragment.group, fragment.device, self._status, contribution.squares)
        detected = self._detected(pending)
        if detected is None:
            weights, divisor = self._weigh(pending)
        else:
            weights, divisor = self._weigh_as(detected)
        try:
            sent = fragment.reducer.mean_(contribution.tensors, divisor, weights)
        except PeerError:
            pending.wait()  # a rank that found a disagreement has left, and all have to hear of it
            raise
        status = pending.wait()
        status.check_models(fragment.group, contribution.problem)
        self._meter.count("parameters", sent, self.record)
        if self.buffers is not None:
            self._meter.count("buffers", self.buffers.reduce(fragment.group, status), self.record)
        self._meter.count("control", status.payload_bytes, self.record)
        if detected is None:
            detected = status.weights[:, None].expand_as(status.squares)
        self._result = Result(status, detected)

    def _detected(self, pending: PendingStatus) -> Tensor | None:
        """Weights that the outlier detector gives, by rank and module; None where there is none."""
        if self.fragment.detector is None:
            return None
        status = pending.wait()
        return self.fragment.detector.weigh(status.squares.sqrt(), status.finite, status.work)

    def _weigh_as(self, detected: Tensor) -> tuple[dict[str, float], Divisor]:
        """Weights of this rank's contribution by name, which sum to 1 over ranks."""
        fragment = self.fragment
        modules = zip(fragment.modules, detected[fragment.group.rank].tolist(), strict=True)
        weights = {name: share for module, share in modules for name in module}
        if self._status.work > 0 or not self._status.finite:
            fragment.reducer.drop_residuals([name for name, share in weights.items() if share == 0])
        return weights, _one

    def _weigh(self, pending: PendingStatus) -> tuple[dict[str, float], Divisor]:
        """Weights of this rank's contribution by name, and what their sum is divided by."""
        fragment, weight = self.fragment, self._status.weight
        if weight == 0:
            fragment.reducer.drop_residuals(self.contribution.tensors)
        elif weight != 1:  # the status is waited for only where weights are uneven
            weight = float(shares(pending.wait().weights)[0][fragment.group.rank])
        weights = dict.fromkeys(self.contribution.tensors, weight)
        return weights, lambda: shares(pending.wait().weights)[1]

    def _apply_in_place(self, result: Result) -> None:
        parameters = list(self.fragment.parameters.values())
        if len(result.excluded) == self.fragment.group.size:
            self._mark_lost(parameters)
            return
        square = squared_norm(parameters)
        self.record.drift = _drift(result.mean_square(), square, square)

    def _mark_lost(self, parameters: list[Tensor]) -> None:
        if self.record.level == WORLD:
            raise NonFiniteError(
                f"after step {self.record.step} the parameters of every replica hold infinities "
                "or NaN: resume from a checkpoint, with a lower learning rate",
                ranks=range(self.fragment.group.size),
                step=self.record.step,
            )
        # Other groups may be well: they leave this one out of their mean, if it stays marked.
        for parameter in parameters:
            parameter.fill_(math.nan)

    def _apply_to(self, anchor: Anchor, result: Result, step: int, mix: float) -> None:
        if len(result.excluded) < self.fragment.group.size:
            self._outer_step(anchor, result, step)
        anchor.restore(mix, self._taken_wholly(result), self.contribution.moves_from)

    def _outer_step(self, anchor: Anchor, result: Result, step: int) -> None:
        fragment, means = self.fragment, self.contribution.tensors
        modules = [fragment.of(module, means) for module in fragment.modules]
        squares = [squared_norm(tensors) for tensors in modules]
        scale = squared_norm(anchor.tensors.values())
        self.record.drift = _drift(result.mean_square(), sum(squares), scale)
        for tensors, factor in zip(modules, _factors(fragment, squares), strict=True):
            weigh_(tensors, factor)
        resting = self._names(result.weights.sum(dim=0) == 0)
        anchor.step(list(means.values()), step, result.status.inner_lr, resting)

    def _taken_wholly(self, result: Result) -> set[str]:
        """Parameters of which this rank keeps nothing: outliers, and what is not finite.

        One that did no step is left out of means too, and yet is where it should be.
        """
        if result.finite and result.status.own("work") == 0:
            return set()
        return self._names(result.weights[result.status.rank] == 0)

    def _names(self, chosen: Tensor) -> set[str]:
        modules = zip(self.fragment.modules, chosen.tolist(), strict=True)
        return {name for module, wanted in modules if wanted for name in module}

    def _warn(self, result: Result) -> None:
        rank, excluded = self.fragment.group.rank, result.excluded
        if not excluded or (rank != 0 and rank not in excluded):
            return
        reasons = [f"rank {other}: {result.reason(other)}" for other in excluded]
        logger.warning(
            "the mean after step %d at level %r leaves out %s",
            self.record.step, self.record.level, ", ".join(reasons),
        )  # fmt: skip


def resumed(
    fragment: Fragment,
    state: Mapping[str, Any],
    meter: Meter,
    buffers: Buffers | None,
    staging: Staging,
) -> Synchronization:
    """The synchronization that a `state_dict` was taken of, with its result, to be applied.

    Args:
        fragment: what was synchronized; it has an anchor.
        state: what `Synchronization.state_dict` gave.
        meter: as of `Synchronization`.
        buffers: where the saved buffers go; None where there are none.
        staging: memory for what was sent.
    """
    assert fragment.anchor is not None
    allocated: list[Tensor] = []
    means = named(fragment, staged(fragment.anchor, staging, allocated))
    for name, tensor in means.items():
        tensor.copy_(state["contributions"][name])
    moves_from = None
    if state["moves_from"] is not None:
        moves_from = staged(fragment.anchor, staging, allocated)
        copy_all_(moves_from, list(state["moves_from"]))
    if buffers is not None:
        buffers.load_state_dict(state["buffers"])
    status = GroupStatus(state["rows"], fragment.group.rank)
    result = Result(status, state["weights"])
    squares = status.squares[status.rank].tolist()
    contribution = Contribution(means, squares, result.finite, moves_from, staging, allocated)
    record = SyncRecord(**state["record"])
    return Synchronization(fragment, contribution, RankStatus(), record, meter, buffers, result)


def _one() -> float:
    return 1.0


def _factors(fragment: Fragment, squares: Sequence[float]) -> list[float]:
    """What each module's mean is multiplied by, given its squared norm."""
    norms = torch.tensor(squares, dtype=torch.float64).sqrt()
    detector = fragment.detector
    factors = torch.ones_like(norms) if detector is None else detector.scale(norms)
    total = float(torch.linalg.vector_norm(norms * factors))
    scaled: list[float] = (factors * fragment.guard.scale(total)).tolist()
    return scaled


def _drift(mean_square: float, square_of_mean: float, scale: float) -> float:
    """Root mean square distance of vectors from their mean, relative to a norm, from squares."""
    if scale == 0:
        return 0.0 if mean_square == 0 else math.inf
    return math.sqrt(max(0.0, mean_square - square_of_mean) / scale)
