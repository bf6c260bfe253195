"""What keeps one replica's fault from becoming everybody's.

A guard decides two things at each synchronization: the weight of a replica's contribution in the
mean, and the factor by which the agreed pseudo-gradient is scaled before the outer step. Guards
are frozen values; `clip` wraps another one.
"""

from dataclasses import dataclass, field
from typing import Protocol


class Guard(Protocol):
    """Judges contributions and their mean."""

    @property
    def anchored(self) -> bool:
        """Whether `scale` needs a pseudo-gradient, and so an anchor."""
        ...

    def weight(self, finite: bool) -> float:
        """Weight in the mean of a contribution, from whether all of its values are finite."""
        ...

    def scale(self, norm: float) -> float:
        """Factor on the mean pseudo-gradient, from its Euclidean norm over all parameters."""
        ...


@dataclass(frozen=True)
class non_finite:
    """Leaves a replica with infinities or NaN out of the mean; it takes the others' mean.

    Example:
        >>> non_finite().weight(finite=False)
        0.0
    """

    anchored = False

    def weight(self, finite: bool) -> float:
        return 1.0 if finite else 0.0

    def scale(self, norm: float) -> float:
        return 1.0


@dataclass(frozen=True)
class trusting:
    """Takes every contribution as it is: NaN on one rank is NaN on all, as in plain DDP.

    Example:
        >>> trusting().weight(finite=False)
        1.0
    """

    anchored = False

    def weight(self, finite: bool) -> float:
        return 1.0

    def scale(self, norm: float) -> float:
        return 1.0


@dataclass(frozen=True)
class clip:
    """Scales the mean pseudo-gradient down to a greatest norm (arXiv 2412.07210, section 3.3).

    Args:
        max_norm: greatest Euclidean norm over all parameters, above 0.
        inner: the guard that weighs contributions, and scales before this one.

    Raises:
        ValueError: if ``max_norm`` is not above 0.

    Example:
        >>> clip(max_norm=10.0).scale(norm=40.0)
        0.25
    """

    max_norm: float
    inner: Guard = field(default_factory=non_finite)
    anchored = True

    def __post_init__(self) -> None:
        if not self.max_norm > 0:
            raise ValueError(f"max_norm must be above 0, got {self.max_norm}")

    def weight(self, finite: bool) -> float:
        return self.inner.weight(finite)

    def scale(self, norm: float) -> float:
        before = self.inner.scale(norm)
        return before * min(1.0, self.max_norm / max(norm * before, 1e-38))
