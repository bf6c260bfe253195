"""Optimizer steps while gradients of other parameters are still under way.

Example:
    >>> import torch
    >>> import torch.distributed as dist
    >>> from torch.nn.parallel import DistributedDataParallel
    >>> from postlocal.ddp_comm_hooks.optimizer_overlap_hooks import apply_optimizer_in_backward
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> module = torch.nn.Linear(2, 1)
    >>> _ = torch.nn.init.ones_(module.weight)
    >>> model = DistributedDataParallel(module)
    >>> apply_optimizer_in_backward(model, torch.optim.SGD, {"lr": 0.1})
    >>> model(torch.ones(3, 2)).sum().backward()  # there is no optimizer.step() in the loop
    >>> module.weight.detach()
    tensor([[0.7000, 0.7000]])
"""

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from postlocal import torch_versions
from postlocal.ddp_comm_hooks.default_hooks import Hook, allreduce_hook
from postlocal.torch_versions import GradBucket

__all__ = ["apply_optimizer_in_backward"]


class _FunctionalOptimizer(Protocol):
    """An optimizer that updates one parameter at a time, as `torch.distributed.optim` has them."""

    def step_param(self, param: Tensor, grad: Tensor) -> None:
        """Update one parameter by its gradient."""
        ...


class _OptimizerHookState:
    """What `_hook_then_optimizer` runs.

    Args:
        functional_optim: has a method ``step_param(param, grad)``.
        params: the parameters that it updates; None: all.

    Raises:
        ValueError: if ``functional_optim`` lacks the method.
    """

    def __init__(
        self, functional_optim: _FunctionalOptimizer, params: Iterable[Tensor] | None = None
    ) -> None:
        if not hasattr(functional_optim, "step_param"):
            raise ValueError(
                f"functional_optim must have a method step_param(param, grad), and "
                f"{type(functional_optim).__name__} has none: use one of the functional "
                "optimizers of torch.distributed.optim, or add it"
            )
        self.functional_optimizer = functional_optim
        self.params_to_optimize = None if params is None else set(params)


def _hook_then_optimizer(hook: Hook, optimizer_state: _OptimizerHookState) -> Hook:
    """A hook that runs ``hook`` and then the optimizer, for the parameters of the bucket.

    Args:
        hook: reduces the gradients; its state is that of the hook returned.
        optimizer_state: the optimizer, and for which parameters it is.
    """

    def hook_then_optimizer_wrapper(
        state: Any, bucket: GradBucket
    ) -> torch.futures.Future[torch.Tensor]:
        def step(done: Future[Tensor]) -> Tensor:
            reduced = done.value()
            chosen = optimizer_state.params_to_optimize
            for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
                if chosen is None or parameter in chosen:
                    optimizer_state.functional_optimizer.step_param(parameter, gradient)
            return reduced

        return hook(state, bucket).then(step)

    return hook_then_optimizer_wrapper


def _apply_optim_in_backward_hook(gradient_is_bucket_view: bool) -> Hook:
    """A hook that all-reduces gradients and runs the parameters' own optimizers, on any device.

    Its state is a weak reference to the DistributedDataParallel model;
    `apply_optimizer_in_backward` sets it all up.

    Args:
        gradient_is_bucket_view: DDP's argument ``gradient_as_bucket_view``.
    """
    return _InBackward(gradient_is_bucket_view).hook


class _InBackward:
    def __init__(self, gradient_is_bucket_view: bool) -> None:
        self._gradient_is_bucket_view = gradient_is_bucket_view
        self._under_way: list[Future[Tensor]] = []

        # A function, as DDP compares annotations of the two arguments, and shows its name.
        def apply_optim_in_backward_hook(
            state: weakref.ref[DistributedDataParallel], bucket: GradBucket
        ) -> torch.futures.Future[torch.Tensor]:
            return self._run(state, bucket)

        self.hook = apply_optim_in_backward_hook

    def _run(
        self, state: weakref.ref[DistributedDataParallel], bucket: GradBucket
    ) -> Future[Tensor]:
        model = state()
        assert model is not None
        if bucket.index() == 0:
            self._under_way.clear()
            torch_versions.after_backward(lambda: self._finish(model))
        future = allreduce_hook(model.process_group, bucket).then(self._step(bucket))
        self._under_way.append(future)
        return future

    def _step(self, bucket: GradBucket) -> Callable[[Future[Tensor]], Tensor]:
        def step(done: Future[Tensor]) -> Tensor:
            reduced = done.value()
            for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
                optimizers = torch_versions.optimizers_in_backward(parameter)
                # The reducer, once told that optimizers run here, gives no gradient back itself.
                if not self._gradient_is_bucket_view:
                    parameter.grad = gradient if optimizers else gradient.clone()
                for optimizer in optimizers:
                    optimizer.step()
            return reduced

        return step

    def _finish(self, model: DistributedDataParallel) -> None:
        for future in self._under_way:
            future.wait()
        for parameter in model.module.parameters():
            if torch_versions.has_optimizer_in_backward(parameter):
                parameter.grad = None


def apply_optimizer_in_backward(
    model: DistributedDataParallel,
    optimizer_class: type[Optimizer],
    optimizer_kwargs: Mapping[str, Any],
    params: Iterable[nn.Parameter] | None = None,
) -> None:
    """Step each parameter as soon as its gradient is reduced, within the backward pass.

    Gradients of these parameters are None after the backward pass, so that at no time all of them
    are held. There is no clipping by the norm of all gradients, and no accumulation.

    `torch.distributed.optim._get_in_backward_optimizers` finds the optimizers, to save them.

    Args:
        model: a DDP model without a communication hook.
        optimizer_class: one optimizer a parameter is made of it.
        optimizer_kwargs: its arguments.
        params: the parameters that it is for; None: all that require grad.

    Raises:
        ValueError: if the model has a communication hook already, or a parameter an optimizer.
        RuntimeError: if this version of torch cannot run optimizers in the backward pass.
    """
    torch_versions.check_optimizers_in_backward(model)
    chosen = [p for p in (model.parameters() if params is None else params) if p.requires_grad]
    if any(torch_versions.has_optimizer_in_backward(p) for p in model.parameters()):
        raise ValueError(
            "model has parameters with an optimizer in backward already: call this once, and not "
            "torch's _apply_optimizer_in_backward before wrapping the model"
        )
    hook = _apply_optim_in_backward_hook(model.gradient_as_bucket_view)
    try:
        model.register_comm_hook(weakref.ref(model), hook)
    except RuntimeError as error:
        raise ValueError("model already has a communication hook: build it without one") from error
    # Later DDP would find the optimizers there, and register a hook of torch's for them.
    torch_versions.initialize(model)
    for parameter in chosen:
        optimizer = optimizer_class([parameter], **optimizer_kwargs)
        torch_versions.set_optimizer_in_backward(parameter, optimizer)
    torch_versions.leave_used_gradients(model)
