"""The job of a fleet: meetings of all replicas, failures and returns, as SimPy runs them.

Times are drawn for all replicas at once, and each has a clock of its own. The job's time goes back
when something has to be done again, so that what follows need not know of it.
"""

import math
from collections import deque
from collections.abc import Callable

import numpy as np
import simpy

from postlocal.planning.cluster import Link
from postlocal.planning.course import Course, Event, Land, Launch, Meet, Steps, timetable
from postlocal.planning.exchange import Costs
from postlocal.planning.fleet import Fleet
from postlocal.planning.hosts import Hosts, Waiting
from postlocal.planning.job import Job
from postlocal.planning.ledger import Ledger
from postlocal.schedule import RANK, WORLD
from postlocal.strategies import Strategy

_TRIES = 1000  # to come from one checkpoint to the next, after which a run is left
_TICK = 1e-6  # seconds that the environment's clock may be behind


class FleetRun:
    """The job of a fleet, as a process, and what happens to it.

    Args:
        strategy: how.
        job: what is trained.
        fleet: by whom.
        source: of chance.

    Attributes:
        hosts: who takes part.
        ledger: what time went into.
    """

    def __init__(
        self, strategy: Strategy, job: Job, fleet: Fleet, source: np.random.Generator
    ) -> None:
        # Each has chance of its own, so that a failure does not change what is drawn later.
        self._draws, failing, making = source.spawn(3)
        self._environment = simpy.Environment()
        self.hosts = Hosts(fleet, job, self._environment, making, failing)
        self.ledger = Ledger((fleet.hosts, fleet.node_size))
        self._strategy = strategy
        self._job = job
        self._fleet = fleet
        self._factors = fleet.factors(making)
        self._interval = fleet.failures.interval(fleet.hosts)
        self._head_start = job.parameter_overlap * job.step_time.mean
        self._course = Course(strategy, strategy.fragments.count)
        self._costs: dict[tuple[int, Link], Costs] = {}
        self._air: deque[float] = deque()  # when the results of what is under way are there
        self._free = 0.0  # when the world's link is
        self._behind = 0.0  # seconds that were done again, or stood still
        self._safe = 0.0  # the job's time when all was last safe
        self._tries = 0
        self._hopeless = self._environment.event()
        self._stands_since: float | None = None
        self._together = True
        self._process = self._environment.process(self._train())

    def follow(self, limit: float) -> tuple[float, bool]:
        """Run to the end, or for so many seconds; tells which it was, and when."""
        if math.isfinite(self._fleet.failures.apart):
            self._environment.process(self.hosts.fail(self._process.interrupt))
        late = self._environment.timeout(limit)
        self._environment.run(until=self._process | late | self._hopeless)
        finished = self._process.triggered
        seconds = self._behind + self._safe if finished else self._environment.now
        if not finished:
            self._leave()
        self.ledger.book("away", self.hosts.away(seconds) * self._fleet.node_size)
        return seconds, finished

    def _leave(self) -> None:
        if self._stands_since is None:
            self.ledger.book("lost", self.ledger.unsafe(self.hosts.members, self._now))
        else:
            self._stood_still(int(self.hosts.members.sum()))

    @property
    def _now(self) -> float:
        """The job's own time, which goes back when something has to be done again."""
        return self._environment.now - self._behind

    def _train(self) -> Waiting:
        for planned, steps, times in timetable(self._strategy, self._job):
            for _ in range(times):
                self._together = planned.gradients == WORLD or not self._strategy.anchored
                for event in self._course.round(planned, steps):
                    yield from self._take(event)
                if planned.parameters == WORLD and steps == planned.steps:
                    yield from self._synchronized()
        for event in self._course.end():
            yield from self._take(event)
        yield from self._reach(self._latest)
        self._secure()

    def _take(self, event: Event) -> Waiting:
        match event:
            case Steps(count, level) if level == WORLD:
                for _ in range(count):
                    yield from self._step_together()
            case Steps(count, level):
                self._step_apart(count, level)
            case Launch(number):
                yield from self._launch(number)
            case Land():
                yield from self._land()
            case Meet(level):
                self._gather_nodes()
                seconds = self._exchanges().narrow(level).seconds
                self.ledger.wait(self.ledger.clock + seconds, "links")

    def _step_together(self) -> Waiting:
        self._compute(1)
        yield from self._reach(self._latest)
        latest = self._latest()
        self.ledger.wait(latest, "stragglers")
        self.ledger.wait(latest + self._exchanges().gradients(WORLD).seconds, "links")
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
            self.ledger.wait(self.ledger.clock + seconds, "links")

    def _compute(self, steps: int) -> None:
        drawn = self._job.step_time.draw(steps, self._factors.shape, self._draws)
        self.ledger.compute(steps, drawn * self._factors)

    def _gather_nodes(self) -> None:
        self.ledger.wait(self.ledger.clock.max(axis=1, keepdims=True), "stragglers")

    def _launch(self, number: int) -> Waiting:
        """Put a fragment on the link, behind what is there, once the slowest has got so far."""
        yield from self._reach(self._latest)
        sent = self._present()
        seconds = self._exchanges().fragment(number).seconds
        self._free = max(self._free, sent - self._head_start) + seconds
        self._air.append(max(sent, self._free))

    def _land(self) -> Waiting:
        arrives = self._air.popleft()
        if not self._strategy.fragments.delay:
            yield from self._reach(lambda: arrives)
        self.ledger.wait(min(arrives, self._latest()), "stragglers")
        self.ledger.wait(arrives, "links")  # the slowest has to wait for it too

    def _synchronized(self) -> Waiting:
        if not self._together:
            self._secure()
        elif self._due:
            yield from self._checkpoint()

    @property
    def _due(self) -> bool:
        return self._latest() - self._safe >= self._interval

    def _checkpoint(self) -> Waiting:
        self.ledger.wait(self._latest() + self._fleet.failures.saving, "stopped")
        yield from self._reach(self._latest)
        self._secure()

    def _secure(self) -> None:
        """All that was done so far stays, and those who have come back take part from here on."""
        self._tries = 0
        self._safe = self._present()
        self.ledger.secure(self.hosts.members, self._safe)
        self._admit()

    def _reach(self, when: Callable[[], float]) -> Waiting:
        """Let the job's time come, while hosts fail; ``when`` it is depends on those left."""
        while (left := when() - self._now) > _TICK:
            try:
                yield self._environment.timeout(left)
            except simpy.Interrupt as failure:
                yield from self._lose(_lost(failure))

    def _lose(self, host: int) -> Waiting:
        self.hosts.drop(host)
        self.ledger.book("lost", self.ledger.unsafe(host, self._now))
        if self._together or not self.hosts.members.any():
            self.ledger.book("lost", self.ledger.unsafe(self.hosts.members, self._now))
            yield from self._restart()

    def _restart(self) -> Waiting:
        """Come back to what was last safe, with those who are there; the rest is done again."""
        self._stands_since = self._environment.now
        while True:
            self._try_again()
            try:
                while not self.hosts.anybody:
                    yield self.hosts.arrival
                yield self._environment.timeout(self._fleet.failures.restart)
                if self.hosts.anybody:
                    break
            except simpy.Interrupt as failure:
                self.hosts.drop(_lost(failure))
                self._stood_still(1)
        self._stood_still(int(self.hosts.members.sum()))
        self._stands_since = None
        self._behind = self._environment.now - self._safe
        self.ledger.begin_again(self._safe)
        self._admit()

    def _try_again(self) -> None:
        self._tries += 1
        if self._tries > _TRIES and not self._hopeless.triggered:
            self._hopeless.succeed()

    def _stood_still(self, hosts: int) -> None:
        assert self._stands_since is not None
        seconds = self._environment.now - self._stands_since
        self.ledger.book("stopped", seconds * hosts * self._fleet.node_size)

    def _admit(self) -> None:
        self.ledger.book("away", self.hosts.admit() * self._fleet.node_size)

    def _latest(self) -> float:
        """When the slowest of those who take part has got so far."""
        clock = self.ledger.clock.max(axis=1)
        return float(np.max(clock, where=self.hosts.members, initial=0.0))

    def _present(self) -> float:
        """When the slowest has got so far, or was lost, if that is later, while waited for."""
        return max(self._latest(), self._now)

    def _exchanges(self) -> Costs:
        """Costs of exchanges of those who take part, counted in hundredths of the fleet."""
        count, uplink = self.hosts.taking_part()
        grain = max(1, self._fleet.hosts // 100)
        key = (min(self._fleet.hosts, math.ceil(count / grain) * grain), uplink)
        if key not in self._costs:
            self._costs[key] = Costs(self._strategy, self._job, self._fleet.cluster(*key))
        return self._costs[key]


def _lost(failure: simpy.Interrupt) -> int:
    assert isinstance(failure.cause, int)
    return failure.cause
