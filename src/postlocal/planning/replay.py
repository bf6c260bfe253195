"""A replay of a whole run on a model of seconds, without computing or sending."""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace

from postlocal.planning import exchange
from postlocal.planning.cluster import Cluster
from postlocal.planning.exchange import Cost
from postlocal.planning.job import Job, count
from postlocal.planning.rounds import Rounds, Steps, events_of
from postlocal.schedule import WORLD, Round
from postlocal.strategies import Strategy
from postlocal.sync.timeline import Apply, Average, Event, Start, Synchronize, Timeline


@dataclass
class Totals:
    """The cost of a replayed run.

    Attributes:
        seconds: from the first step to the end.
        payload_bytes: bytes that the busiest rank sent.
        syncs: number of synchronizations of parameters; each fragment counts as one.
        under_way: greatest number of values that were under way during training.
    """

    seconds: float = 0.0
    payload_bytes: int = 0
    syncs: int = 0
    under_way: int = 0


def replay(rounds: Rounds, strategy: Strategy, job: Job, cluster: Cluster) -> Totals:
    """Replay the rounds of a run, and its end, which makes all replicas equal.

    Raises:
        ValueError: if the strategy does not match the model or the cluster.

    Example:
        >>> from postlocal import strategies
        >>> from postlocal.planning.cluster import Link
        >>> from postlocal.planning.rounds import rounds_of
        >>> two = Cluster(2, {"world": Link(bandwidth=8e6)})
        >>> strategy, job = strategies.local_sgd(period=10), Job(250_000, step=1.0, steps=20)
        >>> replay(rounds_of(strategy, job), strategy, job, two)
        Totals(seconds=22.0, payload_bytes=2000000, syncs=2, under_way=0)
    """
    run = _Run(strategy, job, cluster, rounds[0][0])
    for planned, steps, times in rounds:
        run.repeat(planned, steps, times)
    run.end()
    return run.totals


@dataclass
class _Sending:
    """The exchange of a fragment: the second at which it ends, and its number of values."""

    ends: float
    numel: int


class _Run:
    """The clock of a run, and the exchanges on the world's link."""

    def __init__(self, strategy: Strategy, job: Job, cluster: Cluster, first: Round) -> None:
        self.totals = Totals()
        self._costs = exchange.Costs(strategy, job, cluster)
        self._cluster = cluster
        self._step_time = job.step_time
        self._delayed = strategy.fragments.delay > 0
        self._head_start = job.parameter_overlap * job.step_time.mean
        self._numels = [count(part) for part in job.split(strategy.fragments)]
        self._timeline = Timeline.new(strategy.fragments, first)
        self._under_way: deque[_Sending] = deque()
        self._free = 0.0  # the second from which on the world's link is
        # Steps since the ranks of each level last synchronized, from the narrowest level on.
        self._steps_apart = dict.fromkeys(cluster.groups.levels[1:], 0)

    def repeat(self, planned: Round, steps: int, times: int) -> None:
        """Replay a round a number of times: one by one until each costs the same as the last."""
        like: tuple[float, ...] = ()
        for done in range(times):
            before = replace(self.totals)
            self._timeline, events = events_of(self._timeline, planned, steps)
            self._take(events)
            last, like = like, self._signature(before.seconds)
            if _close(last, like):
                self._skip(before, times - done - 1)
                return

    def end(self) -> None:
        """Apply the exchanges under way, and make all replicas equal."""
        self._timeline, events = self._timeline.finish()
        self._take(events)

    def _take(self, events: Iterable[Steps | Event]) -> None:
        for event in events:
            match event:
                case Steps(steps, gradients):
                    self._advance(steps, gradients)
                case Start(number):
                    self._start(number)
                case Apply():
                    self._apply()
                case Synchronize(number):
                    self._start(number)
                    self._apply()
                case Average(level):
                    self._average(level)

    def _advance(self, steps: int, gradients: str) -> None:
        reduction = self._costs.gradients(gradients)
        seconds = self._step_time.slowest(self._cluster.size(gradients)) + reduction.seconds
        self.totals.payload_bytes += steps * reduction.payload_bytes
        self.totals.seconds += steps * seconds
        for level in self._steps_apart:
            self._steps_apart[level] += steps
        self._note_synchronized(gradients)

    def _start(self, number: int) -> None:
        """Send a fragment, after those that the link is still sending."""
        self._wait_for_the_slowest(WORLD)
        sent = self._costs.fragment(number)
        self._free = max(self._free, self.totals.seconds - self._head_start) + sent.seconds
        self._count(sent)
        self._under_way.append(_Sending(self._free, self._numels[number]))
        if self._delayed:
            under_way = sum(sending.numel for sending in self._under_way)
            self.totals.under_way = max(self.totals.under_way, under_way)

    def _apply(self) -> None:
        """Wait for the oldest exchange."""
        self.totals.seconds = max(self.totals.seconds, self._under_way.popleft().ends)

    def _average(self, level: str) -> None:
        """Average parameters at a narrower level."""
        sent = self._costs.narrow(level)
        self._wait_for_the_slowest(level)
        self.totals.seconds += sent.seconds
        self._count(sent)

    def _count(self, sent: Cost) -> None:
        self.totals.payload_bytes += sent.payload_bytes
        self.totals.syncs += 1

    def _wait_for_the_slowest(self, level: str) -> None:
        """Groups that synchronized since count as one rank; see `postlocal.planning.step_time`."""
        apart = self._steps_apart[level]
        later = [level for level, steps in self._steps_apart.items() if steps < apart]
        widest = max(map(self._cluster.size, later), default=1)
        groups = max(1, self._cluster.size(level) // widest)
        excess = self._step_time.slowest(groups) - self._step_time.mean
        self.totals.seconds += math.sqrt(apart) * excess
        self._note_synchronized(level)

    def _note_synchronized(self, level: str) -> None:
        """Ranks of a level, and so those of all levels within it."""
        size = self._cluster.size(level)
        for each in self._steps_apart:
            if self._cluster.size(each) <= size:
                self._steps_apart[each] = 0

    def _signature(self, since: float) -> tuple[float, ...]:
        """The state on which the cost of the next round depends, and the cost of this one."""
        now = self.totals.seconds
        backlog = max(0.0, self._free - now + self._head_start)
        arrivals = (max(0.0, sending.ends - now) for sending in self._under_way)
        return (now - since, backlog, *self._steps_apart.values(), *arrivals)

    def _skip(self, before: Totals, times: int) -> None:
        """Repeat the cost from ``before`` to now a number of times."""
        totals = self.totals
        later = times * (totals.seconds - before.seconds)
        totals.seconds += later
        totals.payload_bytes += times * (totals.payload_bytes - before.payload_bytes)
        totals.syncs += times * (totals.syncs - before.syncs)
        self._free += later
        for sending in self._under_way:
            sending.ends += later


def _close(first: tuple[float, ...], second: tuple[float, ...]) -> bool:
    pairs = zip(first, second, strict=False)
    same = (math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12) for a, b in pairs)
    return len(first) == len(second) and all(same)
