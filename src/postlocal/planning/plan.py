"""The plan of a run: time, bytes and memory."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from postlocal.outer import Outer
from postlocal.planning.cluster import Cluster
from postlocal.planning.job import Job, count
from postlocal.planning.replay import Totals, replay
from postlocal.planning.rounds import Rounds, rounds_of
from postlocal.schedule import RANK
from postlocal.schedule import levels as levels_of
from postlocal.strategies import Strategy
from postlocal.wire import STAGING_BYTES

_DAY = 86_400


@dataclass(frozen=True)
class Memory:
    """Bytes that stay on a rank, without activations and the memory of a backend.

    Attributes:
        parameters: of the model.
        gradients: the same number; DistributedDataParallel's buckets are not counted.
        optimizer: the inner optimizer's state.
        anchor: the parameters last agreed on.
        outer: the outer optimizer's state.
        residual: of wires with error feedback.
        under_way: contributions that are sent, or wait to be applied, during training; with
            ``keep_delayed_steps`` also the parameters that they were computed from.
        staging: the most staging memory of wires.
    """

    parameters: int
    gradients: int
    optimizer: int
    anchor: int
    outer: int
    residual: int
    under_way: int
    staging: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Plan:
    """The predicted cost of a run.

    Attributes:
        name: of the strategy.
        details: the strategy, as text.
        steps: optimizer steps.
        seconds_a_step: mean over the run, its end included.
        share_computing: share of seconds in which a rank computes.
        payload_bytes_a_step: bytes that the busiest rank sends, mean over the run: gradients,
            parameters, and optimizer state if it is averaged.
        syncs: number of synchronizations of parameters; each fragment counts as one.
        memory: bytes on a rank.

    Example:
        >>> from postlocal import strategies
        >>> from postlocal.planning import Cluster, Job, Link
        >>> two = Cluster(2, {"world": Link(bandwidth=1e9)})
        >>> planned = plan(strategies.diloco(period=100), Job(10**8, step=0.1, steps=1000), two)
        >>> Plan.from_dict(planned.to_dict()) == planned
        True
    """

    name: str
    details: str
    steps: int
    seconds_a_step: float
    share_computing: float
    payload_bytes_a_step: float
    syncs: int
    memory: Memory

    @property
    def hours(self) -> float:
        """Hours of the run."""
        return self.steps * self.seconds_a_step / 3600

    @property
    def payload_bytes_a_day(self) -> float:
        """Bytes that the busiest rank sends in 24 hours."""
        return self.payload_bytes_a_step * _DAY / self.seconds_a_step

    def to_dict(self) -> dict[str, Any]:
        """All fields and derived values, as plain values."""
        derived = {"hours": self.hours, "payload_bytes_a_day": self.payload_bytes_a_day}
        memory = asdict(self.memory) | {"total": self.memory.total}
        return asdict(self) | derived | {"memory": memory}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Plan":
        """The plan that `to_dict` gave, also after JSON."""
        fields = {name: values[name] for name in cls.__dataclass_fields__}
        memory = {name: values["memory"][name] for name in Memory.__dataclass_fields__}
        return cls(**fields | {"memory": Memory(**memory)})


def plan(strategy: Strategy, job: Job, cluster: Cluster) -> Plan:
    """Predict the cost of a run, without a cluster or training.

    The plan runs the strategy's own schedule over the whole run and takes bytes from the messages
    that its wires report. Fragments under way share the world's link one after the other. A
    schedule that adapts to measurements keeps its first rounds. Buffers, and the status messages of
    each synchronization, are not counted.

    Args:
        strategy: one of `postlocal.strategies`, or any other.
        job: the job.
        cluster: the cluster.

    Raises:
        ValueError: if the strategy names a level that the cluster lacks or that has no link, or
            its fragments do not match the model.

    Example:
        >>> from postlocal import strategies
        >>> from postlocal.planning import Cluster, Job, Link
        >>> regions = Cluster(8, {"world": Link(bandwidth=1e9, latency=0.04)})
        >>> planned = plan(strategies.diloco(period=100), Job(10**9, step=1.0), regions)
        >>> print(f"{planned.share_computing:.1%}, {planned.hours:.0f} hours")
        64.1%, 4 hours
    """
    return plan_rounds(rounds_of(strategy, job), strategy, job, cluster)


def plan_rounds(rounds: Rounds, strategy: Strategy, job: Job, cluster: Cluster) -> Plan:
    """The same with given rounds, which several clusters can share."""
    for level in levels_of(strategy.schedule):
        _ = cluster.groups[level]  # raises with the fix if it is missing
    totals = replay(rounds, strategy, job, cluster)
    return Plan(
        name=strategy.name,
        details=str(strategy),
        steps=job.steps,
        seconds_a_step=totals.seconds / job.steps,
        share_computing=job.steps * job.step_time.mean / totals.seconds,
        payload_bytes_a_step=totals.payload_bytes / job.steps,
        syncs=totals.syncs,
        memory=_memory(strategy, job, cluster, totals),
    )


def _memory(strategy: Strategy, job: Job, cluster: Cluster, totals: Totals) -> Memory:
    numel, parameters = job.numel, job.parameter_bytes
    wide = sum(_wide_bytes(tensor) for tensor in job.tensors.values())
    reduces = strategy.schedule(0, 1.0).gradients != RANK
    wires = [strategy.wire, *([strategy.gradient_wire] if reduces else [])]
    residuals = sum(wire.keeps_residuals for wire in wires)
    return Memory(
        parameters=parameters,
        gradients=parameters,
        optimizer=round(numel * job.optimizer_bytes),
        anchor=wide if strategy.anchored else 0,
        outer=round(numel * _bytes_a_value(strategy.outer)) if strategy.anchored else 0,
        residual=residuals * wide,
        under_way=4 * _under_way(strategy, job, totals),
        staging=min(STAGING_BYTES, wide) if cluster.workers > 1 else 0,
    )


def _under_way(strategy: Strategy, job: Job, totals: Totals) -> int:
    """Number of values under way that need memory of their own."""
    if strategy.fragments.delay:
        return totals.under_way * (2 if strategy.fragments.keep_delayed_steps else 1)
    apart = strategy.fragments.mix > 0 or job.parameter_bytes < 4 * job.numel
    if not (apart and strategy.anchored):
        return 0
    return max(map(count, job.split(strategy.fragments)))


def _bytes_a_value(outer: Outer) -> float:
    """Bytes of state that an outer optimizer keeps for each value, found by taking a step."""
    probe = torch.zeros(64)
    optimizer = outer([probe])
    probe.grad = torch.ones_like(probe)
    optimizer.step()
    state = optimizer.state[probe].values()
    kept = [each for each in state if isinstance(each, torch.Tensor) and each.shape == probe.shape]
    return sum(each.nbytes for each in kept) / probe.numel()


def _wide_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * max(4, tensor.itemsize)
