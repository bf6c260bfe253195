"""Guards weigh contributions and limit their mean."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import postlocal
from postlocal import Strategy, guard, strategies, virtual
from postlocal.checkpoint.packing import pack, unpack
from postlocal.comm.group import Group
from postlocal.guard import Guard, OutlierDetector

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

    def detector(self, ranks: int, modules: int) -> OutlierDetector | None:
        return None


@pytest.mark.parametrize(("anchored", "expected"), [(False, 4.0), (True, 7.0)])
def test_weights_of_ones_own_are_divided_out_and_scales_are_applied(
    anchored: bool, expected: float
) -> None:
    own: Guard = Fractional(anchored)
    strategy = replace(strategies.local_sgd(1), guard=own)
    for result in synchronized(strategy, [3.0, 5.0]):
        assert float(result) == pytest.approx(expected)


RANKS, MODULES, WARMUP = 4, 3, 20
ALL = torch.ones(RANKS, dtype=torch.bool)
FULL = torch.ones(RANKS, dtype=torch.float64)


def noisy(seed: int, level: float = 1.0) -> Tensor:
    """Norms of all ranks and modules about a level, with a spread of 5 %."""
    noise = torch.randn(
        RANKS, MODULES, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    return level * (1 + 0.05 * noise.clamp(-2, 2))


def fresh(**arguments: Any) -> OutlierDetector:
    detector = guard.outliers(**{"warmup": WARMUP, **arguments}).detector(RANKS, MODULES)
    assert detector is not None
    return detector


def experienced(rounds: int = WARMUP) -> OutlierDetector:
    detector = fresh()
    for seed in range(rounds):
        detector.weigh(noisy(seed), ALL, FULL)
    return detector


def spoiled(norms: Tensor, rank: int, by: float) -> Tensor:
    norms = norms.clone()
    norms[rank] *= by
    return norms


def only(norms: Tensor, ranks: Sequence[int]) -> Tensor:
    """softmax(-norm) over some of the ranks, 0 for the others."""
    weights = torch.zeros_like(norms)
    weights[list(ranks)] = (-norms[list(ranks)]).softmax(dim=0)
    return weights


def test_only_guards_that_compare_have_a_jury() -> None:
    plain: list[Guard] = [guard.non_finite(), guard.trusting(), guard.clip(1.0)]
    assert [each.detector(2, 3) for each in plain] == [None] * 3
    assert guard.clip(1.0, inner=guard.outliers()).detector(2, 3) is not None
    assert replace(strategies.local_sgd(4), guard=guard.outliers()).anchored


def test_outliers_weighs_and_scales_alone_as_the_guard_inside_it() -> None:
    both = guard.outliers(inner=guard.clip(2.0))
    assert (both.weight(True), both.weight(False), both.scale(4.0)) == (1.0, 0.0, 0.5)


@pytest.mark.parametrize("rounds", [WARMUP, 10 * WARMUP])
def test_a_replica_that_leaps_is_left_out_and_the_others_share_its_weight(rounds: int) -> None:
    norms = spoiled(noisy(999), rank=2, by=100.0)
    weights = experienced(rounds).weigh(norms, ALL, FULL)
    torch.testing.assert_close(weights, only(norms, [0, 1, 3]))
    assert not weights[2].any()


def test_one_module_of_a_replica_can_be_left_out_alone() -> None:
    norms = noisy(999)
    norms[2, 1] *= 100.0
    weights = experienced().weigh(norms, ALL, FULL)
    assert (weights == 0).nonzero().tolist() == [[2, 1]]
    torch.testing.assert_close(weights.sum(dim=0), torch.ones(MODULES, dtype=torch.float64))


def test_a_replica_is_compared_with_itself_and_not_with_the_others() -> None:
    detector = fresh()
    for seed in range(WARMUP):
        detector.weigh(spoiled(noisy(seed), rank=2, by=100.0), ALL, FULL)
    norms = spoiled(noisy(999), rank=2, by=100.0)
    torch.testing.assert_close(detector.weigh(norms, ALL, FULL), only(norms, range(RANKS)))


def test_a_norm_that_falls_is_good() -> None:
    norms = spoiled(noisy(999), rank=2, by=0.01)
    torch.testing.assert_close(experienced().weigh(norms, ALL, FULL), only(norms, range(RANKS)))


def test_where_all_are_outliers_nobody_has_weight() -> None:
    detector = experienced()
    assert not detector.weigh(noisy(999, level=100.0), ALL, FULL).any()
    assert (detector.weigh(noisy(1000), ALL, FULL) > 0).all()


def test_during_warmup_nobody_is_left_out() -> None:
    norms = spoiled(noisy(999), rank=2, by=100.0)
    torch.testing.assert_close(
        experienced(WARMUP - 1).weigh(norms, ALL, FULL), only(norms, range(RANKS))
    )


def test_an_outlier_hides_no_later_one() -> None:
    detector = experienced()
    for seed in range(5):
        weights = detector.weigh(spoiled(noisy(100 + seed), rank=2, by=100.0), ALL, FULL)
        assert not weights[2].any()


def test_a_level_that_has_changed_for_good_is_learned() -> None:
    detector = experienced(10 * WARMUP)
    good = [bool(detector.weigh(noisy(seed, 2.0), ALL, FULL).all()) for seed in range(60)]
    assert not good[0]
    assert all(good[30:])


@pytest.mark.parametrize("rounds", [0, WARMUP])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_contribution_that_is_not_finite_has_no_weight_and_teaches_nothing(
    rounds: int, bad: float
) -> None:
    detector, other = experienced(rounds), experienced(rounds)
    finite = torch.tensor([True, False, True, True])
    norms = noisy(999)
    norms[1] = bad
    torch.testing.assert_close(detector.weigh(norms, finite, FULL), only(norms, [0, 2, 3]))
    other.weigh(spoiled(noisy(999), rank=1, by=7.0), finite, FULL)
    after = noisy(1000)
    assert torch.equal(detector.weigh(after, ALL, FULL), other.weigh(after, ALL, FULL))


def test_where_nothing_is_finite_nobody_has_weight() -> None:
    norms = torch.full((RANKS, MODULES), math.nan, dtype=torch.float64)
    assert torch.equal(fresh().weigh(norms, ~ALL, FULL), torch.zeros_like(norms))


def test_weights_are_in_proportion_to_work() -> None:
    work = torch.tensor([1.0, 0.5, 0.0, 0.25], dtype=torch.float64)
    level = torch.ones(RANKS, MODULES, dtype=torch.float64)
    weights = fresh().weigh(level, ALL, work)
    expected = torch.tensor([4 / 7, 2 / 7, 0, 1 / 7], dtype=torch.float64)
    torch.testing.assert_close(weights, expected.unsqueeze(1).expand(-1, MODULES))


def test_large_norms_do_not_underflow_to_no_weight() -> None:
    weights = fresh().weigh(noisy(0, level=1e30), ALL, FULL)
    torch.testing.assert_close(weights.sum(dim=0), torch.ones(MODULES, dtype=torch.float64))


def test_a_module_that_has_never_moved_may_begin_to() -> None:
    detector = fresh()
    still = torch.zeros(RANKS, MODULES, dtype=torch.float64)
    for _ in range(2 * WARMUP):
        detector.weigh(still, ALL, FULL)
    assert (detector.weigh(noisy(0), ALL, FULL) > 0).all()


@given(
    norms=st.lists(
        st.floats(0.0, 1e6) | st.sampled_from([math.nan, math.inf]), min_size=12, max_size=12
    ),
    finite=st.lists(st.booleans(), min_size=RANKS, max_size=RANKS),
    work=st.lists(st.floats(0.0, 1.0), min_size=RANKS, max_size=RANKS),
    rounds=st.sampled_from([0, 3, WARMUP]),
)
def test_weights_of_a_module_sum_to_one_or_to_nothing(
    norms: list[float], finite: list[bool], work: list[float], rounds: int
) -> None:
    given_norms = torch.tensor(norms, dtype=torch.float64).view(RANKS, MODULES)
    given_work = torch.tensor(work, dtype=torch.float64)
    weights = experienced(rounds).weigh(given_norms, torch.tensor(finite), given_work)
    assert (weights >= 0).all()
    for total in weights.sum(dim=0).tolist():
        assert total == 0 or total == pytest.approx(1.0)
    idle = ~torch.tensor(finite) | (given_work == 0)
    assert not weights[idle].any()


def test_a_modules_mean_is_limited_on_its_own() -> None:
    detector = fresh(max_norm=10.0)
    norms = torch.tensor([5.0, 40.0, 0.0], dtype=torch.float64)
    assert detector.scale(norms).tolist() == [1.0, 0.25, 1.0]


@pytest.mark.parametrize("rounds", [0, 5, 3 * WARMUP])
def test_a_jurys_memory_is_resumed_to_the_bit(rounds: int) -> None:
    detector, twin = experienced(rounds), fresh()
    twin.load_state_dict(unpack(*pack(detector.state_dict())))
    for seed in range(1000, 1000 + 2 * WARMUP):
        norms = spoiled(noisy(seed), rank=seed % RANKS, by=1.0 + seed % 3)
        assert torch.equal(detector.weigh(norms, ALL, FULL), twin.weigh(norms, ALL, FULL))


def test_a_saved_memory_does_not_change_as_the_jury_learns() -> None:
    detector = experienced(3)
    state = detector.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    detector.weigh(noisy(0), ALL, FULL)
    assert all(torch.equal(state[name], before[name]) for name in before)


def test_a_memory_of_other_ranks_is_refused() -> None:
    other = guard.outliers(warmup=WARMUP).detector(RANKS + 1, MODULES)
    assert other is not None
    with pytest.raises(ValueError, match=r"must be of shape \(4, 3\), got 'seen' of \(5, 3\)"):
        fresh().load_state_dict(other.state_dict())


BAD: list[tuple[dict[str, Any], str]] = [
    ({"threshold": 0.0}, r"threshold must be above 0, got 0\.0"),
    ({"threshold": math.nan}, "threshold must be above 0, got nan"),
    ({"decay": 0.0}, r"decay must be above 0 and at most 1, got 0\.0"),
    ({"decay": 1.5}, r"decay must be above 0 and at most 1, got 1\.5"),
    ({"warmup": 0}, "warmup must be at least 1 synchronization, got 0"),
    ({"max_norm": -1.0}, r"max_norm must be above 0, got -1\.0"),
    (
        {"inner": guard.outliers()},
        "inner must be a guard without an outlier detector, got outliers",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_what_makes_no_sense_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        guard.outliers(**arguments)
