"""Communication hooks for DistributedDataParallel: torch's, by torch's names, on every backend.

Change ``torch.distributed.algorithms.ddp_comm_hooks`` to ``postlocal.ddp_comm_hooks``.
"""

from collections.abc import Callable
from enum import Enum, member
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from postlocal.ddp_comm_hooks import debugging_hooks as debugging
from postlocal.ddp_comm_hooks import default_hooks as default
from postlocal.ddp_comm_hooks import optimizer_overlap_hooks as optimizer_overlap
from postlocal.ddp_comm_hooks import post_localSGD_hook as post_localSGD
from postlocal.ddp_comm_hooks import powerSGD_hook as powerSGD
from postlocal.ddp_comm_hooks import quantization_hooks as quantization
from postlocal.ddp_comm_hooks.default_hooks import Hook
from postlocal.torch_versions import GradBucket

__all__ = [
    "DDPCommHookType",
    "debugging",
    "default",
    "optimizer_overlap",
    "post_localSGD",
    "powerSGD",
    "quantization",
    "register_ddp_comm_hook",
]

Model = DistributedDataParallel


def _with_state(comm_hook: Hook, model: Model, state: Any = None) -> None:
    model.register_comm_hook(state, comm_hook)


def _with_powersgd(
    comm_hook: Hook,
    model: Model,
    state: dist.ProcessGroup | None = None,
    matrix_approximation_rank: int = 1,
    start_powerSGD_iter: int = 1_000,
) -> None:
    made = powerSGD.PowerSGDState(state, matrix_approximation_rank, start_powerSGD_iter)
    model.register_comm_hook(made, comm_hook)


def _with_quantization(model: Model, state: Any = None) -> None:
    if not isinstance(state, quantization.QuantizationState):
        state = quantization.QuantizationState(state)
    model.register_comm_hook(state, quantization.quantization_blockwise_hook)


def _with_measuring(model: Model, state: Any = None) -> None:
    if not isinstance(state, debugging.MeasureState):
        raise ValueError(
            "MEASURE needs a state to report from: pass state=debugging.MeasureState(process_group)"
        )
    model.register_comm_hook(state, debugging.measure_hook)


def _with_post_local_sgd(model: Model, state: Any = None) -> None:
    if not isinstance(state, post_localSGD.PostLocalSGDState):
        raise ValueError(
            "POST_LOCAL_SGD needs a state: pass state=PostLocalSGDState(process_group, subgroup, "
            "start_localSGD_iter)"
        )
    state.watch(model)
    model.register_comm_hook(state, post_localSGD.post_localSGD_hook)


class DDPCommHookType(Enum):
    """Hooks by name; each value registers its hook: ``value(model=model, state=state)``.

    ``state`` is a process group, or None for torch's default one, but for `POST_LOCAL_SGD`, which
    takes a ``PostLocalSGDState``, and `MEASURE`, which takes a ``MeasureState``. Those two and
    `QUANTIZE_BLOCKWISE` are not among torch's.

    Example:
        >>> DDPCommHookType.FP16_COMPRESS.name
        'FP16_COMPRESS'
    """

    ALLREDUCE = member(partial(_with_state, comm_hook=default.allreduce_hook))
    FP16_COMPRESS = member(partial(_with_state, comm_hook=default.fp16_compress_hook))
    BF16_COMPRESS = member(partial(_with_state, comm_hook=default.bf16_compress_hook))
    QUANTIZE_PER_TENSOR = member(
        partial(_with_state, comm_hook=quantization.quantization_pertensor_hook)
    )
    QUANTIZE_PER_CHANNEL = member(
        partial(_with_state, comm_hook=quantization.quantization_perchannel_hook)
    )
    QUANTIZE_BLOCKWISE = member(partial(_with_quantization))
    POWER_SGD = member(
        partial(_with_powersgd, comm_hook=powerSGD.powerSGD_hook, matrix_approximation_rank=1)
    )
    POWER_SGD_RANK2 = member(
        partial(_with_powersgd, comm_hook=powerSGD.powerSGD_hook, matrix_approximation_rank=2)
    )
    BATCHED_POWER_SGD = member(
        partial(
            _with_powersgd, comm_hook=powerSGD.batched_powerSGD_hook, matrix_approximation_rank=1
        )
    )
    BATCHED_POWER_SGD_RANK2 = member(
        partial(
            _with_powersgd, comm_hook=powerSGD.batched_powerSGD_hook, matrix_approximation_rank=2
        )
    )
    POST_LOCAL_SGD = member(partial(_with_post_local_sgd))
    MEASURE = member(partial(_with_measuring))
    NOOP = member(partial(_with_state, comm_hook=debugging.noop_hook))


def register_ddp_comm_hook(
    comm_hook_type: DDPCommHookType | Hook, model: Model, state: Any = None
) -> None:
    """Register a hook by name, or one of your own, with a DDP model.

    DDP refuses a hook from a module with ``from __future__ import annotations``, since it compares
    annotations by identity; one that is registered here works.

    Args:
        comm_hook_type: which hook.
        model: the DDP model; it must have no hook yet.
        state: the hook's state; see `DDPCommHookType`.

    Raises:
        ValueError: if the state is not one that the hook needs.
        RuntimeError: by DDP, if the model has a hook.
    """
    if isinstance(comm_hook_type, DDPCommHookType):
        comm_hook_type.value(model=model, state=state)
    else:
        model.register_comm_hook(state, _annotated(comm_hook_type))


def _annotated(hook: Callable[[Any, GradBucket], Any]) -> Hook:
    def annotated_hook(state: Any, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        promise: torch.futures.Future[torch.Tensor] = hook(state, bucket)
        return promise

    annotated_hook.__name__ = getattr(hook, "__name__", "hook")
    annotated_hook.__qualname__ = getattr(hook, "__qualname__", "hook")
    return annotated_hook
