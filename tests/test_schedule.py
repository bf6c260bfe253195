"""Schedules are pure, cover a run without gaps, and refuse what makes no sense."""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postlocal import schedule
from postlocal.schedule import Round, Schedule

periods = st.integers(1, 50)
levels = st.sampled_from(["rank", "node"])


def nested(factors: list[int]) -> Schedule:
    names = ["node", "rack", "world"][-len(factors) :]
    lengths, length = {}, 1
    for name, factor in zip(names, factors, strict=True):
        length *= factor
        lengths[name] = length
    return schedule.hierarchical(lengths)


plain = st.one_of(
    st.just(schedule.every_step()),
    st.builds(schedule.periodic, periods, levels),
    st.lists(st.integers(2, 5), min_size=1, max_size=3).map(nested),
    st.builds(
        schedule.growing,
        st.integers(1, 20),
        st.floats(1.05, 4.0),
        st.integers(1, 5),
        st.none() | st.integers(20, 60),
    ),
    st.builds(schedule.adaptive, st.floats(1e-4, 1.0), st.integers(5, 40), st.integers(1, 5)),
    st.builds(
        schedule.quadratic, st.floats(1e-3, 1.0), periods, st.integers(0, 20), st.none() | periods
    ),
)
schedules = plain | st.builds(schedule.post_local, st.integers(0, 40), plain)
rates = st.floats(1e-6, 1.0)


@given(when=schedules, steps=st.integers(1, 300), lr=rates)
def test_rounds_cover_a_run_without_gaps(when: Schedule, steps: int, lr: float) -> None:
    expected = 0
    for start, each in schedule.rollout(when, steps, lr):
        assert start == expected
        expected += each.steps
    assert expected == steps


@given(when=schedules, step=st.integers(0, 500), lr=rates)
def test_a_schedule_is_pure_and_stays_within_its_levels(
    when: Schedule, step: int, lr: float
) -> None:
    first = when(step, lr)
    assert first == when(step, lr)
    assert first.levels <= schedule.levels(when)


@given(period=periods, step=st.integers(0, 500))
def test_periodic_rounds_end_at_multiples_of_the_period(period: int, step: int) -> None:
    each = schedule.periodic(period)(step, 0.1)
    assert (step + each.steps) % period == 0
    assert 1 <= each.steps <= period


@given(base=periods, small=rates, large=rates)
def test_quadratic_rounds_grow_as_the_learning_rate_falls(
    base: int, small: float, large: float
) -> None:
    small, large = sorted((small, large))
    when = schedule.quadratic(alpha=0.1, base=base)
    assert when(100, small).steps >= when(100, large).steps >= base


def test_quadratic_follows_the_papers_rule() -> None:
    when = schedule.quadratic(alpha=0.0175, base=4)
    expected = {0.008: 4, 0.004: 19, 0.002: 76, 0.0005: 1225}
    assert {lr: when(0, lr).steps for lr in expected} == expected


def test_quadratic_waits_for_the_warmup_and_ends_with_the_run() -> None:
    when = schedule.quadratic(alpha=0.1, base=4, lr_warmup=10, initial=6, total=100)
    assert [when(step, 1e-4).steps for step in (0, 6, 9, 10, 90, 100)] == [6, 4, 1, 90, 10, 1]
    assert schedule.quadratic(alpha=0.1, base=4)(50, 0.0).steps == 4


VIT_B = {0: 4, 1 / 4: 6, 1 / 3: 8, 1 / 2: 19, 2 / 3: 76, 3 / 4: 223, 5 / 6: 1066}
"""Share of the cosine that is done -> steps a round: (0.0175 / 0.006)^2 = 8.5 at a third."""


@pytest.mark.parametrize("done", VIT_B)
def test_quadratic_rounds_are_those_of_the_papers_vit_b(done: float) -> None:
    lr = 0.008 * (1 + math.cos(math.pi * done)) / 2
    assert schedule.quadratic(alpha=0.0175, base=4)(1000, lr).steps == VIT_B[done]


def test_a_run_under_the_quadratic_rule_is_that_of_exact_arithmetic() -> None:
    warmup, total = 1000, 20000

    def lr(step: int) -> float:
        if step < warmup:
            return 0.008 * (step + 1) / warmup
        return 0.004 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))

    when = schedule.quadratic(alpha=0.0175, base=4, lr_warmup=warmup, total=total)
    got = [(start, each.steps) for start, each in schedule.rollout(when, total, lr)]
    expected, step = [], 0
    while step < total:
        steps = max(4, math.floor((Fraction(0.0175) / Fraction(lr(step))) ** 2))
        steps = 4 if step < warmup else min(steps, total - step)
        expected.append((step, steps))
        step += steps
    assert got == expected
    assert got[-1] == (got[-1][0], total - got[-1][0])


