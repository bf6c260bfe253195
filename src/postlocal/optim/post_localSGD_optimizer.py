"""An optimizer that steps another one and then averages parameters when it is time."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from postlocal.model_averaging.averagers import ModelAverager
from postlocal.torch_versions import hooks_of

__all__ = ["PostLocalSGDOptimizer"]

_STEP = "averager_step"


class PostLocalSGDOptimizer(Optimizer):
    """Wraps an optimizer for post-local SGD (arXiv 1808.07217).

    It is a `torch.optim.Optimizer` in every respect: learning rate schedulers, closures, step
    hooks, GradScaler, deepcopy, pickle and `torch.distributed.checkpoint` work on it. Parameter
    groups and state are those of the wrapped optimizer at all times.

    Under a GradScaler each call of ``scaler.step`` counts, also where a rank skips its step because
    of infinite gradients, so that ranks stay in step.

    Args:
        optim: the local optimizer.
        averager: averages parameters; its warm-up must be that of the communication hook.

    Raises:
        TypeError: if ``optim`` is not an optimizer, or ``averager`` not an averager.

    Example:
        >>> import torch.distributed as dist
        >>> from postlocal.model_averaging.averagers import PeriodicModelAverager
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> model = torch.nn.Linear(2, 1)
        >>> local = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> averager = PeriodicModelAverager(4, warmup_steps=100)
        >>> optimizer = PostLocalSGDOptimizer(local, averager)
        >>> model(torch.ones(3, 2)).sum().backward()
        >>> optimizer.step()
        >>> averager.step
        1
    """

    _step_supports_amp_scaling = True  # so that GradScaler calls `step` also where it is skipped

    optim: Optimizer
    averager: ModelAverager

    def __init__(self, optim: Optimizer, averager: ModelAverager) -> None:
        if not isinstance(optim, Optimizer):
            raise TypeError(f"optim must be a torch.optim.Optimizer, got {type(optim).__name__}")
        if not isinstance(averager, ModelAverager):
            raise TypeError(f"averager must be a ModelAverager, got {type(averager).__name__}")
        # Not Optimizer.__init__, which makes parameter groups: they are the wrapped optimizer's.
        self.__setstate__({"optim": optim, "averager": averager})
        self._note_step()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's."""
        return self.optim.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optim.param_groups = groups

    @property
    def state(self) -> Any:
        """The wrapped optimizer's."""
        return self.optim.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optim.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The wrapped optimizer's."""
        return self.optim.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optim.defaults = defaults

    def __getstate__(self) -> dict[str, Any]:
        return {"optim": self.optim, "averager": self.averager}

    def __repr__(self) -> str:
        return repr(self.optim)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step the wrapped optimizer, then have the averager count and average if it is time.

        Args:
            closure: computes the loss again, for optimizers that need it.

        Returns:
            What the wrapped optimizer returns.

        Raises:
            DisagreementError, NonFiniteError, PeerError: see
                `postlocal.model_averaging.utils.average_parameters`.
        """
        if _only_makes_state(self.optim):
            return self._step_locally(closure)
        loss = self._step_locally(closure)
        self.averager.average_parameters(self.param_groups)
        self._note_step()
        return loss

    def finish(self) -> None:
        """Average now, unless that was the last thing done: all replicas end equal."""
        self.averager.finish(self.param_groups)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as the wrapped optimizer does."""
        self.optim.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the wrapped optimizer."""
        self.optim.add_param_group(param_group)
        self._note_step()

    def state_dict(self) -> dict[str, Any]:
        """That of the wrapped optimizer, with an entry ``"step"``: the averager's.

        The step is in every parameter group too (``"averager_step"``), since
        `torch.distributed.checkpoint` keeps nothing but those and the state.
        """
        for before in hooks_of(self, "state_dict_pre"):
            before(self)
        state = dict(self.optim.state_dict(), step=self.averager.step)
        for after in hooks_of(self, "state_dict_post"):
            changed = after(self, state)
            state = state if changed is None else changed
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the wrapped optimizer's state, and the averager's step.

        With no ``"step"`` in ``state_dict`` it warns, and the averager's step becomes 0, as with
        torch's class. A state that `torch.distributed.checkpoint` loads, with parameters by name,
        has the step in its parameter groups.
        """
        state = dict(state_dict)
        for before in hooks_of(self, "load_state_dict_pre"):
            changed = before(self, state)
            state = state if changed is None else dict(changed)
        step = state.pop("step", None)
        if step is None:
            step = _step_by_name(state["param_groups"])
        self.optim.load_state_dict(state)
        if step is None:
            warnings.warn(
                # The beginning is what filters for torch's warning look for.
                "Loaded state dict does not contain a step counter for an averager: the averager's "
                "step becomes 0, and its warm-up runs again",
                stacklevel=2,
            )
        self.averager.step = 0 if step is None else int(step)
        self._note_step()
        for after in hooks_of(self, "load_state_dict_post"):
            after(self)

    def _note_step(self) -> None:
        for group in self.param_groups:
            group[_STEP] = self.averager.step

    def _step_locally(self, closure: Callable[[], float] | None) -> float | None:
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is None:
            return self.optim.step() if closure is None else self.optim.step(closure)
        return self._step_scaled(getattr(self, "grad_scale", None), found_inf)

    def _step_scaled(self, scale: Tensor | None, found_inf: Tensor) -> float | None:
        """Do what GradScaler leaves to optimizers that are called for skipped steps as well."""
        if getattr(self.optim, "_step_supports_amp_scaling", False):
            scaled: Any = self.optim
            scaled.grad_scale, scaled.found_inf = scale, found_inf
            try:
                return self.optim.step()
            finally:
                del scaled.grad_scale, scaled.found_inf
        if found_inf.item():
            return None
        if scale is not None:
            _unscale(self.param_groups, scale)
        return self.optim.step()


def _step_by_name(groups: Sequence[Mapping[str, Any]]) -> int | None:
    """The averager's step in a state of `torch.distributed.checkpoint`, which has no other place.

    Only such a state names its parameters. Of any other, a user has taken the step out.
    """
    named = any(isinstance(key, str) for group in groups for key in group["params"])
    return groups[0].get(_STEP) if named else None


def _unscale(groups: list[dict[str, Any]], scale: Tensor) -> None:
    factor = float(scale.double().reciprocal().float())
    for group in groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)


def _only_makes_state(optimizer: Optimizer) -> bool:
    """Whether a step is the one by which torch.distributed.checkpoint has state allocated.

    It takes one on an optimizer without state, at a learning rate of 0, with gradients of 0: that
    is no step of training, and must not be counted.
    """
    if optimizer.state or any(float(group.get("lr", 0.0)) for group in optimizer.param_groups):
        return False
    gradients = [
        parameter.grad
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad
    ]
    return all(gradient is not None and not torch.any(gradient) for gradient in gradients)
