"""Averagers and the optimizer that has one: torch's semantics, and what is beyond them."""

import copy
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.model_averaging import averagers as torch_averagers
from torch.distributed.algorithms.model_averaging import (
    hierarchical_model_averager as torch_hierarchical,
)
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from postlocal import DisagreementError, NonFiniteError
from postlocal.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from postlocal.model_averaging.averagers import ModelAverager, PeriodicModelAverager
from postlocal.model_averaging.hierarchical_model_averager import HierarchicalModelAverager
from postlocal.model_averaging.utils import (
    average_parameters,
    average_parameters_or_parameter_groups,
    get_params_to_average,
)
from postlocal.optim import PostLocalSGDOptimizer
from tests.models import OPTIMIZERS, batches, distance, equal, mlp, sgd, train_step, values

Ranks = Callable[..., list[Any]]


def averaged_at(rank: int, make: Any, steps: int) -> list[int]:
    """Steps (from 0) after which an averager has made ranks equal."""
    averager = make()
    parameter = nn.Parameter(torch.zeros(3))
    found = []
    for step in range(steps):
        parameter.data.fill_(float(rank + step))
        parameter.grad = torch.ones(3)
        averager.average_parameters([parameter])
        if float(parameter.detach()[0]) != rank + step:
            found.append(step)
    return found


Levels = list[tuple[int, int]]
"""Periods and the numbers of ranks that average."""


def periodic(period: int, warmup: int) -> ModelAverager:
    return PeriodicModelAverager(period, warmup)


def torchs_periodic(period: int, warmup: int) -> Any:
    return torch_averagers.PeriodicModelAverager(period, warmup)


def hierarchical(levels: Levels, warmup: int) -> ModelAverager:
    return HierarchicalModelAverager(OrderedDict(levels), warmup)


def torchs_hierarchical(levels: Levels, warmup: int) -> Any:
    make: Any = torch_hierarchical.HierarchicalModelAverager
    return make(OrderedDict(levels), warmup)


def both_periodic(rank: int, period: int, warmup: int) -> tuple[list[int], list[int]]:
    return (
        averaged_at(rank, lambda: periodic(period, warmup), 20),
        averaged_at(rank, lambda: torchs_periodic(period, warmup), 20),
    )


@pytest.mark.parametrize(("period", "warmup"), [(2, 0), (4, 10), (5, 3)])
def test_parameters_are_averaged_after_the_same_steps_as_torchs(
    ranks: Ranks, period: int, warmup: int
) -> None:
    for ours, theirs in ranks(2, both_periodic, period, warmup):
        assert ours == theirs == [s for s in range(warmup, 20) if (s - warmup) % period == 0]


def both_hierarchical(rank: int, levels: Levels, warmup: int) -> tuple[list[Tensor], list[Tensor]]:
    histories = []
    for averager in (hierarchical(levels, warmup), torchs_hierarchical(levels, warmup)):
        parameter = nn.Parameter(torch.zeros(3))
        history = []
        for step in range(18):
            parameter.data.add_(float(rank * (step + 1)))
            parameter.grad = torch.ones(3)
            averager.average_parameters([parameter])
            history.append(parameter.detach().clone())
        histories.append(history)
    return histories[0], histories[1]


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize(
    "levels",
    [[(2, 2), (6, 4)], [(2, 2), (4, 4), (8, 4)], [(2, 2), (4, 2), (8, 4)], [(1, 4), (4, 4)]],
    ids=str,
)
def test_levels_are_averaged_after_the_same_steps_as_torchs(
    ranks: Ranks, levels: Levels, warmup: int
) -> None:
    for ours, theirs in ranks(4, both_hierarchical, levels, warmup):
        assert equal(ours, theirs)


def levels_of_one_size(rank: int) -> tuple[bool, bool]:
    averager = HierarchicalModelAverager({2: 2, 4: 2, 8: 4, 16: 4})
    groups = averager.period_process_group_dict
    return groups[2] is groups[4], groups[8] is groups[16]


def test_levels_of_one_size_share_a_group(ranks: Ranks) -> None:
    assert ranks(4, levels_of_one_size) == [(True, True)] * 4


