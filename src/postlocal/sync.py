"""The one clock of a training loop: `attach` a strategy, then call `Sync.step` each iteration."""

import logging
import math
import warnings
from collections.abc import Mapping
from datetime import timedelta
from importlib.metadata import version
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from postlocal import agreement, group, schedule
from postlocal.anchor import Anchor
from postlocal.ballot import BYTES as BALLOT_BYTES
from postlocal.ballot import Ballot
from postlocal.errors import DisagreementError, NonFiniteError, PostlocalError
from postlocal.gradients import Local, Reduced
from postlocal.group import Group, Processes
from postlocal.inner import Inner
from postlocal.meter import Meter, SyncRecord
from postlocal.replica import Replica, find_ddp
from postlocal.schedule import WORLD, Round
from postlocal.strategies import Strategy
from postlocal.tensors import all_finite, squared_norm, weigh_
from postlocal.topology import Layout, Partition, Topology, unknown_level, world
from postlocal.wire import Carrier, Staging, fp32, maximum_, mean_

logger = logging.getLogger("postlocal")


def attach(
    model: nn.Module,
    optimizer: Optimizer,
    strategy: Strategy,
    *,
    topology: Topology | None = None,
    process_group: dist.ProcessGroup | Group | None = None,
    initial: Literal["broadcast", "refuse"] = "broadcast",
    timeout: float | None = None,
) -> "Sync":
    """Put a training loop under a strategy; collective, to be called by all ranks.

    All process groups are made here, all levels resolved, and all ranks compared: whatever only
    some of them were given raises on every one.

    Args:
        model: the module that is trained. A strategy that averages gradients at any level but
            ``"rank"`` needs it wrapped in DistributedDataParallel, with no communication hook.
        optimizer: the inner optimizer; it must hold parameters of ``model``.
        strategy: what to do; see `postlocal.strategies`.
        topology: the levels between ``"rank"`` and ``"world"``; None: there are none.
        process_group: the replicas; None: torch's default group, or one rank alone where torch
            has none. A group of `postlocal.virtual` works too.
        initial: what to do with parameters and buffers that differ between ranks: take rank 0's,
            or raise.
        timeout: seconds that a synchronization waits for a missing rank; None: as long as
            torch's default group does.

    Returns:
        The clock to call ``step()`` on, once for each optimizer step.

    Raises:
        ValueError: if an argument is bad, or the schedule names a level the topology lacks.
        TypeError: if a parameter is of a kind that cannot be averaged.
        DisagreementError: if ranks were given different versions, strategies, topologies or
            models.
        PeerError: if a rank does not come within the timeout.

    Example:
        >>> import torch
        >>> import postlocal
        >>> from postlocal import strategies
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> sync = postlocal.attach(model, optimizer, strategies.local_sgd(period=2))
        >>> for _ in range(3):
        ...     model(torch.ones(4)).sum().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     sync.step()
        >>> sync.finish()
        >>> sync.steps, sync.agreed
        (3, True)
    """
    everyone = group.resolve(process_group, timedelta(seconds=timeout) if timeout else None)
    everyone.arrive(0)
    topology = topology or world()
    with agreement.together(everyone):
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout must be above 0 seconds, got {timeout}")
        if initial not in ("broadcast", "refuse"):
            raise ValueError(f"initial must be 'broadcast' or 'refuse', got {initial!r}")
        replica = Replica(model)
        ddp = find_ddp(model)
        _check_ddp(ddp, everyone)
        inner = Inner(optimizer, replica)
        partitions = topology.partition(everyone.size)
        check_levels(strategy, partitions)
        first = strategy.schedule(0, inner.lr)
    agreement.check(
        everyone,
        {
            "version of postlocal": [version("postlocal")],
            "strategy": [strategy.fingerprint],
            "first round": [repr(first)],
            "topology": [repr(partitions)],
            "parameters and buffers": replica.describe(),
            "initial": [initial],
        },
    )
    layout = Layout(everyone, topology)
    meter = Meter()
    with agreement.together(everyone):
        where = _gradients(ddp, strategy, topology, everyone, layout, meter)
        where.use(first.gradients)
    _agree_on_start(layout[WORLD], replica, initial)
    return Sync(strategy, replica, inner, layout, where, meter)


