"""What is wrong in torch 2.13's own post-local SGD is not wrong here; one section a defect."""

import copy
import io
import logging
import os
import pickle
import resource
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.nn.parallel import DistributedDataParallel

import postlocal
from postlocal import NonFiniteError, PeerError, Strategy, Sync, schedule, strategies, topology
from tests.models import (
    OPTIMIZERS,
    adamw,
    batches,
    convnet,
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
NODES = topology.nodes()


# 1. The default subgroup fails on CPU, in the middle of a backward pass.


def default_nodes(rank: int) -> tuple[list[list[Tensor]], int, int]:
    strategy = strategies.post_local_sgd(warmup=2, period=2)
    model = DistributedDataParallel(mlp())
    optimizer = sgd(model)
    sync = postlocal.attach(model, optimizer, strategy, topology=NODES)
    groups_before = len(dist.distributed_c10d._world.pg_map)
    history = []
    for x, y in batches(rank, 6):
        train_step(model, optimizer, x, y)
        sync.step()
        history.append(values(model))
    return history, groups_before, len(dist.distributed_c10d._world.pg_map)


def test_the_default_nodes_work_on_cpu_and_no_group_is_made_after_attach(ranks: Ranks) -> None:
    results = ranks(4, default_nodes, local_world_size=2)
    (first, before, after), (second, *_), (third, *_), _ = results
    assert before == after
    assert equal(first[2], second[2])
    assert not equal(first[2], third[2])
    assert equal(first[3], third[3])


def test_nodes_that_are_the_whole_world_are_warned_of(ranks: Ranks) -> None:
    assert "holds all 2 ranks" in ranks(2, attach_with_one_node)[0]


def attach_with_one_node(rank: int) -> str:
    model = DistributedDataParallel(mlp())
    strategy = strategies.post_local_sgd(warmup=2, period=2)
    with pytest.warns(UserWarning, match="level 'node'") as warnings:
        postlocal.attach(model, sgd(model), strategy, topology=NODES)
    return str(warnings[0].message)


# 2. Two clocks: one counts backward passes, one steps.


def accumulate(rank: int, use_no_sync: bool, under_strategy: bool) -> list[list[Tensor]]:
    model = DistributedDataParallel(mlp())
    optimizer = sgd(model)
    strategy = strategies.post_local_sgd(warmup=4, period=3, gradients="rank")
    sync = postlocal.attach(model, optimizer, strategy) if under_strategy else None
    history = []
    stream = batches(rank, 40)
    for _ in range(10 if under_strategy else 4):
        for micro in range(4):
            x, y = next(stream)
            with model.no_sync() if use_no_sync and micro < 3 else nullcontext():
                nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        if sync is not None:
            sync.step()
        history.append(values(model))
    return history


@pytest.mark.parametrize("use_no_sync", [True, False], ids=["no_sync", "no no_sync"])
def test_four_backward_passes_a_step_are_one_step_of_the_clock(
    ranks: Ranks, use_no_sync: bool
) -> None:
    ours = ranks(2, accumulate, use_no_sync, True)
    plain = ranks(2, accumulate, use_no_sync, False)
    assert equal(ours[0][3], plain[0][3])
    together = [equal(ours[0][step], ours[1][step]) for step in range(10)]
    assert together == [True] * 4 + [False, False, True] * 2


# 3. The clock is in no state, and a state that holds a group cannot be pickled.


def resume_in_the_warmup(rank: int) -> tuple[list[Tensor], list[Tensor], list[schedule.Round]]:
    def begin() -> tuple[nn.Module, torch.optim.Optimizer, Sync]:
        model = DistributedDataParallel(mlp())
        optimizer = momentum(model)
        strategy = strategies.post_local_sgd(warmup=6, period=4, gradients="rank")
        return model, optimizer, postlocal.attach(model, optimizer, strategy)

    def go(model: nn.Module, optimizer: torch.optim.Optimizer, sync: Sync, until: int) -> None:
        for step, (x, y) in enumerate(batches(rank, until)):
            if step >= sync.steps:
                train_step(model, optimizer, x, y)
                sync.step()

    model, optimizer, sync = begin()
    go(model, optimizer, sync, 4)
    saved = pickle.loads(
        pickle.dumps((model.state_dict(), optimizer.state_dict(), sync.state_dict()))
    )
    rounds = [sync.round]
    go(model, optimizer, sync, 12)
    resumed_model, resumed_optimizer, resumed = begin()
    resumed_model.load_state_dict(saved[0])
    resumed_optimizer.load_state_dict(saved[1])
    resumed.load_state_dict(saved[2])
    rounds.append(resumed.round)
    go(resumed_model, resumed_optimizer, resumed, 12)
    return values(model), values(resumed_model), rounds


def test_a_clock_resumed_in_the_warmup_goes_on_where_it_was(ranks: Ranks) -> None:
    for whole, resumed, rounds in ranks(2, resume_in_the_warmup):
        assert equal(whole, resumed)
        assert rounds[0] == rounds[1]


@pytest.mark.parametrize("name", ["post_local_sgd", "diloco", "hierarchical", "qsr"])
def test_strategies_pickle_and_copy(name: str) -> None:
    needed: dict[str, dict[str, Any]] = {
        "post_local_sgd": {"warmup": 3},
        "hierarchical": {"periods": {"node": 2, "world": 4}},
        "qsr": {"alpha": 0.1},
    }
    strategy = strategies.named(name, **needed.get(name, {}))
    assert pickle.loads(pickle.dumps(strategy)) == strategy
    assert copy.deepcopy(strategy) == strategy


# 4 to 6. The optimizer wrapper: stale param_groups, no dummy step, not an optimizer. There is none.


def solo(make: str = "sgd") -> tuple[nn.Module, torch.optim.Optimizer, Sync]:
    model = mlp()
    optimizer = OPTIMIZERS[make](model)
    return model, optimizer, postlocal.attach(model, optimizer, strategies.local_sgd(2))


def test_a_scheduler_drives_the_optimizer_also_after_its_state_was_loaded() -> None:
    model, optimizer, sync = solo("momentum")
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    for x, y in batches(0, 3):
        train_step(model, optimizer, x, y)
        scheduler.step()
        sync.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 8)
    assert sync.inner.lr == pytest.approx(0.1 / 8)


