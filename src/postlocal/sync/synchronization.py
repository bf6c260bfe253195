"""One synchronization of some parameters: launched, carried out, and landed."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.futures import Future

from postlocal.comm.background import Courier
from postlocal.comm.group import Group
from postlocal.errors import NonFiniteError, PeerError
from postlocal.guard import Jury
from postlocal.meter import Meter, SyncRecord
from postlocal.schedule import WORLD
from postlocal.strategies import Strategy
from postlocal.sync.anchor import Anchor
from postlocal.sync.parameters import Replica, floats, others
from postlocal.sync.status import Ballot, Vote, shares
from postlocal.tensors import all_finite, squared_norm, weigh_
from postlocal.wire import Carrier, Divisor, Staging, fp32, maximum_, mean_

logger = logging.getLogger("postlocal")

# A rank that did no step hardly counts, and counts fully where nobody did one.
_IDLE = 1e-9


class Fragment:
    """Parameters that are synchronized together, and what stays between synchronizations.

    Args:
        parameters: by name; they are changed in place.
        level: with whom they are synchronized.
        carrier: how they travel, and with whom.
        strategy: its guard weighs contributions, and its outer optimizer moves the anchor, if
            there is one at this level.
        modules: names of the parameters, in groups that the guard may judge one by one.
        number: from 0; None where there is but one fragment.

    Attributes:
        device: of the parameters when this was made, which collectives take tensors from.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        level: str,
        carrier: Carrier,
        strategy: Strategy,
        modules: Sequence[Sequence[str]] = (),
        number: int | None = None,
    ) -> None:
        self._trained = dict(parameters)
        self._likes = [torch.empty_like(tensor, device="meta") for tensor in parameters.values()]
        self.device = next(iter(parameters.values())).device
        self.level = level
        self.carrier = carrier
        self.number = number
        self.guard = strategy.guard
        self.anchor: Anchor | None = None
        self.jury: Jury | None = None
        if strategy.anchored and level == WORLD:
            self.anchor = Anchor(parameters, strategy.outer)
            self.jury = strategy.guard.jury(carrier.group.size, len(modules))
        self.modules = [tuple(parameters)] if self.jury is None else [*map(tuple, modules)]
        self._since = (0, 0.0)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters where they lie now, in the order in which they travel."""
        return {name: parameter.detach() for name, parameter in self._trained.items()}

    def zeros(self) -> dict[str, Tensor]:
        """What a rank sends whose parameters are not what they were: zeros, as others expect."""
        likes = self._likes if self.anchor is None else list(self.anchor.tensors.values())
        zeros = (torch.zeros_like(like, device=self.device) for like in likes)
        return dict(zip(self._trained, zeros, strict=True))

    @property
    def group(self) -> Group:
        """Who takes part."""
        return self.carrier.group

    @property
    def since(self) -> int:
        """Steps of the clock at which work began to count: at the last launch, as a rule."""
        return self._since[0]

    def begin(self, steps: int, work: float) -> None:
        """Count work from here on, given steps and work of the clock so far."""
        self._since = (steps, work)

    def work(self, steps: int, work: float) -> float:
        """Share of the steps since then that this rank did."""
        before_steps, before_work = self._since
        return (work - before_work) / (steps - before_steps) if steps > before_steps else 1.0

    def of(self, module: Sequence[str], tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """The tensors of one module."""
        return [tensors[name] for name in module]

    def state_dict(self) -> dict[str, Any]:
        """Anchor, what the wire and the guard remember, and the clock at the last launch."""
        return {
            "anchor": None if self.anchor is None else self.anchor.state_dict(),
            "wire": self.carrier.state_dict(),
            "jury": None if self.jury is None else self.jury.state_dict(),
            "since": self._since,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state_dict` gave."""
        if self.anchor is not None:
            self.anchor.load_state_dict(state["anchor"])
        self.carrier.load_state_dict(state["wire"])
        if self.jury is not None:
            self.jury.load_state_dict(state["jury"])
        self._since = tuple(state["since"])


