"""Means of payloads that go to everybody, as suits sparse ones."""

import torch

from postlocal.codec import Codec
from postlocal.comm.group import Group, Work
from postlocal.wire.cargo import Cargo
from postlocal.wire.exchange import Divisor
from postlocal.wire.staging import Staging


class ToEveryone:
    """Each rank's payload travels to all others, and each takes the mean of all, rank by rank.

    Each value is coded once, and the rank that sent it keeps what coding loses; see `Cargo`.
    """

    def __init__(
        self,
        cargo: Cargo,
        group: Group,
        divisor: Divisor,
        codec: Codec,
        staging: Staging,
    ) -> None:
        values = cargo.lend(slice(0, cargo.values.numel()))
        self._values = values
        self._divisor = divisor
        self._codec = codec
        self._staging = staging
        nbytes = codec.nbytes(values.numel(), values.dtype)
        self._received = staging.take(group.size * nbytes, values, torch.uint8)
        self._payloads = self._received.view(group.size, nbytes)
        own = self._payloads[group.rank]
        codec.encode(values, own)
        cargo.lose(slice(0, values.numel()), own, codec)
        places = [[payload] for payload in self._payloads]
        self._work: Work = group.all_to_all([[own]] * group.size, places)

    def turn(self) -> None:
        self._work.wait()
        self._values.zero_()
        for payload in self._payloads:
            self._codec.accumulate(payload, self._values)
        self._values.div_(self._divisor())
        self._staging.give(self._received)

    def wait(self) -> None:
        return None
