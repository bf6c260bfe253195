"""Schedules are pure, cover a run without gaps, and refuse what makes no sense."""

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
]


@pytest.mark.parametrize(("make", "arguments", "message"), BAD)
def test_what_makes_no_sense_is_refused(make: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)