def test_the_dummy_step_of_dcp_does_not_move_the_clock() -> None:
    model, optimizer, sync = solo("adamw")
    state = get_optimizer_state_dict(model, optimizer)
    assert state["state"]
    assert sync.steps == 0


def test_schedulers_copies_hooks_and_closures_work() -> None:
    model, optimizer, sync = solo()
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(1))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=6)
    for x, y in batches(0, 4):
        train_step(model, optimizer, x, y)
        scheduler.step()
        sync.step()
    assert len(seen) == 4
    assert copy.deepcopy(optimizer).param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    pickle.loads(pickle.dumps(optimizer.state_dict()))


def test_an_optimizer_with_closures_works() -> None:
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    sync = postlocal.attach(model, optimizer, strategies.diloco(2))
    x, y = next(batches(0, 1))

    def closure() -> float:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    losses = []
    for _ in range(4):
        losses.append(float(optimizer.step(closure)))  # type: ignore[no-untyped-call]
        sync.step()
    assert losses[-1] < losses[0]
    assert sync.steps == 4


# 7. A GradScaler that skips a step on one rank puts clocks out of step for ever.


def scale_with_an_overflow(rank: int) -> tuple[int, list[Tensor], bool]:
    model = DistributedDataParallel(mlp())
    optimizer = sgd(model)
    sync = postlocal.attach(model, optimizer, strategies.local_sgd(4))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    skipped = False
    for step, (x, y) in enumerate(batches(rank, 8)):
        loss = nn.functional.cross_entropy(model(x), y)
        overflow = float("inf") if rank == 1 and step == 2 else 1.0
        scaler.scale(loss * overflow).backward()  # type: ignore[no-untyped-call]
        before = values(model)
        scaler.step(optimizer)
        scaler.update()
        skipped = skipped or equal(before, values(model))
        optimizer.zero_grad()
        sync.step()
    return sync.steps, values(model), skipped


def test_a_step_that_a_grad_scaler_skips_on_one_rank_still_counts(ranks: Ranks) -> None:
    (steps, one, skipped_zero), (other_steps, other, skipped_one) = ranks(2, scale_with_an_overflow)
    assert steps == other_steps == 8
    assert (skipped_zero, skipped_one) == (False, True)
    assert equal(one, other)


# 8. What is averaged depends on which gradients happen to be there.


