"""Data-parallel PyTorch training that communicates seldom.

`attach` puts a training loop under a `Strategy`; the modules are its axes.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from postlocal import (
    codec,
    errors,
    fragments,
    guard,
    meter,
    outer,
    schedule,
    strategies,
    topology,
    virtual,
    wire,
)
from postlocal.errors import (
    CheckpointError,
    DisagreementError,
    ModelChangedError,
    NonFiniteError,
    PeerError,
    PostlocalError,
)
from postlocal.strategies import Strategy
from postlocal.sync.attach import attach
from postlocal.sync.clock import Sync
from postlocal.version import __version__

if TYPE_CHECKING:
    from postlocal import checkpoint, planning
    from postlocal.planning import plan
else:
    # Imported when first used: a loop under `attach` needs neither, and both take long to import.
    def __getattr__(name: str) -> object:
        if name in ("checkpoint", "planning"):
            return import_module(f"postlocal.{name}")
        if name == "plan":
            return import_module("postlocal.planning").plan
        raise AttributeError(f"module 'postlocal' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted(__all__)


__all__ = [
    "CheckpointError",
    "DisagreementError",
    "ModelChangedError",
    "NonFiniteError",
    "PeerError",
    "PostlocalError",
    "Strategy",
    "Sync",
    "__version__",
    "attach",
    "checkpoint",
    "codec",
    "errors",
    "fragments",
    "guard",
    "meter",
    "outer",
    "plan",
    "planning",
    "schedule",
    "strategies",
    "topology",
    "virtual",
    "wire",
]
