"""How long a step takes, and how long the slowest of several ranks takes.

Ranks that meet wait for the slowest of them. Where each took one step since they last met, that is
the expected maximum of as many draws; where each took ``n`` steps on its own, fast and slow steps
even out, and the excess over the mean grows with the square root of ``n`` only. For normal times
that is exact, for others the limit of many steps. Time lost to stragglers is therefore one more
thing that falls with the period: it is divided by its square root.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist, fmean
from typing import Protocol

_POINTS = 4096  # of the integral over a normal distribution's quantiles


class StepTime(Protocol):
    """The time of a step, drawn anew for each rank and step."""

    @property
    def mean(self) -> float:
        """Mean seconds a step."""
        ...

    def slowest(self, workers: int) -> float:
        """Expected seconds of the slowest of so many ranks, in one step."""
        ...


@dataclass(frozen=True)
class steady:
    """Each step of each rank takes the same time.

    Args:
        mean: seconds, above 0.

    Raises:
        ValueError: if ``mean`` is not above 0.

    Example:
        >>> steady(0.5).slowest(workers=100)
        0.5
    """

    mean: float

    def __post_init__(self) -> None:
        _check_mean(self.mean)

    def slowest(self, workers: int) -> float:
        return self.mean


@dataclass(frozen=True)
class normal:
    """Times of a normal distribution.

    Args:
        mean: seconds, above 0.
        deviation: standard deviation in seconds, at least 0.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> round(normal(mean=1.0, deviation=0.1).slowest(workers=8), 3)
        1.142
    """

    mean: float
    deviation: float

    def __post_init__(self) -> None:
        _check_mean(self.mean)
        if not self.deviation >= 0:
            raise ValueError(f"deviation must be at least 0 seconds, got {self.deviation}")

    def slowest(self, workers: int) -> float:
        return self.mean + self.deviation * _highest_of_normal(workers)


@dataclass(frozen=True, init=False)
class quantiles:
    """Times as measured: each of them is as likely as the others.

    Args:
        seconds: of some steps, or evenly spaced quantiles; at least one, each above 0.

    Raises:
        ValueError: if there are none, or one is not above 0.

    Example:
        >>> measured = quantiles([1.0, 1.0, 1.0, 2.0])
        >>> measured.mean, measured.slowest(workers=2)
        (1.25, 1.4375)
    """

    seconds: tuple[float, ...]

    def __init__(self, seconds: Sequence[float]) -> None:
        object.__setattr__(self, "seconds", tuple(sorted(seconds)))
        if not self.seconds:
            raise ValueError("seconds must hold at least one step's time, got none")
        _check_mean(self.seconds[0])

    @property
    def mean(self) -> float:
        return fmean(self.seconds)

    def slowest(self, workers: int) -> float:
        count = len(self.seconds)
        return sum(
            value * (((place + 1) / count) ** workers - (place / count) ** workers)
            for place, value in enumerate(self.seconds)
        )


@cache
def _highest_of_normal(count: int) -> float:
    """Expected maximum of so many draws of a standard normal distribution."""
    if count == 1:
        return 0.0
    # The maximum's own quantile at p is the distribution's at the root of p.
    quantile = NormalDist().inv_cdf
    places = ((point + 0.5) / _POINTS for point in range(_POINTS))
    return fmean(quantile(place ** (1 / count)) for place in places)


def _check_mean(mean: float) -> None:
    if not mean > 0:
        raise ValueError(f"step time must be above 0 seconds, got {mean}")
