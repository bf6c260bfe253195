"""Each known defect of torch 2.13's own post-local SGD, by its number, shown to be absent here."""

import copy
import ctypes
import logging
import math
import os
import pickle
import platform
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import OneCycleLR, StepLR

import postlocal
from postlocal import (
    NonFiniteError,
    PeerError,
    Strategy,
    outer,
    schedule,
    strategies,
    topology,
)
from postlocal.strategies import OptimizerState
from tests.launcher import await_event, say
from tests.models import (
    adamw,
    batches,
    distance,
    equal,
    mlp,
    momentum,
    sgd,
    train,
    train_step,
    values,
)

Ranks = Callable[..., list[Any]]


def syncs_of(history: list[list[list[Tensor]]]) -> list[int]:
    """The steps (counted from 1) after which all ranks hold equal parameters."""
    return [
        step + 1
        for step, first in enumerate(history[0])
        if all(equal(first, other[step]) for other in history[1:])
    ]


def node_level(rank: int) -> tuple[list[int], list[list[Tensor]], list[str]]:
    model = DistributedDataParallel(mlp())
    optimizer = sgd(model)
    strategy = strategies.post_local_sgd(warmup=2, period=3)
    sync = postlocal.attach(model, optimizer, strategy, topology=topology.nodes())
    groups = [sync.groups[level].size for level in sync.groups.levels]
    known = set(dist.distributed_c10d._world.pg_names)
    history = []
    for x, y in batches(rank, 5):
        train_step(model, optimizer, x, y)
        sync.step()
        history.append(values(model))
    made_later = set(dist.distributed_c10d._world.pg_names) - known
    return groups, history, [str(group) for group in made_later]


def test_01_nodes_are_known_on_cpu_and_every_group_exists_before_the_first_backward(
    ranks: Ranks,
) -> None:
    results = ranks(4, node_level, local_world_size=2)
    for groups, _, made_later in results:
        assert groups == [1, 2, 4]
        assert made_later == []
    history = [result[1] for result in results]
    assert syncs_of(history) == [1, 2, 5]
    assert syncs_of(history[:2]) == syncs_of(history[2:]) == [1, 2, 3, 4, 5]


