"""Every algorithm has a limit that equals something simpler."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import postlocal
from postlocal import guard, outer, schedule, strategies, topology, wire
from postlocal.strategies import Strategy
from tests.models import (
    OPTIMIZERS,
    batches,
    distance,
    equal,
    mlp,
    stacked,
    train,
    train_plain,
    train_step,
    values,
)

Ranks = Callable[..., list[Any]]


@pytest.mark.parametrize("make", ["momentum", "adamw"])
@pytest.mark.parametrize("world", [2, 3])
def test_ddp_is_bit_identical_to_plain_ddp(ranks: Ranks, make: str, world: int) -> None:
    plain = ranks(world, train_plain, 24, make)
    ours = ranks(world, train, strategies.ddp(), 24, make)
    for rank in range(world):
        assert equal(plain[rank], ours[rank][-1])


@pytest.mark.parametrize("make", ["momentum", "adamw"])
def test_the_warmup_of_post_local_is_bit_identical_to_plain_ddp(ranks: Ranks, make: str) -> None:
    strategy = strategies.post_local_sgd(warmup=24, period=4, gradients="rank")
    plain = ranks(2, train_plain, 24, make)
    ours = ranks(2, train, strategy, 28, make)
    for rank in range(2):
        assert equal(plain[rank], ours[rank][23])
    assert not equal(ours[0][24], ours[1][24])
    assert equal(ours[0][27], ours[1][27])


@pytest.mark.parametrize("world", [2, 3, 4])
def test_local_sgd_of_period_one_equals_ddp(ranks: Ranks, world: int) -> None:
    plain = ranks(world, train_plain, 12, "sgd")
    ours = ranks(world, train, strategies.local_sgd(period=1), 12, "sgd")
    assert distance(plain[0], ours[0][-1]) < 1e-6


def diloco_reference(world: int, steps: int, period: int, lr: float, mu: float) -> list[Tensor]:
    """Algorithm 1 of arXiv 2311.08105, all replicas in one process."""
    replicas = [mlp() for _ in range(world)]
    optimizers = [OPTIMIZERS["adamw"](replica) for replica in replicas]
    streams = [list(batches(rank, steps)) for rank in range(world)]
    anchor = values(replicas[0])
    momentum = [torch.zeros_like(tensor) for tensor in anchor]
    for step in range(steps):
        for replica, optimizer, stream in zip(replicas, optimizers, streams, strict=True):
            train_step(replica, optimizer, *stream[step])
        if (step + 1) % period:
            continue
        for index, tensor in enumerate(anchor):
            local = stacked(replicas, index)
            delta = (tensor - local).mean(0)
            momentum[index] = mu * momentum[index] + delta
            tensor -= lr * (delta + mu * momentum[index])
            for replica in replicas:
                list(replica.parameters())[index].data.copy_(tensor)
    return anchor


@pytest.mark.parametrize("wrap", [True, False], ids=["ddp", "plain module"])
def test_diloco_equals_the_papers_algorithm_in_one_process(ranks: Ranks, wrap: bool) -> None:
    strategy = strategies.diloco(period=5, outer_lr=0.6, outer_momentum=0.8)
    ours = ranks(3, train, strategy, 20, "adamw", wrap)
    reference = diloco_reference(3, 20, 5, 0.6, 0.8)
    for rank in range(3):
        assert distance(ours[rank][-1], reference) < 1e-6


def test_slowmo_without_momentum_equals_averaging(ranks: Ranks) -> None:
    averaged = ranks(2, train, strategies.local_sgd(period=4), 16, "momentum")
    without = strategies.slowmo(period=4, slow_lr=1.0, slow_momentum=0.0)
    slow = ranks(2, train, without, 16, "momentum")
    assert distance(averaged[0][-1], slow[0][-1]) < 1e-6


def slowmo_reference(world: int, steps: int, period: int, beta: float) -> list[Tensor]:
    """Algorithm 1 of arXiv 1910.00643, all replicas in one process, inner SGD at 0.1."""
    replicas = [mlp() for _ in range(world)]
    optimizers = [OPTIMIZERS["sgd"](replica) for replica in replicas]
    anchor = values(replicas[0])
    slow = [torch.zeros_like(tensor) for tensor in anchor]
    for step in range(steps):
        for rank, (replica, optimizer) in enumerate(zip(replicas, optimizers, strict=True)):
            train_step(replica, optimizer, *list(batches(rank, steps))[step])
        if (step + 1) % period:
            continue
        for index, tensor in enumerate(anchor):
            local = stacked(replicas, index)
            slow[index] = beta * slow[index] + (tensor - local.mean(0)) / 0.1
            tensor -= 0.1 * slow[index]
            for replica in replicas:
                list(replica.parameters())[index].data.copy_(tensor)
    return anchor


def test_slowmo_equals_the_papers_algorithm_in_one_process(ranks: Ranks) -> None:
    ours = ranks(2, train, strategies.slowmo(period=4, slow_momentum=0.5), 16, "sgd")
    assert distance(ours[0][-1], slowmo_reference(2, 16, 4, 0.5)) < 1e-6


@pytest.mark.parametrize(
    "variant",
    [
        {"outer": outer.nesterov(lr=1.0, momentum=0.0)},
        {"guard": guard.clip(max_norm=1e6)},
        {"wire": wire.bf16()},
        {"wire": wire.fp16()},
    ],
    ids=["sgd of lr 1", "clip that does not bind", "bf16", "fp16"],
)
def test_anchored_averaging_equals_averaging_in_place(
    ranks: Ranks, variant: dict[str, Any]
) -> None:
    plain = strategies.local_sgd(period=4)
    fast = ranks(2, train, plain, 16, "momentum")
    slow = ranks(2, train, replace(plain, **variant), 16, "momentum")
    assert distance(fast[0][-1], slow[0][-1]) < (2e-3 if "wire" in variant else 1e-6)
    assert equal(slow[0][-1], slow[1][-1])


SYNCED = {
    "local_sgd": strategies.local_sgd(4),
    "slowmo": strategies.slowmo(4),
    "diloco": strategies.diloco(4),
    "bf16": replace(strategies.diloco(4), wire=wire.bf16()),
    "qsr": strategies.qsr(alpha=0.015, base=4),
    "post_local": strategies.post_local_sgd(4, 4, gradients="rank"),
    "clipped": replace(strategies.diloco(4), guard=guard.clip(0.01)),
    "averaged state": replace(strategies.local_sgd(4), optimizer_state="average"),
    "reset state": replace(strategies.local_sgd(4), optimizer_state="reset"),
}


@pytest.mark.parametrize("name", SYNCED)
@pytest.mark.parametrize("world", [2, 3])
def test_replicas_are_bit_identical_after_a_world_sync_and_only_then(
    ranks: Ranks, name: str, world: int
) -> None:
    history = ranks(world, train, SYNCED[name], 8, "adamw")
    for rank in range(1, world):
        assert equal(history[0][7], history[rank][7])
        assert not equal(history[0][6], history[rank][6])


@pytest.mark.parametrize("name", SYNCED)
def test_finish_leaves_replicas_equal_in_the_middle_of_a_round(ranks: Ranks, name: str) -> None:
    history = ranks(2, train, SYNCED[name], 6, "adamw", finish=True)
    assert not equal(history[0][5], history[1][5])
    assert equal(history[0][6], history[1][6])


def test_hierarchical_ranks_are_equal_where_they_synchronized(ranks: Ranks) -> None:
    strategy = strategies.hierarchical({"node": 2, "world": 4})
    history = ranks(4, train, strategy, 8, "sgd", topology=topology.nodes(size=2))
    at = {step: [history[rank][step - 1] for rank in range(4)] for step in (1, 2, 4, 6, 8)}
    for step in (2, 6):
        assert equal(at[step][0], at[step][1])
        assert equal(at[step][2], at[step][3])
        assert not equal(at[step][0], at[step][2])
    for step in (4, 8):
        assert all(equal(at[step][0], at[step][rank]) for rank in range(4))
    assert not equal(at[1][0], at[1][1])


def test_gradients_at_node_level_keep_the_ranks_of_a_node_equal(ranks: Ranks) -> None:
    strategy = Strategy(schedule.periodic(4, gradients="node"))
    history = ranks(4, train, strategy, 4, "adamw", topology=topology.nodes(size=2))
    for step in range(3):
        assert equal(history[0][step], history[1][step])
        assert equal(history[2][step], history[3][step])
        assert not equal(history[0][step], history[2][step])
    assert equal(history[0][3], history[3][3])


def test_a_lossy_gradient_wire_stays_close_to_ddp_and_replicas_equal(ranks: Ranks) -> None:
    strategy = replace(strategies.ddp(), gradient_wire=wire.bf16())
    plain = ranks(3, train_plain, 12, "sgd")
    ours = ranks(3, train, strategy, 12, "sgd")
    assert equal(ours[0][-1], ours[2][-1])
    assert 0 < distance(plain[0], ours[0][-1]) < 1e-2


def train_with(rank: int, options: dict[str, bool]) -> tuple[list[Tensor], list[bool]]:
    """Local rounds first, then gradients that meet at every step."""
    model = DistributedDataParallel(mlp(), **options)  # type: ignore[arg-type]
    optimizer = OPTIMIZERS["sgd"](model)
    late = [schedule.Round(3, "rank", "world")] * 2 + [schedule.Round(1)] * 6
    sync = postlocal.attach(
        model, optimizer, Strategy(lambda step, lr: late[min(step // 3, 2)]), topology=None
    )
    agreed = []
    for x, y in batches(rank, 9):
        train_step(model, optimizer, x, y)
        sync.step()
        agreed.append(equal_everywhere(values(model)))
    return values(model), agreed


def equal_everywhere(tensors: list[Tensor]) -> bool:
    copies = [tensor.clone() for tensor in tensors]
    for copy in copies:
        dist.broadcast(copy, 0)
    verdict = torch.tensor(float(equal(copies, tensors)))
    dist.all_reduce(verdict, dist.ReduceOp.MIN)
    return bool(verdict)


@pytest.mark.parametrize("option", ["static_graph", "gradient_as_bucket_view", "plain"])
def test_local_rounds_can_come_before_synchronous_ones(ranks: Ranks, option: str) -> None:
    options = {} if option == "plain" else {option: True}
    plain = ranks(2, train_with, {})
    for (result, agreed), (expected, _) in zip(ranks(2, train_with, options), plain, strict=True):
        assert agreed == [False, False, True, False, False, True, True, True, True]
        assert equal(result, expected)