def post_local(
    rank: int, package: str, make: str, warmup: int, period: int, steps: int
) -> list[list[Tensor]]:
    """torch's documented loop, with torch's classes or ours."""
    hook: Any
    state: Any
    optimizer: Any
    averager: Any
    model = DistributedDataParallel(mlp())
    local = OPTIMIZERS[make](model)
    subgroup, _ = dist.new_subgroups(group_size=2)  # type: ignore[no-untyped-call]
    if package == "torch":
        from torch.distributed.algorithms.ddp_comm_hooks import post_localSGD_hook as theirs
        from torch.distributed.optim import PostLocalSGDOptimizer as TorchOptimizer

        state = theirs.PostLocalSGDState(None, subgroup, warmup)  # type: ignore[no-untyped-call]
        hook = theirs.post_localSGD_hook
        averager = torch_averagers.PeriodicModelAverager(period, warmup)
        optimizer = TorchOptimizer(local, averager)
    else:
        averager = PeriodicModelAverager(period, warmup)
        optimizer = PostLocalSGDOptimizer(local, averager)
        state = PostLocalSGDState(None, subgroup, warmup, clock=optimizer)
        hook = post_localSGD_hook
    model.register_comm_hook(state, hook)
    history = []
    for x, y in batches(rank, steps):
        train_step(model, optimizer, x, y)
        history.append(values(model))
    return history


def both_post_local(rank: int, make: str) -> list[float]:
    ours, theirs = (post_local(rank, name, make, 3, 2, 10) for name in ("ours", "torch"))
    return [distance(mine, other) for mine, other in zip(ours, theirs, strict=True)]


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_the_whole_loop_takes_the_trajectory_of_torchs(ranks: Ranks, make: str) -> None:
    for differences in ranks(4, both_post_local, make):
        assert max(differences) <= 1e-6


def test_parameters_that_require_grad_are_chosen_from_models_and_groups() -> None:
    model = mlp()
    first, rest = next(model.parameters()), list(model.parameters())[1:]
    first.requires_grad_(False)
    split: list[dict[str, Any]] = [{"params": [first]}, {"params": rest, "lr": 0.1}]
    groups = torch.optim.SGD(split).param_groups
    for source in (model.parameters(), groups):
        assert [id(p) for p in get_params_to_average(source)] == [id(p) for p in rest]
    with pytest.raises(TypeError, match="model"):
        get_params_to_average([torch.zeros(1)])  # type: ignore[arg-type]


def outside_the_group(rank: int) -> Any:
    group = dist.new_group([0, 1])
    parameter = nn.Parameter(torch.full((2,), float(rank)))
    PeriodicModelAverager(2, 0, group).average_parameters([parameter])
    average_parameters([parameter], group)
    average_parameters_or_parameter_groups([{"params": [parameter]}], group)
    return parameter.detach().tolist()


def test_ranks_outside_the_process_group_keep_their_parameters(ranks: Ranks) -> None:
    assert ranks(3, outside_the_group) == [[0.5, 0.5], [0.5, 0.5], [2.0, 2.0]]


def clocks_apart(rank: int) -> str:
    averager = PeriodicModelAverager(2)
    averager.step = 2 * rank
    with pytest.raises(DisagreementError) as caught:
        averager.average_parameters(mlp().parameters())
    return str(caught.value)


def test_ranks_that_counted_different_steps_are_told(ranks: Ranks) -> None:
    for message in ranks(2, clocks_apart):
        assert "rank 1 of the group has taken 2 steps, rank 0 0" in message


def all_broken(rank: int) -> str:
    model = mlp()
    next(model.parameters()).data.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="on every rank"):
        average_parameters(model.parameters(), None)
    return "raised"


def test_where_no_rank_is_finite_all_raise(ranks: Ranks) -> None:
    assert ranks(2, all_broken) == ["raised"] * 2


