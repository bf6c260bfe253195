"""Every algorithm has a limit that equals something simpler."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import postlocal
from postlocal import guard, outer, schedule, strategies, topology, wire
from postlocal.strategies import Strategy
from tests.launcher import Cases, Table, run_table
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

Trained = Callable[[int], Table]


@pytest.fixture(scope="module")
def trained() -> Trained:
    """``trained(world)[case]``: what each rank came to; all cases of a world are one launch."""
    return cache(lambda world: run_table(world, WORLDS[world]))


@pytest.mark.parametrize("make", ["momentum", "adamw"])
@pytest.mark.parametrize("world", [2, 3])
def test_ddp_is_bit_identical_to_plain_ddp(trained: Trained, make: str, world: int) -> None:
    plain = trained(world)["plain", make]
    ours = trained(world)["ddp", make]
    for rank in range(world):
        assert equal(plain[rank], ours[rank][-1])


@pytest.mark.parametrize("make", ["momentum", "adamw"])
def test_the_warmup_of_post_local_is_bit_identical_to_plain_ddp(
    trained: Trained, make: str
) -> None:
    plain = trained(2)["plain", make]
    ours = trained(2)["warm-up", make]
    for rank in range(2):
        assert equal(plain[rank], ours[rank][23])
    assert not equal(ours[0][24], ours[1][24])
    assert equal(ours[0][27], ours[1][27])


@pytest.mark.parametrize("world", [2, 3, 4])
def test_local_sgd_of_period_one_equals_ddp(trained: Trained, world: int) -> None:
    plain = trained(world)["plain", "sgd"]
    ours = trained(world)["period of one"]
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
def test_diloco_equals_the_papers_algorithm_in_one_process(trained: Trained, wrap: bool) -> None:
    ours = trained(3)["diloco", wrap]
    reference = diloco_reference(3, 20, 5, 0.6, 0.8)
    for rank in range(3):
        assert distance(ours[rank][-1], reference) < 1e-6


def test_slowmo_without_momentum_equals_averaging(trained: Trained) -> None:
    averaged = trained(2)["averaging in place"]
    slow = trained(2)["slowmo without momentum"]
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


def test_slowmo_equals_the_papers_algorithm_in_one_process(trained: Trained) -> None:
    ours = trained(2)["slowmo"]
    assert distance(ours[0][-1], slowmo_reference(2, 16, 4, 0.5)) < 1e-6


ANCHORED: dict[str, dict[str, Any]] = {
    "sgd of lr 1": {"outer": outer.nesterov(lr=1.0, momentum=0.0)},
    "clip that does not bind": {"guard": guard.clip(max_norm=1e6)},
    "bf16": {"wire": wire.bf16()},
    "fp16": {"wire": wire.fp16()},
}


@pytest.mark.parametrize("name", ANCHORED)
def test_anchored_averaging_equals_averaging_in_place(trained: Trained, name: str) -> None:
    fast = trained(2)["averaging in place"]
    slow = trained(2)["anchored", name]
    assert distance(fast[0][-1], slow[0][-1]) < (2e-3 if "wire" in ANCHORED[name] else 1e-6)
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
    trained: Trained, name: str, world: int
) -> None:
    history = trained(world)["synced", name]
    for rank in range(1, world):
        assert equal(history[0][7], history[rank][7])
        assert not equal(history[0][6], history[rank][6])


@pytest.mark.parametrize("name", SYNCED)
def test_finish_leaves_replicas_equal_in_the_middle_of_a_round(trained: Trained, name: str) -> None:
    history = trained(2)["finished", name]
    assert not equal(history[0][5], history[1][5])
    assert equal(history[0][6], history[1][6])


def test_hierarchical_ranks_are_equal_where_they_synchronized(trained: Trained) -> None:
    history = trained(4)["hierarchical"]
    at = {step: [history[rank][step - 1] for rank in range(4)] for step in (1, 2, 4, 6, 8)}
    for step in (2, 6):
        assert equal(at[step][0], at[step][1])
        assert equal(at[step][2], at[step][3])
        assert not equal(at[step][0], at[step][2])
    for step in (4, 8):
        assert all(equal(at[step][0], at[step][rank]) for rank in range(4))
    assert not equal(at[1][0], at[1][1])


def test_gradients_at_node_level_keep_the_ranks_of_a_node_equal(trained: Trained) -> None:
    history = trained(4)["gradients of a node"]
    for step in range(3):
        assert equal(history[0][step], history[1][step])
        assert equal(history[2][step], history[3][step])
        assert not equal(history[0][step], history[2][step])
    assert equal(history[0][3], history[3][3])


def test_a_lossy_gradient_wire_stays_close_to_ddp_and_replicas_equal(trained: Trained) -> None:
    plain = trained(3)["plain", "sgd"]
    ours = trained(3)["gradients in bf16"]
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


OPTIONS: dict[str, dict[str, bool]] = {
    "static_graph": {"static_graph": True},
    "gradient_as_bucket_view": {"gradient_as_bucket_view": True},
    "plain": {},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_local_rounds_can_come_before_synchronous_ones(trained: Trained, option: str) -> None:
    plain = trained(2)["local rounds first"]
    ours = trained(2)["local rounds first", option]
    for (result, agreed), (expected, _) in zip(ours, plain, strict=True):
        assert agreed == [False, False, True, False, False, True, True, True, True]
        assert equal(result, expected)


AVERAGING = strategies.local_sgd(period=4)
WARM_UP = strategies.post_local_sgd(warmup=24, period=4, gradients="rank")
SLOWMO = strategies.slowmo(period=4, slow_momentum=0.5)
WITHOUT = strategies.slowmo(period=4, slow_lr=1.0, slow_momentum=0.0)
DILOCO = strategies.diloco(period=5, outer_lr=0.6, outer_momentum=0.8)
LOSSY = replace(strategies.ddp(), gradient_wire=wire.bf16())
MAKES = ("momentum", "adamw")
EVERY: Cases = {
    ("plain", "sgd"): (train_plain, 12, "sgd"),
    "period of one": (train, strategies.local_sgd(period=1), 12, "sgd"),
}
OF_2_AND_3: Cases = {
    **{("plain", make): (train_plain, 24, make) for make in MAKES},
    **{("ddp", make): (train, strategies.ddp(), 24, make) for make in MAKES},
    **{("synced", name): (train, one, 8, "adamw") for name, one in SYNCED.items()},
}
OF_2: Cases = {
    **{("warm-up", make): (train, WARM_UP, 28, make) for make in MAKES},
    "averaging in place": (train, AVERAGING, 16, "momentum"),
    "slowmo without momentum": (train, WITHOUT, 16, "momentum"),
    "slowmo": (train, SLOWMO, 16, "sgd"),
    **{
        ("anchored", name): (train, replace(AVERAGING, **variant), 16, "momentum")
        for name, variant in ANCHORED.items()
    },
    **{
        ("finished", name): (partial(train, finish=True), one, 6, "adamw")
        for name, one in SYNCED.items()
    },
    "local rounds first": (train_with, {}),
    **{("local rounds first", name): (train_with, some) for name, some in OPTIONS.items()},
}
OF_3: Cases = {
    **{("diloco", wrap): (train, DILOCO, 20, "adamw", wrap) for wrap in (True, False)},
    "gradients in bf16": (train, LOSSY, 12, "sgd"),
}
OF_A_NODE = Strategy(schedule.periodic(4, gradients="node"))
IN_NODES = partial(train, topology=topology.nodes(size=2))
OF_4: Cases = {
    "hierarchical": (IN_NODES, strategies.hierarchical({"node": 2, "world": 4}), 8, "sgd"),
    "gradients of a node": (IN_NODES, OF_A_NODE, 4, "adamw"),
}
WORLDS: dict[int, Cases] = {
    2: {**EVERY, **OF_2_AND_3, **OF_2},
    3: {**EVERY, **OF_2_AND_3, **OF_3},
    4: {**EVERY, **OF_4},
}
