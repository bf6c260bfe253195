"""What synchronizations show of a loop that is not set up as it seems: warned of once each."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from postlocal.meter import SyncRecord
from postlocal.schedule import WORLD
from postlocal.sync.consistency import Agreed, contents_number, fingerprint
from postlocal.sync.ddp import DDPHook, UnreducedGradients
from postlocal.sync.fragment import Fragment
from postlocal.sync.inner_optimizer import InnerOptimizers
from postlocal.sync.parameters import Replica
from postlocal.sync.status import GroupStatus
from postlocal.sync.supported_wrappers import gradients_reduced_elsewhere

logger = logging.getLogger("postlocal")


class Diagnosis:
    """Looks for other optimizers than those that are known, and for equal data on all ranks.

    Args:
        replica: what is trained.
        inner: the optimizers that `attach` was given.
        gradients: how gradients are averaged.
        agreed: when replicas last agreed.
        rank: this rank; rank 0 warns.
    """

    def __init__(
        self,
        replica: Replica,
        inner: InnerOptimizers,
        gradients: UnreducedGradients | DDPHook,
        agreed: Agreed,
        rank: int,
    ) -> None:
        self._replica = replica
        self._inner = inner
        self._gradients = gradients
        self._agreed = agreed
        self._rank = rank
        self._warned_of_optimizer = False
        self._perhaps_equal = True  # not seen to differ after local steps, nor warned of

    @contextmanager
    def own_writes(self) -> Iterator[None]:
        """A ``with`` block in which parameters are written to by a synchronization."""
        before = self._inner.versions()
        try:
            yield
        finally:
            self._inner.disregard(before)

    def check_optimizers(self) -> None:
        """Warn where parameters changed since, and their optimizer took no step."""
        idle = self._inner.idle()
        if not idle or self._warned_of_optimizer:
            return
        self._warned_of_optimizer = True
        if self._rank == 0:
            logger.warning(
                "parameters changed, and the %s that attach was given took no step: if another one "
                "was made since, its learning rate and its state are not seen, nor saved; call "
                "sync.finish() and sync.close(), and attach again with it",
                " and ".join(idle),
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

    def check_replicas(self, record: SyncRecord, status: GroupStatus) -> None:
        """Warn where replicas were equal after local steps, until they are seen to differ."""
        local = record.step - self._agreed.step
        asked = self._perhaps_equal and status.own("fingerprint")
        if not (local and asked):
            return
        self._perhaps_equal = False
        if not status.unanimous("fingerprint") or self._rank:
            return
        wrapper = self._gradients.wrapper
        owner = gradients_reduced_elsewhere(self._replica.parameters.values(), wrapper)
        reason = "ranks seem to train on the same data, or not at all: shard the data by rank"
        if owner is not None:
            reason = f"{owner} averages their gradients in each step: pass it to attach"
        logger.warning("replicas are equal to the bit after %d local steps: %s", local, reason)
