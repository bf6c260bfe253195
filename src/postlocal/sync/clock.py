"""The one clock of a training loop: counts steps, and synchronizes when the schedule says so."""

import logging
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from postlocal import fragments, schedule
from postlocal.checks import number, shown
from postlocal.comm.agreement import same_values_
from postlocal.comm.background import Courier
from postlocal.comm.groups import LevelGroups
from postlocal.errors import ModelChangedError
from postlocal.meter import Meter, SyncRecord, human_bytes, human_seconds
from postlocal.schedule import RANK, WORLD, Round
from postlocal.strategies import Strategy
from postlocal.sync.agreed import Agreed, copy_, put_back
from postlocal.sync.consistency import check_equal_, contents_number, fingerprint
from postlocal.sync.ddp import Local, Reduced
from postlocal.sync.inner_optimizer import Inner
from postlocal.sync.parameters import Replica
from postlocal.sync.status import Vote, layout_number
from postlocal.sync.synchronization import Buffers, Flight, Fragment
from postlocal.sync.wrappers import gradients_reduced_elsewhere
from postlocal.wire import Staging, fp32

logger = logging.getLogger("postlocal")

_ADVICE = (
    "call sync.step() on every rank after each optimizer step, start from equal states of the "
    "optimizer, and call the DistributedDataParallel object in every forward pass, not the module "
    "inside it"
)


