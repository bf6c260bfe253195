"""Gradients of 8 bits on the wire, on every backend.

Each rank reduces one shard of the bucket. All ranks send it their codes; it takes the mean in
higher precision and sends codes of the mean back. So a rank sends ``2 (W - 1) / W`` bytes a value,
however many ranks ``W`` there are. torch's hooks of these names gather everything and send
``W - 1``.

The reduction runs beside the backward pass, on a process group that the first call makes.

Example:
    >>> import torch
    >>> import torch.distributed as dist
    >>> from torch.nn.parallel import DistributedDataParallel
    >>> from postlocal.ddp_comm_hooks.quantization_hooks import (
    ...     QuantizationState,
    ...     quantization_blockwise_hook,
    ... )
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> model = DistributedDataParallel(torch.nn.Linear(2, 1))
    >>> model.register_comm_hook(QuantizationState(None), quantization_blockwise_hook)
    >>> model(torch.ones(3, 2)).sum().backward()
    >>> model.module.weight.grad
    tensor([[3., 3.]])
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from postlocal.codec import affine, int8
from postlocal.comm.group import torch_group
from postlocal.ddp_comm_hooks._background import background
from postlocal.ddp_comm_hooks._residuals import Residuals
from postlocal.torch_versions import GradBucket
from postlocal.wire import quantised, sent_as

__all__ = [
    "QuantizationState",
    "quantization_blockwise_hook",
    "quantization_perchannel_hook",
    "quantization_pertensor_hook",
]


def quantization_pertensor_hook(
    process_group: dist.ProcessGroup | None, bucket: GradBucket
) -> torch.futures.Future[torch.Tensor]:
    """Mean of gradients as codes of 8 bits, one scale and zero point for each shard that is sent.

    A shard is what one rank reduces of at most 2 Mi elements of a bucket, so that scales are never
    coarser than the one of torch's hook for a whole bucket. The mean is rounded once more on its
    way back: each way loses at most half a step of the scale used.

    Args:
        process_group: who takes part; None: torch's default group.
        bucket: the gradients, of any floating point dtype.

    Returns:
        A promise of the bucket's buffer, which holds the mean in its own dtype.
    """
    return background(torch_group(process_group)).mean(bucket, quantised(affine()))


def quantization_perchannel_hook(
    process_group: dist.ProcessGroup | None, bucket: GradBucket, bucket_size: int = 512
) -> torch.futures.Future[torch.Tensor]:
    """Mean of gradients as codes of 8 bits, with scale and zero point for each run of elements.

    Args:
        process_group: who takes part; None: torch's default group.
        bucket: the gradients, of any floating point dtype.
        bucket_size: elements that share scale and zero point (8 bytes).

    Returns:
        A promise of the bucket's buffer, which holds the mean in its own dtype.

    Raises:
        ValueError: if ``bucket_size`` is below 1.
    """
    return background(torch_group(process_group)).mean(bucket, quantised(affine(bucket_size)))


class QuantizationState:
    """What `quantization_blockwise_hook` needs: block size, and the errors it feeds back.

    Args:
        process_group: who takes part; None: torch's default group.
        block: elements that share a scale (4 bytes).
        error_feedback: keep what rounding lost and add it to the next gradients (arXiv 1901.09847,
            Algorithm 2). It needs memory for one copy of the gradients in fp32.

    Raises:
        ValueError: if ``block`` is below 1.

    Example:
        >>> QuantizationState(None, block=128).wire.payload_bytes(numel=1024, size=2)
        1056
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None,
        block: int = 256,
        error_feedback: bool = True,
    ) -> None:
        self.process_group = process_group
        self.wire = quantised(int8(block))
        self.error_feedback = error_feedback
        self._residuals = Residuals()

    @property
    def errors(self) -> Mapping[int, torch.Tensor]:
        """The residual of each parameter's gradient on this rank, in the order first seen."""
        return self._residuals.by_parameter

    def state_dict(self) -> dict[str, Any]:
        """The errors, each rank's own. For an exact resume each rank loads its own again."""
        return {"errors": self._residuals.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state_dict` gave."""
        self._residuals.load_state_dict(state["errors"])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "process_group"}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state, process_group=None)


def quantization_blockwise_hook(
    state: QuantizationState, bucket: GradBucket
) -> torch.futures.Future[torch.Tensor]:
    """Mean of gradients as integers of 8 bits, one scale a block, errors fed back.

    Args:
        state: block size and errors.
        bucket: the gradients, of any floating point dtype.

    Returns:
        A promise of the bucket's buffer, which holds the mean in its own dtype.
    """
    errors = None
    if state.error_feedback:
        errors = state._residuals.flat(bucket, sent_as(bucket.buffer().dtype))
    return background(torch_group(state.process_group)).mean(bucket, state.wire, errors)
