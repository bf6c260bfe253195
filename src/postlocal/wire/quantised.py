"""Means of codes: reduce-scatter of encoded contributions, all-gather of encoded means."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from postlocal.codec import Codec
from postlocal.comm.group import Group, Work
from postlocal.wire.api import Divisor, Leg
from postlocal.wire.chunks import Chunk, Staging, coded_chunk_size
from postlocal.wire.mean import CodecWire, Exchange, Staged
from postlocal.wire.residuals import CompensatedValues


@dataclass(frozen=True)
class quantised(CodecWire):
    """Codes of a codec: each value is encoded once on the way out and once on the way back.

    A reduce-scatter of codes, and an all-gather of codes of the means. A rank sends
    ``2 (W - 1) / W`` payloads of the whole, as in a ring all-reduce; sums are taken in fp32.

    Args:
        codec: one of `postlocal.codec`.

    Raises:
        TypeError: if ``codec`` is none.

    Example:
        >>> from postlocal import codec
        >>> quantised(codec.int8(block=256)).payload_bytes(numel=2**20, size=2)
        1064960
    """

    def legs(self, numel: int, rank: int, size: int, dtype: torch.dtype) -> Sequence[Leg]:
        payloads = _payloads(self.codec, numel, size, dtype)
        own = payloads[rank]
        return Leg(sum(payloads) - own, size), Leg((size - 1) * own, size)

    def limit(self, size: int, numel: int) -> int:
        return coded_chunk_size(numel, self.codec)

    def staged(self, chunk: Chunk, size: int) -> Staged:
        packed = chunk.packed * chunk.dtype.itemsize
        payload = self.codec.nbytes(chunk.numel, chunk.dtype)
        return Staged(packed + 2 * payload, packed + payload)

    def start(self, chunk: Chunk, group: Group, divisor: Divisor, staging: Staging) -> Exchange:
        return QuantisedExchange(CompensatedValues(chunk), group, divisor, self.codec, staging)


class QuantisedExchange:
    """Codes under way: a reduce-scatter of codes, and an all-gather of codes of the means.

    Each value is encoded once on the way out, unless this rank reduces it, and once on the way
    back. All ranks take what the codes of the means stand for.

    What coding loses on the way out is kept by the rank that sent it, and what it loses on the way
    back, by all ranks, by the one that reduced the shard; see `CompensatedValues`.
    """

    def __init__(
        self,
        compensated: CompensatedValues,
        group: Group,
        divisor: Divisor,
        codec: Codec,
        staging: Staging,
    ) -> None:
        self._compensated = compensated
        self._group = group
        self._divisor = divisor
        self._codec = codec
        self._staging = staging
        values = compensated.values
        self._shards = _shards(values.numel(), group.size, codec.block)
        sizes = _payloads(codec, values.numel(), group.size, values.dtype)
        self._sent = staging.allocate(sum(sizes), values, torch.uint8)
        self._received = staging.allocate(group.size * sizes[group.rank], values, torch.uint8)
        self._outgoing = torch.split(self._sent, sizes)
        self._incoming = self._received.chunk(group.size)
        for rank, (shard, payload) in enumerate(zip(self._shards, self._outgoing, strict=True)):
            self._encode(rank, shard, payload)
        self._work: Work = group.all_to_all(_single(self._outgoing), _single(self._incoming))

    def reduce(self) -> None:
        self._work.wait()
        rank = self._group.rank
        shard, payload = self._shards[rank], self._outgoing[rank]
        mean = self._compensated.values[shard]
        divisor = self._divisor()
        for other, incoming in enumerate(self._incoming):
            if other != rank:
                self._codec.accumulate(incoming, mean)
        self._staging.free(self._received)
        mean.div_(divisor)
        self._compensated.encode_mean(shard, payload, self._codec, self._group.size)
        sent = [[payload]] * self._group.size
        self._work = self._group.all_to_all(sent, _single(self._outgoing))

    def wait(self) -> None:
        self._work.wait()
        for shard, payload in zip(self._shards, self._outgoing, strict=True):
            self._codec.decode(payload, self._compensated.values[shard])
        self._staging.free(self._sent)

    def _encode(self, rank: int, shard: slice, payload: Tensor) -> None:
        if rank == self._group.rank:
            self._compensated.weigh(shard)
        else:
            self._compensated.encode(shard, payload, self._codec)


def _single(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    return [[tensor] for tensor in tensors]


def _shards(numel: int, size: int, block: int) -> list[slice]:
    """The shards of a chunk, of whole blocks; the last ones may be shorter or empty."""
    most = math.ceil(math.ceil(numel / size) / block) * block
    return [slice(min(rank * most, numel), min((rank + 1) * most, numel)) for rank in range(size)]


def _payloads(codec: Codec, numel: int, size: int, dtype: torch.dtype) -> list[int]:
    """Bytes of the payload of each shard."""
    shards = _shards(numel, size, codec.block)
    return [codec.nbytes(shard.stop - shard.start, dtype) for shard in shards]
