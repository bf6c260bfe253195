"""Which strategy reaches a wanted share of time computing, and over which link."""

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
    """A way to communicate less, as places on three ladders."""

    period: int
    wire: int
    delay: int

    @property
    def cost(self) -> tuple[int, int, int]:
        """Least first: ladders that are climbed, rungs on all of them, rungs of the period."""
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
    """The smallest change that lets ranks compute a wanted share of the time.

    Three things can be changed, each along a ladder: the period (every step, then 8 to 512 steps
    of DiLoCo), the wire (fp32, bf16, int8, int4), and how parameters are sent (all at once; in
    fragments with a delay of 1 or of 5 steps, a quarter of the period at most). The fewest things
    changed win, then the fewest rungs in all, then the shortest period. What each costs in
    accuracy it cannot know.

    Args:
        job: what is trained; at most its first 4096 steps are planned.
        cluster: where.
        share: of time computing, above 0 and below 1.
        count: fragments, where there are any; at most the number of the model's layers.

    Returns:
        The strategy and its plan; None if none of them gets there.

    Raises:
        ValueError: if ``share`` is out of its range, or the model cannot be cut so often.

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
    """Bit/s that a level's link must have for a wanted share of time computing.

    Args:
        strategy: how.
        job: what is trained.
        cluster: where; the bandwidth that it has at the level does not count.
        share: of time computing, above 0 and below 1.
        level: which link.

    Returns:
        The least bandwidth within a thousandth; infinity if no bandwidth is enough.

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
