"""How tensors travel: means of many tensors over a group, in place, with bounded memory.

A `Wire` is a recipe, such as `bf16` or ``error_feedback(int8())``. Opened over a group it is a
`Carrier`, which keeps what is remembered of each tensor. Recipes that remember nothing can be used
without one: `mean_` takes a `ChunkWire`.

Example:
    >>> import torch
    >>> from postlocal import virtual, wire
    >>> from postlocal.topology import Layout, world
    >>> def work(group):
    ...     carrier = wire.error_feedback(wire.bf16()).open(Layout(group, world()), "world")
    ...     weight = torch.tensor([float(group.rank)])
    ...     return carrier.mean_({"weight": weight}), weight.item()
    >>> virtual.run(2, work)
    [(4, 0.5), (4, 0.5)]
"""

from postlocal.wire.carrier import Carrier, Wire
from postlocal.wire.chunks import CHUNK, Chunk, travels_as
from postlocal.wire.direct import Direct
from postlocal.wire.exchange import ChunkWire, Divisor, Exchange, Repair, Staged
from postlocal.wire.feedback import error_feedback
from postlocal.wire.mean import maximum_, mean_
from postlocal.wire.recipes import Coded, Exact, bf16, fp16, fp32, quantised
from postlocal.wire.staging import Staging

__all__ = [
    "CHUNK",
    "Carrier",
    "Chunk",
    "ChunkWire",
    "Coded",
    "Direct",
    "Divisor",
    "Exact",
    "Exchange",
    "Repair",
    "Staged",
    "Staging",
    "Wire",
    "bf16",
    "error_feedback",
    "fp16",
    "fp32",
    "maximum_",
    "mean_",
    "quantised",
    "travels_as",
]
