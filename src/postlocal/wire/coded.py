"""Means of coded values: codes of parts travel to their owners, codes of means back."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from postlocal.codec import Codec
from postlocal.comm.group import Group, Work
from postlocal.wire.cargo import Cargo
from postlocal.wire.exchange import Divisor
from postlocal.wire.staging import Staging


class Encoded:
    """Codes of parts travel: to their owners, which take the means, and codes of the means back.

    Each value is coded once on the way out, unless its own rank owns it, and once on the way back.
    All ranks take what the owner's codes stand for.

    What coding loses on the way out is kept by the rank that sent it, and what it loses on the way
    back, by all ranks, by the one that owns the part; see `Cargo`.
    """

    def __init__(
        self,
        cargo: Cargo,
        group: Group,
        divisor: Divisor,
        codec: Codec,
        staging: Staging,
    ) -> None:
        self._cargo = cargo
        self._group = group
        self._divisor = divisor
        self._codec = codec
        self._staging = staging
        values = cargo.values
        self._parts = _parts(values.numel(), group.size, codec.block)
        sizes = _payloads(codec, values.numel(), group.size, values.dtype)
        self._sent = staging.take(sum(sizes), values, torch.uint8)
        self._received = staging.take(group.size * sizes[group.rank], values, torch.uint8)
        self._outgoing = torch.split(self._sent, sizes)
        self._incoming = self._received.chunk(group.size)
        for rank, (part, payload) in enumerate(zip(self._parts, self._outgoing, strict=True)):
            self._send(rank, part, payload)
        self._work: Work = group.all_to_all(_single(self._outgoing), _single(self._incoming))

    def turn(self) -> None:
        self._work.wait()
        rank = self._group.rank
        part, payload = self._parts[rank], self._outgoing[rank]
        mean = self._cargo.values[part]
        divisor = self._divisor()
        for other, incoming in enumerate(self._incoming):
            if other != rank:
                self._codec.accumulate(incoming, mean)
        self._staging.give(self._received)
        mean.div_(divisor)
        self._cargo.settle(part, payload, self._codec, self._group.size)
        sent = [[payload]] * self._group.size
        self._work = self._group.all_to_all(sent, _single(self._outgoing))

    def wait(self) -> None:
        self._work.wait()
        for part, payload in zip(self._parts, self._outgoing, strict=True):
            self._codec.decode(payload, self._cargo.values[part])
        self._staging.give(self._sent)

    def _send(self, rank: int, part: slice, payload: Tensor) -> None:
        if rank == self._group.rank:
            self._cargo.weigh(part)
        else:
            self._codec.encode(self._cargo.lend(part), payload)
            self._cargo.lose(part, payload, self._codec)


def _single(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    return [[tensor] for tensor in tensors]


def _parts(numel: int, size: int, block: int) -> list[slice]:
    """The parts of a chunk that ``size`` ranks own, the last ones perhaps shorter or empty."""
    part = owned(numel, size, block)
    return [slice(min(rank * part, numel), min((rank + 1) * part, numel)) for rank in range(size)]


def _payloads(codec: Codec, numel: int, size: int, dtype: torch.dtype) -> list[int]:
    """Bytes of the payloads of the parts that ``size`` ranks own."""
    parts = _parts(numel, size, codec.block)
    return [codec.nbytes(part.stop - part.start, dtype) for part in parts]


def exchanged_bytes(codec: Codec, numel: int, size: int, dtype: torch.dtype, rank: int = 0) -> int:
    """Bytes that a rank sends where parts go to their owners and come back; rank 0 sends most."""
    payloads = _payloads(codec, numel, size, dtype)
    return sum(payloads) + (size - 2) * payloads[rank]


def owned(numel: int, size: int, block: int) -> int:
    """Elements that each of ``size`` ranks owns, the last ones perhaps fewer: whole blocks."""
    return math.ceil(math.ceil(numel / size) / block) * block
