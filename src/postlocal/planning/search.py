"""Search for a strategy, or a bandwidth, that reaches a share of time computing."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from postlocal import strategies, wire
from postlocal.planning.cluster import Cluster
from postlocal.planning.job import Job
from postlocal.planning.plan import Plan, plan, plan_rounds
from postlocal.planning.rounds import rounds_of
from postlocal.schedule import WORLD
from postlocal.strategies import Strategy

_PERIODS = (1, 8, 16, 32, 64, 128, 256, 512)
_WIRES = ("fp32", "bf16", "int8", "int4")
_DELAYS = (None, 1, 5)  # None: all parameters at once, and training waits for them


@dataclass(frozen=True)
class _Change:
    """A change that reduces communication, as places in three lists."""

    period: int
    wire: int
    delay: int

    @property
    def cost(self) -> tuple[int, int, int]:
        """Sort key: number of lists that are used, sum of places, place of the period."""
        places = (self.period, self.wire, self.delay)
        return sum(place > 0 for place in places), sum(places), self.period

    def strategy(self, count: int) -> Strategy:
        carried = wire.named(_WIRES[self.wire])
        if not self.period:
            return strategies.ddp(gradient_wire=carried)
        delay = _DELAYS[self.delay]
        period = _PERIODS[self.period]
        if delay is None:
            return strategies.diloco(period, wire=carried)
        return strategies.streaming_diloco(period, count, delay, wire=carried)


def best(
    job: Job, cluster: Cluster, share: float = 0.95, count: int = 4
) -> tuple[Strategy, Plan] | None:
    """The smallest change with which ranks compute for a given share of the time.

    Three things can change, each along a list: the period (every step, then 8 to 512 steps of
    DiLoCo), the wire (fp32, bf16, int8, int4), and the delay (all parameters at once; fragments
    with a delay of 1 or 5 steps, at most a quarter of the period). The change of fewest things is
    preferred, then the fewest places in all, then the shortest period. The cost in accuracy is not
    known.

    Args:
        job: the job; at most its first 4096 steps are planned.
        cluster: the cluster.
        share: share of time computing, above 0 and below 1.
        count: number of fragments, at most the number of the model's layers.

    Returns:
        The strategy and its plan; None if no change reaches the share.

    Raises:
        ValueError: if ``share`` is out of its range, or the model has too few layers for ``count``.

    Example:
        >>> from postlocal.planning import Link
        >>> found = best(Job(10**9, step=1.0), Cluster(2, {"world": Link(bandwidth=1e9)}))
        >>> found[0].schedule.period, found[0].wire == wire.named("int4"), found[0].fragments.delay
        (128, True, 0)
    """
    if not 0 < share < 1:
        raise ValueError(f"share must be above 0 and below 1, got {share}")
    short = replace(job, steps=min(job.steps, 4096))
    for change in sorted(_changes(), key=lambda change: change.cost):
        strategy = change.strategy(count)
        planned = plan(strategy, short, cluster)
        if planned.share_computing >= share:
            return strategy, planned
    return None


def bandwidth_for(
    strategy: Strategy, job: Job, cluster: Cluster, share: float, level: str = WORLD
) -> float:
    """Bit/s that a level's link needs for a given share of time computing.

    Args:
        strategy: the strategy.
        job: the job.
        cluster: the cluster; its bandwidth at the level is ignored.
        share: share of time computing, above 0 and below 1.
        level: the level of the link.

    Returns:
        The least bandwidth, to a thousandth; infinity if no bandwidth is enough.

    Raises:
        ValueError: if ``share`` is out of its range.

    Example:
        >>> from postlocal.planning import Link
        >>> two = Cluster(2, {"world": Link(bandwidth=1.0)})
        >>> needed = bandwidth_for(strategies.local_sgd(100), Job(10**9, step=0.1), two, 0.5)
        >>> print(f"{needed:.2g}")
        3.2e+09
    """
    if not 0 < share < 1:
        raise ValueError(f"share must be above 0 and below 1, got {share}")

    rounds = rounds_of(strategy, job)

    def reached(bandwidth: float) -> float:
        there = cluster.with_bandwidth(bandwidth, level)
        return plan_rounds(rounds, strategy, job, there).share_computing

    if reached(math.inf) < share:
        return math.inf
    low, high = 0.0, 18.0  # exponents of ten
    while high - low > 4e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if reached(10**middle) >= share else (middle, high)
    return float(10**high)


def _changes() -> Iterator[_Change]:
    ladders = (range(len(_PERIODS)), range(len(_WIRES)), range(len(_DELAYS)))
    for period, carried, delay in product(*ladders):
        if 4 * (_DELAYS[delay] or 0) <= _PERIODS[period]:
            yield _Change(period, carried, delay)
