"""A whole run by the clock, with nothing computed and nothing sent.

It takes the rounds that `postlocal.schedule.rollout` gives, and launches and lands fragments where
`postlocal.sync.Sync` does.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from postlocal.fragments import launch_steps
from postlocal.planning import exchange
from postlocal.planning.cluster import Cluster
from postlocal.planning.exchange import Exchange
from postlocal.planning.job import Job, count
from postlocal.schedule import WORLD, Round, Schedule, rollout
from postlocal.strategies import Strategy
from postlocal.wire import fp32


@dataclass
class Totals:
    """What a run took.

    Attributes:
        seconds: from the first step to the end.
        payload_bytes: bytes that the busiest rank sent.
        syncs: number of synchronizations of parameters, each fragment's its own.
        under_way: greatest number of values that were under way while training went on.
    """

    seconds: float = 0.0
    payload_bytes: int = 0
    syncs: int = 0
    under_way: int = 0


Timetable = Sequence[tuple[Round, int, int]]
"""Rounds as planned, how many steps of each are taken, and how many times over."""


def timetable(strategy: Strategy, job: Job) -> Timetable:
    """The rounds of a run, on whatever cluster.

    Example:
        >>> from postlocal import strategies
        >>> for each in timetable(strategies.local_sgd(period=8), Job(1, step=1.0, steps=20)):
        ...     print(each)
        (Round(steps=8, gradients='rank', parameters='world'), 8, 2)
        (Round(steps=8, gradients='rank', parameters='world'), 4, 1)
    """
    rounds = groupby(_rounds(strategy.schedule, job))
    return [(planned, steps, sum(1 for _ in same)) for (planned, steps), same in rounds]


def replay(rounds: Timetable, strategy: Strategy, job: Job, cluster: Cluster) -> Totals:
    """Take the rounds of a run, and its end, where all replicas become equal.

    Raises:
        ValueError: if the strategy does not fit the model or the cluster.

    Example:
        >>> from postlocal import strategies
        >>> from postlocal.planning.cluster import Link
        >>> two = Cluster(2, {"world": Link(bandwidth=8e6)})
        >>> strategy, job = strategies.local_sgd(period=10), Job(250_000, step=1.0, steps=20)
        >>> replay(timetable(strategy, job), strategy, job, two)
        Totals(seconds=22.0, payload_bytes=2000000, syncs=2, under_way=0)
    """
    run = _Run(strategy, job, cluster)
    for planned, steps, times in rounds:
        run.repeat(planned, steps, times)
    run.end()
    return run.totals


def _rounds(schedule: Schedule, job: Job) -> Iterator[tuple[Round, int]]:
    """Rounds as planned, and how many steps of each are taken: not all where the run ends."""
    for start, taken in rollout(schedule, job.steps, job.lr):
        planned = taken
        if start + taken.steps == job.steps:
            planned = schedule(start, job.lr(start) if callable(job.lr) else job.lr)
        yield planned, taken.steps


@dataclass
class _Airborne:
    """A fragment under way.

    Attributes:
        fragment: its number.
        steps: until it is landed.
        arrives: at what second its result is there.
        numel: of its values.
    """

    fragment: int
    steps: int
    arrives: float
    numel: int


class _Run:
    """The clock of a run, and what is on the world's link."""

    def __init__(self, strategy: Strategy, job: Job, cluster: Cluster) -> None:
        self.totals = Totals()
        self._strategy = strategy
        self._cluster = cluster
        self._job = job
        self._mean = job.step_time.mean
        self._delay = strategy.fragments.delay
        self._head_start = job.parameter_overlap * self._mean
        parts = job.split(strategy.fragments)
        self._numels = [count(part) for part in parts]
        self._exchanges = [
            exchange.of_tensors(strategy.wire, part, cluster, WORLD) for part in parts
        ]
        if strategy.optimizer_state == "average":
            self._exchanges[-1] += self._optimizer_state(WORLD)
        self._narrow: dict[str, Exchange] = {}
        self._steps: dict[str, tuple[int, float]] = {}
        self._air: deque[_Airborne] = deque()
        self._free = 0.0  # at what second the world's link is
        self._since = [0] * len(parts)  # steps since each fragment was launched
        # Steps since the ranks of each level last met, from the narrowest level on.
        self._alone = dict.fromkeys(cluster.layout.levels[1:], 0)
        self._lockstep = True
        self._agreed = True

    def repeat(self, planned: Round, steps: int, times: int) -> None:
        """A round so many times over: one by one, until each is like the one before."""
        like: tuple[float, ...] = ()
        for done in range(times):
            before = replace(self.totals)
            self._take(planned, steps)
            last, like = like, self._signature(before.seconds)
            if _close(last, like):
                self._skip(before, times - done - 1)
                return

    def end(self) -> None:
        """Land what is under way, and make all replicas equal."""
        while self._air:
            self._land()
        if not self._lockstep and not self._agreed:
            for number, steps in enumerate(self._since):
                if steps or not self._strategy.streams:  # else it was launched at this very step
                    self._synchronize(number)

    def _take(self, planned: Round, steps: int) -> None:
        """The first ``steps`` steps of a round."""
        launches = launch_steps(planned.steps, len(self._numels))
        position = 0
        for stop in self._stops(launches if planned.parameters == WORLD else (), steps):
            self._advance(planned.gradients, stop - position)
            position = stop
            while self._air and self._air[0].steps <= 0:
                self._land()
            if planned.parameters == WORLD:
                for number, launch in enumerate(launches):
                    if launch == stop:
                        self._launch(number)
        self._lockstep = self._lockstep and planned.gradients == WORLD
        self._agreed = False
        if steps == planned.steps:
            self._agreed = planned.parameters == WORLD and not self._strategy.streams
            if planned.parameters not in (None, WORLD):
                self._meet(planned.parameters)

    def _stops(self, launches: tuple[int, ...], steps: int) -> list[int]:
        """Steps of the round after which something lands or is launched, and its last."""
        landings = {flight.steps for flight in self._air}
        landings |= {launch + self._delay for launch in launches}
        return sorted({stop for stop in landings | {*launches, steps} if 0 < stop <= steps})

    def _advance(self, gradients: str, steps: int) -> None:
        payload, seconds = self._step(gradients)
        self.totals.payload_bytes += steps * payload
        self.totals.seconds += steps * seconds
        self._since = [before + steps for before in self._since]
        for level in self._alone:
            self._alone[level] += steps
        self._have_met(gradients)
        for flight in self._air:
            flight.steps -= steps

    def _step(self, level: str) -> tuple[int, float]:
        """Bytes and seconds of a step whose gradients are reduced at a level."""
        if level not in self._steps:
            job, wire = self._job, self._strategy.gradient_wire
            reduction = exchange.of_gradients(wire, job.tensors, self._cluster, level)
            hidden = job.gradient_overlap * self._mean if exchange.hides(wire) else 0.0
            seconds = job.step_time.slowest(self._cluster.size(level))
            seconds += max(0.0, reduction.seconds - hidden)
            self._steps[level] = (reduction.payload_bytes, seconds)
        return self._steps[level]

    def _launch(self, number: int) -> None:
        while any(flight.fragment == number for flight in self._air):
            self._land()  # after a round that was cut short
        if not self._delay:
            self._synchronize(number)
            return
        arrives = self._occupy(number)
        self._air.append(_Airborne(number, self._delay, arrives, self._numels[number]))
        under_way = sum(flight.numel for flight in self._air)
        self.totals.under_way = max(self.totals.under_way, under_way)

    def _land(self) -> None:
        flight = self._air.popleft()
        self.totals.seconds = max(self.totals.seconds, flight.arrives)

    def _synchronize(self, number: int) -> None:
        arrives = self._occupy(number)
        self.totals.seconds = max(self.totals.seconds, arrives)

    def _occupy(self, number: int) -> float:
        """Put a fragment on the link, behind what is there; tells when its result arrives."""
        self._wait_for_the_slowest(WORLD)
        sent = self._exchanges[number]
        self._since[number] = 0
        self._free = max(self._free, self.totals.seconds - self._head_start) + sent.seconds
        self._count(sent)
        return self._free

    def _meet(self, level: str) -> None:
        """Average parameters at a narrower level."""
        if level not in self._narrow:
            self._narrow[level] = exchange.of_tensors(
                fp32(), self._job.tensors, self._cluster, level
            )
            if self._strategy.optimizer_state == "average":
                self._narrow[level] += self._optimizer_state(level)
        self._wait_for_the_slowest(level)
        self.totals.seconds += self._narrow[level].seconds
        self._count(self._narrow[level])

    def _optimizer_state(self, level: str) -> Exchange:
        return exchange.of_tensors(fp32(), self._job.optimizer_tensors, self._cluster, level)

    def _count(self, sent: Exchange) -> None:
        self.totals.payload_bytes += sent.payload_bytes
        self.totals.syncs += 1

    def _wait_for_the_slowest(self, level: str) -> None:
        """Groups that met since are as one rank; see `postlocal.planning.step_time`."""
        alone = self._alone[level]
        met = [self._cluster.size(each) for each, steps in self._alone.items() if steps < alone]
        groups = max(1, self._cluster.size(level) // max(met, default=1))
        excess = self._job.step_time.slowest(groups) - self._mean
        self.totals.seconds += math.sqrt(alone) * excess
        self._have_met(level)

    def _have_met(self, level: str) -> None:
        """Ranks of a level, and so those of all levels within it."""
        size = self._cluster.size(level)
        for each in self._alone:
            if self._cluster.size(each) <= size:
                self._alone[each] = 0

    def _signature(self, since: float) -> tuple[float, ...]:
        """What the next round's cost depends on, and this one's."""
        now = self.totals.seconds
        backlog = max(0.0, self._free - now + self._head_start)
        arrivals = (max(0.0, flight.arrives - now) for flight in self._air)
        return (now - since, backlog, *self._alone.values(), *arrivals)

    def _skip(self, before: Totals, times: int) -> None:
        """Go on as from ``before`` to now, so many times."""
        totals = self.totals
        later = times * (totals.seconds - before.seconds)
        totals.seconds += later
        totals.payload_bytes += times * (totals.payload_bytes - before.payload_bytes)
        totals.syncs += times * (totals.syncs - before.syncs)
        self._free += later
        for flight in self._air:
            flight.arrives += later


def _close(first: tuple[float, ...], second: tuple[float, ...]) -> bool:
    pairs = zip(first, second, strict=False)
    same = (math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12) for a, b in pairs)
    return len(first) == len(second) and all(same)
