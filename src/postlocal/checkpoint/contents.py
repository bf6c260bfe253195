"""What a checkpoint holds of one rank."""

from collections.abc import Mapping
from typing import Any

from postlocal.checkpoint import matching
from postlocal.errors import CheckpointError
from postlocal.sync.clock import Sync


def local_state(sync: Sync, extra: Mapping[Any, Any] | None) -> dict[str, Any]:
    """All that a checkpoint holds of this rank."""
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
    """Look at the model as it is now: buffers may have been assigned anew since the last look.

    Raises:
        CheckpointError: if it is no longer what `attach` was given.
    """
    problem = sync.follow_model()
    if problem is not None:
        raise CheckpointError(problem)