def with_buffers(rank: int) -> tuple[list[float], int]:
    norm = nn.BatchNorm1d(3)
    norm(torch.full((4, 3), float(rank)) + torch.randn(4, 3))
    assert norm.running_mean is not None
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked += rank
    before = norm.running_mean.clone()
    averager = PeriodicModelAverager(2, buffers=norm.buffers())
    averager.average_parameters(norm.parameters())
    dist.all_reduce(before)
    return (norm.running_mean - before / 2).tolist(), int(norm.num_batches_tracked)


def test_buffers_are_averaged_along(ranks: Ranks) -> None:
    for difference, tracked in ranks(2, with_buffers):
        assert max(map(abs, difference)) < 1e-7
        assert tracked == 2


def finished(rank: int, kind: str) -> tuple[list[Tensor], int]:
    model = mlp()
    averager: ModelAverager
    if kind == "periodic":
        averager = PeriodicModelAverager(4, 0)
    else:
        averager = HierarchicalModelAverager({2: 2, 4: 4})
    optimizer = PostLocalSGDOptimizer(sgd(model), averager)
    for x, y in batches(rank, 7):
        train_step(model, optimizer, x, y)
    optimizer.finish()
    return values(model), averager.step


@pytest.mark.parametrize("kind", ["periodic", "hierarchical"])
def test_finish_makes_replicas_equal_and_counts_no_step(ranks: Ranks, kind: str) -> None:
    results = ranks(4, finished, kind)
    for parameters, step in results:
        assert equal(parameters, results[0][0])
        assert step == 7


def finish_twice(rank: int) -> int:
    model = mlp()
    averager = PeriodicModelAverager(2)
    averager.average_parameters(model.parameters())
    count = 0
    original = dist.all_reduce

    def counting(*args: Any, **keywords: Any) -> Any:
        nonlocal count
        count += 1
        return original(*args, **keywords)

    dist.all_reduce = counting
    averager.finish(model.parameters())
    dist.all_reduce = original
    return count


def test_finish_does_nothing_right_after_an_averaging(ranks: Ranks) -> None:
    assert ranks(2, finish_twice) == [0, 0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PeriodicModelAverager(0), "period must be at least 1 step, got 0"),
        (lambda: PeriodicModelAverager(2, -1), "warmup_steps must be at least 0, got -1"),
        (lambda: PeriodicModelAverager(2, timeout=0), "timeout must be above 0 seconds, got 0"),
        (lambda: HierarchicalModelAverager({}), "must not be empty"),
        (lambda: HierarchicalModelAverager({0: 1}), "periods .* must be at least 1"),
        (lambda: HierarchicalModelAverager({4: 1, 2: 1}), "periods .* 4 and then 2"),
        (lambda: HierarchicalModelAverager({2: 1, 3: 2}), "periods .* 2 and then 3"),
        (lambda: HierarchicalModelAverager({2: 2, 4: 1}), "sizes .* 2 and then 1"),
        (lambda: HierarchicalModelAverager({2: 2}), r"that of process_group \(1\), got 2"),
    ],
)
def test_arguments_out_of_range_are_refused(
    alone: None, make: Callable[[], Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_without_a_process_group_it_is_said_what_to_do() -> None:
    with pytest.raises(ValueError, match="init_process_group"):
        PeriodicModelAverager(2)


def test_a_period_of_one_is_warned_of(alone: None) -> None:
    with pytest.warns(UserWarning, match="period of 1"):
        PeriodicModelAverager(1)
    with pytest.warns(UserWarning, match="period of 1"):
        HierarchicalModelAverager({1: 1})


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))])
def test_averagers_are_copied_and_saved(alone: None, copied: Callable[[Any], Any]) -> None:
    for averager in (PeriodicModelAverager(4, 2), HierarchicalModelAverager({4: 1}, 2)):
        averager.average_parameters(mlp().parameters())
        twin = copied(averager)
        assert twin.state_dict() == averager.state_dict() == {"step": 1, "averaged_at": -1}
        twin.average_parameters(mlp().parameters())
        assert (averager.step, twin.step) == (1, 2)
        fresh = PeriodicModelAverager(4, 2)
        fresh.load_state_dict(twin.state_dict())
        assert fresh.step == 2