@given(
    start=st.integers(1, 20),
    factor=st.floats(1.05, 4.0),
    every=st.integers(1, 5),
    limit=st.none() | st.integers(20, 60),
)
def test_growing_rounds_never_shrink_and_stay_within_their_limit(
    start: int, factor: float, every: int, limit: int | None
) -> None:
    when = schedule.growing(start, factor, every, limit)
    lengths = [each.steps for _, each in schedule.rollout(when, 500)][:-1]
    assert lengths == sorted(lengths)
    assert all(start <= length <= (limit or math.inf) for length in lengths)
    assert lengths[:every] == [start] * min(every, len(lengths))


@given(
    when=st.builds(schedule.growing, st.integers(1, 9), st.floats(1.05, 4), st.integers(1, 4)),
    step=st.integers(0, 400),
)
def test_a_growing_round_that_begins_early_ends_where_the_whole_one_would(
    when: schedule.growing, step: int
) -> None:
    ends = [start + each.steps for start, each in schedule.rollout(when, 5000)]
    assert step + when(step, 0.1).steps == next(end for end in ends if end > step)


def test_growing_periods_are_rounded_down_but_grow_from_what_they_were() -> None:
    when = schedule.growing(4, factor=1.5)
    assert [each.steps for _, each in schedule.rollout(when, 52)] == [4, 6, 9, 13, 20]


ADAPTIVE = schedule.adaptive(target_drift=0.1, initial=10, shortest=4, longest=40)


@pytest.mark.parametrize(
    ("drift", "steps"),
    [
        (0.1, 10),
        (0.08, 12),
        (0.2, 5),
        (0.9, 5),
        (1e-9, 20),
        (0.0, 20),
        (math.inf, 5),
        (math.nan, 10),
    ],
)
def test_an_adaptive_period_follows_the_drift(drift: float, steps: int) -> None:
    planned, before = ADAPTIVE(70, 0.1), Round(10, "rank", "world")
    assert schedule.adapt(ADAPTIVE, planned, before, drift) == Round(steps, "rank", "world")


