"""Wires that remember nothing: exact ones, and those that send codes."""

from dataclasses import dataclass, field

import torch

from postlocal.checks import settle
from postlocal.codec import Codec, cast, exact
from postlocal.codec.protocol import is_codec
from postlocal.comm.group import Group
from postlocal.comm.groups import LevelGroups
from postlocal.wire.carrier import Carrier, Forgetful
from postlocal.wire.chunks import CHUNK, Chunk, share_of
from postlocal.wire.coded import Encoded, exchanged_bytes
from postlocal.wire.exact import Direct
from postlocal.wire.exchange import ChunkWire, Divisor, Exchange, Repair, Staged
from postlocal.wire.gathered import ToEveryone
from postlocal.wire.staging import Staging


class _Forgetting(ChunkWire):
    """What wires that remember nothing have in common."""

    def payload_bytes(self, numel: int, size: int, dtype: torch.dtype = torch.float32) -> int:
        return self.sent_bytes(numel, 0, size, dtype)

    def open(self, groups: LevelGroups, level: str, staging: Staging | None = None) -> Carrier:
        return Forgetful(self, groups[level], staging)


@dataclass(frozen=True)
class Exact(_Forgetting):
    """Values travel as they are; see `fp32`.

    Args:
        repair: takes the mean where a sum is not finite; None: it stays as it is.
    """

    repair: Repair | None = field(default=None, repr=False)
    lossy = False

    def sent_bytes(
        self, numel: int, rank: int, size: int, dtype: torch.dtype = torch.float32
    ) -> int:
        return exchanged_bytes(exact(), numel, size, dtype, rank)

    def limit(self, size: int, numel: int) -> int:
        return share_of(numel, CHUNK, value_bytes=4)

    def staged(self, chunk: Chunk, size: int) -> Staged:
        copied = chunk.copied * chunk.dtype.itemsize
        return Staged(chunk.numel * chunk.dtype.itemsize + copied, copied)

    def launch(self, chunk: Chunk, group: Group, divisor: Divisor, staging: Staging) -> Exchange:
        return Direct(chunk.pieces(), group, divisor, staging, self.repair)


@dataclass(frozen=True)
class Coded(_Forgetting):
    """Codes travel to the owners of parts and back; see `quantised`.

    Args:
        codec: turns values into payloads.
    """

    codec: Codec
    lossy = True

    def __post_init__(self) -> None:
        settle(self, codec=is_codec)

    def sent_bytes(
        self, numel: int, rank: int, size: int, dtype: torch.dtype = torch.float32
    ) -> int:
        return exchanged_bytes(self.codec, numel, size, dtype, rank)

    def limit(self, size: int, numel: int) -> int:
        most = CHUNK // 2
        return share_of(numel, most, self.codec.nbytes(most) / most)

    def staged(self, chunk: Chunk, size: int) -> Staged:
        packed = chunk.packed * chunk.dtype.itemsize
        payload = self.codec.nbytes(chunk.numel, chunk.dtype)
        return Staged(packed + 2 * payload, packed + payload)

    def launch(self, chunk: Chunk, group: Group, divisor: Divisor, staging: Staging) -> Exchange:
        return Encoded(chunk.pack(), group, divisor, self.codec, staging)


@dataclass(frozen=True)
class Gathered(_Forgetting):
    """Codes travel to everybody; see `gathered`.

    Args:
        codec: turns values into payloads.
    """

    codec: Codec
    lossy = True

    def __post_init__(self) -> None:
        settle(self, codec=is_codec)

    def sent_bytes(
        self, numel: int, rank: int, size: int, dtype: torch.dtype = torch.float32
    ) -> int:
        return (size - 1) * self.codec.nbytes(numel, dtype)

    def limit(self, size: int, numel: int) -> int:
        # As much memory for everybody's payloads as a chunk of fp32 takes.
        whole = CHUNK // 2
        fitting = whole * 4 * CHUNK // (size * self.codec.nbytes(whole))
        return max(1, min(whole, fitting) // self.codec.block) * self.codec.block

    def staged(self, chunk: Chunk, size: int) -> Staged:
        packed = chunk.packed * chunk.dtype.itemsize
        return Staged(packed + size * self.codec.nbytes(chunk.numel, chunk.dtype), packed)

    def launch(self, chunk: Chunk, group: Group, divisor: Divisor, staging: Staging) -> Exchange:
        return ToEveryone(chunk.pack(), group, divisor, self.codec, staging)


def fp32() -> Exact:
    """Exact: 4 bytes a value (8 for fp64 tensors).

    Identical replicas stay as they are to the last bit, whatever their number.

    Example:
        >>> fp32().payload_bytes(numel=1000, size=2)
        4000
    """
    return Exact()


def bf16() -> Coded:
    """2 bytes a value, 8 bits of precision, the range of fp32; sums are taken in fp32.

    Example:
        >>> bf16().payload_bytes(numel=1000, size=2)
        2000
    """
    return Coded(cast(torch.bfloat16))


def fp16() -> Coded:
    """2 bytes a value, 11 bits of precision; finite ones beyond 65504 are sent as 65504.

    Example:
        >>> fp16().lossy
        True
    """
    return Coded(cast(torch.float16))


def quantised(codec: Codec) -> Coded:
    """Codes of a codec: each value is encoded once on the way out and once on the way back.

    A rank sends ``2 (W - 1) / W`` payloads of the whole, as in a ring all-reduce.

    Args:
        codec: one of `postlocal.codec`.

    Raises:
        TypeError: if ``codec`` is none.

    Example:
        >>> from postlocal import codec
        >>> quantised(codec.int8(block=256)).payload_bytes(numel=2**20, size=2)
        1064960
    """
    return Coded(codec)


def gathered(codec: Codec) -> Gathered:
    """Codes that go to everybody: each value is encoded once, and its mean not at all.

    A rank sends ``W - 1`` payloads of the whole, which suits sparse ones and few ranks: a mean of
    sparse values is not sparse, and would lose what `quantised` encodes on the way back.

    Args:
        codec: one of `postlocal.codec`.

    Raises:
        TypeError: if ``codec`` is none.

    Example:
        >>> from postlocal import codec
        >>> gathered(codec.int8(block=256)).payload_bytes(numel=2**20, size=3)
        2129920
    """
    return Gathered(codec)