class Sync:
    """The clock that `attach` returns: counts steps, and synchronizes when the schedule says so.

    Attributes:
        strategy: what it runs.
        meter: bytes, waiting and drift so far.
        groups: this rank's groups for synchronizations.
        replica: what is synchronized.
        inner: the user's optimizer.
    """

    def __init__(
        self,
        strategy: Strategy,
        replica: Replica,
        inner: Inner,
        groups: LevelGroups,
        where: Local | Reduced,
        meter: Meter,
        parts: Sequence[Fragment],
    ) -> None:
        self.strategy = strategy
        self.replica = replica
        self.inner = inner
        self.groups = groups
        self.meter = meter
        self._gradients = where
        self._fragments = parts
        self._narrow = {
            level: Fragment(replica.parameters, level, fp32().open(groups, level), strategy)
            for level in groups.levels
            if level not in (RANK, WORLD)
        }
        cut = strategy.fragments
        self._delay, self._mix, self._carry = cut.delay, cut.mix, cut.carry
        self._courier = Courier() if self._delay else None
        self._hangar = Staging()
        self._flights: deque[Flight] = deque()
        self._steps = 0
        self._work = 0.0
        self._lr = inner.lr
        self._drift = math.nan
        self._agreed = Agreed(replica, keeps_buffers=strategy.anchored)
        self._lockstep = True
        self._compared = False
        self._perhaps_equal = True  # not seen apart after local steps, nor told of
        self._closed = False
        self._written = self._agreed.versions()
        self._told_of_optimizer = False
        self._lent = 0
        self._gave_way = False
        self._begin(self._plan())
        inner.watch()  # last, so that a clock that could not be made leaves nothing behind

    def __repr__(self) -> str:
        ranks, meter, ddp = self.groups[WORLD].size, self.meter, self.ddp_payload_bytes
        share = f" ({meter.total_bytes / ddp:.1%} of DDP's)" if ddp else ""
        return (
            f"<Sync: {self.strategy.name} on {ranks} ranks: {self._steps:,} steps, "
            f"{meter.syncs:,} synchronizations, {human_bytes(meter.total_bytes)} sent{share}, "
            f"waited {human_seconds(meter.wait_seconds)}>"
        )

    @property
    def steps(self) -> int:
        """Number of calls of `step` so far."""
        return self._steps

    @property
    def ddp_payload_bytes(self) -> int:
        """Bytes that this rank would have sent in as many steps of DDP with fp32 gradients."""
        numel = sum(parameter.numel() for parameter in self.replica.parameters.values())
        return self._steps * fp32().payload_bytes(numel, self.groups[WORLD].size)

    @property
    def round(self) -> Round:
        """The round under way."""
        return self._round

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    @property
    def agreed(self) -> bool:
        """Whether all replicas hold the same parameters at this moment, as far as this rank knows.

        It is true right after a synchronization at level ``"world"`` that is applied at once, and
        after `finish`, until a parameter is written to; and while gradients are averaged over all
        ranks. It sends nothing: values are compared when replicas part and by `finish`.
        """
        if self._lockstep and self._round.gradients == WORLD:
            return True
        return self._agreed.holds(self._steps)

    def step(self, *, work: float = 1.0) -> None:
        """Count one iteration, and land and launch what is due after it.

        To be called on every rank once for each optimizer step that the loop intends, after it;
        also where a GradScaler skipped it, and once for all micro-batches of an accumulation.

        Args:
            work: how much of a step this rank really did, at least 0: its share of the usual
                batch, or 0 where it skipped the step. Contributions to a mean of parameters weigh
                as much as the work since the last one.

        Raises:
            PeerError: if a rank does not come to the synchronization within the timeout.
            DisagreementError: if ranks are not at the same step, or plan different rounds.
            ModelChangedError: if the model or the optimizer was changed so that it cannot be
                synchronized any more.
            NonFiniteError: if every replica is non-finite and the strategy has no anchor.
            RuntimeError: if called inside ``model.no_sync()`` or `agreed_parameters`, or after
                `close`.
            TypeError: if ``work`` is no number.
            ValueError: if ``work`` is negative or not finite.
        """
        self._check_open()
        self._gradients.check()
        work = number("work", work, least=0)
        self._steps += 1
        self._work += work
        self._lr = max(self._lr, self.inner.lr)
        self._lockstep = self._lockstep and self._round.gradients == WORLD
        self._land_launched_until(self._steps - self._delay)
        if self._lockstep and not self._compared:
            self._compare()
        if self._steps < self._end:
            self._launch_due(self._round)
            return
        following = self._plan()
        self._end_round(following)
        self._begin(self._adapt(following, self._drift))

    def finish(self) -> None:
        """Make every replica equal: synchronize now, unless they agree already, and compare them.

        What is under way is landed before. Fragments that were launched earlier than at this step
        take one more outer step, for what was learned since. Training can go on after it, with a
        new round.

        Raises:
            DisagreementError: as `step` does, and if replicas differ where the clock says that they
                agree, such as after calls of `step` were left out.
            PeerError, ModelChangedError, NonFiniteError: as `step` does.
        """
        self._check_open()
        following = self._plan()
        self._land_launched_until(self._steps)
        if self._lockstep:
            self._compare()
            self._share_buffers(self.replica.averaged)
        elif self._steps != self._agreed.step:
            for fragment in self._fragments:
                if self.strategy.streams and fragment.since == self._steps:
                    self._give_anchor(fragment)  # it was launched at this very step
                else:
                    self._synchronize(fragment, following)
            self._agreed.note(self._steps)
        if not self._lockstep:
            self._compare()
        self._agreed.note(self._steps)
        self._begin(self._adapt(following, math.nan))

    @contextmanager
    def agreed_parameters(self) -> Iterator[None]:
        """A ``with`` block in which the model holds parameters and buffers last agreed on.

        These are what a strategy with fragments, delay or mix is evaluated on: its replicas are
        never all equal before `finish`. It needs memory for a second copy of the parameters. This
        rank's own values are back after the block: nothing can be synchronized, saved or loaded
        within it, and what is written to parameters there is lost.

        Raises:
            RuntimeError: if replicas have gone apart and the strategy keeps no anchor.
            ModelChangedError: if the model was changed so that it cannot hold them any more.

        Example:
            >>> import torch
            >>> import postlocal
            >>> model = torch.nn.Linear(4, 1)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> sync = postlocal.attach(model, optimizer, postlocal.strategies.diloco(period=8))
            >>> with sync.agreed_parameters():
            ...     _ = model(torch.ones(4))
        """
        if self.agreed:
            yield
            return
        if not self.strategy.anchored:
            raise RuntimeError(
                f"replicas of {self.strategy.name} agree only right after a synchronization, and "
                "it keeps no anchor: evaluate where sync.agreed is true, or after sync.finish()"
            )
        if (problem := self.replica.refresh()) is not None:
            raise ModelChangedError(problem)
        parameters = [parameter.detach() for parameter in self.replica.parameters.values()]
        averaged = self.replica.averaged
        buffers = [averaged[name] for name in self._agreed.buffers]
        with put_back([*parameters, *buffers]):
            self._give_anchor(*self._fragments)
            copy_(buffers, list(self._agreed.buffers.values()))
            self._lent += 1
            try:
                yield
            finally:
                self._lent -= 1

    def follow_model(self) -> str | None:
        """Follow what may change in the model and the optimizer; on this rank alone.

        Buffers may be assigned anew, tensors move in memory, and parameters of the model join the
        optimizer. `step`, `finish` and `postlocal.checkpoint` call it by themselves.

        Returns:
            None; or, in words, a change that makes them unfit to be synchronized, and the fix.
        """
        return self.replica.refresh() or self.inner.refresh()

    def close(self) -> None:
        """End what `attach` began: hooks, threads and process groups; the model is as before it.

        To be called by all ranks, after `finish` where replicas are to be equal. A training that
        goes on by DistributedDataParallel alone needs equal states of the optimizer as well: those
        of ``optimizer_state="keep"`` are each rank's own. Raises nothing, also after an error or a
        second time. It waits for fragments under way, as long as a synchronization does, and then
        at most 2 s for ranks that do not call it; their groups, and this rank's, last until the
        next `attach`.
        """
        if self._closed:
            return
        self._closed = True
        if self._courier is not None:
            self._courier.close()
        self._gradients.close()
        self.inner.close()
        self.groups.close()

    def give_way(self) -> None:
        """Refuse to go on, since the model has come under another clock; `close` is still due."""
        self._gave_way = True

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this Sync was closed: attach again to go on under a strategy")
        self._check_own()

    def _check_own(self) -> None:
        """That the model holds what this rank trains, under this clock alone."""
        if self._gave_way:
            raise RuntimeError(
                "the model was attached again since, and two clocks would undo each other: call "
                "the newer Sync alone; where a model has several optimizers, attach to each "
                "optimizer's own part of the model"
            )
        if self._lent:
            raise RuntimeError(
                "called inside sync.agreed_parameters(), where the model does not hold what this "
                "rank trains: step, finish, save and load after the with block"
            )

    def state_dict(self) -> dict[str, Any]:
        """What a resume in the middle of a round needs beside the model and the optimizer.

        Local to this rank and not copied. It waits for what is under way; calling it changes
        nothing.

        Raises:
            RuntimeError: if called inside `agreed_parameters`.
        """
        for flight in self._flights:
            flight.wait()
        self._check_own()
        return {
            "strategy": self.strategy.fingerprint,
            "steps": self._steps,
            "work": self._work,
            "round": {
                "steps": self._round.steps,
                "gradients": self._round.gradients,
                "parameters": self._round.parameters,
            },
            "end": self._end,
            "lr": self._lr,
            "drift": self._drift,
            "agreed_at": self._agreed.step,
            "agreed_buffers": dict(self._agreed.buffers),
            "moving": sorted(self.replica.moving),
            "lockstep": self._lockstep,
            "fragments": [fragment.state_dict() for fragment in self._fragments],
            "narrow": {level: part.state_dict() for level, part in self._narrow.items()},
            "flights": [flight.state_dict() for flight in self._flights],
            "gradients": self._gradients.state_dict(),
            "meter": self.meter.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, on the same rank of as many ranks.

        The model and the optimizer are loaded by the caller; `postlocal.checkpoint` does it all.

        Raises:
            TypeError: if ``state`` is no mapping.
            ValueError: if it is nothing that `state_dict` gave, or that of another strategy or
                model; nothing was changed.
        """
        self._check_open()
        self._check_state(state)
        self._load_clock(state)
        self._gradients.load_state_dict(state["gradients"])
        for fragment, saved in zip(self._fragments, state["fragments"], strict=True):
            fragment.load_state_dict(saved)
        for level, fragment in self._narrow.items():
            fragment.load_state_dict(state["narrow"][level])
        self._flights = deque(self._load_flight(saved) for saved in state["flights"])
        self._agreed.keep(state["agreed_buffers"])
        self._agreed.note(state["agreed_at"])

    def restart(self, state: Mapping[str, Any]) -> None:
        """Start a new round at the step of a state that another number of ranks saved.

        Parameters become the saved anchor; where the strategy has none, or replicas have not gone
        apart yet, all ranks must hold equal parameters already. The outer optimizer's state is
        taken over; what was under way, and what wires and guards remembered, is not.

        Args:
            state: the `state_dict` of any of the ranks that saved it.

        Raises:
            TypeError, ValueError: as `load_state_dict` does.
        """
        self._check_open()
        self._check_state(state)
        self._load_clock(state)
        for fragment, saved in zip(self._fragments, state["fragments"], strict=True):
            if fragment.anchor is not None:
                fragment.anchor.load_state_dict(saved["anchor"])
            fragment.begin(self._steps, self._work)
        for fragment in self._narrow.values():
            fragment.begin(self._steps, self._work)
        if not self._lockstep:
            self._give_anchor(*self._fragments)
        self._agreed.keep(self.replica.averaged)
        self._agreed.note(self._steps)
        self._begin(self._adapt(self._plan(), math.nan))

    def _check_state(self, state: Any) -> None:
        """Refuse what is no state of this clock, before anything is changed."""
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be what state_dict() of a Sync gave, got {shown(state)}")
        missing = [key for key in self.state_dict() if key not in state]
        if missing:
            raise ValueError(
                f"state must be what state_dict() of a Sync gave, got one without {missing[0]!r}"
            )
        if state["strategy"] != self.strategy.fingerprint:
            raise ValueError(
                f"state is of strategy {state['strategy']}, this is {self.strategy.fingerprint}"
            )
        saved = [_shapes(fragment["anchor"]) for fragment in state["fragments"]]
        if saved != [_shapes(fragment.state_dict()["anchor"]) for fragment in self._fragments]:
            raise ValueError(
                "state is of another model: names or shapes of its parameters are not those that "
                "attach was given; load it into a Sync of the model that it was saved with"
            )

    def _load_clock(self, state: Mapping[str, Any]) -> None:
        while self._flights:  # of what was before
            flight = self._flights.popleft()
            flight.wait()
            flight.leave()
        self._steps = state["steps"]
        self._work = state["work"]
        self._drift = state["drift"]
        self._lockstep = state["lockstep"]
        self._compared = False
        self.replica.mark()
        self.replica.moving = set(state["moving"])
        self._set_round(Round(**state["round"]), state["end"])
        self._lr = state["lr"]
        self.meter.load_state_dict(state["meter"])

    def _load_flight(self, state: Mapping[str, Any]) -> Flight:
        buffers = None if state["buffers"] is None else Buffers(self.replica, apart=True)
        flight = Flight(
            self._fragments[state["fragment"] or 0],
            SyncRecord(**state["record"]),
            self.meter,
            buffers,
            self._hangar,
        )
        flight.load_state_dict(state)
        return flight

    def _plan(self) -> Round:
        return schedule.planned(self.strategy.schedule, self._steps, self.inner.lr)

    def _adapt(self, planned: Round, drift: float) -> Round:
        return schedule.adapt(self.strategy.schedule, planned, self._round, drift)

    def _begin(self, following: Round) -> None:
        if self._lockstep and following.gradients != WORLD:
            self._part()
        self._set_round(following, self._steps + following.steps)
        self._lr = self.inner.lr

    def _part(self) -> None:
        """Begin to go apart, from what all replicas hold now."""
        if self._steps:
            self._compare()
            self._agreed.note(self._steps)
            self._say("after step %d replicas part: rounds of local steps begin", self._steps)
            for fragment in (*self._fragments, *self._narrow.values()):
                fragment.begin(self._steps, self._work)
                if fragment.anchor is not None:
                    fragment.anchor.take()
        if self.strategy.anchored:
            shared = {name: tensor.clone() for name, tensor in self.replica.averaged.items()}
            if self._steps:
                self._share_buffers(shared)
            self._agreed.keep(shared)

    def _compare(self) -> None:
        """Measure that replicas are equal where the clock says so.

        Raises:
            DisagreementError, ModelChangedError: on every rank.
        """
        self._compared = True
        if not self._steps:
            claim = "no call of sync.step() told of a step"
        elif self._lockstep:
            claim = f"gradients were averaged over all ranks in each of {self._steps} steps"
        else:
            claim = f"they were synchronized after step {self._agreed.step}"
        world, problem, first = self.groups[WORLD], self.follow_model(), self._fragments[0]
        tensors = self.replica.compared if problem is None else first.zeros()
        world.arrive(self._steps)
        vote = Vote(step=self._steps, lr=self.inner.lr)
        with self.meter.waiting():
            sent = check_equal_(
                world, tensors, claim, _ADVICE, vote, len(first.modules), problem,
                self.replica.moving,
            )  # fmt: skip
        self.meter.count("control", sent)

    def _say(self, message: str, *values: object) -> None:
        """Log on one rank what all of them do."""
        if self.groups[WORLD].rank == 0:
            logger.info(message, *values)

    def _share_buffers(self, buffers: Mapping[str, Tensor]) -> None:
        """Take rank 0's, as DistributedDataParallel does before a forward pass."""
        world = self.groups[WORLD]
        if not buffers or world.size == 1:
            return
        with self.meter.waiting():
            same_values_(world, buffers)
        if world.rank == 0:
            nbytes = sum(buffer.nbytes for buffer in buffers.values())
            self.meter.count("buffers", nbytes * (world.size - 1))

    def _set_round(self, following: Round, end: int) -> None:
        self._round = following
        self._end = end
        launches = fragments.launch_steps(following.steps, len(self._fragments))
        self._launches = [end - following.steps + launch for launch in launches]
        self._gradients.use(following.gradients)

    def _end_round(self, following: Round) -> None:
        level = self._round.parameters
        if level == WORLD:
            self._launch_due(following)
            if not self.strategy.streams:
                self._agreed.note(self._steps)
        elif level is not None:
            self._synchronize(self._narrow[level], following)

    def _launch_due(self, following: Round) -> None:
        """Launch the fragments whose turn it is within the round."""
        if self._round.parameters != WORLD:
            return
        for fragment, step in zip(self._fragments, self._launches, strict=True):
            if step != self._steps:
                continue
            if self._delay:
                self._launch(fragment, following)
            else:
                self._synchronize(fragment, following, self._mix)

    def _synchronize(self, fragment: Fragment, following: Round, mix: float = 0.0) -> None:
        """Launch a fragment and land it at once."""
        if fragment.group.size == 1 and fragment.anchor is None:
            return
        flight = self._prepare(fragment, apart=mix > 0)
        try:
            with torch.no_grad(), self.meter.waiting(flight.record):
                self._load(flight, following)
                flight.exchange()
            self._land(flight, mix)
            self._written = self._agreed.versions()
        except Exception:
            if flight.in_place:
                self._give_anchor(fragment)
            raise

    def _launch(self, fragment: Fragment, following: Round) -> None:
        """Send a fragment on its way, to be landed later."""
        assert self._courier is not None
        while any(flight.fragment is fragment for flight in self._flights):
            self._land(self._flights.popleft(), self._mix)  # after a round that was cut short
        flight = self._prepare(fragment, apart=True, carry=self._carry)
        with torch.no_grad(), self.meter.waiting(flight.record):
            self._load(flight, following)
            flight.exchange_beside(self._courier)
        self._flights.append(flight)

    def _prepare(self, fragment: Fragment, apart: bool, carry: bool = False) -> Flight:
        last = fragment.number in (None, len(self._fragments) - 1)
        problem = self.follow_model()
        return Flight(
            fragment,
            SyncRecord(self._steps, fragment.level, fragment.number),
            self.meter,
            Buffers(self.replica, apart) if last else None,
            self._hangar if apart else None,
            carry,
            problem,
        )

    def _load(self, flight: Flight, following: Round) -> None:
        self.groups[WORLD].arrive(self._steps)
        averages = self.strategy.optimizer_state == "average"
        work = flight.fragment.work(self._steps, self._work)
        flight.fragment.begin(self._steps, self._work)
        if flight.buffers is not None:
            self._begin_narrower(flight.record.level)
        contents = self._contents(flight.fragment)
        self._watch_optimizer()
        flight.load()
        flight.vote(
            buffers_finite=not self.replica.has_nan_buffer(),
            work=work,
            step=self._steps,
            planned=following.steps,
            fingerprint=contents,
            moving=layout_number(sorted(self.replica.moving)),
            lr=self.inner.lr,
            inner_lr=self._lr,
            layout=self.inner.layout() if averages else 0,
        )

    def _begin_narrower(self, level: str) -> None:
        """Count work anew at all levels within the one that is synchronized."""
        levels = self.groups.levels
        for narrower in levels[1 : levels.index(level)]:
            self._narrow[narrower].begin(self._steps, self._work)

    def _land_launched_until(self, step: int) -> None:
        while self._flights and self._flights[0].record.step <= step:
            self._land(self._flights.popleft(), self._mix)

    def _land(self, flight: Flight, mix: float) -> None:
        if flight.record.step != self._steps:
            self.replica.refresh()  # a change that cannot be followed is told at the next launch
        before = self._agreed.versions()
        with torch.no_grad(), self.meter.waiting(flight.record):
            flight.land(self._steps, mix)
            if flight.buffers is not None:
                if flight.record.level == WORLD:
                    self._agreed.keep(flight.buffers.tensors)
                self._settle_optimizer(flight)
            if not flight.finite:
                self._recover(flight)
        self._written += self._agreed.versions() - before  # by this clock, not by an optimizer
        self._drift = flight.record.drift
        self._watch_replicas(flight)
        self.meter.close(flight.record)
        if self.groups[WORLD].rank == 0:
            logger.debug("synchronized: %s", flight.record)

    def _contents(self, fragment: Fragment) -> int:
        """What tells whether replicas are equal; 0 where that is known, or no wonder."""
        local = self._round.gradients == RANK and fragment.level == WORLD
        if not (local and self._perhaps_equal) or fragment.group.size == 1:
            return 0
        return contents_number(map(fingerprint, fragment.parameters.values()))

    def _watch_replicas(self, flight: Flight) -> None:
        """Say that local steps were not local, until replicas were seen to go apart."""
        local = flight.record.step - self._agreed.step
        if not (local and self._perhaps_equal and flight.ballot.vote.fingerprint):
            return
        self._perhaps_equal = False
        if not flight.ballot.unanimous("fingerprint") or self.groups[WORLD].rank:
            return
        wrapper = self._gradients.wrapper
        owner = gradients_reduced_elsewhere(self.replica.parameters.values(), wrapper)
        reason = "ranks seem to train on the same data, or not at all: shard the data by rank"
        if owner is not None:
            reason = f"{owner} averages their gradients in each step: pass it to attach"
        logger.warning("replicas are equal to the bit after %d local steps: %s", local, reason)

    def _watch_optimizer(self) -> None:
        """Say that parameters move by another optimizer than the one that attach was given."""
        written, self._written = self._written, self._agreed.versions()
        if self.inner.worked() or written == self._written or self._told_of_optimizer:
            return
        self._told_of_optimizer = True
        if self.groups[WORLD].rank == 0:
            logger.warning(
                "parameters changed, and the optimizer that attach was given took no step: if "
                "another one was made since, its learning rate and its state are not seen, nor "
                "saved; call sync.finish() and sync.close(), and attach again with it"
            )

    def _settle_optimizer(self, flight: Flight) -> None:
        match self.strategy.optimizer_state:
            case "reset":
                self.inner.reset()
            case "average":
                weight, divisor = flight.shares()
                unanimous = flight.ballot.unanimous("layout")
                sent = self.inner.average_(
                    flight.fragment.group, weight, lambda: divisor, unanimous
                )
                self.meter.count("optimizer", sent, flight.record)
            case "keep":
                pass

    def _recover(self, flight: Flight) -> None:
        """Leave nothing of this replica that is not finite, or it would be left out for ever."""
        if flight.record.level == WORLD:
            self._give_anchor(*self._fragments)  # the fragments whose turn has not come as well
            for other in self._flights:
                other.restart_moves()
        self.inner.heal()
        self._gradients.forget()

    def _give_anchor(self, *chosen: Fragment) -> None:
        with torch.no_grad():
            for fragment in chosen:
                if fragment.anchor is not None:
                    fragment.anchor.give()


def _shapes(anchor: Mapping[str, Any] | None) -> dict[str, torch.Size]:
    tensors = {} if anchor is None else anchor["tensors"]
    return {name: tensor.shape for name, tensor in tensors.items()}