@given(
    before=st.integers(1, 100),
    drift=st.floats(min_value=0) | st.just(math.nan),
    target=st.floats(1e-6, 1e3),
)
def test_an_adaptive_period_stays_within_its_bounds(
    before: int, drift: float, target: float
) -> None:
    when = schedule.adaptive(target, initial=10, shortest=4, longest=40)
    steps = when.adapt(when(0, 0.1), Round(before, "rank", "world"), drift).steps
    assert min(max(before // 2, 4), 40) <= steps <= max(min(before * 2, 40), 4)


def test_an_adaptive_period_settles_where_the_drift_is_the_target() -> None:
    each = ADAPTIVE(0, 0.1)
    for _ in range(10):
        each = schedule.adapt(ADAPTIVE, ADAPTIVE(0, 0.1), each, drift=0.004 * each.steps)
    assert each.steps == 25


def test_other_schedules_take_the_round_they_planned() -> None:
    planned = Round(16, "rank", "world")
    for when in (schedule.periodic(16), schedule.quadratic(0.1, 4), lambda step, lr: planned):
        assert schedule.adapt(when, planned, planned, drift=0.5) is planned


def test_post_local_adapts_only_after_its_warmup() -> None:
    when = schedule.post_local(20, then=ADAPTIVE)
    planned = when(20, 0.1)
    assert schedule.adapt(when, planned, before=when(0, 0.1), drift=0.5) is planned
    assert schedule.adapt(when, planned, before=planned, drift=0.5).steps == 5


@given(when=plain, lr=st.floats(1e-2, 1.0))
def test_no_full_round_is_shorter_than_the_shortest(when: Schedule, lr: float) -> None:
    warmup = getattr(when, "lr_warmup", 0)
    rounds = [each for start, each in schedule.rollout(when, 400, lr) if start >= warmup]
    assert all(each.steps >= schedule.shortest(when) for each in rounds[:-1])


def test_each_schedule_knows_its_shortest_round() -> None:
    expected: list[tuple[Schedule, int]] = [
        (schedule.every_step(), 1),
        (schedule.periodic(7), 7),
        (schedule.hierarchical({"node": 3, "world": 12}), 3),
        (schedule.quadratic(0.1, base=8), 8),
        (schedule.quadratic(0.1, base=8, lr_warmup=10, initial=5), 5),
        (schedule.growing(6), 6),
        (ADAPTIVE, 4),
        (schedule.post_local(100, schedule.growing(6)), 6),
        (schedule.post_local(100, lambda step, lr: Round(3, "rank", "world")), 3),
    ]
    assert [schedule.shortest(when) for when, _ in expected] == [steps for _, steps in expected]


@dataclass(frozen=True)
class Alternating:
    """A schedule of a user's own that adapts."""

    def __call__(self, step: int, lr: float) -> Round:
        return Round(2, "rank", "world")

    def adapt(self, planned: Round, before: Round, drift: float) -> Round:
        return Round(6 - before.steps, planned.gradients, planned.parameters)


def test_a_schedule_of_ones_own_can_adapt() -> None:
    planned = Round(2, "rank", "world")
    when = schedule.post_local(8, Alternating())
    assert schedule.adapt(when, planned, planned, 0.1).steps == 4


def test_hierarchical_takes_the_longest_period_that_divides_the_step() -> None:
    when = schedule.hierarchical({"node": 2, "rack": 4, "world": 8})
    ends = [when(step, 0.1).parameters for step in range(0, 16, 2)]
    assert ends == ["node", "rack", "node", "world"] * 2
    assert when(3, 0.1) == Round(1, "rank", "rack")


def test_a_function_of_ones_own_is_a_schedule() -> None:
    def mine(step: int, lr: float) -> Round:
        return Round(3, "node", "world")

    assert schedule.levels(mine) == {"node", "world"}
    assert [start for start, _ in schedule.rollout(mine, 7, lr=lambda step: 0.1)] == [0, 3, 6]


BAD: list[tuple[Any, dict[str, Any], str]] = [
    (schedule.periodic, {"period": 0}, "period must be at least 1 step, got 0"),
    (schedule.periodic, {"period": -4}, "period must be at least 1 step, got -4"),
    (Round, {"steps": 0}, "steps must be at least 1 step, got 0"),
    (schedule.post_local, {"warmup": -1, "then": schedule.every_step()}, "warmup must be at least"),
    (schedule.hierarchical, {"periods": {}}, "periods must name at least one level"),
    (schedule.hierarchical, {"periods": {"node": 0}}, r"periods\['node'\] must be at least 1"),
    (schedule.hierarchical, {"periods": {"node": 3, "world": 8}}, "each a multiple"),
    (schedule.hierarchical, {"periods": {"node": 8, "world": 8}}, "periods must grow"),
    (schedule.quadratic, {"alpha": 0, "base": 4}, "alpha must be above 0, got 0"),
    (schedule.quadratic, {"alpha": 0.1, "base": 0}, "base must be at least 1 step"),
    (schedule.quadratic, {"alpha": 0.1, "base": 1, "lr_warmup": -1}, "lr_warmup must be"),
    (schedule.quadratic, {"alpha": 0.1, "base": 1, "total": 0}, "total must be at least"),
    (schedule.quadratic, {"alpha": 0.1, "base": 1, "initial": 0}, "initial must be at least"),
    (schedule.growing, {"start": 0}, "start must be at least 1 step, got 0"),
    (schedule.growing, {"start": 1, "factor": 1.0}, "factor must be above 1, got 1.0"),
    (schedule.growing, {"start": 1, "factor": math.nan}, "above 1, got nan"),
    (schedule.growing, {"start": 1, "every": 0}, "every must be at least 1 round, got 0"),
    (schedule.growing, {"start": 8, "limit": 4}, r"at least start \(8 steps\), got 4"),
    (schedule.adaptive, {"target_drift": 0.0, "initial": 4}, "target_drift must be above 0, got 0"),
    (schedule.adaptive, {"target_drift": math.nan, "initial": 4}, "above 0, got nan"),
    (
        schedule.adaptive,
        {"target_drift": 0.1, "initial": 4, "shortest": 0},
        "shortest must be at least 1 step, got 0",
    ),
    (
        schedule.adaptive,
        {"target_drift": 0.1, "initial": 4, "shortest": 8, "longest": 7},
        r"longest must be at least shortest \(8 steps\), got 7",
    ),
    (
        schedule.adaptive,
        {"target_drift": 0.1, "initial": 4, "shortest": 8},
        r"from shortest to longest \(8 to 1000 steps\), got 4",
    ),
]


@pytest.mark.parametrize(("make", "arguments", "message"), BAD)
def test_what_makes_no_sense_is_refused(make: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)
