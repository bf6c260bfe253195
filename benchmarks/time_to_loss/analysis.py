"""Steps and seconds to a loss, and shares of computing, from the reports of workers."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from benchmarks.time_to_loss.methods import ALONE, DDP, METHODS
from benchmarks.time_to_loss.worker import Report

Point = tuple[int, float, float]
"""Steps taken, seconds so far, and held-out loss."""

Spread = tuple[float, float, float]
"""Median, least and greatest."""


@dataclass(frozen=True)
class Pace:
    """Time and bytes of a step, in the order of rounds.

    Attributes:
        seconds: a step.
        alone: seconds a step in the same round with no communication.
        bytes_up: a step, of the host that sends most.
    """

    seconds: tuple[float, ...]
    alone: tuple[float, ...]
    bytes_up: float

    @property
    def median(self) -> float:
        """Seconds a step."""
        return statistics.median(self.seconds)

    @property
    def computing(self) -> tuple[float, ...]:
        """Share of time that is computing, round by round."""
        return tuple(a / b for a, b in zip(self.alone, self.seconds, strict=True))


@dataclass(frozen=True)
class TimeToLoss:
    """Steps and seconds in which a method reached a loss.

    Attributes:
        steps: until the loss.
        seconds: until the loss.
        composed: whether the seconds are those of timed steps, times the number of steps.
    """

    steps: float
    seconds: float
    composed: bool


def merged(reports: Sequence[Report]) -> Report:
    """All ranks' reports of the same training as one: the slowest time, the mean of losses."""
    first = reports[0]
    return Report(
        first.method,
        first.round,
        max(report.seconds for report in reports),
        first.steps,
        max(report.bytes_up for report in reports),
        [
            (points[0][0], max(p[1] for p in points), statistics.mean(p[2] for p in points))
            for points in zip(*(report.losses for report in reports), strict=True)
        ],
    )


def paces(reports: Iterable[Report]) -> dict[str, Pace]:
    """The pace of each method in a launch, which includes the one without communication."""
    rounds: dict[str, list[Report]] = defaultdict(list)
    for report in sorted(reports, key=lambda report: report.round):
        rounds[report.method].append(report)
    alone = tuple(report.seconds / report.steps for report in rounds[ALONE])
    return {
        name: Pace(
            tuple(report.seconds / report.steps for report in own),
            alone,
            statistics.median(report.bytes_up / report.steps for report in own),
        )
        for name, own in rounds.items()
    }


def crossing(points: Sequence[Point], target: float) -> tuple[float, float] | None:
    """Steps and seconds at which the loss falls to the target, between two evaluations.

    Returns:
        None if it never does.

    Example:
        >>> crossing([(10, 1.0, 3.0), (20, 2.0, 2.0)], target=2.5)
        (15.0, 1.5)
    """
    for before, after in zip([points[0], *points], points, strict=False):
        if after[2] <= target:
            fall = before[2] - after[2]
            share = (before[2] - target) / fall if fall > 0 else 1.0
            steps, seconds = (a + share * (b - a) for a, b in zip(before[:2], after, strict=False))
            return steps, seconds
    return None


def time_to_loss(
    curve: Report, pace: Callable[[float], float], whole: Report | None, target: float
) -> TimeToLoss | None:
    """Time of a method to a loss over a network; None if it is not reached.

    Args:
        curve: its run with no limit on the network.
        pace: seconds over the network for so many steps from the start.
        whole: its whole run over the network, if there was one; the curve is used otherwise.
        target: the loss.
    """
    crossed = crossing((whole or curve).losses, target)
    if crossed is None:
        return None
    steps, seconds = crossed
    return TimeToLoss(steps, seconds if whole else pace(steps), composed=whole is None)


@dataclass
class Measurements:
    """All that was measured.

    Attributes:
        seeds: of the runs.
        paces: by rate, and then by method.
        curves: whole runs with no limit on the network, by method and seed.
        wholes: whole runs over a network, by method, seed and rate.
    """

    seeds: Sequence[int]
    paces: dict[str, dict[str, Pace]] = field(default_factory=dict)
    curves: dict[tuple[str, int], Report] = field(default_factory=dict)
    wholes: dict[tuple[str, int, str], Report] = field(default_factory=dict)

    def times(self, name: str, rate: str) -> list[TimeToLoss | None]:
        """Times to DDP's last loss at a rate, seed by seed; None where it was not reached."""
        return [
            time_to_loss(
                self.curves[name, seed],
                partial(self.seconds, name, rate),
                self.wholes.get((name, seed, rate)),
                target=self.curves[DDP, seed].losses[-1][2],
            )
            for seed in self.seeds
        ]

    def seconds(self, name: str, rate: str, steps: float) -> float:
        """Seconds of so many steps from the start, by the timed steps."""
        dense = min(steps, METHODS[name].dense)
        paces = self.paces[rate]
        return dense * paces[DDP].median + (steps - dense) * paces[name].median

    def row(self, name: str, rate: str) -> dict[str, Any]:
        """All figures of a method at a rate; those of the loss only if it was reached."""
        pace = self.paces[rate][name]
        figures: dict[str, Any] = {
            "seconds_a_step": spread(pace.seconds),
            "computing": spread(pace.computing),
            "bytes_up_a_step": pace.bytes_up,
        }
        if name == ALONE:
            return figures
        own, ddp = self.times(name, rate), self.times(DDP, rate)
        last = [self.curves[name, seed].losses[-1][2] for seed in self.seeds]
        reached = [(a, b) for a, b in zip(own, ddp, strict=True) if a is not None and b]
        figures |= {
            "last_loss": spread(last),
            "reached": len(reached),
            "composed": any(a.composed for a, _ in reached),
        }
        if len(reached) < len(self.seeds):
            return figures
        alone = statistics.median(pace.alone)
        return figures | {
            "steps": spread(a.steps for a, _ in reached),
            "seconds": spread(a.seconds for a, _ in reached),
            "sooner_than_ddp": spread(b.seconds / a.seconds for a, b in reached),
            "over_its_limit": spread(a.seconds / (a.steps * alone) for a, _ in reached),
        }


def spread(values: Iterable[float]) -> Spread:
    """Median, least and greatest."""
    kept = list(values)
    return statistics.median(kept), min(kept), max(kept)
