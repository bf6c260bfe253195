"""The timeline: results are applied in time, replicas agree when it says so, and runs follow it."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import postlocal
from postlocal import Strategy, fragments, outer, schedule, topology, virtual
from postlocal.comm.group import Group
from postlocal.fragments import Fragments, streaming, whole
from postlocal.schedule import WORLD, Round
from postlocal.sync.timeline import (
    Agree,
    Apply,
    Average,
    Event,
    Restore,
    Start,
    Synchronize,
    Timeline,
    start_steps,
)

cuts = st.one_of(
    st.just(whole()),
    st.builds(
        streaming, st.integers(1, 5), delay=st.integers(0, 9), mix=st.sampled_from([0.0, 0.5])
    ),
)
rounds = st.builds(
    Round,
    st.integers(1, 12),
    st.sampled_from(["rank", "node", "world"]),
    st.sampled_from([None, "node", "world"]),
)


@dataclass(frozen=True)
class Moment:
    """What happens after a step, or at the end of a run: ``finished``."""

    before: Timeline
    after: Timeline
    events: tuple[Event, ...]
    finished: bool = False

    @property
    def started(self) -> list[int]:
        return [event.fragment for event in self.events if isinstance(event, Start)]

    @property
    def applied(self) -> list[int]:
        return [event.fragment for event in self.events if isinstance(event, Apply)]

    @property
    def synchronized(self) -> list[int]:
        return [event.fragment for event in self.events if isinstance(event, Synchronize)]


@dataclass(frozen=True)
class Run:
    """Some rounds, and steps after which all replicas are made equal, if they are reached."""

    cut: Fragments
    plan: tuple[Round, ...]
    finishes: frozenset[int]

    def moments(self) -> Iterator[Moment]:
        timeline, plan = Timeline.new(self.cut, self.plan[0]), iter(self.plan)
        for planned in plan:
            timeline = timeline.begin(planned)
            while not timeline.ended:
                before = timeline
                timeline, events = before.step()
                yield Moment(before, timeline, events)
                if timeline.steps in self.finishes:
                    before = timeline
                    timeline, events = before.finish()
                    yield Moment(before, timeline, events, finished=True)
                    break


runs = st.builds(
    Run,
    cuts,
    st.lists(rounds, min_size=1, max_size=6).map(tuple),
    st.frozensets(st.integers(1, 60), max_size=3),
)


@given(steps=st.integers(1, 1000), count=st.integers(1, 64))
def test_starts_are_spread_evenly_over_a_round_and_the_last_is_at_its_end(
    steps: int, count: int
) -> None:
    starts = start_steps(steps, count)
    assert len(starts) == count
    assert list(starts) == sorted(starts)
    assert starts[0] >= 1
    assert starts[-1] == steps
    gaps = [after - before for before, after in zip((0, *starts), starts, strict=False)]
    assert max(gaps) - min(gaps) <= 1


@given(cuts, rounds, st.integers(0, 30))
def test_each_fragment_is_sent_once_in_a_round_at_level_world_and_in_no_other(
    cut: Fragments, planned: Round, before: int
) -> None:
    run = Run(cut, (Round(before + 1, "rank", "world"), planned), frozenset())
    sent = Counter[int]()
    for moment in run.moments():
        if moment.before.steps > before:
            sent.update([*moment.started, *moment.synchronized])
    times = 1 if planned.parameters == WORLD else 0
    assert [sent[number] for number in range(cut.count)] == [times] * cut.count


@given(runs)
@settings(max_examples=100)
def test_a_fragment_is_applied_after_its_delay_or_before_it_is_sent_again(run: Run) -> None:
    sent: dict[int, int] = {}
    for moment in run.moments():
        for event in moment.events:
            match event:
                case Start(number):
                    assert number not in sent
                    sent[number] = moment.after.steps
                case Apply(number):
                    assert number == next(iter(sent))  # the oldest
                    late = moment.after.steps - sent.pop(number)
                    cut_short = moment.finished or bool(moment.started)
                    assert late <= run.cut.delay if cut_short else late == run.cut.delay
        assert tuple(sent) == moment.after.under_way
        assert all(moment.after.steps - step < run.cut.delay for step in sent.values())


@given(runs)
@settings(max_examples=100)
def test_a_delay_shorter_than_rounds_is_kept_to_the_step(run: Run) -> None:
    run = replace(run, plan=tuple(replace(each, steps=each.steps + 9) for each in run.plan))
    sent: dict[int, int] = {}
    for moment in run.moments():
        if moment.finished:
            sent.clear()
            continue
        for number in moment.applied:
            assert moment.after.steps - sent.pop(number) == run.cut.delay
        sent |= dict.fromkeys(moment.started, moment.after.steps)


@given(runs)
@settings(max_examples=100)
def test_only_fragments_without_delay_are_synchronized_at_once(run: Run) -> None:
    for moment in run.moments():
        if not moment.finished:
            assert not moment.synchronized or run.cut.delay == 0
            assert not moment.started or run.cut.delay > 0
            assert not any(isinstance(event, Restore) for event in moment.events)


@given(runs)
@settings(max_examples=100)
def test_narrower_levels_are_averaged_at_the_ends_of_their_rounds(run: Run) -> None:
    for moment in run.moments():
        level = moment.before.round.parameters
        due = moment.after.ended and not moment.finished and level not in (None, WORLD)
        averaged = [event.level for event in moment.events if isinstance(event, Average)]
        assert averaged == ([level] if due else [])


@given(runs)
@settings(max_examples=100)
def test_the_end_applies_what_is_under_way_and_sends_what_was_learned_since(run: Run) -> None:
    last = dict.fromkeys(range(run.cut.count), 0)
    for moment in run.moments():
        if moment.finished:
            assert moment.applied == list(moment.before.under_way)
            assert moment.after.under_way == ()
            rest = moment.events[len(moment.applied) :]
            assert rest[-1] == Agree()
            ends = [
                Restore(number) if step == moment.after.steps else Synchronize(number, final=True)
                for number, step in last.items()
            ]
            agreed = moment.before.agreed_at == moment.before.steps
            assert list(rest[:-1]) == ([] if agreed else ends)
            assert moment.after.finish() == (moment.after, (Agree(),))
        sent = range(run.cut.count) if moment.finished else [*moment.started, *moment.synchronized]
        last |= dict.fromkeys(sent, moment.after.steps)


@given(runs)
@settings(max_examples=100)
def test_replicas_agree_after_synchronous_steps_whole_synchronizations_and_the_end(
    run: Run,
) -> None:
    synchronous = True
    for moment in run.moments():
        planned, after = moment.before.round, moment.after
        synchronous = synchronous and (moment.finished or planned.gradients == WORLD)
        whole_round = after.ended and planned.parameters == WORLD and not run.cut.streams
        agreed = synchronous or whole_round or moment.finished
        assert (after.agreed_at == after.steps) == agreed
        assert after.synchronous == synchronous
        assert (Agree() in moment.events) == (whole_round or moment.finished)


@given(runs)
def test_steps_at_a_time_and_one_by_one_give_the_same_events(run: Run) -> None:
    for planned in run.plan:
        slow = fast = Timeline.new(run.cut, run.plan[0]).begin(planned)
        while not fast.ended:
            fast, events = fast.step(fast.steps_to_next)
            passed: list[Event] = []
            while slow.steps < fast.steps:
                assert not passed
                slow, more = slow.step()
                passed += more
            assert (slow, tuple(passed)) == (fast, events)


@given(runs)
def test_a_saved_timeline_goes_on_as_if_it_had_not_been_saved(run: Run) -> None:
    other = Timeline.new(run.cut, Round(7))
    for moment in run.moments():
        assert other.resumed(moment.after.state_dict()) == moment.after


def test_no_event_is_passed_by() -> None:
    timeline = Timeline.new(streaming(count=2), Round(8, "rank", "world"))
    for count in (0, 5):
        with pytest.raises(ValueError, match=f"count must be from 1 to the 4 steps .* got {count}"):
            timeline.step(count)
    ended, _ = timeline.step(4)[0].step()[0].step(3)
    with pytest.raises(ValueError, match="begin the next round where this one has ended"):
        ended.step()


@dataclass(frozen=True)
class Own:
    """A schedule of rounds that follow no rule."""

    plan: tuple[Round, ...]
    follows_lr: ClassVar[bool] = False
    shortest: ClassVar[int] = 1
    levels: ClassVar[frozenset[str]] = frozenset({"node", "world"})

    def __call__(self, step: int, lr: float) -> Round:
        return self.plan[step * 7919 % len(self.plan)]


periods = st.integers(2, 7)
local = st.builds(
    Round, st.integers(1, 6), st.just("rank"), st.sampled_from([None, "node", "world"])
)
schedules: st.SearchStrategy[Any] = st.one_of(
    st.builds(schedule.periodic, periods, parameters=st.sampled_from(["node", "world"])),
    st.builds(schedule.adaptive, st.sampled_from([0.001, 0.1, 10.0]), periods, longest=st.just(15)),
    st.builds(schedule.quadratic, st.just(0.3), periods, total=st.sampled_from([None, 9, 20])),
    st.builds(schedule.growing, periods, every=st.just(2)),
    st.builds(lambda period: schedule.hierarchical({"node": period, "world": 2 * period}), periods),
    st.builds(Own, st.lists(local, min_size=1, max_size=5).map(tuple)),
)


@st.composite
def strategies(draw: st.DrawFn) -> Strategy:
    when, cut = draw(schedules), fragments.whole()
    if not schedule.nests(when) and draw(st.booleans()):
        longest = 0 if schedule.adapts(when) else schedule.shortest(when) - 1
        delay, mix = draw(st.integers(0, longest)), draw(st.sampled_from([0.0, 0.5]))
        cut = streaming(draw(st.integers(1, 5)), delay=delay, mix=mix)
    outers: list[outer.Outer] = [outer.average(), outer.nesterov(0.7, 0.5)]
    return Strategy(when, draw(st.sampled_from(outers)), fragments=cut)


def lr_at(step: int) -> float:
    return 0.1 / (1 + step // 5)


Sent = tuple[str, int, int, int | None]
"""Level, number of the fragment, and the steps at which it was sent and applied."""


def train(
    group: Group, strategy: Strategy, steps: int, finishes: set[int]
) -> tuple[list[Sent], list[float], list[bool], list[Round]]:
    """Synchronizations of a run in order, their drift, and agreement and round after each step."""
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(5)))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr_at(0))
    levels = topology.nodes(size=1)
    if "node" in schedule.levels(strategy.schedule):
        levels = topology.nodes(size=2)
    sync = postlocal.attach(model, optimizer, strategy, topology=levels, process_group=group)
    agreed, taken = [], [sync.round]
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = lr_at(step)
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.1 * (1 + group.rank))
        optimizer.step()
        sync.step()
        agreed.append(sync.agreed)
        if step in finishes:
            sync.finish()
            agreed.append(sync.agreed)
        taken.append(sync.round)
    records = sync.meter.records
    sent = [(each.level, each.fragment or 0, each.step, each.applied) for each in records]
    sync.close()
    return sent, [each.drift for each in records], agreed, taken


def carry_out(
    timeline: Timeline, events: tuple[Event, ...], sent: list[Sent], started: dict[int, int]
) -> None:
    now = timeline.steps
    for event in events:
        match event:
            case Average(level):
                sent.append((level, 0, now, now))
            case Synchronize(number):
                sent.append((WORLD, number, now, now))
            case Start(number):
                started[number] = now
            case Apply(number):
                sent.append((WORLD, number, started.pop(number), now))


@given(strategies(), st.integers(1, 24), st.sets(st.integers(1, 24), max_size=3))
@settings(max_examples=40, deadline=None)
def test_a_run_synchronizes_and_agrees_when_its_timeline_says_so(
    strategy: Strategy, steps: int, finishes: set[int]
) -> None:
    counted, drifts, agreed, taken = virtual.run(
        2, lambda group: train(group, strategy, steps, finishes)
    )[0]
    sent: list[Sent] = []
    started: dict[int, int] = {}
    timeline = Timeline.new(strategy.fragments, strategy.schedule(0, lr_at(0)))
    expected, planned = [], [timeline.round]

    def begin(timeline: Timeline, drift: float) -> Timeline:
        following = strategy.schedule(timeline.steps, lr_at(timeline.steps))
        return timeline.begin(schedule.adapt(strategy.schedule, following, timeline.round, drift))

    for step in range(1, steps + 1):
        timeline, events = timeline.step()
        carry_out(timeline, events, sent, started)
        if timeline.ended:
            drift = drifts[len(sent) - 1] if sent and len(sent) <= len(drifts) else math.nan
            timeline = begin(timeline, drift)
        expected.append(timeline.agreed_at == step)
        if step in finishes:
            timeline, events = timeline.finish()
            carry_out(timeline, events, sent, started)
            timeline = begin(timeline, math.nan)
            expected.append(True)
        planned.append(timeline.round)
    assert (sent, expected, planned) == (counted, agreed, taken)


def test_after_a_synchronization_that_failed_the_next_round_begins() -> None:
    def work(group: Group) -> tuple[str, list[int], bool]:
        model = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sync = postlocal.attach(
            model, optimizer, Strategy(schedule.periodic(4)), process_group=group
        )
        fill(model, math.nan)
        with pytest.raises(postlocal.NonFiniteError) as failed:
            for _ in range(4):
                sync.step()
        agreed = sync.agreed
        fill(model, 1.0 + group.rank)
        for _ in range(5):
            sync.step()
        sync.finish()
        records = [record.step for record in sync.meter.records]
        sync.close()
        return str(failed.value), records, agreed

    for failed, records, agreed in virtual.run(2, work):
        assert failed.startswith("after step 4 the parameters of every replica")
        assert (records, agreed) == ([8, 9], False)


@dataclass
class Interrupting:
    """A guard within which the user interrupts, when it is armed."""

    anchored: ClassVar[bool] = False
    armed: bool = False

    def weight(self, finite: bool) -> float:
        if self.armed:
            raise KeyboardInterrupt
        return float(finite)

    def scale(self, norm: float) -> float:
        return 1.0

    def detector(self, ranks: int, modules: int) -> None:
        return None


def test_a_loop_that_was_interrupted_as_a_fragment_was_sent_can_go_on(alone: None) -> None:
    guard = Interrupting()
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    strategy = postlocal.strategies.streaming_diloco(4, fragments=1, delay=2, guard=guard)
    sync = postlocal.attach(model, optimizer, strategy)
    for _ in range(3):
        sync.step()
    guard.armed = True
    with pytest.raises(KeyboardInterrupt):
        sync.step()
    guard.armed = False
    for _ in range(8):
        sync.step()
    sync.finish()
    assert [record.step for record in sync.meter.records] == [8, 12]


def fill(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
