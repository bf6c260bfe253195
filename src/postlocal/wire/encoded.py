"""Means of coded values: codes of parts travel to their owners, codes of means back."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from postlocal.codec import Codec
from postlocal.group import Group, Work
from postlocal.wire.exchange import Divisor
from postlocal.wire.staging import Staging


class Encoded:
    """Codes of parts travel: to their owners, which take the means, and codes of the means back.

    Each value is coded once on the way out, unless its own rank owns it, and once on the way back.
    All ranks take what the owner's codes stand for.

    What coding loses is left in ``residual``, if there is one: by this rank on the way out, and by
    all ranks on the way back with the one that owns the part, so that the mean over ranks of
    contribution minus residual is what all received.
    """

    def __init__(
        self,
        chunk: Tensor,
        group: Group,
        divisor: Divisor,
        codec: Codec,
        staging: Staging,
        residual: Tensor | None = None,
    ) -> None:
        self._group = group
        self._divisor = divisor
        self._codec = codec
        self._staging = staging
        self._parts = _parts(chunk, group.size, codec.block)
        self._residuals = None if residual is None else _parts(residual, group.size, codec.block)
        sizes = [codec.nbytes(part.numel(), chunk.dtype) for part in self._parts]
        self._sent = staging.take(sum(sizes), chunk, torch.uint8)
        self._received = staging.take(group.size * sizes[group.rank], chunk, torch.uint8)
        self._outgoing = torch.split(self._sent, sizes)
        self._incoming = self._received.chunk(group.size)
        for rank, (part, payload) in enumerate(zip(self._parts, self._outgoing, strict=True)):
            self._send(rank, part, payload)
        self._work: Work = group.exchange(_single(self._outgoing), _single(self._incoming))

    def turn(self) -> None:
        self._work.wait()
        rank = self._group.rank
        mean, payload = self._parts[rank], self._outgoing[rank]
        divisor = self._divisor()
        for other, incoming in enumerate(self._incoming):
            if other != rank:
                self._codec.accumulate(incoming, mean)
        self._staging.give(self._received)
        mean.div_(divisor)
        self._codec.encode(mean, payload)
        if self._residuals is not None:
            lose_(self._residuals[rank], mean, payload, self._codec)
            self._residuals[rank].mul_(divisor)
        sent = [[payload]] * self._group.size
        self._work = self._group.exchange(sent, _single(self._outgoing))

    def wait(self) -> None:
        self._work.wait()
        for part, payload in zip(self._parts, self._outgoing, strict=True):
            self._codec.decode(payload, part)
        self._staging.give(self._sent)

    def _send(self, rank: int, part: Tensor, payload: Tensor) -> None:
        if rank != self._group.rank:
            self._codec.encode(part, payload)
            if self._residuals is not None:
                lose_(self._residuals[rank], part, payload, self._codec)


def lose_(residual: Tensor, values: Tensor, payload: Tensor, codec: Codec) -> None:
    """Replace a residual by what a payload lacks of values."""
    residual.copy_(values)
    codec.accumulate(payload, residual, -1.0)


def _single(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    return [[tensor] for tensor in tensors]


def _parts(flat: Tensor, size: int, block: int) -> list[Tensor]:
    """The parts of a chunk that ``size`` ranks own, the last ones perhaps shorter or empty."""
    part = owned(flat.numel(), size, block)
    return [flat[rank * part : (rank + 1) * part] for rank in range(size)]


def exchanged_bytes(codec: Codec, numel: int, size: int, dtype: torch.dtype) -> int:
    """Bytes a rank sends where parts go to their owners and come back."""
    part = min(numel, owned(numel, size, codec.block))
    return 2 * (size - 1) * codec.nbytes(part, dtype)


def owned(numel: int, size: int, block: int) -> int:
    """Elements that each of ``size`` ranks owns, the last ones perhaps fewer: whole blocks."""
    return math.ceil(math.ceil(numel / size) / block) * block
