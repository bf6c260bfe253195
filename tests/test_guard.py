"""Guards weigh contributions and limit their mean."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import postlocal
from postlocal import Strategy, guard, strategies, virtual
from postlocal.group import Group
from postlocal.guard import Guard

norms = st.floats(0.0, 1e30)


@given(norm=norms, limit=st.floats(1e-3, 1e6))
def test_a_clipped_mean_is_never_longer_and_a_short_one_is_left_alone(
    norm: float, limit: float
) -> None:
    scale = guard.clip(limit).scale(norm)
    assert norm * scale <= limit * (1 + 1e-9)
    assert (scale == 1.0) == (norm <= limit)


@given(norm=norms, first=st.floats(1e-3, 1e3), second=st.floats(1e-3, 1e3))
def test_nested_clips_limit_to_the_smaller_of_both(
    norm: float, first: float, second: float
) -> None:
    both = guard.clip(first, inner=guard.clip(second))
    assert both.scale(norm) == pytest.approx(guard.clip(min(first, second)).scale(norm))


def test_clip_weighs_as_the_guard_inside_it() -> None:
    assert guard.clip(1.0).weight(finite=False) == 0.0
    assert guard.clip(1.0, inner=guard.trusting()).weight(finite=False) == 1.0
    assert guard.clip(1.0).weight(finite=True) == 1.0


def test_only_clip_needs_an_anchor() -> None:
    plain = strategies.local_sgd(4)
    assert not plain.anchored
    assert not replace(plain, guard=guard.trusting()).anchored
    assert replace(plain, guard=guard.clip(1.0)).anchored


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan])
def test_a_limit_that_is_not_above_zero_is_refused(limit: float) -> None:
    with pytest.raises(ValueError, match=r"max_norm must be above 0, got (0|-1|nan)"):
        guard.clip(limit)


def synchronized(strategy: Strategy, contributions: Sequence[float]) -> list[Tensor]:
    """One parameter on as many workers, from 1 in common; what all hold after a sync."""

    def work(group: Group) -> Tensor:
        model = nn.Linear(1, 1, bias=False)
        nn.init.ones_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sync = postlocal.attach(model, optimizer, strategy, process_group=group)
        nn.init.constant_(model.weight, contributions[group.rank])
        sync.step()
        return model.weight.detach().clone()

    return virtual.run(len(contributions), work)


ANCHORED = replace(strategies.local_sgd(1), guard=guard.clip(1e9))


@pytest.mark.parametrize("strategy", [strategies.local_sgd(1), ANCHORED], ids=["plain", "anchored"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_contribution_that_is_not_finite_is_left_out(strategy: Strategy, bad: float) -> None:
    for result in synchronized(strategy, [2.0, bad, 5.0]):
        assert float(result) == pytest.approx(3.5)


def test_a_large_finite_contribution_is_taken() -> None:
    for result in synchronized(strategies.local_sgd(1), [1e30, 3e30]):
        assert float(result) == pytest.approx(2e30)


def test_trust_makes_one_nan_everybodys() -> None:
    strategy = replace(strategies.local_sgd(1), guard=guard.trusting())
    for result in synchronized(strategy, [2.0, math.nan]):
        assert math.isnan(float(result))


def test_clip_limits_how_far_the_agreed_parameters_move() -> None:
    strategy = replace(strategies.local_sgd(1), guard=guard.clip(0.5))
    for result in synchronized(strategy, [3.0, 5.0]):
        assert float(result) == pytest.approx(1.5)


@dataclass(frozen=True)
class Fractional:
    """A guard of a user's own: half a vote for everybody."""

    anchored: bool

    def weight(self, finite: bool) -> float:
        return 0.5

    def scale(self, norm: float) -> float:
        return 2.0


@pytest.mark.parametrize(("anchored", "expected"), [(False, 4.0), (True, 7.0)])
def test_weights_of_ones_own_are_divided_out_and_scales_are_applied(
    anchored: bool, expected: float
) -> None:
    own: Guard = Fractional(anchored)
    strategy = replace(strategies.local_sgd(1), guard=own)
    for result in synchronized(strategy, [3.0, 5.0]):
        assert float(result) == pytest.approx(expected)
