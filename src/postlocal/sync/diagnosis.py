"""What synchronizations show of a loop that is not set up as it seems: warned of once each."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from postlocal.schedule import WORLD
from postlocal.sync.agreed import Agreed
from postlocal.sync.consistency import contents_number, fingerprint
from postlocal.sync.ddp import Local, Reduced
from postlocal.sync.inner_optimizer import Inner
from postlocal.sync.parameters import Replica
from postlocal.sync.synchronization import Flight, Fragment
from postlocal.sync.wrappers import gradients_reduced_elsewhere

logger = logging.getLogger("postlocal")


class Diagnosis:
    """Looks for another optimizer than the one that is known, and for equal data on all ranks.

    Args:
        replica: what is trained.
        inner: the optimizer that `attach` was given.
        gradients: how gradients are averaged.
        agreed: when replicas last agreed.
        rank: this rank; rank 0 warns.
    """

    def __init__(
        self, replica: Replica, inner: Inner, gradients: Local | Reduced, agreed: Agreed, rank: int
    ) -> None:
        self._replica = replica
        self._inner = inner
        self._gradients = gradients
        self._agreed = agreed
        self._rank = rank
        self._written = agreed.versions()
        self._warned_of_optimizer = False
        self._perhaps_equal = True  # not seen to differ after local steps, nor warned of

    @contextmanager
    def own_writes(self) -> Iterator[None]:
        """A ``with`` block in which parameters are written to by a synchronization."""
        before = self._agreed.versions()
        try:
            yield
        finally:
            self._written += self._agreed.versions() - before

    def check_optimizer(self) -> None:
        """Warn where parameters changed since, and the optimizer took no step."""
        written, self._written = self._written, self._agreed.versions()
        if self._inner.worked() or written == self._written or self._warned_of_optimizer:
            return
        self._warned_of_optimizer = True
        if self._rank == 0:
            logger.warning(
                "parameters changed, and the optimizer that attach was given took no step: if "
                "another one was made since, its learning rate and its state are not seen, nor "
                "saved; call sync.finish() and sync.close(), and attach again with it"
            )

    def contents(self, fragment: Fragment, local: bool) -> int:
        """A number by which ranks compare contents; 0 where these are not of interest.

        Args:
            fragment: what is synchronized.
            local: whether the steps before were local, so that replicas should differ.
        """
        asked = local and self._perhaps_equal and fragment.level == WORLD
        if not asked or fragment.group.size == 1:
            return 0
        return contents_number(map(fingerprint, fragment.parameters.values()))

    def check_replicas(self, synchronization: Flight) -> None:
        """Warn where replicas were equal after local steps, until they are seen to differ."""
        local = synchronization.record.step - self._agreed.step
        asked = self._perhaps_equal and synchronization.ballot.vote.fingerprint
        if not (local and asked):
            return
        self._perhaps_equal = False
        if not synchronization.ballot.unanimous("fingerprint") or self._rank:
            return
        wrapper = self._gradients.wrapper
        owner = gradients_reduced_elsewhere(self._replica.parameters.values(), wrapper)
        reason = "ranks seem to train on the same data, or not at all: shard the data by rank"
        if owner is not None:
            reason = f"{owner} averages their gradients in each step: pass it to attach"
        logger.warning("replicas are equal to the bit after %d local steps: %s", local, reason)
