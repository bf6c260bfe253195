"""What happens in a run, in order, with no clock: steps, launches, landings and meetings.

It takes the rounds that `postlocal.schedule.rollout` gives, and launches and lands fragments where
`postlocal.sync.clock.Sync` does.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from postlocal.fragments import launch_steps
from postlocal.planning.job import Job
from postlocal.schedule import WORLD, Round, Schedule, rollout
from postlocal.strategies import Strategy

Timetable = Sequence[tuple[Round, int, int]]
"""Rounds as planned, how many steps of each are taken, and how many times over."""


@dataclass(frozen=True)
class Steps:
    """Steps of every rank, whose gradients meet at a level."""

    count: int
    gradients: str


@dataclass(frozen=True)
class Launch:
    """A fragment is sent; where there is no delay, it lands at once."""

    fragment: int


@dataclass(frozen=True)
class Land:
    """The fragment that was launched first, of those under way, is applied."""

    fragment: int


@dataclass(frozen=True)
class Meet:
    """Parameters are averaged at a level below the world's."""

    level: str


Event = Steps | Launch | Land | Meet


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


def _rounds(schedule: Schedule, job: Job) -> Iterator[tuple[Round, int]]:
    """Rounds as planned, and how many steps of each are taken: not all where the run ends."""
    for start, taken in rollout(schedule, job.steps, job.lr):
        planned = taken
        if start + taken.steps == job.steps:
            planned = schedule(start, job.lr(start) if callable(job.lr) else job.lr)
        yield planned, taken.steps


@dataclass
class _Airborne:
    """A fragment under way, and in how many steps it is landed."""

    fragment: int
    steps: int


class Course:
    """The events of a run, round by round.

    Args:
        strategy: how.
        fragments: number of parts that parameters are cut into.

    Example:
        >>> from postlocal import strategies
        >>> course = Course(strategies.streaming_diloco(period=8, fragments=2, delay=1), 2)
        >>> for event in course.round(Round(8, "rank", "world"), steps=8):
        ...     print(event)
        Steps(count=4, gradients='rank')
        Launch(fragment=0)
        Steps(count=1, gradients='rank')
        Land(fragment=0)
        Steps(count=3, gradients='rank')
        Launch(fragment=1)
    """

    def __init__(self, strategy: Strategy, fragments: int) -> None:
        self._streams = strategy.streams
        self._delay = strategy.fragments.delay
        self._air: deque[_Airborne] = deque()
        self._since = [0] * fragments  # steps since each fragment was launched
        self._lockstep = True
        self._agreed = True

    def round(self, planned: Round, steps: int) -> Iterator[Event]:
        """The first ``steps`` steps of a round."""
        launches = launch_steps(planned.steps, len(self._since))
        if planned.parameters != WORLD:
            launches = ()
        position = 0
        for stop in self._stops(launches, steps):
            yield self._advance(planned.gradients, stop - position)
            position = stop
            while self._air and self._air[0].steps <= 0:
                yield self._land()
            for number, launch in enumerate(launches):
                if launch == stop:
                    yield from self._launch(number)
        self._lockstep = self._lockstep and planned.gradients == WORLD
        self._agreed = False
        if steps == planned.steps:
            self._agreed = planned.parameters == WORLD and not self._streams
            if planned.parameters not in (None, WORLD):
                yield Meet(planned.parameters)

    def end(self) -> Iterator[Event]:
        """Land what is under way, and make all replicas equal."""
        while self._air:
            yield self._land()
        if not self._lockstep and not self._agreed:
            for number, steps in enumerate(self._since):
                if steps or not self._streams:  # else it was launched at this very step
                    yield Launch(number)
                    yield Land(number)

    def _stops(self, launches: tuple[int, ...], steps: int) -> list[int]:
        """Steps of the round after which something lands or is launched, and its last."""
        landings = {flight.steps for flight in self._air}
        landings |= {launch + self._delay for launch in launches}
        return sorted({stop for stop in landings | {*launches, steps} if 0 < stop <= steps})

    def _advance(self, gradients: str, steps: int) -> Steps:
        self._since = [before + steps for before in self._since]
        for flight in self._air:
            flight.steps -= steps
        return Steps(steps, gradients)

    def _launch(self, number: int) -> Iterator[Event]:
        while any(flight.fragment == number for flight in self._air):
            yield self._land()  # after a round that was cut short
        self._since[number] = 0
        self._air.append(_Airborne(number, self._delay))
        yield Launch(number)
        if not self._delay:
            yield self._land()

    def _land(self) -> Land:
        return Land(self._air.popleft().fragment)
