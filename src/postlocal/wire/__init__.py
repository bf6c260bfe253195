"""How tensors travel: means of many tensors over a group, in place, with bounded memory.

A `Wire` is a recipe, such as `bf16` or ``error_feedback(int8())``. Opened over a group it is a
`Carrier`, which keeps what is remembered of each tensor. Recipes that remember nothing can be used
without one: `mean_` takes a `ChunkWire`.

Example:
    >>> import torch
    >>> from postlocal import virtual, wire
    >>> from postlocal.topology import world
    >>> from postlocal.comm.groups import LevelGroups
    >>> def work(group):
    ...     carrier = wire.error_feedback(wire.bf16()).open(LevelGroups(group, world()), "world")
    ...     weight = torch.full((8,), float(group.rank))
    ...     return carrier.mean_({"weight": weight}), weight[0].item()
    >>> virtual.run(2, work)
    [(16, 0.5), (16, 0.5)]
"""

from postlocal.wire.carrier import Carrier, Wire
from postlocal.wire.chunks import CHUNK, Chunk, travels_as
from postlocal.wire.error_feedback import error_feedback
from postlocal.wire.exact import Direct
from postlocal.wire.exchange import ChunkWire, Divisor, Exchange, Repair, Staged
from postlocal.wire.mean import maximum_, mean_
from postlocal.wire.named import (
    NAMED,
    codecs,
    fp4,
    fp8,
    int4,
    int8,
    levels,
    named,
    random_k,
    sign,
    top_k,
)
from postlocal.wire.power_sgd import powersgd
from postlocal.wire.recipes import Coded, Exact, Gathered, bf16, fp16, fp32, gathered, quantised
from postlocal.wire.staging import Staging
from postlocal.wire.two_level import relayed

__all__ = [
    "CHUNK",
    "NAMED",
    "Carrier",
    "Chunk",
    "ChunkWire",
    "Coded",
    "Direct",
    "Divisor",
    "Exact",
    "Exchange",
    "Gathered",
    "Repair",
    "Staged",
    "Staging",
    "Wire",
    "bf16",
    "codecs",
    "error_feedback",
    "fp4",
    "fp8",
    "fp16",
    "fp32",
    "gathered",
    "int4",
    "int8",
    "levels",
    "maximum_",
    "mean_",
    "named",
    "powersgd",
    "quantised",
    "random_k",
    "relayed",
    "sign",
    "top_k",
    "travels_as",
]
