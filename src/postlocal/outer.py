"""What is done with the mean of the replicas: an outer optimizer on the anchor.

The **anchor** is the parameters last agreed on. At a synchronization its gradient is the
pseudo-gradient, anchor minus mean of the replicas, and the outer optimizer takes one step. So an
outer optimizer is any function from the anchor's tensors to a `torch.optim.Optimizer`, torch's
own among them: ``functools.partial(torch.optim.Adam, lr=0.01)``.

`scheduled` wraps one, to have its learning rate follow the step: a **factor** is any function from
the number of steps taken to a number, 1 for the learning rate as it is.

Example:
    >>> decaying = scheduled(nesterov(lr=0.7), cosine(total=1000, final=0.1))
    >>> rate(decaying, step=500)
    0.55
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from postlocal.checks import (
    fraction,
    function,
    no_steps_or_more,
    number,
    pairs,
    positive,
    settle,
    shown,
    steps,
    whole,
)

momentum_of = partial(number, least=0, below=1)
"""The rule for an outer momentum."""
_factor = partial(number, least=0)


class Outer(Protocol):
    """A factory of outer optimizers."""

    def __call__(self, anchor: Sequence[Tensor]) -> Optimizer:
        """An optimizer of ``anchor``, tensors of fp32 in the shapes of the parameters.

        Where its parameter groups have an entry ``"inner_lr"``, it is set to the inner
        optimizer's learning rate before each step.
        """
        ...


@dataclass(frozen=True)
class average:
    """The mean of the replicas itself, with no state (local SGD, Stich 2018, arXiv 1805.09767).

    With an exact wire it needs no anchor: parameters are averaged in place. Where there is an
    anchor it is one step of SGD at learning rate 1, which is the same up to rounding.

    Example:
        >>> anchor = torch.zeros(1)
        >>> anchor.grad = anchor - torch.tensor([3.0])  # anchor minus mean
        >>> average()([anchor]).step()
        >>> anchor
        tensor([3.])
    """

    def __call__(self, anchor: Sequence[Tensor]) -> Optimizer:
        return _sgd(anchor, lr=1.0)


@dataclass(frozen=True)
class nesterov:
    """SGD with Nesterov momentum on pseudo-gradients (DiLoCo, arXiv 2311.08105, Algorithm 1).

    Args:
        lr: outer learning rate, above 0.
        momentum: outer momentum, at least 0 and below 1; 0 is plain SGD.

    Raises:
        TypeError: if either is no number.
        ValueError: if either is out of its range.

    Example:
        >>> nesterov(lr=0.7, momentum=0.9)([torch.zeros(2)]).defaults["nesterov"]
        True
    """

    lr: float = 0.7
    momentum: float = 0.9

    def __post_init__(self) -> None:
        settle(self, lr=positive, momentum=momentum_of)

    def __call__(self, anchor: Sequence[Tensor]) -> Optimizer:
        return _sgd(anchor, self.lr, self.momentum)


@dataclass(frozen=True)
class slow_momentum:
    """SlowMo: momentum over rounds, in units of the inner learning rate (arXiv 1910.00643).

    Args:
        lr: slow learning rate (alpha in the paper), above 0.
        momentum: slow momentum (beta), at least 0 and below 1. 0 with ``lr=1`` is averaging.

    Raises:
        TypeError: if either is no number.
        ValueError: if either is out of its range.

    Example:
        >>> slow_momentum(momentum=0.5)([torch.zeros(2)])
        SlowMomentum (
        Parameter Group 0
            inner_lr: 1.0
            lr: 1.0
            momentum: 0.5
        )
    """

    lr: float = 1.0
    momentum: float = 0.6

    def __post_init__(self) -> None:
        settle(self, lr=positive, momentum=momentum_of)

    def __call__(self, anchor: Sequence[Tensor]) -> Optimizer:
        return SlowMomentum(anchor, self.lr, self.momentum)


@dataclass(frozen=True)
class scheduled:
    """Another outer optimizer, its learning rate multiplied by a factor that follows the step.

    Args:
        inner: the outer optimizer; all of its parameter groups have an ``"lr"``.
        factor: from the number of inner steps taken to a factor, at least 0; a pure function. At
            0 an outer step leaves the anchor where it was: what replicas did in that round is lost.

    Raises:
        TypeError: if ``inner`` is no outer optimizer, or ``factor`` no function.

    Example:
        >>> halved = scheduled(nesterov(), piecewise({1000: 0.5}))
        >>> [rate(halved, step) for step in (999, 1000)]
        [1.0, 0.5]
    """

    inner: Outer
    factor: Callable[[int], float]

    def __post_init__(self) -> None:
        settle(self, inner=is_outer, factor=partial(function, example="outer.cosine(total=1000)"))

    def __call__(self, anchor: Sequence[Tensor]) -> Optimizer:
        return self.inner(anchor)


def rate(outer: Outer, step: int) -> float:
    """Factor on an outer optimizer's learning rate after ``step`` inner steps; 1 if unscheduled.

    Nested ones multiply.

    Raises:
        ValueError: if a factor is negative or not finite.

    Example:
        >>> rate(nesterov(), step=10)
        1.0
    """
    if not isinstance(outer, scheduled):
        return 1.0
    factor = outer.factor(step)
    if not isinstance(factor, Real) or not 0 <= factor < math.inf:
        raise ValueError(
            f"outer lr factor must be a finite number of at least 0, got {shown(factor)} at step "
            f"{step} from {outer.factor}"
        )
    return factor * rate(outer.inner, step)


def is_outer(name: str, value: Any) -> Any:
    """The rule for an argument that takes an outer optimizer.

    A class of `torch.optim` is one: it makes an optimizer of the anchor, with its own defaults.

    Raises:
        TypeError: if it cannot be called with the anchor's tensors.
    """
    if isinstance(value, type) and issubclass(value, Optimizer):
        return value
    if isinstance(value, Optimizer):
        raise TypeError(
            f"{name} must make an optimizer of the anchor, got one that is made already, "
            f"{type(value).__name__}: pass functools.partial(torch.optim.SGD, lr=0.7)"
        )
    return function(name, value, "outer.nesterov(lr=0.7, momentum=0.9)")


def follows_lr(outer: Outer, anchor: Sequence[Tensor]) -> bool:
    """Whether an outer optimizer asks for the inner one's learning rate, found out by making one.

    Args:
        outer: makes it.
        anchor: tensors in the shapes of the parameters; they stay as they are.

    Raises:
        TypeError: if what it makes is no `torch.optim.Optimizer`.
        ValueError: if a parameter group of it has no ``"lr"``.

    Example:
        >>> anchor = [torch.zeros(2)]
        >>> follows_lr(slow_momentum(), anchor), follows_lr(nesterov(), anchor)
        (True, False)
    """
    made = outer(anchor)
    if not isinstance(made, Optimizer):
        raise TypeError(
            f"outer must make a torch.optim.Optimizer of the anchor's tensors, got {shown(made)} "
            f"from {outer!r}"
        )
    for group in made.param_groups:
        number("outer lr", group.get("lr"))
    return any("inner_lr" in group for group in made.param_groups)


@dataclass(frozen=True)
class _Decay(ABC):
    """A factor that rises from 0 to 1 and falls to ``final``; see `cosine` and `linear`."""

    total: int
    final: float = 0.0
    warmup: int = 0

    def __post_init__(self) -> None:
        settle(self, total=steps, final=fraction, warmup=whole)
        if not 0 <= self.warmup < self.total:
            raise ValueError(
                f"warmup must be at least 0 steps and below total ({self.total}), got {self.warmup}"
            )

    def __call__(self, step: int) -> float:
        done = _share(step - self.warmup, self.total - self.warmup)
        return _share(step, self.warmup) * (1 - (1 - self.final) * self._fallen(done))

    @abstractmethod
    def _fallen(self, done: float) -> float:
        """How far the factor has fallen, from 0 to 1, when a share of the steps is done."""
        ...


@dataclass(frozen=True)
class cosine(_Decay):
    """A factor that falls from 1 to ``final`` along half a cosine (arXiv 1608.03983, equation 5).

    Args:
        total: step at which ``final`` is reached, and kept.
        final: the last factor, from 0 to 1.
        warmup: number of first steps in which the factor rises from 0 in a straight line, at
            least 0 and below ``total``.

    Raises:
        TypeError: if an argument is of another type.
        ValueError: if an argument is out of its range.

    Example:
        >>> [round(cosine(total=100, final=0.2)(step), 3) for step in (0, 50, 100, 200)]
        [1.0, 0.6, 0.2, 0.2]
    """

    def _fallen(self, done: float) -> float:
        return (1 - math.cos(math.pi * done)) / 2


@dataclass(frozen=True)
class linear(_Decay):
    """A factor that falls from 1 to ``final`` in a straight line.

    Args:
        total: step at which ``final`` is reached, and kept.
        final: the last factor, from 0 to 1.
        warmup: number of first steps in which the factor rises from 0 in a straight line, at
            least 0 and below ``total``.

    Raises:
        TypeError: if an argument is of another type.
        ValueError: if an argument is out of its range.

    Example:
        >>> [linear(total=100, final=0.5, warmup=20)(step) for step in (10, 20, 60, 100)]
        [0.5, 1.0, 0.75, 0.5]
    """

    def _fallen(self, done: float) -> float:
        return done


@dataclass(frozen=True, init=False)
class piecewise:
    """A factor that changes at given steps; 1 before the first of them.

    Args:
        factors: step, at least 0 -> factor from there on, at least 0.

    Raises:
        TypeError: if ``factors`` is no mapping of whole numbers to numbers.
        ValueError: if there are none, or one is out of its range.

    Example:
        >>> [piecewise({100: 0.5, 200: 0.1})(step) for step in (99, 100, 250)]
        [1.0, 0.5, 0.1]
    """

    factors: tuple[tuple[int, float], ...]

    def __init__(self, factors: Mapping[int, float]) -> None:
        given = pairs("factors", factors, "{1000: 0.5}")
        if not given:
            raise ValueError("factors must name at least one step, got none")
        known = [
            (no_steps_or_more("each step of factors", step), _factor(f"factors[{step!r}]", factor))
            for step, factor in given
        ]
        object.__setattr__(self, "factors", tuple(sorted(known)))

    def __call__(self, step: int) -> float:
        return next((factor for start, factor in reversed(self.factors) if step >= start), 1.0)


class SlowMomentum(Optimizer):
    """The outer optimizer of SlowMo, Algorithm 1, lines 7 and 8 (arXiv 1910.00643).

    With pseudo-gradient d and inner learning rate g: ``u = momentum * u + d / g``, then
    ``anchor -= lr * g * u``. At an inner learning rate of 0 replicas have not moved, and neither
    does the anchor.
    """

    def __init__(self, anchor: Sequence[Tensor], lr: float, momentum: float) -> None:
        super().__init__(anchor, {"lr": lr, "momentum": momentum, "inner_lr": 1.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Take one outer step; ``closure`` is there for torch's signature and is not called."""
        for group in self.param_groups:
            if group["inner_lr"] == 0:
                continue
            for anchor in group["params"]:
                if anchor.grad is not None:
                    self._step(anchor, group["lr"], group["momentum"], group["inner_lr"])

    def _step(self, anchor: Tensor, lr: float, momentum: float, inner_lr: float) -> None:
        assert anchor.grad is not None
        state = self.state[anchor]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(anchor)
        buffer = state["momentum_buffer"]
        buffer.mul_(momentum).add_(anchor.grad, alpha=1 / inner_lr)
        anchor.sub_(buffer, alpha=lr * inner_lr)


def _sgd(anchor: Sequence[Tensor], lr: float, momentum: float = 0.0) -> Optimizer:
    # Fused it reads and writes memory once: on CPU a tenth of the time of torch's default there.
    fused = all(tensor.device.type in ("cpu", "cuda", "xpu", "mps") for tensor in anchor)
    return torch.optim.SGD(
        anchor, lr=lr, momentum=momentum, nesterov=momentum > 0, fused=fused or None
    )


def _share(step: int, steps: int) -> float:
    """How much of some steps is done, from 0 to 1; all of no steps."""
    return min(1.0, max(0.0, step / steps)) if steps else 1.0
