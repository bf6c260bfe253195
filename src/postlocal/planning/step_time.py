"""How long a step takes, and how long the slowest of several ranks takes.

Ranks that synchronize wait for the slowest of them. After one step, its time is the expected
maximum of one draw for each rank. After ``n`` local steps, fast and slow steps average out, and the
excess over the mean grows only with the square root of ``n``. This is exact for normal times, and
the limit of many steps for others. The time lost to stragglers is therefore divided by the square
root of the period.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist, fmean
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Seconds = NDArray[np.float64]

_POINTS = 4096  # of the integral over a normal distribution's quantiles


class StepTime(Protocol):
    """The time of a step, drawn for each rank and step."""

    @property
    def mean(self) -> float:
        """Mean seconds a step."""
        ...

    def slowest(self, workers: int) -> float:
        """Expected seconds of the slowest of ``workers`` ranks, in one step."""
        ...

    def draw(self, steps: int, shape: tuple[int, ...], source: np.random.Generator) -> Seconds:
        """Seconds that each of many ranks takes for ``steps`` steps, of the given shape."""
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

    def draw(self, steps: int, shape: tuple[int, ...], source: np.random.Generator) -> Seconds:
        return np.full(shape, steps * self.mean)


@dataclass(frozen=True)
class normal:
    """Step times with a normal distribution.

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
        if not 0 <= self.deviation < math.inf:
            rule = "finite" if self.deviation == math.inf else "at least 0 seconds"
            raise ValueError(f"deviation must be {rule}, got {self.deviation}")

    def slowest(self, workers: int) -> float:
        return self.mean + self.deviation * _highest_of_normal(workers)

    def draw(self, steps: int, shape: tuple[int, ...], source: np.random.Generator) -> Seconds:
        return source.normal(steps * self.mean, math.sqrt(steps) * self.deviation, shape)


@dataclass(frozen=True)
class exponential_tail:
    """The same minimum for all, and an exponential rest: few are slow, but some are very slow.

    This is the usual model of stragglers (Lee et al., arXiv 1512.02673, Section III).

    Args:
        mean: seconds, above 0.
        tail: mean and standard deviation of the rest; from 0 to ``mean``.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> exponential_tail(mean=1.0, tail=0.2).slowest(workers=2)
        1.1
    """

    mean: float
    tail: float

    def __post_init__(self) -> None:
        _check_mean(self.mean)
        if not 0 <= self.tail <= self.mean:
            raise ValueError(f"tail must be from 0 to the mean of {self.mean}, got {self.tail}")

    def slowest(self, workers: int) -> float:
        return self.mean + self.tail * (sum(1 / place for place in range(1, workers + 1)) - 1)

    def draw(self, steps: int, shape: tuple[int, ...], source: np.random.Generator) -> Seconds:
        return steps * (self.mean - self.tail) + self.tail * source.gamma(steps, size=shape)


@dataclass(frozen=True, init=False)
class quantiles:
    """Measured times, each equally likely.

    Args:
        seconds: times of some steps, or evenly spaced quantiles; at least one, each above 0.

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

    def draw(self, steps: int, shape: tuple[int, ...], source: np.random.Generator) -> Seconds:
        total = np.zeros(shape)
        for _ in range(steps):
            total += source.choice(self.seconds, shape)
        return total


@cache
def _highest_of_normal(count: int) -> float:
    """Expected maximum of ``count`` draws of a standard normal distribution."""
    if count == 1:
        return 0.0
    # The quantile of the maximum at p is that of the distribution at the count-th root of p.
    quantile = NormalDist().inv_cdf
    places = ((point + 0.5) / _POINTS for point in range(_POINTS))
    return fmean(quantile(place ** (1 / count)) for place in places)


def _check_mean(mean: float) -> None:
    if not 0 < mean < math.inf:
        rule = "finite" if mean == math.inf else "above 0 seconds"
        raise ValueError(f"step time must be {rule}, got {mean}")