class Sync:
    """The clock that `attach` returns: counts steps, and synchronizes when a round ends.

    Attributes:
        strategy: what it runs.
        meter: bytes, waiting and drift so far.
        layout: this rank's groups for synchronizations.
        replica: what is synchronized.
        inner: the user's optimizer.
    """

    def __init__(
        self,
        strategy: Strategy,
        replica: Replica,
        inner: Inner,
        layout: Layout,
        where: Local | Reduced,
        meter: Meter,
    ) -> None:
        self.strategy = strategy
        self.replica = replica
        self.inner = inner
        self.layout = layout
        self.meter = meter
        self._gradients = where
        self._anchor = Anchor(replica.parameters, strategy.outer) if strategy.anchored else None
        self._staging = Staging()
        self._carrier = strategy.wire.open(layout, WORLD, self._staging)
        self._steps = 0
        self._lr = inner.lr
        self._agreed_at = 0
        self._lockstep = True
        self._begin(self._plan())

    @property
    def steps(self) -> int:
        """Number of calls of `step` so far."""
        return self._steps

    @property
    def round(self) -> Round:
        """The round under way."""
        return self._round

    @property
    def agreed(self) -> bool:
        """Whether all replicas hold the same parameters at this moment."""
        return self._lockstep or self._steps == self._agreed_at

    def step(self) -> None:
        """Count one iteration, and synchronize if it was the last of its round.

        To be called on every rank once for each optimizer step that the loop intends, after it;
        also where a GradScaler skipped it, and once for all micro-batches of an accumulation.

        Raises:
            PeerError: if a rank does not come to the synchronization within the timeout.
            DisagreementError: if ranks are not at the same step, or plan different rounds.
            NonFiniteError: if every replica is non-finite and the strategy has no anchor.
            RuntimeError: if called inside ``model.no_sync()``.
        """
        self._gradients.check()
        self._steps += 1
        self._lr = max(self._lr, self.inner.lr)
        self._lockstep = self._lockstep and self._round.gradients == WORLD
        if self._steps < self._end:
            return
        following = self._plan()
        if self._round.parameters is not None:
            self._synchronize(self._round.parameters, following)
        self._begin(following)

    def finish(self) -> None:
        """Make every replica equal: synchronize now, unless they agree already.

        Training can go on after it, with a new round.

        Raises:
            PeerError, DisagreementError, NonFiniteError: as `step` does.
        """
        following = self._plan()
        if not self.agreed:
            self._synchronize(WORLD, following)
        self._begin(following)

    def close(self) -> None:
        """End the threads that this clock started, if any. It communicates with nobody."""
        self._gradients.close()

    def state_dict(self) -> dict[str, Any]:
        """What a resume in the middle of a round needs beside the model and the optimizer.

        Local to this rank and not copied; calling it changes nothing.
        """
        return {
            "strategy": self.strategy.fingerprint,
            "steps": self._steps,
            "round": {
                "steps": self._round.steps,
                "gradients": self._round.gradients,
                "parameters": self._round.parameters,
            },
            "end": self._end,
            "lr": self._lr,
            "agreed_at": self._agreed_at,
            "lockstep": self._lockstep,
            "meter": self.meter.state_dict(),
            "wire": self._carrier.state_dict(),
            "gradients": self._gradients.state_dict(),
            "anchor": None if self._anchor is None else self._anchor.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, on the same rank of as many ranks.

        The model and the optimizer are loaded by the caller; `postlocal.checkpoint` does it all.

        Raises:
            ValueError: if the state is that of another strategy.
        """
        if state["strategy"] != self.strategy.fingerprint:
            raise ValueError(
                f"state is of strategy {state['strategy']}, this is {self.strategy.fingerprint}"
            )
        self._steps = state["steps"]
        self._begin(Round(**state["round"]))
        self._end = state["end"]
        self._lr = state["lr"]
        self._agreed_at = state["agreed_at"]
        self._lockstep = state["lockstep"]
        self.meter.load_state_dict(state["meter"])
        self._carrier.load_state_dict(state["wire"])
        self._gradients.load_state_dict(state["gradients"])
        if self._anchor is not None:
            self._anchor.load_state_dict(state["anchor"])

    def restart(self, state: Mapping[str, Any]) -> None:
        """Start a new round at the step of a state that another number of ranks saved.

        Parameters become the saved anchor; where the strategy has none, all ranks must hold equal
        parameters already. The outer optimizer's state is taken over.

        Args:
            state: the `state_dict` of any of the ranks that saved it.
        """
        self.load_state_dict(state)
        self._carrier.forget()
        self._gradients.forget()
        if self._anchor is not None:
            self._anchor.restore()
        self._lockstep = False
        self._agreed_at = self._steps
        self._begin(self._plan())

    def _plan(self) -> Round:
        return self.strategy.schedule(self._steps, self.inner.lr)

    def _begin(self, following: Round) -> None:
        self._round = following
        self._end = self._steps + following.steps
        self._lr = self.inner.lr
        self._gradients.use(following.gradients)

    def _synchronize(self, level: str, following: Round) -> None:
        group = self.layout[level]
        anchor = self._anchor if level == WORLD else None
        if group.size > 1 or anchor is not None:
            self.layout[WORLD].arrive(self._steps)
            with torch.no_grad(), self.meter.sync(self._steps, level) as record:
                self._meet(group, anchor, following, record)
            if record.excluded and (group.rank == 0 or group.rank in record.excluded):
                logger.warning(
                    "the mean after step %d at level %r leaves out rank %s: not finite",
                    record.step, level, ", ".join(map(str, record.excluded)),
                )  # fmt: skip
        if level == WORLD:
            self._agreed_at = self._steps

    def _meet(
        self, group: Group, anchor: Anchor | None, following: Round, record: SyncRecord
    ) -> None:
        if anchor is None:
            ballot = self._average(group, following, record)
        else:
            ballot = self._move(anchor, group, following, record)
        record.excluded = ballot.excluded
        self._average_buffers(group, ballot)
        self._settle_optimizer(group, ballot)
        self.meter.count("control", BALLOT_BYTES * (group.size - 1))

    def _average(self, group: Group, following: Round, record: SyncRecord) -> Ballot:
        parameters = list(self.replica.parameters.values())
        exact = fp32().open(self.layout, record.level, self._staging)
        ballot = self._mean(parameters, exact, following)
        if len(ballot.excluded) == group.size:
            self._lose(parameters, record.level)
            return ballot
        square = squared_norm(parameters)
        record.drift = _drift(ballot.mean_square(), square, square)
        return ballot

    def _lose(self, parameters: list[Tensor], level: str) -> None:
        if level == WORLD:
            raise NonFiniteError(
                f"after step {self._steps} the parameters of every replica hold infinities or "
                "NaN: resume from a checkpoint, with a lower learning rate"
            )
        # Other groups may be well: they leave this one out where they meet, if it stays marked.
        for parameter in parameters:
            parameter.fill_(math.nan)

    def _move(self, anchor: Anchor, group: Group, following: Round, record: SyncRecord) -> Ballot:
        scale = squared_norm(anchor.tensors.values())
        differences = anchor.pseudo_gradients()
        try:
            ballot = self._mean(differences, self._carrier, following)
        except PostlocalError:
            anchor.restore()
            raise
        if len(ballot.excluded) == group.size:
            anchor.restore()
            return ballot
        square = squared_norm(differences)
        record.drift = _drift(ballot.mean_square(), square, scale)
        weigh_(differences, self.strategy.guard.scale(math.sqrt(square)))
        anchor.step(differences, self._lr)
        return ballot

    def _mean(self, tensors: list[Tensor], carrier: Carrier, following: Round) -> Ballot:
        square = squared_norm(tensors)
        ballot = Ballot(
            carrier.group,
            tensors[0].device,
            weight=self.strategy.guard.weight(all_finite(tensors, square)),
            buffer_weight=self.strategy.guard.weight(not self.replica.has_nan_buffer()),
            square=square,
            step=self._steps,
            planned=following.steps,
            lr=self.inner.lr,
            layout=self.inner.layout() if self.strategy.optimizer_state == "average" else 0,
        )
        weigh_(tensors, ballot.weight)
        named = dict(zip(self.replica.parameters, tensors, strict=True))
        self.meter.count("parameters", carrier.mean_(named, ballot.total_weight))
        if ballot.weight == 0:
            carrier.forget()
        return ballot

    def _average_buffers(self, group: Group, ballot: Ballot) -> None:
        floats, others = self.replica.float_buffers(), self.replica.other_buffers()
        weight, total = ballot.buffer_weights()
        weigh_(floats, weight)
        sent = mean_(floats, group, fp32(), lambda: total)
        self.meter.count("buffers", sent + maximum_(others, group))

    def _settle_optimizer(self, group: Group, ballot: Ballot) -> None:
        match self.strategy.optimizer_state:
            case "reset":
                self.inner.reset()
            case "average":
                sent = self.inner.average_(
                    group, ballot.weight, ballot.total_weight, ballot.unanimous
                )
                self.meter.count("optimizer", sent)
            case "keep":
                if ballot.weight == 0:
                    self.inner.heal()


def _drift(mean_square: float, square_of_mean: float, scale: float) -> float:
    """Root mean square distance of vectors from their mean, relative to a norm, from squares."""
    if scale == 0:
        return 0.0 if mean_square == 0 else math.inf
    return math.sqrt(max(0.0, mean_square - square_of_mean) / scale)


def check_levels(strategy: Strategy, partitions: Mapping[str, Partition]) -> None:
    """Check that a strategy's levels are there, and warn of one that is the whole world.

    Args:
        strategy: its schedule names levels.
        partitions: what `Topology.partition` gives for the world.

    Raises:
        ValueError: naming the level that is missing.
    """
    for level in sorted(schedule.levels(strategy.schedule)):
        if level not in partitions:
            raise ValueError(unknown_level(level, partitions))
        if level != WORLD and len(partitions[level]) == 1 and len(partitions[level][0]) > 1:
            warnings.warn(
                f"level {level!r} holds all {len(partitions[level][0])} ranks, so that every step "
                "communicates with everybody; pass a topology with more than one group, such as "
                "topology.nodes(size=1)",
                stacklevel=4,
            )


def _gradients(
    ddp: DistributedDataParallel | None,
    strategy: Strategy,
    topology: Topology,
    everyone: Group,
    layout: Layout,
    meter: Meter,
) -> Local | Reduced:
    if ddp is None:
        return Local(layout)
    # What travels in several legs runs beside the backward pass, where DDP may communicate too.
    given = {} if strategy.gradient_wire != fp32() else {WORLD: Processes(ddp.process_group)}
    return Reduced(ddp, Layout(everyone, topology, given), strategy.gradient_wire, meter)


def _check_ddp(ddp: DistributedDataParallel | None, everyone: Group) -> None:
    if ddp is not None and dist.get_world_size(ddp.process_group) != everyone.size:
        raise ValueError(
            f"process_group must be the one of the DistributedDataParallel model, which has "
            f"{dist.get_world_size(ddp.process_group)} ranks; got one of {everyone.size}"
        )


def _agree_on_start(group: Group, replica: Replica, initial: str) -> None:
    differing = agreement.same_values_(group, replica.tensors)
    if initial == "broadcast":
        return
    for rank, names in enumerate(group.all_gather_object(differing)):
        if names:
            raise DisagreementError(
                f"ranks differ in initial values: {names[0]!r} on rank {rank} is not rank 0's; "
                "start from equal values, or pass initial='broadcast'"
            )
