"""The rounds of a run, and the events of a round as `postlocal.sync.timeline` orders them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from postlocal.planning.job import Job
from postlocal.schedule import Round, Schedule, rollout
from postlocal.strategies import Strategy
from postlocal.sync.timeline import Event, Timeline

Rounds = Sequence[tuple[Round, int, int]]
"""Planned rounds, the number of steps taken of each, and the number of repetitions."""


@dataclass(frozen=True)
class Steps:
    """Steps of every rank, in each of which gradients are averaged at a level."""

    count: int
    gradients: str


def rounds_of(strategy: Strategy, job: Job) -> Rounds:
    """The rounds of a run, which do not depend on the cluster.

    Example:
        >>> from postlocal import strategies
        >>> for each in rounds_of(strategies.local_sgd(period=8), Job(1, step=1.0, steps=20)):
        ...     print(each)
        (Round(steps=8, gradients='rank', parameters='world'), 8, 2)
        (Round(steps=8, gradients='rank', parameters='world'), 4, 1)
    """
    rounds = groupby(_planned_and_taken(strategy.schedule, job))
    return [(planned, steps, sum(1 for _ in same)) for (planned, steps), same in rounds]


def events_of(
    timeline: Timeline, planned: Round, steps: int
) -> tuple[Timeline, list[Steps | Event]]:
    """Begin a round and take its first steps.

    Args:
        timeline: of the run so far.
        planned: the round.
        steps: number of its steps that are taken.

    Returns:
        The timeline after these steps; and its events in order, with the steps between them.

    Example:
        >>> from postlocal.fragments import streaming
        >>> planned = Round(8, "rank", "world")
        >>> timeline = Timeline.new(streaming(count=2, delay=1), planned)
        >>> for event in events_of(timeline, planned, steps=8)[1]:
        ...     print(event)
        Steps(count=4, gradients='rank')
        Start(fragment=0)
        Steps(count=1, gradients='rank')
        Apply(fragment=0)
        Steps(count=3, gradients='rank')
        Start(fragment=1)
    """
    timeline = timeline.begin(planned)
    events: list[Steps | Event] = []
    while steps:
        taken = min(steps, timeline.steps_to_next)
        timeline, due = timeline.step(taken)
        events += [Steps(taken, planned.gradients), *due]
        steps -= taken
    return timeline, events


def _planned_and_taken(schedule: Schedule, job: Job) -> Iterator[tuple[Round, int]]:
    """Planned rounds, and the number of steps taken of each: fewer if the run ends."""
    for start, taken in rollout(schedule, job.steps, job.lr):
        planned = taken
        if start + taken.steps == job.steps:
            planned = schedule(start, job.lr(start) if callable(job.lr) else job.lr)
        yield planned, taken.steps