def copied_levels(rank: int) -> list[float]:
    averager = HierarchicalModelAverager({2: 2, 4: 4})
    twins = [copy.deepcopy(averager), pickle.loads(pickle.dumps(averager))]
    found = []
    for twin in twins:
        assert list(twin.period_process_group_dict) == [2, 4]
        parameter = nn.Parameter(torch.full((2,), float(rank)))
        twin.step = 2
        twin.average_parameters([parameter])
        found.append(float(parameter.detach()[0]))
    return found


def test_copies_of_a_hierarchical_averager_average_in_its_groups(ranks: Ranks) -> None:
    assert ranks(4, copied_levels) == [[0.5, 0.5], [0.5, 0.5], [2.5, 2.5], [2.5, 2.5]]


@pytest.fixture
def wrapped(alone: None) -> PostLocalSGDOptimizer:
    model = mlp()
    return PostLocalSGDOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), PeriodicModelAverager(4)
    )


def fill(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)


def test_the_optimizer_refuses_what_is_none(alone: None) -> None:
    averager = PeriodicModelAverager(4)
    with pytest.raises(TypeError, match="optim must be"):
        PostLocalSGDOptimizer(mlp(), averager)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="averager must be"):
        PostLocalSGDOptimizer(sgd(mlp()), 4)  # type: ignore[arg-type]


def test_state_dict_has_the_step_and_loading_takes_it(wrapped: PostLocalSGDOptimizer) -> None:
    for _ in range(3):
        fill(wrapped)
        wrapped.step()
    state = wrapped.state_dict()
    assert state["step"] == 3
    other = PostLocalSGDOptimizer(
        torch.optim.SGD(mlp().parameters(), lr=0.5, momentum=0.9), PeriodicModelAverager(4)
    )
    other.load_state_dict(state)
    assert other.averager.step == 3
    assert other.param_groups[0]["lr"] == 0.1
    assert other.param_groups is other.optim.param_groups


def test_a_state_without_step_is_warned_of(wrapped: PostLocalSGDOptimizer) -> None:
    wrapped.averager.step = 7
    plain = torch.optim.SGD(mlp().parameters(), lr=0.5, momentum=0.9)
    with pytest.warns(UserWarning, match="averager's step becomes 0"):
        wrapped.load_state_dict(plain.state_dict())
    assert wrapped.averager.step == 0


def test_a_state_whose_step_was_taken_out_is_warned_of_as_torch_does(
    wrapped: PostLocalSGDOptimizer,
) -> None:
    fill(wrapped)
    wrapped.step()
    state = wrapped.state_dict()
    del state["step"]
    with warnings.catch_warnings():  # a filter as it was written for torch's class
        warnings.filterwarnings("ignore", "Loaded state dict does not contain a step", UserWarning)
        wrapped.load_state_dict(state)
    assert wrapped.averager.step == 0


