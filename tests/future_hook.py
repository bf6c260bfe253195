"""A communication hook in a module whose annotations are strings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from postlocal.ddp_comm_hooks.default_hooks import allreduce_hook

if TYPE_CHECKING:
    import torch
    from torch._C._distributed_c10d import GradBucket


def hook(state: Any, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    return allreduce_hook(state, bucket)
