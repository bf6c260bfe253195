"""Carries out the events of a timeline on the parameters of a replica."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from postlocal.comm.background import Courier
from postlocal.comm.groups import LevelGroups
from postlocal.meter import Meter, SyncRecord
from postlocal.schedule import RANK, WORLD
from postlocal.strategies import Strategy
from postlocal.sync.agreed import Agreed
from postlocal.sync.ddp import Local, Reduced
from postlocal.sync.diagnosis import Diagnosis
from postlocal.sync.inner_optimizer import Inner
from postlocal.sync.parameters import Replica
from postlocal.sync.status import layout_number
from postlocal.sync.synchronization import Buffers, Flight, Fragment
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
        inner: the user's optimizer.
        groups: of this rank, for synchronizations.
        gradients: how gradients are averaged.
        meter: counts bytes and waiting.
        fragments: all of level ``"world"``.
        agreed: keeps the buffers that replicas agree on.

    Attributes:
        fragments: all of level ``"world"``.
        narrow: for each level below, all parameters as one fragment.
        under_way: synchronizations by the number of their fragment, the oldest first.
        drift: measured by the synchronization that was applied last.
    """

    def __init__(
        self,
        strategy: Strategy,
        replica: Replica,
        inner: Inner,
        groups: LevelGroups,
        gradients: Local | Reduced,
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
        self.under_way: dict[int, Flight] = {}
        self.drift = math.nan
        self._strategy = strategy
        self._replica = replica
        self._inner = inner
        self._groups = groups
        self._gradients = gradients
        self._meter = meter
        self._agreed = agreed
        self._diagnosis = Diagnosis(replica, inner, gradients, agreed, groups[WORLD].rank)
        self._courier = Courier() if strategy.fragments.delay else None
        self._hangar = Staging()

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
                self.restore(self.fragments[number])

    def restore(self, *fragments: Fragment) -> None:
        """Give parameters their anchors, where there are any."""
        with torch.no_grad():
            for fragment in fragments:
                if fragment.anchor is not None:
                    fragment.anchor.give()

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
            synchronization.leave()

    def close(self) -> None:
        """End the background thread, once what is under way is here."""
        if self._courier is not None:
            self._courier.close()

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

    def _load_under_way(self, fragment: Fragment, state: Mapping[str, Any]) -> Flight:
        buffers = None if state["buffers"] is None else Buffers(self._replica, apart=True)
        record = SyncRecord(**state["record"])
        synchronization = Flight(fragment, record, self._meter, buffers, self._hangar)
        synchronization.load_state_dict(state)
        return synchronization

    def _synchronize(self, fragment: Fragment, mix: float, now: Moment) -> None:
        """Send a fragment and apply the result at once."""
        if fragment.group.size == 1 and fragment.anchor is None:
            return
        synchronization = self._prepare(fragment, now, apart=mix > 0)
        with self._diagnosis.own_writes():
            try:
                with torch.no_grad(), self._meter.waiting(synchronization.record):
                    self._load(synchronization, now)
                    synchronization.exchange()
                self._apply(synchronization, mix, now)
            except Exception:
                if synchronization.in_place:
                    self.restore(fragment)
                raise

    def _start(self, number: int, now: Moment) -> None:
        """Send a fragment on the background thread; the result is applied later."""
        assert self._courier is not None
        keep = self._strategy.fragments.keep_delayed_steps
        synchronization = self._prepare(self.fragments[number], now, apart=True, keep=keep)
        with torch.no_grad(), self._meter.waiting(synchronization.record):
            self._load(synchronization, now)
            synchronization.exchange_beside(self._courier)
        self.under_way[number] = synchronization

    def _prepare(self, fragment: Fragment, now: Moment, apart: bool, keep: bool = False) -> Flight:
        last = fragment.number in (None, len(self.fragments) - 1)
        problem = self._replica.refresh() or self._inner.refresh()
        return Flight(
            fragment,
            SyncRecord(now.step, fragment.level, fragment.number),
            self._meter,
            Buffers(self._replica, apart) if last else None,
            self._hangar if apart else None,
            keep,
            problem,
        )

    def _load(self, synchronization: Flight, now: Moment) -> None:
        """Take this rank's contribution, and what it tells the others."""
        fragment = synchronization.fragment
        self._groups[WORLD].arrive(now.step)
        work = fragment.work(now.step, now.work)
        fragment.begin(now.step, now.work)
        if synchronization.buffers is not None:
            self._begin_narrower(fragment.level, now)
        contents = self._diagnosis.contents(fragment, now.local)
        self._diagnosis.check_optimizer()
        synchronization.load()
        averages = self._strategy.optimizer_state == "average"
        synchronization.vote(
            buffers_finite=not self._replica.has_nan_buffer(),
            work=work,
            step=now.step,
            planned=now.planned,
            fingerprint=contents,
            moving=layout_number(sorted(self._replica.moving)),
            lr=self._inner.lr,
            inner_lr=now.inner_lr,
            layout=self._inner.layout() if averages else 0,
        )

    def _begin_narrower(self, level: str, now: Moment) -> None:
        """Count work anew at all levels within the one that is synchronized."""
        levels = self._groups.levels
        for narrower in levels[1 : levels.index(level)]:
            self.narrow[narrower].begin(now.step, now.work)

    def _apply_late(self, synchronization: Flight, mix: float, now: Moment) -> None:
        """Apply a result some steps after its fragment was sent."""
        if synchronization.record.step != now.step:
            self._replica.refresh()  # a change that cannot be followed is told at the next start
        with self._diagnosis.own_writes():
            self._apply(synchronization, mix, now)

    def _apply(self, synchronization: Flight, mix: float, now: Moment) -> None:
        record = synchronization.record
        with torch.no_grad(), self._meter.waiting(record):
            synchronization.land(now.step, mix)
            if synchronization.buffers is not None:
                if record.level == WORLD:
                    self._agreed.keep(synchronization.buffers.tensors)
                self._update_optimizer(synchronization)
            if not synchronization.finite:
                self._recover(record.level)
        self.drift = record.drift
        self._diagnosis.check_replicas(synchronization)
        self._meter.close(record)
        if self._groups[WORLD].rank == 0:
            logger.debug("synchronized: %s", record)

    def _update_optimizer(self, synchronization: Flight) -> None:
        """Keep, average or reset the state of the inner optimizer."""
        match self._strategy.optimizer_state:
            case "reset":
                self._inner.reset()
            case "average":
                weight, divisor = synchronization.shares()
                unanimous = synchronization.ballot.unanimous("layout")
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
        self._inner.heal()
        self._gradients.forget()