def inside_a_process_group(rank: int) -> tuple[int, list[list[Tensor]]]:
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = halves[rank // 2]
    assert isinstance(mine, dist.ProcessGroup)
    model = mlp()
    optimizer = sgd(model)
    sync = postlocal.attach(model, optimizer, strategies.local_sgd(2), process_group=mine)
    history = []
    for x, y in batches(rank, 2):
        train_step(model, optimizer, x, y)
        sync.step()
        history.append(values(model))
    return sync.groups["world"].size, history


def test_01_the_process_group_that_is_given_is_the_one_that_is_used(ranks: Ranks) -> None:
    results = ranks(4, inside_a_process_group)
    assert [size for size, _ in results] == [2, 2, 2, 2]
    history = [history for _, history in results]
    assert syncs_of(history[:2]) == syncs_of(history[2:]) == [2]
    assert syncs_of(history) == []


def accumulate(
    rank: int, strategy: Strategy | None, steps: int, with_no_sync: bool
) -> tuple[list[list[Tensor]], list[str]]:
    """Four backward passes a step."""
    model = DistributedDataParallel(mlp())
    optimizer = momentum(model)
    sync = None if strategy is None else postlocal.attach(model, optimizer, strategy)
    history, levels = [], []
    micro_batches = batches(rank, 4 * steps)
    for _ in range(steps):
        levels.append("none" if sync is None else sync.round.gradients)
        for micro in range(4):
            with model.no_sync() if with_no_sync and micro < 3 else nullcontext():
                x, y = next(micro_batches)
                F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        if sync is not None:
            sync.step()
        history.append(values(model))
    return history, levels


@pytest.mark.parametrize("with_no_sync", [True, False], ids=["no_sync", "plain"])
def test_02_the_clock_counts_steps_and_not_backward_passes(
    ranks: Ranks, with_no_sync: bool
) -> None:
    strategy = strategies.post_local_sgd(warmup=4, period=3, gradients="rank")
    ours = ranks(2, accumulate, strategy, 10, with_no_sync)
    plain = ranks(2, accumulate, None, 4, with_no_sync)
    for history, levels in ours:
        assert levels == ["world"] * 4 + ["rank"] * 6
        assert equal(history[3], plain[0][0][3])
    assert syncs_of([history for history, _ in ours]) == [1, 2, 3, 4, 7, 10]


def resumed_at(rank: int, strategy: Strategy, at: int | None) -> list[list[Tensor]]:
    """12 steps; after ``at`` of them all objects are made anew from their states."""
    model = DistributedDataParallel(mlp())
    optimizer = adamw(model)
    sync = postlocal.attach(model, optimizer, strategy)
    history = []
    for step, (x, y) in enumerate(batches(rank, 12)):
        if step == at:
            states = pickle.dumps((model.state_dict(), optimizer.state_dict(), sync.state_dict()))
            model = DistributedDataParallel(mlp(seed=5))
            optimizer = adamw(model)
            sync = postlocal.attach(model, optimizer, strategy)
            for thing, state in zip((model, optimizer, sync), pickle.loads(states), strict=True):
                thing.load_state_dict(state)  # type: ignore[attr-defined]
        train_step(model, optimizer, x, y)
        sync.step()
        history.append(values(model))
    return history


@pytest.mark.parametrize("at", [2, 4, 7], ids=["in the warm-up", "at its end", "in a round"])
def test_03_the_one_clock_is_resumed_where_it_stood(ranks: Ranks, at: int) -> None:
    strategy = strategies.post_local_sgd(warmup=4, period=4, gradients="rank")
    whole = ranks(2, resumed_at, strategy, None)
    resumed = ranks(2, resumed_at, strategy, at)
    for rank in range(2):
        assert equal(whole[rank][-1], resumed[rank][-1])
    assert syncs_of(resumed) == [1, 2, 3, 4, 8, 12]


@pytest.mark.parametrize(
    "strategy",
    [
        strategies.ddp(),
        strategies.post_local_sgd(10),
        strategies.hierarchical({"node": 4, "world": 16}),
        strategies.slowmo(),
        strategies.diloco(),
        strategies.qsr(0.02),
    ],
    ids=lambda strategy: strategy.name,
)
def test_03_a_strategy_pickles(strategy: Strategy) -> None:
    again = pickle.loads(pickle.dumps(strategy))
    assert again == strategy
    assert str(again) == str(strategy)


def scheduled(rank: int) -> list[tuple[float, float, float]]:
    model = DistributedDataParallel(mlp())
    optimizer = sgd(model)
    schedule_lr = StepLR(optimizer, step_size=1, gamma=0.5)
    sync = postlocal.attach(model, optimizer, strategies.post_local_sgd(1, 2, gradients="rank"))
    seen = []
    for step, (x, y) in enumerate(batches(rank, 4)):
        if step == 2:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        before = values(model)
        F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        gradient = next(model.parameters()).grad
        assert gradient is not None
        gradient = gradient.clone()
        optimizer.step()
        moved = (before[0] - values(model)[0]).norm() / gradient.norm()
        optimizer.zero_grad()
        sync.step()
        seen.append((float(moved), sync.inner.lr, float(schedule_lr.get_last_lr()[0])))
        schedule_lr.step()
    return seen


def test_04_a_scheduler_still_sets_the_learning_rate_after_load_state_dict(ranks: Ranks) -> None:
    for seen in ranks(2, scheduled):
        for step, (moved, inner_lr, last_lr) in enumerate(seen):
            assert inner_lr == last_lr == 0.1 * 0.5**step
            assert moved == pytest.approx(last_lr, rel=1e-3)


def fresh_state(rank: int) -> tuple[int, bool, list[str], list[Tensor], bool]:
    model = DistributedDataParallel(mlp())
    optimizer = adamw(model)
    sync = postlocal.attach(model, optimizer, strategies.local_sgd(2))
    before = values(model)
    saved = get_optimizer_state_dict(model, optimizer)
    steps, untouched = sync.steps, equal(before, values(model))
    for x, y in batches(rank, 2):
        train_step(model, optimizer, x, y)
        sync.step()
    moments = optimizer.state[next(model.parameters())]["exp_avg"].clone()
    full = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    optimizer.state.clear()
    set_optimizer_state_dict(model, optimizer, full)
    restored = optimizer.state[next(model.parameters())]["exp_avg"]
    names = sorted(str(name) for name in saved["state"])
    return (
        sync.steps,
        untouched and steps == 0,
        names,
        values(model),
        bool((moments == restored).all()),
    )


def test_05_the_state_of_a_fresh_optimizer_can_be_read_without_moving_the_clock(
    ranks: Ranks,
) -> None:
    results = ranks(2, fresh_state)
    for steps, untouched, names, parameters, restored in results:
        assert steps == 2
        assert untouched
        assert restored
        assert names == ["0.bias", "0.weight", "2.bias", "2.weight"]
        assert equal(parameters, results[0][3])


def whole_optimizer(rank: int) -> tuple[list[float], int, bool, list[Tensor]]:
    model = DistributedDataParallel(mlp())
    optimizer = momentum(model)
    rates = OneCycleLR(optimizer, max_lr=0.4, total_steps=6)
    taken = []
    optimizer.register_step_post_hook(lambda *_: taken.append(1))
    sync = postlocal.attach(model, optimizer, strategies.local_sgd(3))
    seen = []
    for x, y in batches(rank, 6):
        seen.append(sync.inner.lr)
        train_step(model, optimizer, x, y)
        sync.step()
        if len(seen) < 6:
            rates.step()
    optimizer.register_step_post_hook(print)
    twin = copy.deepcopy(optimizer)
    states = zip(optimizer.state.values(), twin.state.values(), strict=True)
    same = all(torch.equal(a["momentum_buffer"], b["momentum_buffer"]) for a, b in states)
    return seen, len(taken), same, values(model)


def test_06_one_cycle_deepcopy_and_step_hooks_work_on_the_optimizer(ranks: Ranks) -> None:
    results = ranks(2, whole_optimizer)
    for seen, taken, same, parameters in results:
        assert max(seen) == pytest.approx(0.4, rel=0.2)
        assert len(set(seen)) == 6
        assert taken == 6
        assert same
        assert equal(parameters, results[0][3])


def with_closure(rank: int) -> tuple[float, float, list[Tensor]]:
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=3)
    sync = postlocal.attach(model, optimizer, strategies.local_sgd(2))
    x, y = next(batches(rank, 1))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    first = float(closure().detach())
    for _ in range(4):
        optimizer.step(closure)  # type: ignore[no-untyped-call]
        sync.step()
    return first, float(closure().detach()), values(model)


