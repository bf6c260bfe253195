"""Means of payloads that are all-gathered, as suits sparse ones."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from postlocal.codec import Codec
from postlocal.comm.group import Group, Work
from postlocal.wire.api import Divisor, Leg
from postlocal.wire.chunks import Chunk, Staging, gathered_chunk_size
from postlocal.wire.mean import CodecWire, Exchange, Staged
from postlocal.wire.residuals import CompensatedValues


@dataclass(frozen=True)
class gathered(CodecWire):
    """Codes that go to everybody: each value is encoded once, and its mean not at all.

    One all-gather. A rank sends ``W - 1`` payloads of the whole, which suits sparse ones and few
    ranks: a mean of sparse values is not sparse, and would lose what `quantised` encodes on the way
    back.

    Args:
        codec: one of `postlocal.codec`.

    Raises:
        TypeError: if ``codec`` is none.

    Example:
        >>> from postlocal import codec
        >>> gathered(codec.int8(block=256)).payload_bytes(numel=2**20, size=3)
        2129920
    """

    def legs(self, numel: int, rank: int, size: int, dtype: torch.dtype) -> Sequence[Leg]:
        return (Leg((size - 1) * self.codec.nbytes(numel, dtype), size),)

    def limit(self, size: int, numel: int) -> int:
        return gathered_chunk_size(size, self.codec)

    def staged(self, chunk: Chunk, size: int) -> Staged:
        packed = chunk.packed * chunk.dtype.itemsize
        return Staged(packed + size * self.codec.nbytes(chunk.numel, chunk.dtype), packed)

    def start(self, chunk: Chunk, group: Group, divisor: Divisor, staging: Staging) -> Exchange:
        return GatheredExchange(CompensatedValues(chunk), group, divisor, self.codec, staging)


class GatheredExchange:
    """Payloads under way to all ranks, each of which takes the mean, in the order of ranks.

    Each value is encoded once, and the rank that sent it keeps what coding loses; see
    `CompensatedValues`.
    """

    def __init__(
        self,
        compensated: CompensatedValues,
        group: Group,
        divisor: Divisor,
        codec: Codec,
        staging: Staging,
    ) -> None:
        values = compensated.values
        self._values = values
        self._divisor = divisor
        self._codec = codec
        self._staging = staging
        nbytes = codec.nbytes(values.numel(), values.dtype)
        self._received = staging.allocate(group.size * nbytes, values, torch.uint8)
        self._payloads = self._received.view(group.size, nbytes)
        own = self._payloads[group.rank]
        compensated.encode(slice(0, values.numel()), own, codec)
        places = [[payload] for payload in self._payloads]
        self._work: Work = group.all_to_all([[own]] * group.size, places)

    def reduce(self) -> None:
        self._work.wait()
        self._values.zero_()
        for payload in self._payloads:
            self._codec.accumulate(payload, self._values)
        self._values.div_(self._divisor())
        self._staging.free(self._received)

    def wait(self) -> None:
        return None
