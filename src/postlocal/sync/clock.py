"""The one clock of a training loop: counts steps, and synchronizes when the schedule says so."""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from postlocal import schedule
from postlocal.checks import number, shown
from postlocal.comm.agreement import same_values_
from postlocal.comm.groups import LevelGroups
from postlocal.errors import ModelChangedError
from postlocal.expressions import difference
from postlocal.meter import Meter, human_bytes, human_seconds
from postlocal.schedule import RANK, WORLD, Round
from postlocal.strategies import Strategy
from postlocal.sync.consistency import Agreed, Held, check_equal_, copy_, put_back
from postlocal.sync.ddp import DDPHook, UnreducedGradients
from postlocal.sync.executor import Executor, Moment
from postlocal.sync.fragment import Fragment
from postlocal.sync.inner_optimizer import InnerOptimizers
from postlocal.sync.parameters import Replica
from postlocal.sync.status import RankStatus
from postlocal.sync.timeline import Agree, Event, Timeline
from postlocal.wire import fp32

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
        inner: the user's optimizers.
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
    ) -> None:
        self.strategy = strategy
        self.replica = replica
        self.inner = inner
        self.groups = groups
        self.meter = meter
        self._gradients = gradients
        self._agreed = Agreed(replica, keeps_buffers=strategy.anchored)
        self._executor = Executor(
            strategy, replica, inner, groups, gradients, meter, fragments, self._agreed
        )
        first = schedule.planned(strategy.schedule, 0, inner.lr)
        self._timeline = Timeline.new(strategy.fragments, first)
        self._work = 0.0
        self._lr = inner.lr  # the greatest of the round so far
        self._compared = False  # whether this process has seen synchronous steps agree
        self._closed = False
        self._lent = 0
        self._gave_way = False
        self._begin(first)
        inner.watch()  # last, so that a clock that could not be made leaves nothing behind

    def __repr__(self) -> str:
        ranks, meter, ddp = self.groups[WORLD].size, self.meter, self.ddp_payload_bytes
        share = f" ({meter.total_bytes / ddp:.1%} of DDP's)" if ddp else ""
        return (
            f"<Sync: {self.strategy.name} on {ranks} ranks: {self.steps:,} steps, "
            f"{meter.syncs:,} synchronizations, {human_bytes(meter.total_bytes)} sent{share}, "
            f"waited {human_seconds(meter.wait_seconds)}>"
        )

    @property
    def steps(self) -> int:
        """Number of calls of `step` so far."""
        return self._timeline.steps

    @property
    def ddp_payload_bytes(self) -> int:
        """Bytes that this rank would have sent in as many steps of DDP with fp32 gradients."""
        numel = sum(parameter.numel() for parameter in self.replica.parameters.values())
        return self.steps * fp32().payload_bytes(numel, self.groups[WORLD].size)

    @property
    def round(self) -> Round:
        """The round under way."""
        return self._timeline.round

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
        if self._timeline.synchronous and self.round.gradients == WORLD:
            return True
        return self._agreed.holds(self.steps)

    def step(self, *, work: float = 1.0) -> None:
        """Count one iteration, and apply and start what is due after it.

        To be called on every rank once for each optimizer step that the loop intends, after it;
        also where a GradScaler skipped it, and once for all micro-batches of an accumulation.

        Args:
            work: how much of a step this rank really did, at least 0: its share of the usual
                batch, or 0 where it skipped the step. Contributions to a mean of parameters weigh
                as much as the work since the last one.

        Raises:
            PeerError: if a rank does not take part in the synchronization within the timeout.
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
        if self._timeline.ended:  # the synchronization at the end of the round failed
            self._begin(self._plan())
        before = self._timeline
        self._timeline, events = before.step()
        self._work += work
        self._lr = max(self._lr, self.inner.lr)
        with self._unsent_on_failure(before):
            if self._timeline.synchronous and not self._compared:
                self._compare()
            following = self._plan() if self._timeline.ended else self.round
            self._carry_out(events, following)
        if self._timeline.ended:
            self._begin(self._adapt(following, self._executor.drift))

    def finish(self) -> None:
        """Make every replica equal: synchronize now, unless they agree already, and compare them.

        What is under way is applied before. Fragments that were sent earlier than at this step
        take one more outer step, for what was learned since. Training can go on after it, with a
        new round.

        Raises:
            DisagreementError: as `step` does, and if replicas differ where the clock says that they
                agree, such as after calls of `step` were left out.
            PeerError, ModelChangedError, NonFiniteError: as `step` does.
        """
        self._check_open()
        before, following = self._timeline, self._plan()
        self._timeline, events = before.finish()
        with self._unsent_on_failure(before):
            self._carry_out(events, following)
        self._compare()
        if self._timeline.synchronous:
            self._share_buffers(self.replica.averaged)
        self._agreed.note(self.steps)
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
        with self.inner.own_writes(), put_back([*parameters, *buffers]):
            self._executor.restore(*self._executor.fragments)
            copy_(buffers, list(self._agreed.buffers.values()))
            self._lent += 1
            try:
                yield
            finally:
                self._lent -= 1

    def follow_model(self) -> str | None:
        """Follow what may change in the model and the optimizers; on this rank alone.

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
        self._executor.close()
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
                "the newer Sync alone; where a model has several optimizers, pass a list of them "
                "to one attach"
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
        self._executor.wait()
        self._check_own()
        return {
            "strategy": str(self.strategy),
            "timeline": self._timeline.state_dict(),
            "work": self._work,
            "lr": self._lr,
            "agreed_buffers": dict(self._agreed.buffers),
            "moving": sorted(self.replica.moving),
            "gradients": self._gradients.state_dict(),
            "meter": self.meter.state_dict(),
            **self._executor.state_dict(),
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
        self._gradients.use(self.round.gradients)
        self._gradients.load_state_dict(state["gradients"])
        self._executor.load_state_dict(state)
        self._agreed.keep(state["agreed_buffers"])
        self._agreed.note(self._timeline.agreed_at)
        self._lr = state["lr"]
        self.inner.disregard()

    def restart(self, state: Mapping[str, Any]) -> None:
        """Start a new round at the step of a state that another number of ranks saved.

        Parameters become the saved anchor; where the strategy has none, or replicas have not gone
        apart yet, all ranks must hold equal parameters already. The outer optimizer's state is
        taken over. What was under way, residuals of wires and statistics of guards are not.

        Args:
            state: the `state_dict` of any of the ranks that saved it.

        Raises:
            TypeError, ValueError: as `load_state_dict` does.
        """
        self._check_open()
        self._check_state(state)
        self._load_clock(state)
        self._timeline = self._timeline.agreeing()
        for fragment, saved in zip(self._executor.fragments, state["fragments"], strict=True):
            if fragment.anchor is not None:
                fragment.anchor.load_state_dict(saved["anchor"])
        self._executor.drift = state["drift"]
        self._executor.begin(self.steps, self._work)
        if not self._timeline.synchronous:
            self._executor.restore(*self._executor.fragments)
        self._agreed.keep(self.replica.averaged)
        self._agreed.note(self.steps)
        self.inner.disregard()
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
        if state["strategy"] != str(self.strategy):
            words = difference(state["strategy"], str(self.strategy))
            raise ValueError(
                f"state is of strategy {state['strategy']}, this is {self.strategy}"
                + (f" ({words})" if words else "")
            )
        saved = [_shapes(fragment["anchor"]) for fragment in state["fragments"]]
        fragments = self._executor.fragments
        if saved != [_shapes(fragment.state_dict()["anchor"]) for fragment in fragments]:
            raise ValueError(
                "state is of another model: names or shapes of its parameters are not those that "
                "attach was given; load it into a Sync of the model that it was saved with"
            )

    def _load_clock(self, state: Mapping[str, Any]) -> None:
        self._executor.drop()  # of what was before
        self._timeline = self._timeline.resumed(state["timeline"])
        self._work = state["work"]
        self._compared = False
        self.replica.mark()
        self.replica.moving = set(state["moving"])
        self.meter.load_state_dict(state["meter"])

    def _plan(self) -> Round:
        return schedule.planned(self.strategy.schedule, self.steps, self.inner.lr)

    def _adapt(self, planned: Round, drift: float) -> Round:
        return schedule.adapt(self.strategy.schedule, planned, self.round, drift)

    def _carry_out(self, events: Iterable[Event], following: Round) -> None:
        local = self.round.gradients == RANK
        now = Moment(self.steps, self._work, self._lr, following.steps, local)
        for event in events:
            if isinstance(event, Agree):
                self._agreed.note(self.steps)
            else:
                self._executor.carry_out(event, now)

    @contextmanager
    def _unsent_on_failure(self, before: Timeline) -> Iterator[None]:
        """A ``with`` block after whose failure the timeline is as if no fragment had been sent."""
        try:
            yield
        except BaseException:  # also an interrupt, after which a notebook may go on
            self._timeline = replace(
                self._timeline,
                started=before.started,
                under_way=tuple(self._executor.under_way),
                agreed_at=before.agreed_at,
            )
            raise

    def _begin(self, following: Round) -> None:
        begun = self._timeline.begin(following)
        if begun.diverges:
            self._diverge()
        self._timeline = begun
        self._gradients.use(following.gradients)
        self._lr = self.inner.lr

    def _diverge(self) -> None:
        """Take anchors of what all replicas hold now, before the first local step."""
        if self.steps:
            self._compare()
            self._agreed.note(self.steps)
            self._log("after step %d replicas part: rounds of local steps begin", self.steps)
            self._executor.begin(self.steps, self._work)
            for fragment in self._executor.fragments:
                if fragment.anchor is not None:
                    fragment.anchor.snapshot()
        if self.strategy.anchored:
            shared = {name: tensor.clone() for name, tensor in self.replica.averaged.items()}
            if self.steps:
                self._share_buffers(shared)
            self._agreed.keep(shared)

    def _compare(self) -> None:
        """Measure that replicas are equal where the clock says so.

        Raises:
            DisagreementError, ModelChangedError: on every rank.
        """
        self._compared = True
        self._executor.wait()  # no two threads send over the same group
        if not self.steps:
            claim = "no call of sync.step() told of a step"
        elif self._timeline.synchronous:
            claim = f"gradients were averaged over all ranks in each of {self.steps} steps"
        else:
            claim = f"they were synchronized after step {self._agreed.step}"
        world, problem, first = self.groups[WORLD], self.follow_model(), self._executor.fragments[0]
        tensors = self.replica.compared if problem is None else first.zeros()
        world.announce(self.steps)
        status = RankStatus(step=self.steps, lr=self.inner.lr)
        held = Held(tensors, self.replica.moving, status, len(first.modules), problem)
        with self.meter.waiting():
            sent = check_equal_(world, held, claim, _ADVICE)
        self.meter.count("control", sent)

    def _log(self, message: str, *values: object) -> None:
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


def _shapes(anchor: Mapping[str, Any] | None) -> dict[str, torch.Size]:
    tensors = {} if anchor is None else anchor["tensors"]
    return {name: tensor.shape for name, tensor in tensors.items()}
