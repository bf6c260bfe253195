"""What is done with the mean of the replicas: an outer optimizer on the anchor.

The **anchor** is the parameters last agreed on. At a synchronization its gradient is the
pseudo-gradient, anchor minus mean of the replicas, and the outer optimizer takes one step. So an
outer optimizer is any function from the anchor's tensors to a `torch.optim.Optimizer`, torch's
own among them: ``functools.partial(torch.optim.Adam, lr=0.01)``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer


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
        return torch.optim.SGD(anchor, lr=1.0)


@dataclass(frozen=True)
class nesterov:
    """SGD with Nesterov momentum on pseudo-gradients (DiLoCo, arXiv 2311.08105, Algorithm 1).

    Args:
        lr: outer learning rate, above 0.
        momentum: outer momentum, at least 0 and below 1; 0 is plain SGD.

    Raises:
        ValueError: if either is out of its range.

    Example:
        >>> nesterov(lr=0.7, momentum=0.9)([torch.zeros(2)]).defaults["nesterov"]
        True
    """

    lr: float = 0.7
    momentum: float = 0.9

    def __post_init__(self) -> None:
        _check(self.lr, self.momentum)

    def __call__(self, anchor: Sequence[Tensor]) -> Optimizer:
        return torch.optim.SGD(
            anchor, lr=self.lr, momentum=self.momentum, nesterov=self.momentum > 0
        )


@dataclass(frozen=True)
class slow_momentum:
    """SlowMo: momentum over rounds, in units of the inner learning rate (arXiv 1910.00643).

    Args:
        lr: slow learning rate (alpha in the paper), above 0.
        momentum: slow momentum (beta), at least 0 and below 1. 0 with ``lr=1`` is averaging.

    Raises:
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
        _check(self.lr, self.momentum)

    def __call__(self, anchor: Sequence[Tensor]) -> Optimizer:
        return SlowMomentum(anchor, self.lr, self.momentum)


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


def _check(lr: float, momentum: float) -> None:
    if not lr > 0:
        raise ValueError(f"outer lr must be above 0, got {lr}")
    if not 0 <= momentum < 1:
        raise ValueError(f"outer momentum must be at least 0 and below 1, got {momentum}")
