"""The part of a checkpoint that one rank saves."""

from collections.abc import Mapping
from typing import Any

from postlocal.checkpoint import matching
from postlocal.errors import CheckpointError
from postlocal.sync.clock import Sync


def local_state(sync: Sync, extra: Mapping[Any, Any] | None) -> dict[str, Any]:
    """The part of a checkpoint that this rank saves."""
    if not isinstance(extra, Mapping | None):
        raise TypeError(f"extra must be a dict, got {type(extra).__name__}")
    return {
        "about": matching.describe(sync),
        "model": {name: tensor.detach() for name, tensor in sync.replica.tensors.items()},
        "own": {name: tensor.detach() for name, tensor in sync.replica.own.items()},
        "optimizers": [optimizer.state_dict() for optimizer in sync.inner.optimizers],
        "sync": sync.state_dict(),
        "extra": dict(extra or {}),
    }


def follow_model(sync: Sync) -> None:
    """Look up the model's tensors again, because buffers may have been reassigned.

    Raises:
        CheckpointError: if the model was changed since `attach`.
    """
    problem = sync.follow_model()
    if problem is not None:
        raise CheckpointError(problem)