class Buffers:
    """Buffers of a replica, and frozen parameters that move, on their way.

    Floats are averaged, of integers the greatest is taken.

    Args:
        replica: whose buffers.
        apart: whether copies travel, since training goes on meanwhile.
    """

    def __init__(self, replica: Replica, apart: bool) -> None:
        self._replica = replica
        self._apart = apart
        self.tensors: dict[str, Tensor] = {}
        self._take()

    def reduce(self, group: Group, ballot: Ballot) -> int:
        """Average over a group; returns the bytes of payload that this rank sent."""
        if not ballot.unanimous("moving"):
            self._replica.moving.update(*group.all_gather_object(self._replica.moving))
            self._take()
        weight, total = ballot.buffer_weights()
        means = floats(self.tensors.values())
        weigh_(means, weight)
        sent = mean_(means, group, fp32(), lambda: total)
        return sent + maximum_(others(self.tensors.values()), group)

    def apply(self) -> None:
        """Give the replica what came back."""
        if not self._apart:
            return
        present = self._replica.averaged
        for name, result in self.tensors.items():
            tensor = present[name]
            integer = not (tensor.is_floating_point() or tensor.is_complex())
            # As int64: not every dtype has a maximum.
            tensor.copy_(torch.maximum(tensor.long(), result.long()) if integer else result)

    def state_dict(self) -> dict[str, Tensor]:
        """What is on its way, by name."""
        return self.tensors

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on with what `state_dict` gave."""
        for name, value in state.items():
            self.tensors[name] = value.clone()

    def _take(self) -> None:
        self.tensors = {
            name: self.tensors.get(name, tensor.clone() if self._apart else tensor)
            for name, tensor in self._replica.averaged.items()
        }


class Flight:
    """A synchronization of one fragment from its launch to its landing.

    Args:
        fragment: what is synchronized.
        record: where bytes, waiting and drift are noted.
        meter: counts them.
        buffers: travel along; None: they do not.
        hangar: memory for contributions that travel while training goes on; None: they travel in
            the parameters' own memory, which has to be left alone until the landing.
        carry: whether parameters keep how far they move until the landing; it needs a hangar.
        problem: why the model of this rank cannot be synchronized, to be raised on all ranks.
    """

    def __init__(
        self,
        fragment: Fragment,
        record: SyncRecord,
        meter: Meter,
        buffers: Buffers | None = None,
        hangar: Staging | None = None,
        carry: bool = False,
        problem: str | None = None,
    ) -> None:
        self.fragment = fragment
        self.record = record
        self.buffers = buffers
        self._meter = meter
        self._hangar = hangar
        self._carry = carry
        self._problem = problem
        self._sent: list[Tensor] | None = None
        self._memory: list[Tensor] = []
        self._contributions: dict[str, Tensor] = {}
        self._weights: Tensor | None = None
        self._future: Future[Tensor] | None = None
        self.ballot: Ballot

    def load(self) -> None:
        """Take the contribution of this rank: parameters, or how far they moved."""
        fragment = self.fragment
        if self._problem is not None:
            self._contributions = fragment.zeros()
            return
        if fragment.anchor is None:
            self._contributions = fragment.parameters
            return
        room = None if self._hangar is None else self._room(fragment.anchor, self._hangar)
        differences = fragment.anchor.pseudo_gradients(room)
        self._contributions = dict(zip(fragment.parameters, differences, strict=True))
        if self._carry:
            self._keep(list(fragment.parameters.values()))

    def vote(self, *, buffers_finite: bool, work: float, **said: Any) -> None:
        """Open the ballot with what this rank has to say; see `Vote`."""
        fragment, values = self.fragment, self._contributions
        squares = [squared_norm(fragment.of(module, values)) for module in fragment.modules]
        finite = all_finite(values.values(), sum(squares))
        self._squares = squares
        self._vote = Vote(
            weight=fragment.guard.weight(finite) * max(work, _IDLE),
            buffer_weight=fragment.guard.weight(buffers_finite),
            finite=finite,
            work=work,
            changed=self._problem is not None,
            **said,
        )

    def exchange(self) -> None:
        """Communicate; on the thread that carries all flights of the group, in one order.

        Raises:
            PeerError: if a rank did not take part in time.
            DisagreementError: if ranks are not at the same step, or plan different rounds.
            ModelChangedError: if the model of any rank cannot be synchronized any more.
        """
        fragment, values = self.fragment, self._contributions
        ballot = self.ballot = Ballot(
            fragment.group, fragment.device, self._vote, self._squares, self._problem
        )
        weights, divisor = self._weigh(ballot)
        try:
            sent = fragment.carrier.mean_(values, divisor, weights)
        except PeerError:
            ballot.wait()  # a rank that found a disagreement has left, and all have to hear of it
            raise
        ballot.check_models()
        self._meter.count("parameters", sent, self.record)
        if self.buffers is not None:
            self._meter.count("buffers", self.buffers.reduce(fragment.group, ballot), self.record)
        self._meter.count("control", ballot.payload_bytes, self.record)

    def _weigh(self, ballot: Ballot) -> tuple[dict[str, float], Divisor]:
        """Weights of this rank's contribution by name, and what their sum is divided by."""
        fragment, weight = self.fragment, self._vote.weight
        rank = fragment.group.rank
        if fragment.jury is not None:
            self._weights = fragment.jury.weigh(ballot.squares.sqrt(), ballot.finite, ballot.work)
            modules = zip(fragment.modules, self._weights[rank].tolist(), strict=True)
            weights = {name: share for module, share in modules for name in module}
            if self._vote.work > 0 or not self._vote.finite:
                fragment.carrier.forget([name for name, share in weights.items() if share == 0])
            return weights, _one
        if weight == 0:
            fragment.carrier.forget(self._contributions)
        elif weight != 1:  # the ballot is waited for only where weights are uneven
            weight = float(shares(ballot.weights)[0][rank])
        weights = dict.fromkeys(self._contributions, weight)
        return weights, lambda: shares(ballot.weights)[1]

    def exchange_beside(self, courier: Courier) -> None:
        """Communicate on the courier's thread while training goes on."""
        self._future = courier.send(next(iter(self._contributions.values())), self.exchange)

    def wait(self) -> None:
        """Block until the result is here.

        Raises:
            PeerError, DisagreementError: what the exchange met.
        """
        if self._future is not None:
            self._future.wait()
            self._future = None

    def land(self, step: int, mix: float) -> None:
        """Apply the result to anchor, parameters and buffers.

        Args:
            step: of the clock.
            mix: share of its own value that a parameter keeps.

        Raises:
            NonFiniteError: if no contribution at level ``"world"`` was finite and there is no
                anchor.
        """
        self.wait()
        self.record.landed = step
        self.record.excluded = tuple((self.weights.sum(dim=1) == 0).nonzero().flatten().tolist())
        self._warn()
        if self.fragment.anchor is None:
            self._land_in_place()
        else:
            self._land_on(self.fragment.anchor, step, mix)
        if self.buffers is not None:
            self.buffers.apply()
        self.leave()

    def restart_moves(self) -> None:
        """Count how far parameters move from the anchor, which they were just given."""
        if self._sent is not None:
            assert self.fragment.anchor is not None
            torch._foreach_copy_(self._sent, list(self.fragment.anchor.tensors.values()))

    def leave(self) -> None:
        """Give memory back; the result is no longer needed."""
        if self._hangar is not None:
            self._hangar.give(*self._memory)
            self._memory.clear()

    @property
    def weights(self) -> Tensor:
        """Weight of each rank's contribution to each module, shape ``(ranks, modules)``."""
        if self._weights is None:
            self._weights = self.ballot.weights[:, None].expand_as(self.ballot.squares)
        return self._weights

    @property
    def finite(self) -> bool:
        """Whether this rank's contribution was."""
        return bool(self.ballot.finite[self.fragment.group.rank])

    @property
    def in_place(self) -> bool:
        """Whether the parameters hold pseudo-gradients until the landing."""
        anchored = self.fragment.anchor is not None
        return anchored and self._hangar is None and self._problem is None

    def shares(self) -> tuple[float, float]:
        """Weight of this rank's optimizer state in its mean, and what the sum is divided by."""
        counted = self.weights.sum(dim=1) > 0
        scaled, divisor = shares(self.ballot.weights.where(counted, 0.0))
        return float(scaled[self.fragment.group.rank]), divisor

    def state_dict(self) -> dict[str, Any]:
        """What is to be landed, once it has been waited for. Nothing is copied."""
        return {
            "fragment": self.fragment.number,
            "record": self.record.state_dict(),
            "contributions": dict(self._contributions),
            "rows": self.ballot.wait(),
            "weights": self.weights,
            "sent": self._sent,
            "buffers": None if self.buffers is None else self.buffers.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Be the flight that `state_dict` was taken of: what came back is here, to be landed."""
        assert self._hangar is not None
        assert self.fragment.anchor is not None
        room = self._room(self.fragment.anchor, self._hangar)
        self._contributions = dict(zip(self.fragment.parameters, room, strict=True))
        for name, tensor in self._contributions.items():
            tensor.copy_(state["contributions"][name])
        self.ballot = Ballot.counted(state["rows"], self.fragment.group.rank)
        self._weights = state["weights"]
        if state["sent"] is not None:
            self._keep(state["sent"])
        if self.buffers is not None:
            self.buffers.load_state_dict(state["buffers"])

    def _keep(self, parameters: Sequence[Tensor]) -> None:
        """Remember what is sent, to know at the landing how far parameters moved since."""
        assert self._hangar is not None
        assert self.fragment.anchor is not None
        self._sent = self._room(self.fragment.anchor, self._hangar)
        torch._foreach_copy_(self._sent, list(parameters))

    def _room(self, anchor: Anchor, hangar: Staging) -> list[Tensor]:
        """Memory, as for the anchor, for what must outlive this step."""
        tensors = list(anchor.tensors.values())
        room: list[Tensor] = []
        free: dict[torch.dtype, Tensor] = {}
        for dtype in {tensor.dtype for tensor in tensors}:
            numel = sum(tensor.numel() for tensor in tensors if tensor.dtype == dtype)
            free[dtype] = hangar.take(numel, tensors[0], dtype)
        self._memory += free.values()
        for tensor in tensors:
            part, free[tensor.dtype] = free[tensor.dtype].tensor_split([tensor.numel()])
            room.append(part.view(tensor.shape))
        return room

    def _land_in_place(self) -> None:
        parameters = list(self.fragment.parameters.values())
        if len(self.record.excluded) == self.fragment.group.size:
            self._lose(parameters)
            return
        square = squared_norm(parameters)
        self.record.drift = _drift(self._mean_square(), square, square)

    def _lose(self, parameters: list[Tensor]) -> None:
        if self.record.level == WORLD:
            raise NonFiniteError(
                f"after step {self.record.step} the parameters of every replica hold infinities "
                "or NaN: resume from a checkpoint, with a lower learning rate"
            )
        # Other groups may be well: they leave this one out where they meet, if it stays marked.
        for parameter in parameters:
            parameter.fill_(math.nan)

    def _land_on(self, anchor: Anchor, step: int, mix: float) -> None:
        if len(self.record.excluded) < self.fragment.group.size:
            self._move(anchor, step)
        anchor.give(mix, self._taken_wholly(), self._sent)

    def _move(self, anchor: Anchor, step: int) -> None:
        fragment, values = self.fragment, self._contributions
        modules = [fragment.of(module, values) for module in fragment.modules]
        squares = [squared_norm(tensors) for tensors in modules]
        scale = squared_norm(anchor.tensors.values())
        self.record.drift = _drift(self._mean_square(), sum(squares), scale)
        for tensors, factor in zip(modules, self._factors(squares), strict=True):
            weigh_(tensors, factor)
        resting = self._names(self.weights.sum(dim=0) == 0)
        anchor.step(list(values.values()), step, self.ballot.inner_lr, resting)

    def _taken_wholly(self) -> set[str]:
        """Parameters of which this rank keeps nothing: outliers, and what is not finite.

        One that did no step is left out of means too, and yet is where it should be.
        """
        if self.finite and self.ballot.vote.work == 0:
            return set()
        return self._names(self.weights[self.fragment.group.rank] == 0)

    def _factors(self, squares: Sequence[float]) -> list[float]:
        """What each module's mean is multiplied by, given its squared norm."""
        jury, guard = self.fragment.jury, self.fragment.guard
        norms = torch.tensor(squares, dtype=torch.float64).sqrt()
        factors = torch.ones_like(norms) if jury is None else jury.scale(norms)
        total = float(torch.linalg.vector_norm(norms * factors))
        scaled: list[float] = (factors * guard.scale(total)).tolist()
        return scaled

    def _names(self, chosen: Tensor) -> set[str]:
        modules = zip(self.fragment.modules, chosen.tolist(), strict=True)
        return {name for module, wanted in modules if wanted for name in module}

    def _mean_square(self) -> float:
        """Weighted mean of the contributions' squared norms."""
        totals = self.weights.sum(dim=0)
        squares = self.ballot.squares.where(self.weights > 0, 0.0)
        sums = (self.weights * squares).sum(dim=0)
        return float((sums / totals.where(totals > 0, 1.0)).sum())

    def _warn(self) -> None:
        group, excluded = self.fragment.group, self.record.excluded
        if not excluded or (group.rank != 0 and group.rank not in excluded):
            return
        reasons = [f"rank {rank}: {self._reason(rank)}" for rank in excluded]
        logger.warning(
            "the mean after step %d at level %r leaves out %s",
            self.record.step, self.record.level, ", ".join(reasons),
        )  # fmt: skip

    def _reason(self, rank: int) -> str:
        if not self.ballot.finite[rank]:
            return "not finite"
        return "an outlier" if self.ballot.work[rank] > 0 else "it did no step"


def _one() -> float:
    return 1.0


def _drift(mean_square: float, square_of_mean: float, scale: float) -> float:
    """Root mean square distance of vectors from their mean, relative to a norm, from squares."""
    if scale == 0:
        return 0.0 if mean_square == 0 else math.inf
    return math.sqrt(max(0.0, mean_square - square_of_mean) / scale)