def test_06_an_optimizer_with_a_closure_works(ranks: Ranks) -> None:
    results = ranks(2, with_closure)
    assert equal(results[0][2], results[1][2])
    assert sum(last for _, last, _ in results) < 0.8 * sum(first for first, _, _ in results)


def scaled(rank: int, bad_rank: int) -> tuple[int, int, float, list[list[Tensor]]]:
    model = DistributedDataParallel(mlp())
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    taken = []
    optimizer.register_step_post_hook(lambda *_: taken.append(1))
    sync = postlocal.attach(model, optimizer, strategies.post_local_sgd(2, 3, gradients="rank"))
    history = []
    for step, (x, y) in enumerate(batches(rank, 8)):
        loss = F.cross_entropy(model(x), y)
        if rank == bad_rank and step == 3:
            loss = loss * math.inf
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        sync.step()
        history.append(values(model))
    return sync.steps, len(taken), scaler.get_scale(), history


def test_07_ranks_stay_in_step_where_a_grad_scaler_skips_one(ranks: Ranks) -> None:
    results = ranks(2, scaled, 1)
    assert [result[:3] for result in results] == [(8, 8, 16.0), (8, 7, 8.0)]
    history = [result[3] for result in results]
    assert syncs_of(history) == [1, 2, 5, 8]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in history[0][-1])


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left = nn.Linear(8, 4)
        self.right = nn.Linear(8, 4)
        self.never = nn.Linear(8, 4)

    def forward(self, x: Tensor, left: bool) -> Tensor:
        branch = self.left if left else self.right
        output: Tensor = branch(x)
        return output


