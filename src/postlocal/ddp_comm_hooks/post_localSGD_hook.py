"""Post-local SGD: gradients are averaged globally at first, then within a node (arXiv 1808.07217).

Example:
    >>> import torch
    >>> import torch.distributed as dist
    >>> from torch.nn.parallel import DistributedDataParallel
    >>> from postlocal.ddp_comm_hooks.post_localSGD_hook import (
    ...     PostLocalSGDState,
    ...     post_localSGD_hook,
    ... )
    >>> from postlocal.model_averaging.averagers import PeriodicModelAverager
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> model = DistributedDataParallel(torch.nn.Linear(2, 1))
    >>> averager = PeriodicModelAverager(period=16, warmup_steps=100)
    >>> state = PostLocalSGDState(None, None, start_localSGD_iter=100, clock=averager)
    >>> model.register_comm_hook(state, post_localSGD_hook)
    >>> model(torch.ones(3, 2)).sum().backward()
    >>> averager.average_parameters(model.parameters())  # after each optimizer.step()
    >>> model.module.weight.grad, averager.step
    (tensor([[3., 3.]]), 1)
"""

import copy
import logging
import warnings
from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from postlocal.comm.group import Processes, torch_group
from postlocal.comm.groups import by_node
from postlocal.ddp_comm_hooks._background import background
from postlocal.ddp_comm_hooks.default_hooks import Hook, allreduce_hook, kept
from postlocal.torch_versions import GradBucket, buffers_option
from postlocal.wire import ChunkWire

__all__ = ["Clock", "PostLocalSGDState", "post_localSGD_hook"]

logger = logging.getLogger(__name__)


class Clock(Protocol):
    """Counts steps, and knows how many of them are warm-up: a model averager does."""

    step: int
    warmup_steps: int


