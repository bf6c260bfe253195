"""All-reduce of gradients, as they are or as 16 bits: `torch`'s default hooks, on every backend.

A hook is what `DistributedDataParallel.register_comm_hook` takes: given a state and a bucket of
gradients, it starts a reduction and promises the reduced bucket.

Example:
    >>> import torch
    >>> import torch.distributed as dist
    >>> from torch.nn.parallel import DistributedDataParallel
    >>> from postlocal.ddp_comm_hooks.default_hooks import allreduce_hook
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> model = DistributedDataParallel(torch.nn.Linear(2, 1))
    >>> model.register_comm_hook(None, allreduce_hook)
    >>> model(torch.ones(3, 2)).sum().backward()
    >>> model.module.weight.grad
    tensor([[3., 3.]])
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from postlocal.comm.background import promise
from postlocal.comm.group import torch_group
from postlocal.sync.supported_tensors import dense
from postlocal.torch_versions import GradBucket

__all__ = [
    "Hook",
    "allreduce_hook",
    "bf16_compress_hook",
    "bf16_compress_wrapper",
    "fp16_compress_hook",
    "fp16_compress_wrapper",
]

Hook = Callable[[Any, GradBucket], Future[Tensor]]
"""State and bucket -> a promise of the reduced bucket, flat, in its dtype."""


def kept(tensor: Tensor) -> Future[Tensor]:
    """A promise that is fulfilled already."""
    future = promise(tensor)
    future.set_result(tensor)
    return future


def _summed(tensor: Tensor, process_group: dist.ProcessGroup) -> Future[list[Tensor]]:
    work = dist.all_reduce(tensor, group=process_group, async_op=True)
    assert work is not None
    future: Future[list[Tensor]] = work.get_future()
    return future


def allreduce_hook(
    process_group: dist.ProcessGroup | None, bucket: GradBucket
) -> torch.futures.Future[torch.Tensor]:
    """Divide gradients by the number of ranks and all-reduce them, as DDP does with no hook.

    Args:
        process_group: who takes part; None: torch's default group.
        bucket: the gradients.

    Returns:
        A promise of the bucket's buffer, which holds the mean. The arithmetic is that of torch's
        ``allreduce_hook``, bit for bit.
    """
    group = torch_group(process_group)
    return _summed(bucket.buffer().div_(group.size()), group).then(lambda done: done.value()[0])


def _compressed(
    dtype: torch.dtype, process_group: dist.ProcessGroup | None, bucket: GradBucket
) -> Future[Tensor]:
    group = torch_group(process_group)
    buffer = dense(bucket)
    narrow = buffer.to(dtype).div_(group.size())
    return _summed(narrow, group).then(lambda done: buffer.copy_(done.value()[0]))


def fp16_compress_hook(
    process_group: dist.ProcessGroup | None, bucket: GradBucket
) -> torch.futures.Future[torch.Tensor]:
    """Cast gradients to fp16, divide them by the number of ranks, all-reduce: half the bytes.

    Values beyond 65504 become infinite, which a GradScaler notices; `bf16_compress_hook` has the
    range of fp32.

    Args:
        process_group: who takes part; None: torch's default group.
        bucket: the gradients, of any floating point dtype.

    Returns:
        A promise of the bucket's buffer, which holds the mean in its own dtype.
    """
    return _compressed(torch.float16, process_group, bucket)


def bf16_compress_hook(
    process_group: dist.ProcessGroup | None, bucket: GradBucket
) -> torch.futures.Future[torch.Tensor]:
    """Cast gradients to bf16, divide them by the number of ranks, all-reduce: half the bytes.

    On gloo too, where torch's hook of this name is refused.

    Args:
        process_group: who takes part; None: torch's default group.
        bucket: the gradients, of any floating point dtype.

    Returns:
        A promise of the bucket's buffer, which holds the mean in its own dtype.
    """
    return _compressed(torch.bfloat16, process_group, bucket)


# DistributedDataParallel refuses hooks of this name unless the backend is NCCL; gloo has bf16 too.
bf16_compress_hook.__name__ = "bf16_compress"


def _cast_around(hook: Hook, dtype: torch.dtype, name: str) -> Hook:
    def compress_wrapper_hook(state: Any, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        buffer = dense(bucket)
        bucket.set_buffer(buffer.to(dtype))

        def decompress(done: Future[Tensor]) -> Tensor:
            bucket.set_buffer(buffer)
            return buffer.copy_(done.value())

        return hook(state, bucket).then(decompress)

    compress_wrapper_hook.__name__ = f"{name}({getattr(hook, '__name__', hook)})"
    compress_wrapper_hook.__qualname__ = compress_wrapper_hook.__name__
    return compress_wrapper_hook


def fp16_compress_wrapper(hook: Hook) -> Hook:
    """A hook that casts gradients to fp16, runs ``hook`` on them, and casts the result back.

    Args:
        hook: any hook; its state is that of the wrapper.

    Example:
        >>> hook = fp16_compress_wrapper(allreduce_hook)
        >>> hook.__name__
        'fp16_compress_wrapper(allreduce_hook)'
    """
    return _cast_around(hook, torch.float16, "fp16_compress_wrapper")


def bf16_compress_wrapper(hook: Hook) -> Hook:
    """A hook that casts gradients to bf16, runs ``hook`` on them, and casts the result back.

    Args:
        hook: any hook; its state is that of the wrapper.

    Example:
        >>> hook = bf16_compress_wrapper(allreduce_hook)
    """
    return _cast_around(hook, torch.bfloat16, "bf16_compress_wrapper")