def branch_by_rank(
    rank: int, wrap: bool, set_to_none: bool
) -> tuple[list[Tensor], list[Tensor], list[bool]]:
    """Parameters just before and after a synchronization, and which had gradients."""
    model: nn.Module = Branches()
    if wrap:
        model = DistributedDataParallel(model)
    optimizer = sgd(model)
    sync = postlocal.attach(model, optimizer, strategies.local_sgd(3))
    for step, (x, y) in enumerate(batches(rank, 3)):
        F.cross_entropy(model(x, rank == 0), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        had = [parameter.grad is not None for parameter in model.parameters()]
        if set_to_none or step < 2:
            optimizer.zero_grad(set_to_none)
        before = values(model)
        sync.step()
    return before, values(model), had


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("wrap", [True, False], ids=["ddp", "plain"])
def test_08_parameters_without_a_gradient_are_averaged_by_name(
    ranks: Ranks, wrap: bool, set_to_none: bool
) -> None:
    results = ranks(2, branch_by_rank, wrap, set_to_none)
    assert results[0][2] != results[1][2]
    before = [result[0] for result in results]
    assert not equal(before[0], before[1])
    mean = [(a + b) / 2 for a, b in zip(*before, strict=True)]
    for _, after, _ in results:
        assert equal(after, mean)


class Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def poisoned(rank: int, strategy: Strategy, bad: tuple[int, ...], steps: int = 8) -> dict[str, Any]:
    """NaN gradients on ``bad`` ranks in the third step; period 4."""
    collector = Collector()
    logging.getLogger("postlocal").addHandler(collector)
    model = DistributedDataParallel(mlp())
    optimizer = adamw(model)
    sync = postlocal.attach(model, optimizer, strategy)
    start = values(model)
    before, after, states = [], [], []
    for step, (x, y) in enumerate(batches(rank, steps)):
        if rank in bad and step == 2:
            x = x * math.nan
        train_step(model, optimizer, x, y)
        before.append(values(model))
        sync.step()
        after.append(values(model))
        state = [tensor for entry in optimizer.state.values() for tensor in entry.values()]
        states.append(all(bool(torch.isfinite(tensor).all()) for tensor in state))
    return {
        "start": start,
        "before": before,
        "after": after,
        "finite states": states,
        "excluded": [record.excluded for record in sync.meter.records],
        "drift": [record.drift for record in sync.meter.records],
        "count": sync.meter.excluded,
        "logged": collector.lines,
    }


def test_09_a_rank_with_nan_is_left_out_of_the_mean_and_named(ranks: Ranks) -> None:
    results = ranks(3, poisoned, strategies.local_sgd(4), (1,))
    assert not torch.isfinite(results[1]["before"][3][0]).all()
    replicas = [results[rank]["before"][3] for rank in (0, 2)]
    mean = [((a.double() + b.double()) / 2).float() for a, b in zip(*replicas, strict=True)]
    for result in results:
        assert equal(result["after"][3], mean)
        assert equal(result["after"][7], results[0]["after"][7])
        assert all(bool(torch.isfinite(tensor).all()) for tensor in result["after"][7])
        assert result["excluded"] == [(1,), ()]
        assert result["count"] == 1
        assert all(0 < drift < 1 for drift in result["drift"])
    for rank in (0, 1):
        (line,) = results[rank]["logged"]
        assert "after step 4 at level 'world' leaves out rank 1: not finite" in line
    assert results[2]["logged"] == []


def test_09_the_optimizer_of_the_rank_that_was_left_out_is_finite_again(ranks: Ranks) -> None:
    results = ranks(2, poisoned, strategies.local_sgd(4), (0,))
    assert results[0]["finite states"] == [True, True, False, True, True, True, True, True]
    assert all(results[1]["finite states"])
    assert not equal(results[0]["before"][4], results[0]["after"][3])


def all_poisoned(rank: int, strategy: Strategy) -> str:
    with pytest.raises(NonFiniteError) as caught:
        poisoned(rank, strategy, (0, 1))
    return str(caught.value)


def test_09_where_all_ranks_are_nan_and_no_anchor_is_kept_all_raise(ranks: Ranks) -> None:
    for message in ranks(2, all_poisoned, strategies.local_sgd(4)):
        assert message.startswith("after step 4 the parameters of every replica hold infinities")


def test_09_where_all_ranks_are_nan_the_anchor_is_taken_back(ranks: Ranks) -> None:
    results = ranks(2, poisoned, strategies.diloco(4), (0, 1))
    for result in results:
        assert equal(result["after"][3], result["start"])
        assert result["excluded"] == [(0, 1), ()]
        assert result["finite states"][3:] == [True] * 5
        assert equal(result["after"][7], results[0]["after"][7])
        assert not equal(result["after"][7], result["start"])


class Normed(nn.Module):
    """BatchNorm, a constant table as models keep them, and a mask of infinities."""

    table: Tensor
    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(8)
        self.out = nn.Linear(8, 4)
        self.register_buffer("table", torch.arange(1.0, 9.0))
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.out(self.norm(x * self.table))
        return output


def one_sync_of_buffers(
    rank: int, strategy: Strategy, bad_buffer: tuple[int, ...], bad: tuple[int, ...]
) -> dict[str, Tensor]:
    """Two steps; a buffer of ranks ``bad_buffer``, parameters of ranks ``bad`` turn NaN."""
    model = Normed()
    optimizer = sgd(model)
    sync = postlocal.attach(model, optimizer, strategy)
    for x, y in batches(rank, 2):
        train_step(model, optimizer, x, y)
        with torch.no_grad():
            if rank in bad_buffer:
                assert model.norm.running_mean is not None
                model.norm.running_mean.fill_(math.nan)
            if rank in bad:
                model.out.weight.fill_(math.nan)
        sync.step()
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def check_buffers(buffers: dict[str, Tensor]) -> None:
    assert torch.equal(buffers["table"], torch.arange(1.0, 9.0))
    assert torch.equal(buffers["mask"], torch.tensor([0.0, -math.inf]))
    assert bool(torch.isfinite(buffers["norm.running_mean"]).all())
    assert bool((buffers["norm.running_var"] > 0).all())


def test_09_buffers_survive_where_one_rank_is_left_out(ranks: Ranks) -> None:
    for buffers in ranks(2, one_sync_of_buffers, strategies.local_sgd(2), (), (1,)):
        check_buffers(buffers)


def test_09_nan_in_one_ranks_buffers_does_not_become_everybodys(ranks: Ranks) -> None:
    for buffers in ranks(2, one_sync_of_buffers, strategies.local_sgd(2), (1,), ()):
        check_buffers(buffers)


def test_09_buffers_survive_where_all_ranks_are_taken_back(ranks: Ranks) -> None:
    for buffers in ranks(2, one_sync_of_buffers, strategies.diloco(2), (), (0, 1)):
        check_buffers(buffers)


@pytest.mark.parametrize("bad", [(), (0, 1)], ids=["parameters finite", "parameters NaN too"])
def test_09_a_buffer_that_is_nan_on_all_ranks_takes_no_other_buffer_with_it(
    ranks: Ranks, bad: tuple[int, ...]
) -> None:
    for buffers in ranks(2, one_sync_of_buffers, strategies.diloco(2), (0, 1), bad):
        check_buffers(buffers | {"norm.running_mean": torch.zeros(8)})


def node_of_nan(rank: int) -> tuple[list[tuple[int, ...]], bool, list[Tensor]]:
    """Both ranks of the first of two nodes turn NaN in the first step."""
    model = mlp()
    optimizer = sgd(model)
    strategy = Strategy(schedule.hierarchical({"node": 2, "world": 4}), outer.nesterov())
    sync = postlocal.attach(model, optimizer, strategy, topology=topology.nodes(size=2))
    for step, (x, y) in enumerate(batches(rank, 4)):
        if rank < 2 and step == 0:
            x = x * math.nan
        train_step(model, optimizer, x, y)
        sync.step()
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in values(model))
    return [record.excluded for record in sync.meter.records], finite, values(model)


