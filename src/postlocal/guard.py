"""Guards: they keep one replica's fault from spreading to all replicas.

A guard decides two things at each synchronization: the weight of a replica's contribution in the
mean, and the factor by which the agreed pseudo-gradient is scaled before the outer step. Guards
are frozen values; `clip` wraps another one.

A guard that compares replicas with each other, or with their earlier rounds, has an **outlier
detector**. It gets one norm of each replica and module, the same on all ranks, and keeps moving
statistics of them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from postlocal.checks import count, made, number, settle

_limit = partial(number, above=0, finite=False)  # infinity: there is none


class Guard(Protocol):
    """Weighs contributions, and scales their mean."""

    @property
    def anchored(self) -> bool:
        """Whether `scale` needs a pseudo-gradient, and so an anchor."""
        ...

    def weight(self, finite: bool) -> float:
        """Weight of a contribution in the mean, given whether all of its values are finite."""
        ...

    def scale(self, norm: float) -> float:
        """Factor on the mean pseudo-gradient, given its Euclidean norm over all parameters."""
        ...

    def detector(self, ranks: int, modules: int) -> "OutlierDetector | None":
        """A new outlier detector for so many ranks and modules; None: `weight` alone decides."""
        ...


@dataclass(frozen=True)
class non_finite:
    """Leaves a replica with infinities or NaN out of the mean; it gets the mean of the others.

    Example:
        >>> non_finite().weight(finite=False)
        0.0
    """

    anchored = False

    def weight(self, finite: bool) -> float:
        return 1.0 if finite else 0.0

    def scale(self, norm: float) -> float:
        return 1.0

    def detector(self, ranks: int, modules: int) -> "OutlierDetector | None":
        return None


@dataclass(frozen=True)
class trusting:
    """Accepts every contribution: NaN on one rank is NaN on all, as in plain DDP.

    Example:
        >>> trusting().weight(finite=False)
        1.0
    """

    anchored = False

    def weight(self, finite: bool) -> float:
        return 1.0

    def scale(self, norm: float) -> float:
        return 1.0

    def detector(self, ranks: int, modules: int) -> "OutlierDetector | None":
        return None


@dataclass(frozen=True)
class clip:
    """Clips the norm of the mean pseudo-gradient (arXiv 2412.07210, section 3.3).

    Args:
        max_norm: greatest Euclidean norm over all parameters that are synchronized together, above
            0.
        inner: the guard that weighs contributions, and scales before this one.

    Raises:
        TypeError: if ``max_norm`` is no number, or ``inner`` no guard.
        ValueError: if ``max_norm`` is not above 0.

    Example:
        >>> clip(max_norm=10.0).scale(norm=40.0)
        0.25
    """

    max_norm: float
    inner: Guard = field(default_factory=non_finite)
    anchored = True

    def __post_init__(self) -> None:
        settle(self, max_norm=_limit, inner=is_guard)

    def weight(self, finite: bool) -> float:
        return self.inner.weight(finite)

    def scale(self, norm: float) -> float:
        before = self.inner.scale(norm)
        return before * min(1.0, self.max_norm / max(norm * before, 1e-38))

    def detector(self, ranks: int, modules: int) -> "OutlierDetector | None":
        return self.inner.detector(ranks, modules)


@dataclass(frozen=True)
class outliers:
    """Leaves out replicas whose pseudo-gradient is unusually large (arXiv 2412.07210, 3.3).

    EDiT's pseudo-gradient penalty. Each module of each replica has a moving mean and variance of
    its pseudo-gradient's norm. After ``warmup`` synchronizations, a norm more than ``threshold``
    standard deviations above the mean is an outlier, with weight 0. If recent z-scores spread by
    more than 1, the limit is higher by that factor. The other replicas have weights
    ``work * softmax(-norm)`` over ranks, and the mean's norm is limited. A module in which all
    replicas are outliers keeps its anchor.

    Differences from the paper: (1) An outlier enters the statistics with the value of the limit, so
    one outlier changes them little, and a lasting change is learned. (2) For the first
    ``1 / decay`` synchronizations, mean and variance are plain ones of all norms so far, which
    makes them unbiased. (3) A standard deviation counts as at least 1 % of the mean.

    Args:
        threshold: standard deviations above the mean that are accepted, above 0.
        decay: weight of the newest norm in mean and variance, above 0 and at most 1.
        warmup: synchronizations before a norm can be an outlier, and the number of recent z-scores
            whose spread counts, at least 1.
        max_norm: greatest Euclidean norm of a module's mean pseudo-gradient, above 0.
        inner: the guard that weighs buffers, and scales all modules together; it has no outlier
            detector.

    Raises:
        TypeError: if an argument is of another type.
        ValueError: if an argument is out of its range.

    Example:
        >>> detector = outliers(warmup=8).detector(ranks=2, modules=1)
        >>> finite, work = torch.tensor([True, True]), torch.ones(2, dtype=torch.float64)
        >>> for round in range(8):
        ...     norms = torch.tensor([[1.0], [1.0]], dtype=torch.float64)
        ...     weights = detector.weigh(norms, finite, work)
        >>> detector.weigh(norms * torch.tensor([[1.0], [100.0]]), finite, work)
        tensor([[1.],
                [0.]], dtype=torch.float64)
    """

    threshold: float = 3.0
    decay: float = 0.02
    warmup: int = 120
    max_norm: float = 10.0
    inner: Guard = field(default_factory=non_finite)
    anchored = True

    def __post_init__(self) -> None:
        settle(
            self, threshold=_limit, decay=partial(number, above=0, most=1), max_norm=_limit,
            warmup=partial(count, unit="synchronization"), inner=is_guard,
        )  # fmt: skip
        if self.inner.detector(1, 1) is not None:
            raise ValueError(f"inner must be a guard without an outlier detector, got {self.inner}")

    def weight(self, finite: bool) -> float:
        return self.inner.weight(finite)

    def scale(self, norm: float) -> float:
        return self.inner.scale(norm)

    def detector(self, ranks: int, modules: int) -> "OutlierDetector | None":
        return OutlierDetector(self, ranks, modules)


class OutlierDetector:
    """Weighs the contributions of all replicas together; the same on all ranks.

    It keeps moving statistics of each replica's norms, module by module. A **module** is a
    group of parameters with a weight of its own, such as a layer.

    Args:
        recipe: the guard.
        ranks: number of replicas.
        modules: number of modules.
    """

    def __init__(self, recipe: outliers, ranks: int, modules: int) -> None:
        self._recipe = recipe
        zeros = torch.zeros(ranks, modules, dtype=torch.float64)
        self._statistics = {
            "seen": zeros,
            "mean": zeros.clone(),
            "variance": zeros.clone(),
            "scores": zeros.repeat(recipe.warmup, 1, 1),
        }

    def weigh(self, norms: Tensor, finite: Tensor, work: Tensor) -> Tensor:
        """Weights in the mean; called once at each synchronization.

        Args:
            norms: Euclidean norms of pseudo-gradients, fp64, ``(ranks, modules)``.
            finite: whether all values of a rank's contribution are finite, bool, ``(ranks,)``.
            work: share of the round's steps that a rank took, from 0 to 1, fp64,
                ``(ranks,)``.

        Returns:
            fp64, ``(ranks, modules)``. For each module they sum to 1 over ranks, or all are 0 if no
            contribution is accepted: the module then keeps its anchor.
        """
        counted = (finite & (work > 0)).unsqueeze(1) & norms.isfinite()
        scores, limits = self._scores(norms), self._limits()
        self._learn(norms.where(counted, 0.0), scores.where(counted, 0.0), limits, counted)
        good = counted & (scores <= limits)
        wishes = (work.log().unsqueeze(1) - norms).where(good, -math.inf)
        return wishes.softmax(dim=0).nan_to_num(0.0)

    def scale(self, norms: Tensor) -> Tensor:
        """Factors on modules' mean pseudo-gradients, from their norms; both ``(modules,)``."""
        return (self._recipe.max_norm / norms).clamp(max=1.0)

    def state_dict(self) -> dict[str, Any]:
        """The statistics, not copied."""
        return dict(self._statistics)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load saved statistics of the same number of ranks and modules.

        Raises:
            ValueError: if they are of other ranks, modules or warmup.
        """
        for name, mine in self._statistics.items():
            if state[name].shape != mine.shape:
                raise ValueError(
                    f"state of the guard must be of shape {tuple(mine.shape)}, got {name!r} of "
                    f"{tuple(state[name].shape)}: it is of other ranks, modules or warmup"
                )
        self._statistics = {name: state[name].clone() for name in self._statistics}

    def _scores(self, norms: Tensor) -> Tensor:
        """z-scores; 0 during warm-up, and for a module that has never moved."""
        mean = self._statistics["mean"]
        known = (self._statistics["seen"] >= self._recipe.warmup) & (mean > 0)
        return ((norms - mean) / self._deviation()).where(known, 0.0)

    def _deviation(self) -> Tensor:
        return self._statistics["variance"].sqrt().maximum(0.01 * self._statistics["mean"])

    def _limits(self) -> Tensor:
        spread = self._statistics["scores"].std(dim=0, correction=0)
        return self._recipe.threshold * spread.clamp(min=1.0)

    def _learn(self, norms: Tensor, scores: Tensor, limits: Tensor, counted: Tensor) -> None:
        seen, mean, variance, past = self._statistics.values()
        highest = (mean + limits * self._deviation()).where(scores > limits, math.inf)
        seen = seen + counted
        rate = (1 / seen).clamp(min=self._recipe.decay).where(counted, 0.0)
        step = norms.minimum(highest) - mean
        self._statistics = {
            "seen": seen,
            "mean": mean + rate * step,
            "variance": (1 - rate) * (variance + rate * step.square()),
            "scores": torch.cat([past[1:], scores.minimum(limits).unsqueeze(0)]),
        }


def is_guard(name: str, value: Any) -> Any:
    """The rule for an argument that takes a guard.

    Raises:
        TypeError: if it lacks a method of `Guard`, or is a class or function that makes one.
    """
    return made(
        name, value, ("anchored", "weight", "scale", "detector"), "guard.clip(max_norm=10.0)"
    )
