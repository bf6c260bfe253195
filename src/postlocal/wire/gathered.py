"""Means of payloads that go to everybody, as suits sparse ones."""

import torch
from torch import Tensor

from postlocal.codec import Codec
from postlocal.group import Group, Work
from postlocal.wire.encoded import lose_
from postlocal.wire.exchange import Divisor
from postlocal.wire.staging import Staging


class ToEveryone:
    """Each rank's payload travels to all others, and each takes the mean of all, rank by rank.

    Each value is coded once. What coding loses of this rank's values is left in ``residual``, if
    there is one, so that the mean over ranks of contribution minus residual is what all received.
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
        self._chunk = chunk
        self._divisor = divisor
        self._codec = codec
        self._staging = staging
        nbytes = codec.nbytes(chunk.numel(), chunk.dtype)
        self._received = staging.take(group.size * nbytes, chunk, torch.uint8)
        self._payloads = self._received.view(group.size, nbytes)
        own = self._payloads[group.rank]
        codec.encode(chunk, own)
        if residual is not None:
            lose_(residual, chunk, own, codec)
        places = [[payload] for payload in self._payloads]
        self._work: Work = group.exchange([[own]] * group.size, places)

    def turn(self) -> None:
        self._work.wait()
        self._chunk.zero_()
        for payload in self._payloads:
            self._codec.accumulate(payload, self._chunk)
        self._chunk.div_(self._divisor())
        self._staging.give(self._received)

    def wait(self) -> None:
        return None
