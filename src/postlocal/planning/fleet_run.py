"""The job of a fleet: synchronizations of all replicas, failures and returns, run by SimPy.

Times are drawn for all replicas at once, and each has its own clock. The job's time is reset to the
last safe state when steps have to be repeated.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable

import numpy as np
import simpy

from postlocal.planning.cluster import Link
from postlocal.planning.exchange import Costs
from postlocal.planning.fleet import Fleet
from postlocal.planning.job import Job
from postlocal.planning.membership import Membership, Waiting
from postlocal.planning.replica_clocks import ReplicaClocks
from postlocal.planning.rounds import Steps, events_of, rounds_of
from postlocal.schedule import RANK, WORLD
from postlocal.strategies import Strategy
from postlocal.sync.timeline import Apply, Average, Event, Start, Synchronize, Timeline

_TRIES = 1000  # attempts to reach the next checkpoint, after which a run is abandoned
_TICK = 1e-6  # seconds that the environment's clock may be behind


class FleetRun:
    """The job of a fleet, as a process of SimPy.

    Args:
        strategy: the strategy.
        job: the job.
        fleet: the fleet.
        source: random numbers.

    Attributes:
        membership: which hosts take part.
        clocks: clocks of the replicas, and how their time is spent.
    """

    def __init__(
        self, strategy: Strategy, job: Job, fleet: Fleet, source: np.random.Generator
    ) -> None:
        # Separate generators, so that a failure does not change later draws of step times.
        self._draws, failing, making = source.spawn(3)
        self._environment = simpy.Environment()
        self.membership = Membership(fleet, job, self._environment, making, failing)
        self.clocks = ReplicaClocks((fleet.hosts, fleet.node_size))
        self._strategy = strategy
        self._job = job
        self._fleet = fleet
        self._factors = fleet.factors(making)
        self._interval = fleet.failures.interval(fleet.hosts)
        self._head_start = job.parameter_overlap * job.step_time.mean
        self._rounds = rounds_of(strategy, job)
        self._timeline = Timeline.new(strategy.fragments, self._rounds[0][0])
        self._costs: dict[tuple[int, Link], Costs] = {}
        self._under_way: deque[float] = deque()  # when each exchange under way ends
        self._free = 0.0  # when the world's link is
        self._behind = 0.0  # seconds that were repeated, or stopped
        self._safe = 0.0  # the job's time when all was last safe
        self._tries = 0
        self._hopeless = self._environment.event()
        self._stands_since: float | None = None
        self._together = True
        self._process = self._environment.process(self._train())

    def follow(self, limit: float) -> tuple[float, bool]:
        """Run to the end, or for a limit of seconds; returns the seconds, and whether it ended."""
        if math.isfinite(self._fleet.failures.apart):
            self._environment.process(self.membership.fail(self._process.interrupt))
        late = self._environment.timeout(limit)
        self._environment.run(until=self._process | late | self._hopeless)
        finished = self._process.triggered
        seconds = self._behind + self._safe if finished else self._environment.now
        if not finished:
            self._leave()
        self.clocks.book("away", self.membership.away(seconds) * self._fleet.node_size)
        return seconds, finished

    def _leave(self) -> None:
        if self._stands_since is None:
            self.clocks.book("lost", self.clocks.unsafe(self.membership.members, self._now))
        else:
            self._stood_still(int(self.membership.members.sum()))

    @property
    def _now(self) -> float:
        """The job's own time, which is reset when steps have to be repeated."""
        return self._environment.now - self._behind

    def _train(self) -> Waiting:
        for planned, steps, times in self._rounds:
            for _ in range(times):
                self._together = planned.gradients == WORLD or not self._strategy.anchored
                self._timeline, events = events_of(self._timeline, planned, steps)
                yield from self._take(events)
                if planned.parameters == WORLD and self._timeline.ended:
                    yield from self._synchronized()
        self._timeline, last = self._timeline.finish()
        yield from self._take(last)
        yield from self._reach(self._latest)
        self._secure()

    def _take(self, events: Iterable[Steps | Event]) -> Waiting:
        for event in events:
            match event:
                case Steps(count, level):
                    yield from self._step(count, level)
                case Start(number):
                    yield from self._start(number)
                case Apply():
                    yield from self._apply()
                case Synchronize(number):
                    yield from self._start(number)
                    yield from self._apply()
                case Average(level):
                    self._average(level)

    def _step(self, count: int, level: str) -> Waiting:
        if level != WORLD:
            self._step_apart(count, level)
            return
        for _ in range(count):
            yield from self._step_together()

    def _step_together(self) -> Waiting:
        self._compute(1)
        yield from self._reach(self._latest)
        latest = self._latest()
        self.clocks.wait(latest, "stragglers")
        self.clocks.wait(latest + self._exchanges().gradients(WORLD).seconds, "links")
        if self._due:
            yield from self._checkpoint()

    def _step_apart(self, count: int, level: str) -> None:
        if level == RANK or self._fleet.node_size == 1:
            self._compute(count)
            return
        seconds = self._exchanges().gradients(level).seconds
        for _ in range(count):
            self._compute(1)
            self._gather_nodes()
            self.clocks.wait(self.clocks.clock + seconds, "links")

    def _compute(self, steps: int) -> None:
        drawn = self._job.step_time.draw(steps, self._factors.shape, self._draws)
        self.clocks.compute(steps, drawn * self._factors)

    def _gather_nodes(self) -> None:
        self.clocks.wait(self.clocks.clock.max(axis=1, keepdims=True), "stragglers")

    def _average(self, level: str) -> None:
        """Average parameters within each node."""
        self._gather_nodes()
        seconds = self._exchanges().narrow(level).seconds
        self.clocks.wait(self.clocks.clock + seconds, "links")

    def _start(self, number: int) -> Waiting:
        """Send a fragment when the slowest has reached it, after those that the link is sending."""
        yield from self._reach(self._latest)
        sent = self._present()
        seconds = self._exchanges().fragment(number).seconds
        self._free = max(self._free, sent - self._head_start) + seconds
        self._under_way.append(max(sent, self._free))

    def _apply(self) -> Waiting:
        """Wait for the oldest exchange."""
        ends = self._under_way.popleft()
        if not self._strategy.fragments.delay:
            yield from self._reach(lambda: ends)
        self.clocks.wait(min(ends, self._latest()), "stragglers")
        self.clocks.wait(ends, "links")  # the slowest waits for it too

    def _synchronized(self) -> Waiting:
        if not self._together:
            self._secure()
        elif self._due:
            yield from self._checkpoint()

    @property
    def _due(self) -> bool:
        return self._latest() - self._safe >= self._interval

    def _checkpoint(self) -> Waiting:
        self.clocks.wait(self._latest() + self._fleet.failures.saving, "stopped")
        yield from self._reach(self._latest)
        self._secure()

    def _secure(self) -> None:
        """Note that all work so far is safe, and admit the hosts that have returned."""
        self._tries = 0
        self._safe = self._present()
        self.clocks.secure(self.membership.members, self._safe)
        self._admit()

    def _reach(self, when: Callable[[], float]) -> Waiting:
        """Advance the job's time to ``when()``, which depends on the hosts that are left."""
        while (left := when() - self._now) > _TICK:
            try:
                yield self._environment.timeout(left)
            except simpy.Interrupt as failure:
                yield from self._lose(_lost(failure))

    def _lose(self, host: int) -> Waiting:
        self.membership.drop(host)
        self.clocks.book("lost", self.clocks.unsafe(host, self._now))
        if self._together or not self.membership.members.any():
            self.clocks.book("lost", self.clocks.unsafe(self.membership.members, self._now))
            yield from self._restart()

    def _restart(self) -> Waiting:
        """Restart from the last safe state with the present hosts; later work is repeated."""
        self._stands_since = self._environment.now
        while True:
            self._try_again()
            try:
                while not self.membership.any_left:
                    yield self.membership.arrival
                yield self._environment.timeout(self._fleet.failures.restart)
                if self.membership.any_left:
                    break
            except simpy.Interrupt as failure:
                self.membership.drop(_lost(failure))
                self._stood_still(1)
        self._stood_still(int(self.membership.members.sum()))
        self._stands_since = None
        self._behind = self._environment.now - self._safe
        self.clocks.begin_again(self._safe)
        self._admit()

    def _try_again(self) -> None:
        self._tries += 1
        if self._tries > _TRIES and not self._hopeless.triggered:
            self._hopeless.succeed()

    def _stood_still(self, hosts: int) -> None:
        assert self._stands_since is not None
        seconds = self._environment.now - self._stands_since
        self.clocks.book("stopped", seconds * hosts * self._fleet.node_size)

    def _admit(self) -> None:
        self.clocks.book("away", self.membership.admit() * self._fleet.node_size)

    def _latest(self) -> float:
        """The clock of the slowest host that takes part."""
        clock = self.clocks.clock.max(axis=1)
        return float(np.max(clock, where=self.membership.members, initial=0.0))

    def _present(self) -> float:
        """That clock, or the present if a host was lost later, while others waited for it."""
        return max(self._latest(), self._now)

    def _exchanges(self) -> Costs:
        """Costs of exchanges of the hosts that take part, in hundredths of the fleet."""
        count, uplink = self.membership.taking_part()
        grain = max(1, self._fleet.hosts // 100)
        key = (min(self._fleet.hosts, math.ceil(count / grain) * grain), uplink)
        if key not in self._costs:
            self._costs[key] = Costs(self._strategy, self._job, self._fleet.cluster(*key))
        return self._costs[key]


def _lost(failure: simpy.Interrupt) -> int:
    assert isinstance(failure.cause, int)
    return failure.cause