class PostLocalSGDState:
    """When and with whom gradients are reduced.

    Where ``subgroup`` is None and torch.distributed is initialized, making a state is collective:
    all ranks of ``process_group`` make theirs, and the groups of all nodes, at this point. Before
    that they are made at the first backward pass.

    Args:
        process_group: who reduces gradients during the warm-up; None: torch's default group.
        subgroup: who does afterwards; None: the ranks of ``process_group`` on this machine, as the
            launcher tells (torchrun), or else its name.
        start_localSGD_iter: iterations of warm-up.
        post_local_gradient_allreduce: reduce gradients in ``subgroup`` after the warm-up; else they
            stay on their rank.
        reducer: what reduces a bucket over a group: a wire without residuals, such as
            `postlocal.wire.bf16`, or another hook. A
            hook is given ``reducer_state``, of which ``process_group`` is set to the group in use;
            or that group itself, if there is no ``reducer_state``. None: an all-reduce.
        reducer_state: see ``reducer``.
        clock: a model averager, or an optimizer that has one: its step is then the iteration, so
            that both start local training in the same one.
        gradient_accumulation_steps: backward passes an iteration that reduce gradients: 1 where
            the others run in ``no_sync()``. With a ``clock`` it is not needed.
        model: the DDP model. After the warm-up it then neither broadcasts buffers in each forward
            pass, nor looks for unused parameters on all ranks where nothing is reduced; have the
            averager average its buffers.

    Raises:
        ValueError: if a number is out of its range, or ``clock`` has another warm-up.

    Example:
        >>> state = PostLocalSGDState(None, None, start_localSGD_iter=100)
        >>> state.iter
        0
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None,
        subgroup: dist.ProcessGroup | None,
        start_localSGD_iter: int,
        post_local_gradient_allreduce: bool = True,
        *,
        reducer: Hook | ChunkWire | None = None,
        reducer_state: Any = None,
        clock: Any = None,
        gradient_accumulation_steps: int = 1,
        model: DistributedDataParallel | None = None,
    ) -> None:
        if start_localSGD_iter < 0:
            raise ValueError(f"start_localSGD_iter must be at least 0, got {start_localSGD_iter}")
        if gradient_accumulation_steps < 1:
            raise ValueError(
                f"gradient_accumulation_steps must be at least 1, got {gradient_accumulation_steps}"
            )
        if not (reducer is None or callable(reducer) or isinstance(reducer, ChunkWire)):
            raise ValueError(
                f"reducer must be a hook, or a wire without residuals, got {reducer!r}: give "
                "one with residuals to a strategy as its gradient_wire"
            )
        self.process_group = process_group
        self.subgroup = subgroup
        self.start_localSGD_iter = start_localSGD_iter
        self.post_local_gradient_allreduce = post_local_gradient_allreduce
        self.reducer = reducer
        self.reducer_state = reducer_state
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.clock = _clock(clock, start_localSGD_iter)
        self._passes = 0
        self._announced = False
        self._quiet: _Quiet | None = None
        if dist.is_initialized():
            self._make_subgroup()
        if model is not None:
            self.watch(model)

    @property
    def iter(self) -> int:
        """Iterations so far; without a ``clock`` it stops at ``start_localSGD_iter``."""
        if self.clock is not None:
            return self.clock.step
        return self._passes // self.gradient_accumulation_steps

    @iter.setter
    def iter(self, value: int) -> None:
        if self.clock is not None:
            self.clock.step = value
        else:
            self._passes = value * self.gradient_accumulation_steps

    @property
    def local(self) -> bool:
        """Whether the warm-up is over."""
        return self.iter >= self.start_localSGD_iter

    @property
    def alone(self) -> bool:
        """Whether gradients stay on their rank after the warm-up."""
        if not self.post_local_gradient_allreduce:
            return True
        return self.subgroup is not None and self.subgroup.size() == 1

    def watch(self, model: DistributedDataParallel) -> None:
        """Keep a DDP model from communicating with everybody after the warm-up; see ``model``."""
        if self._quiet is None:
            self._quiet = _Quiet(self, model)

    def maybe_increase_iter(self, bucket: GradBucket) -> None:
        """Count a backward pass when its last bucket is here, unless a ``clock`` counts."""
        if bucket.is_last() and self.clock is None:
            self._passes += 1

    def state_dict(self) -> dict[str, Any]:
        """The iteration."""
        passes = None if self.clock is not None else self._passes
        return {"iter": self.iter, "passes": passes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; a ``clock`` goes on there too."""
        self.iter = state["iter"]
        if self.clock is None and state.get("passes") is not None:
            self._passes = state["passes"]

    def __getstate__(self) -> dict[str, Any]:
        unsaved = ("process_group", "subgroup", "_quiet")
        return {name: value for name, value in vars(self).items() if name not in unsaved}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Process groups cannot be saved: both are the default ones, unless set afterwards."""
        vars(self).update(state, process_group=None, subgroup=None, _quiet=None)

    def __deepcopy__(self, memo: dict[int, Any]) -> "PostLocalSGDState":
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        twin.process_group, twin.subgroup = self.process_group, self.subgroup
        return twin

    def _make_subgroup(self) -> None:
        if self.subgroup is None and self.post_local_gradient_allreduce:
            base = Processes(torch_group(self.process_group))
            self.subgroup = base.torch_subgroup(by_node(base))

    def _reduce(self, group: dist.ProcessGroup, bucket: GradBucket) -> Future[Tensor]:
        if self.reducer is None:
            return allreduce_hook(group, bucket)
        if isinstance(self.reducer, ChunkWire):
            return background(group).mean(bucket, self.reducer)
        if self.reducer_state is None:
            return self.reducer(group, bucket)
        self.reducer_state.process_group = group
        return self.reducer(self.reducer_state, bucket)

    def _announce(self) -> None:
        if not self._announced:
            self._announced = True
            logger.info("Local SGD starts after %d iterations", self.start_localSGD_iter)


def post_localSGD_hook(
    state: PostLocalSGDState, bucket: GradBucket
) -> torch.futures.Future[torch.Tensor]:
    """Reduce gradients globally during the warm-up, then within the subgroup or not at all.

    Parameters have to be averaged after the warm-up, by `postlocal.model_averaging`.

    Args:
        state: when and with whom.
        bucket: the gradients.

    Returns:
        A promise of the bucket's buffer, which holds the mean.
    """
    if not state.local:
        state.maybe_increase_iter(bucket)
        return state._reduce(torch_group(state.process_group), bucket)
    state._announce()
    state._make_subgroup()  # was made at construction, unless there were no process groups then
    if state.alone:
        return kept(bucket.buffer())
    assert state.subgroup is not None
    return state._reduce(state.subgroup, bucket)


class _Quiet:
    """Keeps a DDP model from communicating with everybody in local iterations."""

    def __init__(self, state: PostLocalSGDState, model: DistributedDataParallel) -> None:
        self._state = state
        self._option = buffers_option(model)
        self._syncs_buffers = getattr(model, self._option)
        self._silent = False
        if self._syncs_buffers and any(True for _ in model.buffers()):
            _check_buffers(state.clock)
        model.register_forward_pre_hook(self._before_forward)

    def _before_forward(self, model: Any, _: Any) -> None:
        local = self._state.local
        setattr(model, self._option, self._syncs_buffers and not local)
        # A static graph has to be seen by the reducer from the first pass on.
        if local and self._state.alone and not model.static_graph:
            self._silent = True
            model.require_backward_grad_sync = False
        elif self._silent:
            self._silent = False
            model.require_backward_grad_sync = True


def _check_buffers(clock: Any) -> None:
    if clock is not None and not clock.buffers:
        warnings.warn(
            "model has buffers, not broadcast after the warm-up, and nothing averages them: "
            "make the averager with buffers=model.buffers()",
            stacklevel=5,
        )


def _clock(clock: Any, warmup: int) -> Clock | None:
    clock = getattr(clock, "averager", clock)
    if clock is not None and clock.warmup_steps != warmup:
        raise ValueError(
            f"start_localSGD_iter must be the warmup_steps of clock, got {warmup} and "
            f"{clock.warmup_steps}: gradients and parameters have to change over in one step"
        )
    counted: Clock | None = clock
    return counted
