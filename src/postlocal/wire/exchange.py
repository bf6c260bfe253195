"""What a mean of a chunk over a group is made of."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from postlocal.comm.group import Group
from postlocal.wire.chunks import Chunk
from postlocal.wire.staging import Staging

Divisor = Callable[[], float]
"""The sum of the weights of all contributions; called when the first sums arrive, not before."""

Repair = Callable[[Tensor, Sequence[Tensor]], None]
"""Replaces a contribution, given those of the others in their order, by a mean."""


def ring_bytes(numel: int, size: int, dtype: torch.dtype) -> int:
    """Bytes that each of ``size`` ranks sends in an all-reduce along a ring.

    Example:
        >>> ring_bytes(1000, 4, torch.float32)
        6000
    """
    return 2 * (size - 1) * math.ceil(numel / size) * dtype.itemsize


class Exchange(Protocol):
    """A mean under way."""

    def turn(self) -> None:
        """Block until all contributions are here, take the mean, and send it on its way back.

        Raises:
            PeerError: if a rank did not take part in time.
        """
        ...

    def wait(self) -> None:
        """Block until the chunk holds the mean.

        Raises:
            PeerError: if a rank did not take part in time.
        """
        ...


class Staged(NamedTuple):
    """Staging memory of a chunk, in bytes, before and after its exchange has turned."""

    outbound: int
    homebound: int


@runtime_checkable
class ChunkWire(Protocol):
    """Takes the mean of values over a group chunk by chunk, and remembers nothing."""

    @property
    def lossy(self) -> bool:
        """Whether values lose precision on the way, so that differences should be sent."""
        ...

    def payload_bytes(self, numel: int, size: int, dtype: torch.dtype = torch.float32) -> int:
        """The most bytes that one of ``size`` ranks sends for ``numel`` elements of ``dtype``."""
        ...

    def sent_bytes(
        self, numel: int, rank: int, size: int, dtype: torch.dtype = torch.float32
    ) -> int:
        """Bytes that rank ``rank`` of ``size`` sends for a chunk of ``numel`` elements."""
        ...

    def limit(self, size: int, numel: int) -> int:
        """Greatest number of fp32 elements of a chunk, where ``size`` ranks exchange ``numel``."""
        ...

    def staged(self, chunk: Chunk, size: int) -> Staged:
        """Memory that a chunk takes on its way between ``size`` ranks."""
        ...

    def launch(self, chunk: Chunk, group: Group, divisor: Divisor, staging: Staging) -> Exchange:
        """Start to replace values by the weighted sum over the group divided by ``divisor()``.

        All ranks end with identical bits.

        Args:
            chunk: the values with this rank's weights, of the same sizes on all ranks.
            group: who takes part.
            divisor: gives the sum of the weights of all contributions.
            staging: where memory for what travels comes from.
        """
        ...