class Branches(nn.Module):
    """Two branches of one size, of which a rank uses one."""

    def __init__(self, used: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList([nn.Linear(8, 4), nn.Linear(8, 4)])
        self.used = used

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.branches[self.used](x)
        return out


def train_branches(rank: int, optimizer_state: Any) -> tuple[list[Tensor], list[Tensor]]:
    model = Branches(rank)
    optimizer = adamw(model)
    strategy = Strategy(schedule.periodic(4), optimizer_state=optimizer_state)
    sync = postlocal.attach(model, optimizer, strategy)
    for step, (x, y) in enumerate(batches(rank, 4)):
        nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step == 3:
            before = values(model)
        sync.step()
    return before, values(model)


@pytest.mark.parametrize("optimizer_state", ["keep", "average", "reset"])
def test_parameters_are_averaged_by_name_with_or_without_a_gradient(
    ranks: Ranks, optimizer_state: str
) -> None:
    (before, after), (other_before, other_after) = ranks(2, train_branches, optimizer_state)
    mean = [(a + b) / 2 for a, b in zip(before, other_before, strict=True)]
    assert distance(after, mean) < 1e-7
    assert equal(after, other_after)


# 9. NaN on one rank is NaN on all ranks, without a word.


def poison(rank: int, strategy: Strategy, victims: tuple[int, ...]) -> dict[str, Any]:
    heard = io.StringIO()
    logging.getLogger("postlocal").addHandler(logging.StreamHandler(heard))
    model = DistributedDataParallel(mlp())
    optimizer = adamw(model)
    sync = postlocal.attach(model, optimizer, strategy)
    start = values(model)
    before, error = start, ""
    try:
        for step, (x, y) in enumerate(batches(rank, 8)):
            factor = float("nan") if rank in victims and step == 2 else 1.0
            train_step(model, optimizer, x * factor, y)
            if step == 3:
                before = values(model)
            sync.step()
            if step == 3:
                after = values(model)
    except NonFiniteError as raised:
        return {"error": str(raised)}
    return {
        "start": start,
        "before": before,
        "after": after,
        "end": values(model),
        "excluded": sync.meter.records[0].excluded,
        "later": sync.meter.records[1].excluded,
        "counted": sync.meter.excluded,
        "heard": heard.getvalue(),
        "error": error,
    }


def test_a_replica_with_nan_takes_the_mean_of_the_others_and_is_named(ranks: Ranks) -> None:
    results = ranks(3, poison, strategies.local_sgd(4), (1,))
    mean = [(a + b) / 2 for a, b in zip(results[0]["before"], results[2]["before"], strict=True)]
    for result in results:
        assert distance(result["after"], mean) < 1e-7
        assert equal(result["after"], results[0]["after"])
        assert result["excluded"] == (1,)
        assert result["counted"] == 1
        assert result["later"] == ()
        assert all(bool(torch.isfinite(tensor).all()) for tensor in result["end"])
    assert "leaves out rank 1" in results[0]["heard"]
    assert "leaves out rank 1" in results[1]["heard"]


def test_where_all_replicas_are_nan_an_anchor_is_restored(ranks: Ranks) -> None:
    for result in ranks(2, poison, strategies.diloco(4), (0, 1)):
        assert equal(result["after"], result["start"])
        assert result["excluded"] == (0, 1)
        assert result["later"] == ()


def test_where_all_replicas_are_nan_and_there_is_no_anchor_all_ranks_are_told(
    ranks: Ranks,
) -> None:
    for result in ranks(2, poison, strategies.local_sgd(4), (0, 1)):
        assert "every replica" in result["error"]


# 10. BatchNorm: a blocking broadcast in every forward pass of the local phase.


def train_batch_norm(rank: int, find_unused: bool) -> tuple[float, list[Tensor], list[Tensor]]:
    model = DistributedDataParallel(convnet(), find_unused_parameters=find_unused)
    optimizer = sgd(model)
    strategy = strategies.post_local_sgd(warmup=2, period=8, gradients="rank")
    sync = postlocal.attach(model, optimizer, strategy)
    longest = 0.0
    for step, (x, y) in enumerate(batches(rank, 10, (1, 6, 6))):
        dist.barrier() if step == 2 else None
        if step == 5 and rank == 0:
            time.sleep(2.0)
        if step == 9:
            before = [buffer.clone() for buffer in model.buffers()]
        start = time.perf_counter()
        train_step(model, optimizer, x, y)
        if 2 <= step < 9:
            longest = max(longest, time.perf_counter() - start)
        sync.step()
    return longest, before, list(model.buffers())


@pytest.mark.parametrize("find_unused", [False, True], ids=["plain", "find_unused_parameters"])
def test_a_local_step_waits_for_nobody_and_statistics_are_averaged(
    ranks: Ranks, find_unused: bool
) -> None:
    (_, _, zero), (waited, _, one) = ranks(2, train_batch_norm, find_unused)
    assert waited < 1.0
    assert equal(zero, one)


def buffers_of_a_sync(rank: int) -> tuple[list[Tensor], list[Tensor]]:
    model = convnet()
    optimizer = sgd(model)
    sync = postlocal.attach(model, optimizer, strategies.local_sgd(3))
    for x, y in batches(rank, 3, (1, 6, 6)):
        train_step(model, optimizer, x, y)
        if rank == 1:
            model(x)
        before = [buffer.clone() for buffer in model.buffers()]
        sync.step()
    return before, list(model.buffers())


def test_float_buffers_take_the_mean_and_integer_buffers_the_maximum(ranks: Ranks) -> None:
    (before, after), (other_before, other_after) = ranks(2, buffers_of_a_sync)
    assert equal(after, other_after)
    for mine, theirs, result in zip(before, other_before, after, strict=True):
        if result.is_floating_point():
            assert torch.allclose(result, (mine + theirs) / 2)
        else:
            assert (int(mine), int(theirs), int(result)) == (3, 6, 6)


# 11. Memory: a copy of the model, and parameters that point somewhere else afterwards.


class Assorted(nn.Module):
    """A channels_last weight, a plain one, and one under two names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        weight = torch.randn(8, 3, 3, 3).to(memory_format=torch.channels_last)
        self.last = nn.Parameter(weight)
        self.conv = nn.Conv2d(8, 8, 3)
        self.linear = nn.Linear(4, 512, bias=False)
        self.tied = self.linear.weight


def storage_around_a_sync(rank: int, strategy: Strategy) -> dict[str, Any]:
    model = Assorted()
    sync = postlocal.attach(model, sgd(model), strategy)
    view = model.linear.weight.data[:2]
    places = [(p.data_ptr(), p.stride(), p.untyped_storage().nbytes()) for p in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(rank)
    before = values(model)
    sync.step()
    saved = io.BytesIO()
    torch.save(model.conv.weight, saved)
    return {
        "before": before,
        "after": values(model),
        "kept": places
        == [(p.data_ptr(), p.stride(), p.untyped_storage().nbytes()) for p in model.parameters()],
        "view": torch.equal(view, model.linear.weight.data[:2]),
        "tied": model.tied is model.linear.weight,
        "saved": len(saved.getvalue()),
    }


@pytest.mark.parametrize(
    "strategy", [strategies.local_sgd(1), strategies.diloco(1, 1.0, 0.0)], ids=["plain", "anchored"]
)
@pytest.mark.parametrize("world", [2, 3])
def test_storage_strides_ties_and_views_survive_a_sync(
    ranks: Ranks, strategy: Strategy, world: int
) -> None:
    results = ranks(world, storage_around_a_sync, strategy)
    mean = [sum(tensors) / world for tensors in zip(*(r["before"] for r in results), strict=True)]
    for result in results:
        assert result["kept"]
        assert result["view"]
        assert result["tied"]
        assert result["saved"] < 8 * 8 * 9 * 4 + 2000
        assert distance(result["after"], mean) < 1e-5


def memory_of_a_sync(rank: int) -> float:
    model = nn.ParameterList([nn.Parameter(torch.zeros(1024, 1024)) for _ in range(48)])
    sync = postlocal.attach(model, sgd(model), strategies.local_sgd(1))
    sync.finish()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        sync.step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def test_averaging_takes_little_memory_beside_a_model_of_192_mib(ranks: Ranks) -> None:
    assert max(ranks(2, memory_of_a_sync)) < 64


# 12. It divides before it sums, in the parameters' own dtype.


def average_identical(rank: int) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    model = nn.ParameterList([nn.Parameter(torch.randn(100_000)), nn.Parameter(torch.randn(7))])
    sync = postlocal.attach(model, sgd(model), strategies.local_sgd(1))
    before = values(model)
    sync.step()
    return before, values(model)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_identical_replicas_do_not_change(ranks: Ranks, world: int) -> None:
    for before, after in ranks(world, average_identical):
        assert equal(before, after)


def average_bf16(rank: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(rank)
    model = nn.ParameterList([nn.Parameter(torch.randn(50_000).bfloat16())])
    with torch.no_grad():
        sync = postlocal.attach(model, sgd(model), strategies.local_sgd(1))
        model[0].copy_(torch.randn(50_000).bfloat16())
    before = values(model)[0]
    sync.step()
    return before, values(model)[0]


def test_bf16_models_are_averaged_with_one_rounding(ranks: Ranks) -> None:
    results = ranks(3, average_bf16)
    exact = torch.stack([before.double() for before, _ in results]).mean(0)
    for _, after in results:
        assert torch.equal(after, exact.float().bfloat16())


# 13. Averagers fire at different steps, and bad periods are taken.


@pytest.mark.parametrize(
    "then", [schedule.periodic(4), schedule.hierarchical({"world": 4})], ids=["flat", "levels"]
)
def test_the_first_sync_comes_a_period_after_the_warmup(then: schedule.Schedule) -> None:
    rounds = schedule.rollout(schedule.post_local(10, then), steps=22)
    ends = [start + each.steps for start, each in rounds if each.parameters == "world"]
    assert ends == [14, 18, 22]


@pytest.mark.parametrize("periods", [{"node": 4, "world": 6}, {"node": 8, "world": 4}, {}])
def test_periods_that_are_not_sorted_and_nested_are_refused(periods: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="periods must"):
        schedule.hierarchical(periods)


# 14. Nothing averages at the end, and optimizer state is neither averaged nor reset.


def test_a_run_that_ends_in_the_middle_of_a_period_ends_with_equal_replicas(
    ranks: Ranks,
) -> None:
    one, other = ranks(2, train, strategies.local_sgd(4), 23, "adamw", finish=True)
    assert not equal(one[22], other[22])
    assert equal(one[23], other[23])


def optimizer_state_around_a_sync(
    rank: int, what: Any
) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]]:
    model = mlp()
    optimizer = adamw(model)
    sync = postlocal.attach(model, optimizer, Strategy(schedule.periodic(4), optimizer_state=what))
    for step, (x, y) in enumerate(batches(rank, 4)):
        train_step(model, optimizer, x, y)
        if step == 3:
            before = [(key, tensor.clone()) for _, key, tensor in sync.inner._state()]
        sync.step()
    return before, [(key, tensor.clone()) for _, key, tensor in sync.inner._state()]


def test_optimizer_state_is_kept_averaged_or_reset_as_asked(ranks: Ranks) -> None:
    for before, after in ranks(2, optimizer_state_around_a_sync, "keep"):
        assert equal([t for _, t in before], [t for _, t in after])
    (mine, averaged), (theirs, also) = ranks(2, optimizer_state_around_a_sync, "average")
    assert equal([t for _, t in averaged], [t for _, t in also])
    for (key, a), (_, b), (_, result) in zip(mine, theirs, averaged, strict=True):
        assert torch.allclose(result, a if key == "step" else (a + b) / 2)
    assert all(after == [] for _, after in ranks(2, optimizer_state_around_a_sync, "reset"))


# 15. A rank that is gone is noticed late, and not named.


def lose_a_rank(rank: int, victim: int, number: int, timeout: float) -> tuple[str, float]:
    model = mlp()
    optimizer = sgd(model)
    sync = postlocal.attach(model, optimizer, strategies.local_sgd(4), timeout=timeout)
    pids: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    start = time.monotonic()
    try:
        for step, (x, y) in enumerate(batches(rank, 8)):
            if rank == victim and step == 5:
                os.kill(os.getpid(), number)
            train_step(model, optimizer, x, y)
            sync.step()
    except PeerError as error:
        waited = time.monotonic() - start
        time.sleep(0.5)  # the others shall read in the store, too, before this rank is gone
        if rank == 0 and number == signal.SIGSTOP:
            os.kill(pids[victim], signal.SIGKILL)
        return str(error), waited
    raise AssertionError("the lost rank was not missed")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_lost_rank_is_named_at_the_next_sync(ranks: Ranks, number: int) -> None:
    results = ranks(3, lose_a_rank, 1, number, 3.0, expect_dead=(1,))
    for answer in (results[0], results[2]):
        message, waited = answer
        assert "missing at the synchronization after step 8: rank 1" in message
        assert "last seen at the synchronization after step 4" in message
        assert waited < 10
