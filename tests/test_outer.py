"""Outer optimizers and the anchor that they move."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from postlocal import outer
from postlocal.outer import Outer
from postlocal.sync.anchor import Anchor

lrs = st.floats(0.01, 2.0)
momenta = st.floats(0.0, 0.99)

OUTERS: dict[str, Outer] = {
    "average": outer.average(),
    "plain": outer.nesterov(0.5, 0.0),
    "nesterov": outer.nesterov(),
    "slow momentum": outer.slow_momentum(),
    "adam": partial(torch.optim.Adam, lr=0.01),
}


def noise(seed: int, numel: int = 6) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def moved(anchor: Anchor, parameter: Tensor, by: Tensor, inner_lr: float = 0.1) -> Tensor:
    """The parameter after local steps that moved it by ``by``, and one outer step."""
    with torch.no_grad():
        parameter.add_(by)
        anchor.step(anchor.pseudo_gradients(), step=0, inner_lr=inner_lr)
        anchor.restore()
    return parameter.detach().clone()


@settings(deadline=None)
@given(lr=lrs, momentum=momenta)
def test_nesterov_is_that_of_the_diloco_paper(lr: float, momentum: float) -> None:
    parameter = noise(0)
    anchor = Anchor({"p": parameter}, outer.nesterov(lr, momentum))
    expected, velocity = parameter.clone(), torch.zeros(6)
    for round_ in range(1, 5):
        delta = -noise(round_)
        velocity = momentum * velocity + delta
        expected = expected - lr * (delta + momentum * velocity)
        torch.testing.assert_close(moved(anchor, parameter, -delta), expected, rtol=1e-4, atol=1e-4)


@settings(deadline=None)
@given(lr=lrs, momentum=momenta, inner_lr=st.floats(1e-4, 1.0))
def test_slow_momentum_counts_in_units_of_the_inner_learning_rate(
    lr: float, momentum: float, inner_lr: float
) -> None:
    parameter = noise(0)
    anchor = Anchor({"p": parameter}, outer.slow_momentum(lr, momentum))
    expected, slow = parameter.double(), torch.zeros(6, dtype=torch.float64)
    for round_ in range(1, 5):
        rate = inner_lr / round_
        slow = momentum * slow - noise(round_).double() / rate
        expected = expected - lr * rate * slow
        got = moved(anchor, parameter, noise(round_), rate)
        torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-3)


def test_slow_momentum_stands_still_where_the_inner_learning_rate_is_zero() -> None:
    parameter = noise(0)
    anchor = Anchor({"p": parameter}, outer.slow_momentum())
    moved(anchor, parameter, noise(1))
    before = parameter.clone()
    assert torch.equal(moved(anchor, parameter, torch.zeros(6), inner_lr=0.0), before)


@pytest.mark.parametrize(
    "plain", [outer.average(), outer.nesterov(1.0, 0.0), outer.slow_momentum(1.0, 0.0)]
)
def test_without_momentum_at_lr_one_every_outer_step_takes_the_mean(plain: Outer) -> None:
    parameter = noise(0)
    mean = parameter + noise(1)
    anchor = Anchor({"p": parameter}, plain)
    torch.testing.assert_close(moved(anchor, parameter, noise(1)), mean)


@pytest.mark.parametrize("name", OUTERS)
def test_outer_state_is_resumed_to_the_bit(name: str) -> None:
    parameter = noise(0)
    anchor = Anchor({"p": parameter}, OUTERS[name])
    moved(anchor, parameter, noise(1))
    again = parameter.clone()
    twin = Anchor({"p": again}, OUTERS[name])
    twin.load_state_dict(copy.deepcopy(anchor.state_dict()))
    assert torch.equal(moved(anchor, parameter, noise(2)), moved(twin, again, noise(2)))


@pytest.mark.parametrize("name", OUTERS)
def test_an_outer_step_keeps_the_memory_of_parameters_and_anchor(name: str) -> None:
    parameter = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    anchor = Anchor({"p": parameter}, OUTERS[name])
    before = (parameter.data_ptr(), parameter.stride(), anchor.tensors["p"].data_ptr())
    moved(anchor, parameter, torch.randn(2, 3, 4, 5))
    assert (parameter.data_ptr(), parameter.stride(), anchor.tensors["p"].data_ptr()) == before
    assert anchor.tensors["p"].grad is None
    assert torch.equal(anchor.tensors["p"], parameter)


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_the_anchor_is_as_precise_as_sums_are(dtype: torch.dtype, wide: torch.dtype) -> None:
    parameter = noise(0).to(dtype)
    anchor = Anchor({"p": parameter}, outer.average())
    assert anchor.tensors["p"].dtype == wide
    (difference,) = anchor.pseudo_gradients()
    assert difference.dtype == wide
    assert (difference.data_ptr() == parameter.data_ptr()) == (dtype == wide)


def test_small_outer_steps_add_up_where_parameters_are_too_coarse_to_show_them() -> None:
    parameter = torch.ones(1, dtype=torch.bfloat16)
    anchor = Anchor({"p": parameter}, outer.nesterov(0.1, 0.0))
    for _ in range(20):
        anchor.step([torch.full((1,), 0.01)], step=0, inner_lr=0.1)
        anchor.restore()
    assert float(anchor.tensors["p"]) == pytest.approx(0.98)
    assert float(parameter) == pytest.approx(0.98, abs=2**-8)


def test_the_last_agreed_values_can_be_taken_back() -> None:
    parameter = noise(0)
    anchor = Anchor({"p": parameter}, outer.nesterov())
    parameter.fill_(float("nan"))
    anchor.pseudo_gradients()
    anchor.restore()
    assert torch.equal(parameter, noise(0))


STEPS = st.integers(0, 10**6)
DECAYS = st.sampled_from([outer.cosine, outer.linear])


@given(decay=DECAYS, warmup=st.integers(0, 50), length=st.integers(1, 500), final=st.floats(0, 1))
def test_a_decay_rises_to_one_then_falls_to_its_final_value(
    decay: Any, warmup: int, length: int, final: float
) -> None:
    total = warmup + length
    factor = decay(total, final, warmup)
    values = [factor(step) for step in range(total + 10)]
    assert values[: warmup + 1] == sorted(values[: warmup + 1])
    assert values[warmup] == 1.0
    assert values[warmup:] == sorted(values[warmup:], reverse=True)
    assert values[total] == pytest.approx(final)
    assert len(set(values[total:])) == 1
    assert all(0 <= value <= 1 for value in values)


@pytest.mark.parametrize("decay", [outer.cosine(100, 0.5), outer.linear(100, 0.5)])
def test_a_decay_is_half_way_in_the_middle(decay: Callable[[int], float]) -> None:
    assert decay(50) == pytest.approx(0.75)


def test_pieces_are_taken_in_the_order_of_their_steps() -> None:
    factor = outer.piecewise({200: 0.1, 0: 2.0, 100: 0.5})
    assert [factor(step) for step in (0, 99, 100, 199, 200, 9999)] == [2, 2, 0.5, 0.5, 0.1, 0.1]
    assert factor == outer.piecewise({0: 2.0, 100: 0.5, 200: 0.1})


@given(step=STEPS)
def test_factors_of_nested_schedules_multiply(step: int) -> None:
    first, second = outer.cosine(1000, 0.1), outer.piecewise({300: 3.0})
    both = outer.scheduled(outer.scheduled(outer.nesterov(), first), second)
    assert outer.rate(both, step) == pytest.approx(first(step) * second(step))


@pytest.mark.parametrize("name", OUTERS)
def test_only_a_scheduled_outer_has_a_rate_of_its_own(name: str) -> None:
    assert outer.rate(OUTERS[name], 10) == 1.0
    assert outer.rate(outer.scheduled(OUTERS[name], outer.linear(20)), 10) == 0.5


def test_a_schedule_leaves_the_optimizer_as_its_recipe_made_it() -> None:
    plain, wrapped = outer.nesterov(), outer.scheduled(outer.nesterov(), outer.cosine(10))
    assert wrapped([noise(0)]).state_dict() == plain([noise(0)]).state_dict()


def test_a_scheduled_outer_prints_all_that_ranks_must_share() -> None:
    text = repr(outer.scheduled(outer.nesterov(0.7), outer.piecewise({5: 0.5})))
    assert text == (
        "scheduled(inner=nesterov(lr=0.7, momentum=0.9), factor=piecewise(factors=((5, 0.5),)))"
    )


@pytest.mark.parametrize("bad", [-0.5, float("nan"), float("inf")])
def test_a_factor_of_ones_own_that_makes_no_sense_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=r"got (-0\.5|nan|inf) at step 7"):
        outer.rate(outer.scheduled(outer.nesterov(), lambda step: bad), 7)


BAD: list[tuple[Callable[..., Any], tuple[Any, ...], str]] = [
    (outer.nesterov, (0.0, 0.9), "lr must be above 0, got 0"),
    (outer.nesterov, (-1.0, 0.9), "lr must be above 0, got -1"),
    (outer.nesterov, (float("nan"), 0.9), "lr must be above 0, got nan"),
    (outer.nesterov, (0.7, 1.0), "momentum must be at least 0 and below 1, got 1"),
    (outer.slow_momentum, (0.0, 0.5), "lr must be above 0, got 0"),
    (outer.slow_momentum, (1.0, -0.1), "momentum must be at least 0 and below 1, got -0.1"),
    (outer.cosine, (0,), "total must be at least 1 step, got 0"),
    (outer.cosine, (10, 1.5), "final must be from 0 to 1, got 1.5"),
    (outer.linear, (10, float("nan")), "final must be from 0 to 1, got nan"),
    (
        outer.linear,
        (10, 0.0, 10),
        r"warmup must be at least 0 steps and below total \(10\), got 10",
    ),
    (
        outer.linear,
        (10, 0.0, -1),
        r"warmup must be at least 0 steps and below total \(10\), got -1",
    ),
    (outer.piecewise, ({},), "factors must name at least one step, got none"),
    (outer.piecewise, ({-1: 0.5},), "each step of factors must be at least 0 steps, got -1"),
    (
        outer.piecewise,
        ({5: -0.5},),
        r"factors\[5\] must be at least 0, got -0.5",
    ),
]


@pytest.mark.parametrize(("make", "arguments", "message"), BAD)
def test_what_is_out_of_range_is_refused(
    make: Callable[..., Any], arguments: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(*arguments)