def test_09_a_node_that_is_nan_as_a_whole_is_left_out_by_the_other_nodes(ranks: Ranks) -> None:
    results = ranks(4, node_of_nan)
    for rank, (excluded, finite, parameters) in enumerate(results):
        assert excluded == [(0, 1) if rank < 2 else (), (0, 1)]
        assert finite
        assert equal(parameters, results[0][2])


def normed(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 4))


def delayed(rank: int, unused: bool) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Rank 0 does a local step when rank 1 has done all of its own; buffers around the sync."""
    model = DistributedDataParallel(normed(), find_unused_parameters=unused)
    optimizer = sgd(model)
    sync = postlocal.attach(model, optimizer, strategies.post_local_sgd(2, 4, gradients="rank"))
    before, after = [], []
    for step, (x, y) in enumerate(batches(rank, 6)):
        if rank == 0 and step == 3:
            await_event("rank 1 has done its local steps")
        train_step(model, optimizer, x + rank, y)
        if rank == 1 and step == 5:
            say("rank 1 has done its local steps")
        before.append([buffer.clone() for buffer in model.buffers()])
        sync.step()
        after.append([buffer.clone() for buffer in model.buffers()])
    return before, after


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("unused", [False, True], ids=["default", "find_unused_parameters"])
def test_10_batch_norm_does_not_make_local_steps_wait(ranks: Ranks, unused: bool) -> None:
    assert len(ranks(2, delayed, unused)) == 2


def test_10_buffers_meet_at_the_sync_floats_by_mean_integers_by_maximum(ranks: Ranks) -> None:
    results = ranks(2, delayed, False)
    for step in (2, 3, 4):
        assert not torch.equal(results[0][1][step][0], results[1][1][step][0])
    before = [result[0][5] for result in results]
    for result in results:
        after = result[1][5]
        for buffer, left, right in zip(after, *before, strict=True):
            if buffer.is_floating_point():
                assert not torch.equal(left, right)
                torch.testing.assert_close(buffer, (left + right) / 2)
            else:
                assert buffer == max(left, right) == 6


def integers(rank: int) -> tuple[int, bool, int]:
    model = nn.Linear(2, 1)
    model.register_buffer("count", torch.tensor(0))
    model.register_buffer("seen", torch.tensor(False))
    model.register_buffer("empty", torch.zeros(0))
    model.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
    sync = postlocal.attach(model, sgd(model), strategies.local_sgd(1))
    buffers = dict(model.named_buffers())
    buffers["count"].fill_(2**40 + rank)
    buffers["seen"].fill_(rank == 1)
    buffers["phase"].fill_(2j * rank)
    sync.step()
    return int(buffers["count"]), bool(buffers["seen"]), int(buffers["phase"][0].imag)


def test_10_integers_booleans_and_complex_buffers_meet_too(ranks: Ranks) -> None:
    assert ranks(3, integers) == [(2**40 + 2, True, 2)] * 3


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.embed = nn.Embedding(8, 4)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight


def storage(rank: int, strategy: Strategy) -> dict[str, Any]:
    model = Tied()
    early_view = model.embed.weight.detach()[2:4]
    optimizer = momentum(model)

    def layout() -> list[tuple[int, tuple[int, ...], int]]:
        return [
            (tensor.data_ptr(), tensor.stride(), tensor.untyped_storage().nbytes())
            for tensor in model.parameters()
        ]

    before = layout()
    sync = postlocal.attach(model, optimizer, strategy)
    for _ in range(2):
        for tensor in model.parameters():
            tensor.grad = torch.full_like(tensor, float(rank))
        optimizer.step()
        sync.step()
    file = BytesIO()
    torch.save(model.embed.weight, file)
    return {
        "same memory": layout() == before,
        "names": list(sync.replica.parameters),
        "tied": model.head.weight is model.embed.weight,
        "view": torch.equal(early_view, model.embed.weight.detach()[2:4]),
        "channels last": model.conv.weight.is_contiguous(memory_format=torch.channels_last),
        "saved": len(file.getvalue()),
        "values": values(model),
    }


@pytest.mark.parametrize(
    "strategy", [strategies.local_sgd(2), strategies.diloco(2)], ids=lambda strategy: strategy.name
)
def test_11_memory_strides_ties_and_views_survive_a_sync(ranks: Ranks, strategy: Strategy) -> None:
    results = ranks(3, storage, strategy)
    for result in results:
        assert result["same memory"]
        assert result["tied"]
        assert result["view"]
        assert result["channels last"]
        assert result["saved"] < 4000
        assert result["names"] == ["conv.weight", "conv.bias", "embed.weight"]
        assert equal(result["values"], results[0]["values"])


def high_water() -> int:
    """Greatest resident memory of this process since it was last reset, in MiB."""
    status = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in status if line.startswith("VmHWM")]
    return int(line.split()[1]) // 1024


M_MMAP_THRESHOLD = -3


def extra_memory(rank: int) -> int:
    # Blocks above 1 MiB go back to the system when freed, so that only live ones are measured.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)
    small = mlp()
    postlocal.attach(small, sgd(small), strategies.local_sgd(1)).step()  # loads all code
    model = nn.ParameterList([torch.ones(2048, 2048) for _ in range(12)])
    sync = postlocal.attach(model, sgd(model), strategies.local_sgd(1))
    Path("/proc/self/clear_refs").write_text("5")
    before = high_water()
    sync.step()
    return high_water() - before


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists() or platform.libc_ver()[0] != "glibc",
    reason="needs Linux's /proc and glibc's mallopt",
)
@pytest.mark.parametrize("world", [2, 3])
def test_11_averaging_needs_much_less_memory_than_the_model(ranks: Ranks, world: int) -> None:
    assert max(ranks(world, extra_memory)) < 192 / 2


def untouched(rank: int) -> bool:
    torch.manual_seed(0)
    model = nn.Linear(300, 100)
    sync = postlocal.attach(model, sgd(model), strategies.local_sgd(1))
    before = values(model)
    for _ in range(5):
        sync.step()
    return equal(before, values(model)) and len(sync.meter.records) == 5


@pytest.mark.parametrize("world", [2, 3, 4])
def test_12_averaging_leaves_identical_replicas_as_they_are(ranks: Ranks, world: int) -> None:
    assert all(ranks(world, untouched))


def in_bf16(rank: int) -> tuple[Tensor, Tensor]:
    model = nn.Linear(300, 100).bfloat16()
    sync = postlocal.attach(model, sgd(model), strategies.local_sgd(1))
    with torch.no_grad():
        model.weight.normal_(generator=torch.Generator().manual_seed(rank))
    before = model.weight.detach().clone()
    sync.step()
    return before, model.weight.detach().clone()


def test_12_bf16_models_are_averaged_in_a_wider_type(ranks: Ranks) -> None:
    results = ranks(3, in_bf16)
    exact = torch.stack([before for before, _ in results]).double().mean(0)
    for _, after in results:
        assert torch.equal(after, results[0][1])
        assert (after == exact.bfloat16()).double().mean() > 0.999


@pytest.mark.parametrize(
    "then",
    [schedule.periodic(4), schedule.hierarchical({"node": 2, "world": 4})],
    ids=["periodic", "hierarchical"],
)
def test_13_the_first_sync_comes_a_period_after_the_warmup(
    ranks: Ranks, then: schedule.Schedule
) -> None:
    strategy = Strategy(schedule.post_local(5, then))
    history = ranks(4, train, strategy, 13, topology=topology.nodes(size=2))
    assert syncs_of(history) == [1, 2, 3, 4, 5, 9, 13]
    within_nodes = [1, 2, 3, 4, 5, 7, 9, 11, 13]
    if isinstance(then, schedule.hierarchical):
        assert syncs_of(history[:2]) == within_nodes


@pytest.mark.parametrize(
    ("periods", "got"),
    [
        ({"node": 16, "world": 4}, "'node': 16, then 'world': 4"),
        ({"node": 4, "world": 6}, "'node': 4, then 'world': 6"),
        ({"node": 4, "world": 4}, "'node': 4, then 'world': 4"),
    ],
    ids=["unsorted", "not nested", "equal"],
)
def test_13_periods_that_would_drop_a_level_are_refused(periods: dict[str, int], got: str) -> None:
    with pytest.raises(ValueError, match=f"periods must grow from level to level.*{got}"):
        schedule.hierarchical(periods)


def test_14_a_run_that_ends_within_a_round_ends_with_equal_replicas(ranks: Ranks) -> None:
    history = ranks(2, train, strategies.local_sgd(4), 23, "adamw", finish=True)
    assert syncs_of(history) == [4, 8, 12, 16, 20, 24]
    mean = [(a + b) / 2 for a, b in zip(history[0][22], history[1][22], strict=True)]
    assert distance(history[0][23], mean) < 1e-7


def states_around(
    rank: int, optimizer_state: OptimizerState
) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """Adam's state of one parameter just before and after a synchronization."""
    model = DistributedDataParallel(mlp())
    optimizer = adamw(model)
    strategy = Strategy(schedule.periodic(3), optimizer_state=optimizer_state)
    sync = postlocal.attach(model, optimizer, strategy)
    parameter = next(model.parameters())
    for x, y in batches(rank, 3):
        train_step(model, optimizer, x, y)
        before = {name: tensor.clone() for name, tensor in optimizer.state[parameter].items()}
        sync.step()
    after = optimizer.state.get(parameter, {})
    return before, {name: tensor.clone() for name, tensor in after.items()}, len(optimizer.state)


