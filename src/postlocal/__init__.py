"""Data-parallel PyTorch training that communicates seldom.

`attach` puts a training loop under a `Strategy`; the modules are its axes. See `postlocal.sync`.
"""

from importlib.metadata import version

from postlocal import (
    checkpoint,
    codec,
    errors,
    fragments,
    guard,
    meter,
    outer,
    planning,
    schedule,
    strategies,
    topology,
    virtual,
    wire,
)
from postlocal.attachment import attach
from postlocal.errors import (
    CheckpointError,
    DisagreementError,
    ModelChangedError,
    NonFiniteError,
    PeerError,
    PostlocalError,
)
from postlocal.planning import plan
from postlocal.strategies import Strategy
from postlocal.sync import Sync

__version__ = version("postlocal")

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
