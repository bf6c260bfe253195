"""How tensors are sent: means of many tensors over a group, in place, with bounded memory.

A `Wire` is a recipe, such as `bf16` or `int8`, and a frozen value. Opened over a group it is a
`Reducer`, which keeps residuals and other state of each tensor. Stateless wires that take means
chunk by chunk, `ChunkWire`, can be used without one, in `mean_`.

Example:
    >>> import torch
    >>> from postlocal import virtual, wire
    >>> from postlocal.topology import world
    >>> from postlocal.comm.groups import LevelGroups
    >>> def work(group):
    ...     reducer = wire.error_feedback(wire.bf16()).open(LevelGroups(group, world()), "world")
    ...     weight = torch.full((8,), float(group.rank))
    ...     return reducer.mean_({"weight": weight}), weight[0].item()
    >>> virtual.run(2, work)
    [(16, 0.5), (16, 0.5)]
"""

from postlocal.wire.api import Divisor, Leg, Reducer, Wire, ring_bytes, sent_bytes
from postlocal.wire.chunks import CHUNK, STAGING_BYTES, Chunk, Staging, sent_as
from postlocal.wire.error_feedback import error_feedback
from postlocal.wire.exact import Repair, exact, fp32
from postlocal.wire.gathered import gathered
from postlocal.wire.mean import ChunkWire, Exchange, Staged, maximum_, mean_
from postlocal.wire.named import (
    NAMED,
    bf16,
    fp4,
    fp8,
    fp16,
    int4,
    int8,
    named,
    random_k,
    sign,
    top_k,
)
from postlocal.wire.power_sgd import powersgd
from postlocal.wire.quantised import quantised
from postlocal.wire.residuals import CompensatedValues
from postlocal.wire.two_level import two_level

__all__ = [
    "CHUNK",
    "NAMED",
    "STAGING_BYTES",
    "Chunk",
    "ChunkWire",
    "CompensatedValues",
    "Divisor",
    "Exchange",
    "Leg",
    "Reducer",
    "Repair",
    "Staged",
    "Staging",
    "Wire",
    "bf16",
    "error_feedback",
    "exact",
    "fp4",
    "fp8",
    "fp16",
    "fp32",
    "gathered",
    "int4",
    "int8",
    "maximum_",
    "mean_",
    "named",
    "powersgd",
    "quantised",
    "random_k",
    "ring_bytes",
    "sent_as",
    "sent_bytes",
    "sign",
    "top_k",
    "two_level",
]