def test_14_optimizer_state_is_averaged_where_that_is_asked_for(ranks: Ranks) -> None:
    results = ranks(2, states_around, "average")
    for _, after, _ in results:
        assert after["step"] == 3
        for name in ("exp_avg", "exp_avg_sq"):
            left, right = (before[name] for before, _, _ in results)
            assert not torch.equal(left, right)
            assert torch.equal(after[name], (left + right) / 2)


def test_14_optimizer_state_is_reset_where_that_is_asked_for(ranks: Ranks) -> None:
    for before, _, left in ranks(2, states_around, "reset"):
        assert before["step"] == 3
        assert left == 0


def test_14_optimizer_state_is_kept_where_nothing_is_asked_for(ranks: Ranks) -> None:
    results = ranks(2, states_around, "keep")
    for before, after, _ in results:
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(results[0][1]["exp_avg"], results[1][1]["exp_avg"])


def unequal_states(rank: int) -> list[Tensor]:
    """Branches that only one rank ever uses: the other one has no Adam state for them."""
    model = Branches()
    optimizer = adamw(model)
    strategy = Strategy(schedule.periodic(2), optimizer_state="average")
    sync = postlocal.attach(model, optimizer, strategy)
    for x, y in batches(rank, 4):
        F.cross_entropy(model(x, rank == 0), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        sync.step()
    moments = [optimizer.state[p].get("exp_avg") for p in model.parameters()]
    return [tensor.clone() for tensor in moments if tensor is not None]


def test_14_a_state_that_one_rank_lacks_is_averaged_too(ranks: Ranks) -> None:
    states = ranks(2, unequal_states)
    assert len(states[0]) == 4
    assert equal(states[0], states[1])


def until_a_peer_is_gone(
    rank: int, gone: int, fault: signal.Signals, strategy: Strategy
) -> tuple[str, float, bool] | None:
    """Rank ``gone`` receives a signal in its sixth step; period 4."""
    pids: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    model = mlp()
    optimizer = sgd(model)
    sync = postlocal.attach(model, optimizer, strategy, timeout=3.0)
    agreed: list[Tensor] = []
    start = time.perf_counter()
    try:
        for step, (x, y) in enumerate(batches(rank, 8)):
            if rank == gone and step == 5:
                os.kill(os.getpid(), fault)
            train_step(model, optimizer, x, y)
            start = time.perf_counter()
            sync.step()
            agreed = values(model) if step == 3 else agreed
    except PeerError as error:
        back = equal(agreed, values(model))
        waited = time.perf_counter() - start
        if rank == 0 and fault == signal.SIGSTOP:
            os.kill(pids[gone], signal.SIGKILL)
        return str(error), waited, back
    return None


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("world", [2, 3])
def test_15_a_rank_that_is_gone_is_named_within_the_timeout(
    ranks: Ranks, world: int, fault: signal.Signals
) -> None:
    gone = world - 1
    strategy = strategies.local_sgd(4)
    results = ranks(world, until_a_peer_is_gone, gone, fault, strategy, expect_dead=(gone,))
    assert results[gone] is None
    for message, waited, _ in results[:gone]:
        assert message.startswith(
            f"missing at the synchronization after step 8: rank {gone} "
            "(last seen at the synchronization after step 4)"
        )
        assert waited < 10


def test_15_with_an_anchor_a_failed_sync_takes_back_the_last_agreed_parameters(
    ranks: Ranks,
) -> None:
    strategy = strategies.diloco(4)
    results = ranks(3, until_a_peer_is_gone, 1, signal.SIGKILL, strategy, expect_dead=(1,))
    for rank in (0, 2):
        message, _, back = results[rank]
        assert "rank 1 (last seen at the synchronization after step 4)" in message
        assert back


def never_there(rank: int) -> str:
    dist.barrier()
    if rank == 1:
        os._exit(0)
    model = mlp()
    with pytest.raises(PeerError) as caught:
        postlocal.attach(model, sgd(model), strategies.local_sgd(4))
    return str(caught.value)


def test_15_a_rank_that_ends_before_attach_is_named(ranks: Ranks) -> None:
    message, _ = ranks(2, never_there, expect_dead=(1,))
    assert message.startswith("missing at attach: rank 1 (never seen)")
