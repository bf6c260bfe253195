"""What the reports of a contest come to: steps and seconds to a loss, and shares of computing."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from benchmarks.contenders import ALONE
from benchmarks.contest import Report

Point = tuple[int, float, float]
"""Steps taken, seconds so far, and held-out loss."""


@dataclass(frozen=True)
class Pace:
    """What a step takes, in the order of rounds.

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
class Arrival:
    """When a contender came to a loss.

    Attributes:
        steps: that it took.
        seconds: that it took.
        composed: whether the seconds are those of a stretch of steps, times the steps.
    """

    steps: float
    seconds: float
    composed: bool


def merged(reports: Sequence[Report]) -> Report:
    """All ranks' reports of the same training as one: the slowest time, the mean of losses."""
    first = reports[0]
    return Report(
        first.contender,
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
    """The pace of each contender in a launch that one without communication took part in."""
    rounds: dict[str, list[Report]] = defaultdict(list)
    for report in sorted(reports, key=lambda report: report.round):
        rounds[report.contender].append(report)
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
    """Steps and seconds at which the loss comes down to the target, between two evaluations.

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


def arrival(
    curve: Report, pace: Callable[[float], float], whole: Report | None, target: float
) -> Arrival | None:
    """When a contender comes to a loss over a network.

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
    return Arrival(steps, seconds if whole else pace(steps), composed=whole is None)
