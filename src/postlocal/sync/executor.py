"""Carries out the events of a timeline on the parameters of a replica."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from postlocal.comm.background import BackgroundThread
from postlocal.comm.groups import LevelGroups
from postlocal.meter import Meter, SyncRecord
from postlocal.schedule import RANK, WORLD
from postlocal.strategies import Strategy
from postlocal.sync.consistency import Agreed, DivergenceCheck
from postlocal.sync.ddp import DDPHook, UnreducedGradients
from postlocal.sync.fragment import Fragment, contribute
from postlocal.sync.inner_optimizer import InnerOptimizers
from postlocal.sync.parameters import Replica
from postlocal.sync.status import RankStatus, layout_number
from postlocal.sync.synchronization import Buffers, Result, Synchronization, resumed
from postlocal.sync.timeline import Apply, Average, Event, Restore, Start, Synchronize
from postlocal.wire import Staging, fp32

logger = logging.getLogger("postlocal")


@dataclass(frozen=True)
class Moment:
    """Where a rank stands when events are carried out.

    Attributes:
        step: steps taken.
        work: work done so far, in steps.
        inner_lr: the greatest learning rate of the round so far.
        planned: steps of the following round as planned, which ranks compare.
        local: whether gradients were not averaged in the round.
    """

    step: int
    work: float
    inner_lr: float
    planned: int
    local: bool


class Executor:
    """Sends fragments, applies their results, and keeps what is under way.

    Args:
        strategy: how.
        replica: what is synchronized.
        inner: the user's optimizers.
        groups: of this rank, for synchronizations.
        gradients: how gradients are averaged.
        meter: counts bytes and waiting.
        fragments: all of level ``"world"``.
        agreed: keeps the buffers that replicas agree on.

    Attributes:
        fragments: all of level ``"world"``.
        narrow: for each level below, from the narrowest on, all parameters as one fragment.
        under_way: synchronizations by the number of their fragment, the oldest first.
        drift: measured by the synchronization that was applied last.
    """

    def __init__(
        self,
        strategy: Strategy,
        replica: Replica,
        inner: InnerOptimizers,
        groups: LevelGroups,
        gradients: UnreducedGradients | DDPHook,
        meter: Meter,
        fragments: Sequence[Fragment],
        agreed: Agreed,
    ) -> None:
        self.fragments = fragments
        self.narrow = {
            level: Fragment(replica.parameters, level, fp32().open(groups, level), strategy)
            for level in groups.levels
            if level not in (RANK, WORLD)
        }
        self.under_way: dict[int, Synchronization] = {}
        self.drift = math.nan
        self._strategy = strategy
        self._replica = replica
        self._inner = inner
        self._world = groups[WORLD]
        self._gradients = gradients
        self._meter = meter
        self._agreed = agreed
        self._divergence = DivergenceCheck()
        self._background = BackgroundThread() if strategy.fragments.delay else None
        self._staging = Staging()

    def carry_out(self, event: Event, now: Moment) -> None:
        """Carry out one event.

        Raises:
            PeerError, DisagreementError, ModelChangedError, NonFiniteError: as a synchronization
                does.
        """
        mix = self._strategy.fragments.mix
        match event:
            case Start(number):
                self._start(number, now)
            case Apply(number):
                self._apply_late(self.under_way.pop(number), mix, now)
            case Synchronize(number, final):
                self._synchronize(self.fragments[number], 0.0 if final else mix, now)
            case Average(level):
                self._synchronize(self.narrow[level], 0.0, now)
            case Restore(number):
                with self._inner.own_writes():
                    self.restore(self.fragments[number])

    def restore(self, *fragments: Fragment) -> None:
        """Give parameters their anchors, where there are any."""
        with torch.no_grad():
            for fragment in fragments:
                if fragment.anchor is not None:
                    fragment.anchor.restore()

    def begin(self, step: int, work: float) -> None:
        """Count work from here on, given steps and work so far, at all levels."""
        for fragment in (*self.fragments, *self.narrow.values()):
            fragment.begin(step, work)

    def wait(self) -> None:
        """Block until the results of all that is under way are here.

        Raises:
            PeerError, DisagreementError: what an exchange met.
        """
        for synchronization in self.under_way.values():
            synchronization.wait()

    def drop(self) -> None:
        """Wait for what is under way, and apply none of it."""
        while self.under_way:
            synchronization = self.under_way.pop(next(iter(self.under_way)))
            synchronization.wait()
            synchronization.release()

    def close(self) -> None:
        """End the background thread, once what is under way is here."""
        if self._background is not None:
            self._background.close()

    def state_dict(self) -> dict[str, Any]:
        """Fragments and what is under way, once it has been waited for; nothing is copied."""
        return {
            "drift": self.drift,
            "fragments": [fragment.state_dict() for fragment in self.fragments],
            "narrow": {level: part.state_dict() for level, part in self.narrow.items()},
            "under_way": [each.state_dict() for each in self.under_way.values()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state_dict` gave, where nothing is under way."""
        self.drift = state["drift"]
        for fragment, saved in zip(self.fragments, state["fragments"], strict=True):
            fragment.load_state_dict(saved)
        for level, fragment in self.narrow.items():
            fragment.load_state_dict(state["narrow"][level])
        for saved in state["under_way"]:
            number = saved["fragment"] or 0
            self.under_way[number] = self._load_under_way(self.fragments[number], saved)

    def _load_under_way(self, fragment: Fragment, state: Mapping[str, Any]) -> Synchronization:
        buffers = None if state["buffers"] is None else Buffers(self._replica, apart=True)
        return resumed(fragment, state, self._meter, buffers, self._staging)

    def _synchronize(self, fragment: Fragment, mix: float, now: Moment) -> None:
        """Synchronize a fragment and apply the result at once."""
        if fragment.group.size == 1 and fragment.anchor is None:
            return
        with self._inner.own_writes():
            synchronization = self._prepare(fragment, now, apart=mix > 0)
            try:
                with torch.no_grad(), self._meter.waiting(synchronization.record):
                    synchronization.start()
                self._apply(synchronization, mix, now)
            except BaseException:
                if synchronization.in_place:
                    self.restore(fragment)
                raise

    def _start(self, number: int, now: Moment) -> None:
        """Start to synchronize a fragment, whose result is applied later."""
        assert self._background is not None
        keeps_moves = self._strategy.fragments.keep_delayed_steps
        fragment = self.fragments[number]
        synchronization = self._prepare(fragment, now, apart=True, keeps_moves=keeps_moves)
        with torch.no_grad(), self._meter.waiting(synchronization.record):
            synchronization.start(self._background)
        self.under_way[number] = synchronization

    def _prepare(
        self, fragment: Fragment, now: Moment, apart: bool, keeps_moves: bool = False
    ) -> Synchronization:
        """Take what this rank sends of a fragment, and what it says of itself."""
        record = SyncRecord(now.step, fragment.level, fragment.number)
        with torch.no_grad(), self._meter.waiting(record):
            last = fragment.number in (None, len(self.fragments) - 1)
            problem = self._replica.refresh() or self._inner.refresh()
            buffers = Buffers(self._replica, apart) if last else None
            self._world.announce(now.step)
            work = fragment.work(now.step, now.work)
            fragment.begin(now.step, now.work)
            if buffers is not None:
                self._begin_narrower(fragment.level, now)
            status = self._status(fragment, work, now)
            self._inner.warn_of_idle(self._world.rank)
            staging = self._staging if apart else None
            contribution = contribute(fragment, staging, keeps_moves, problem)
        return Synchronization(fragment, contribution, status, record, self._meter, buffers)

    def _status(self, fragment: Fragment, work: float, now: Moment) -> RankStatus:
        """What this rank says beside its contribution to a synchronization."""
        averages = self._strategy.optimizer_state == "average"
        compares = now.local and fragment.level == WORLD and fragment.group.size > 1
        return RankStatus(
            buffer_weight=fragment.guard.weight(not self._replica.has_nan_buffer()),
            work=work,
            step=now.step,
            planned=now.planned,
            lr=self._inner.lr,
            inner_lr=now.inner_lr,
            layout=self._inner.layout() if averages else 0,
            moving=layout_number(sorted(self._replica.moving)),
            fingerprint=self._divergence.number(fragment.parameters.values()) if compares else 0,
        )

    def _begin_narrower(self, level: str, now: Moment) -> None:
        """Count work anew at all levels within the one that is synchronized."""
        for narrower, fragment in self.narrow.items():
            if narrower == level:
                return
            fragment.begin(now.step, now.work)

    def _apply_late(self, synchronization: Synchronization, mix: float, now: Moment) -> None:
        """Apply a result some steps after its fragment was sent."""
        if synchronization.record.step != now.step:
            self._replica.refresh()  # a change that cannot be followed is told at the next start
        with self._inner.own_writes():
            self._apply(synchronization, mix, now)

    def _apply(self, synchronization: Synchronization, mix: float, now: Moment) -> None:
        record = synchronization.record
        with torch.no_grad(), self._meter.waiting(record):
            result = synchronization.apply(now.step, mix)
            if synchronization.buffers is not None:
                if record.level == WORLD:
                    self._agreed.keep(synchronization.buffers.tensors)
                self._update_optimizer_state(synchronization, result)
            if not result.finite:
                self._recover(record.level)
        self.drift = record.drift
        self._divergence.conclude(
            result.status,
            record.step - self._agreed.step,
            self._replica.parameters.values(),
            self._gradients.wrapper,
        )
        self._meter.close(record)
        if self._world.rank == 0:
            logger.debug("synchronized: %s", record)

    def _update_optimizer_state(self, synchronization: Synchronization, result: Result) -> None:
        """Keep, average or reset the state of the inner optimizers."""
        match self._strategy.optimizer_state:
            case "reset":
                self._inner.reset()
            case "average":
                weight, divisor = result.shares()
                unanimous = result.status.unanimous("layout")
                group = synchronization.fragment.group
                sent = self._inner.average_(group, weight, lambda: divisor, unanimous)
                self._meter.count("optimizer", sent, synchronization.record)
            case "keep":
                pass

    def _recover(self, level: str) -> None:
        """Leave nothing of this replica that is not finite, or it would be left out for ever."""
        if level == WORLD:
            self.restore(*self.fragments)  # also those that are sent later in the round
            for other in self.under_way.values():
                other.restart_moves()
        self._inner.zero_nonfinite_()
        self._gradients.drop_residuals()