def test_the_warning_begins_as_torchs_does(wrapped: PostLocalSGDOptimizer) -> None:
    plain = torch.optim.SGD(mlp().parameters(), lr=0.5, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing it warns
        from torch.distributed.optim import PostLocalSGDOptimizer as Theirs
    theirs = Theirs(plain, PeriodicModelAverager(4))  # type: ignore[arg-type]
    said = []
    for optimizer in (wrapped, theirs):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.load_state_dict(plain.state_dict())
        said += [(one.category, str(one.message)) for one in caught]
    (ours, our_text), (torchs, torchs_text) = said
    assert ours is torchs
    assert our_text.startswith(torchs_text.split(".")[0])


def test_a_checkpoint_of_torchs_wrapper_is_taken(wrapped: PostLocalSGDOptimizer) -> None:
    plain = torch.optim.SGD(mlp().parameters(), lr=0.5, momentum=0.9)
    wrapped.load_state_dict(dict(plain.state_dict(), step=12))  # what torch's writes
    assert wrapped.averager.step == 12


def test_a_group_can_be_added(wrapped: PostLocalSGDOptimizer) -> None:
    extra = nn.Parameter(torch.ones(2))
    wrapped.add_param_group({"params": [extra], "lr": 0.5})
    fill(wrapped)
    wrapped.step()
    assert extra.tolist() == [0.5, 0.5]
    assert len(wrapped.param_groups) == len(wrapped.optim.param_groups) == 2


def test_state_dict_hooks_run(wrapped: PostLocalSGDOptimizer) -> None:
    seen = []
    wrapped.register_state_dict_pre_hook(lambda optimizer: seen.append("pre"))
    wrapped.register_state_dict_post_hook(lambda optimizer, state: dict(state, extra=1))
    wrapped.register_load_state_dict_pre_hook(
        lambda optimizer, state: {k: v for k, v in state.items() if k != "extra"}
    )
    wrapped.register_load_state_dict_post_hook(lambda optimizer: seen.append("post"))
    state = wrapped.state_dict()
    assert state["extra"] == 1
    wrapped.load_state_dict(state)
    assert seen == ["pre", "post"]


def scaled_like_the_plain_one(rank: int, inner: str) -> float:
    """GradScaler over the wrapper against GradScaler over the optimizer alone."""
    results = []
    for wrapping in (True, False):
        model = mlp()
        optimizer: Optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-2, fused=inner == "fused"
        )
        if wrapping:
            optimizer = PostLocalSGDOptimizer(optimizer, PeriodicModelAverager(100, 50))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for step, (x, y) in enumerate(batches(rank, 5)):
            loss = nn.functional.cross_entropy(model(x), y)
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            if step == 2:
                next(model.parameters()).grad = torch.full((16, 8), float("inf"))
            if step == 3:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        results.append((values(model), scaler.get_scale()))
        if isinstance(optimizer, PostLocalSGDOptimizer):
            assert optimizer.averager.step == 5
    assert results[0][1] == results[1][1] == 2.0**9
    return distance(results[0][0], results[1][0])


@pytest.mark.parametrize("inner", ["plain", "fused"])
def test_a_grad_scaler_does_the_same_over_the_wrapper(ranks: Ranks, inner: str) -> None:
    assert ranks(1, scaled_like_the_plain_one, inner) == [0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start_localSGD_iter": -1}, "start_localSGD_iter must be at least 0, got -1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1"),
    ],
)
def test_the_hooks_state_refuses_numbers_out_of_range(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        PostLocalSGDState(None, None, **({"start_localSGD_iter": 1} | options))


def test_a_clock_with_another_warmup_is_refused(wrapped: PostLocalSGDOptimizer) -> None:
    for clock in (wrapped, wrapped.averager):
        with pytest.raises(ValueError, match="must be the warmup_steps of clock, got 5 and 0"):
            PostLocalSGDState(None, None, 5, clock=clock)
        assert PostLocalSGDState(None, None, 0, clock=clock).iter == 0


def quiet_with_batch_norm(rank: int, averaged: bool) -> bool:
    torch.manual_seed(rank)
    net = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))
    model = DistributedDataParallel(net)
    averager = PeriodicModelAverager(2, 1, buffers=net.buffers() if averaged else None)
    subgroup = dist.new_group([rank], use_local_synchronization=True)
    if not averaged:
        with pytest.warns(UserWarning, match=r"buffers=model.buffers\(\)"):
            PostLocalSGDState(None, subgroup, 1, clock=averager, model=model)
        return True
    state = PostLocalSGDState(None, subgroup, 1, clock=averager, model=model)
    model.register_comm_hook(state, post_localSGD_hook)
    optimizer = PostLocalSGDOptimizer(sgd(model), averager)
    for x, y in batches(rank, 4):
        train_step(model, optimizer, x, y)
    mine = torch.cat([b.double().flatten() for b in (*net.buffers(), *values(model))])
    everyones = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(everyones, mine)
    return torch.equal(*everyones)  # step 3 averages


@pytest.mark.parametrize("averaged", [True, False])
def test_buffers_of_a_quiet_model_are_averaged_or_warned_of(ranks: Ranks, averaged: bool) -> None:
    assert ranks(2, quiet_with_batch_norm, averaged) == [True, True]
