"""Named algorithms beyond averaging, each against its paper, its limit, or a planted fault."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import postlocal
from postlocal import Strategy, codec, guard, outer, schedule, strategies, virtual, wire
from postlocal.checkpoint import packing
from postlocal.comm.group import Group
from tests.models import OPTIMIZERS, batches, distance, equal, mlp, train_step, values

Run = Callable[[postlocal.Sync, nn.Module, int], object]


def mlps(count: int) -> list[nn.Module]:
    """Made in one thread, since threads share torch's generator."""
    return [mlp() for _ in range(count)]


def train(
    strategy: Strategy, steps: int, workers: int = 3, after: Run | None = None, finish: bool = True
) -> list[tuple[list[Tensor], postlocal.Sync]]:
    """Workers under a strategy; their parameters at the end. ``after`` is called each step."""
    models = mlps(workers)

    def work(group: Group) -> tuple[list[Tensor], postlocal.Sync]:
        model = models[group.rank]
        optimizer = OPTIMIZERS["adamw"](model)
        sync = postlocal.attach(model, optimizer, strategy, process_group=group)
        for step, (x, y) in enumerate(batches(group.rank, steps), 1):
            train_step(model, optimizer, x, y)
            if after is not None:
                after(sync, model, step)
            sync.step()
        if finish:
            sync.finish()
        sync.close()
        return values(model), sync

    return virtual.run(workers, work)


ALL: dict[str, Strategy] = {
    "local_sgd": strategies.local_sgd(4),
    "post_local_sgd": strategies.post_local_sgd(0, 4, gradients="rank"),
    "hierarchical": strategies.hierarchical({"world": 4}),
    "slowmo": strategies.slowmo(4),
    "diloco": strategies.diloco(4),
    "streaming_diloco": strategies.streaming_diloco(4, fragments=2),
    "sparse_loco": strategies.sparse_loco(4, top_k=8, chunk=32),
    "edit": strategies.edit(4),
    "qsr": strategies.qsr(alpha=0.02, base=4),
}


def test_every_named_strategy_but_the_control_is_tried_here() -> None:
    assert set(ALL) == set(strategies.NAMED) - {"ddp"}


@pytest.mark.parametrize("name", ALL)
def test_replicas_of_every_strategy_go_apart_and_end_equal(name: str) -> None:
    apart = train(ALL[name], 6, finish=False)
    assert not equal(apart[0][0], apart[1][0])
    together = train(ALL[name], 6)
    for parameters, sync in together:
        assert sync.agreed
        assert equal(parameters, together[0][0])


def sparse_reference(steps: int, period: int, beta: float, lossy: codec.top_k) -> list[Tensor]:
    """Algorithm 1 of arXiv 2508.15706, all replicas in one process."""
    replicas = mlps(3)
    optimizers = [OPTIMIZERS["adamw"](replica) for replica in replicas]
    streams = [list(batches(rank, steps)) for rank in range(3)]
    anchor = values(replicas[0])
    errors = [[torch.zeros_like(tensor) for tensor in anchor] for _ in replicas]
    for step in range(steps):
        for replica, optimizer, stream in zip(replicas, optimizers, streams, strict=True):
            train_step(replica, optimizer, *stream[step])
        if (step + 1) % period:
            continue
        sums = [torch.zeros_like(tensor) for tensor in anchor]
        for replica, error in zip(replicas, errors, strict=True):
            moves = [a - b for a, b in zip(anchor, values(replica), strict=True)]
            wanted = [beta * e + move for e, move in zip(error, moves, strict=True)]
            flat = torch.cat([tensor.flatten() for tensor in wanted])
            payload = torch.zeros(lossy.nbytes(flat.numel()), dtype=torch.uint8)
            lossy.encode(flat, payload)
            sent = torch.empty_like(flat)
            lossy.decode(payload, sent)
            parts = torch.split(sent, [tensor.numel() for tensor in wanted])
            for index, part in enumerate(parts):
                sums[index] += part.view_as(wanted[index])
                error[index] = wanted[index] - part.view_as(wanted[index])
        for index, tensor in enumerate(anchor):
            tensor -= sums[index] / 3
            for replica in replicas:
                list(replica.parameters())[index].data.copy_(tensor)
    return anchor


@pytest.mark.parametrize("bits", [2, 8, 32])
def test_sparse_loco_equals_the_papers_algorithm_in_one_process(bits: int) -> None:
    strategy = strategies.sparse_loco(4, top_k=8, chunk=32, bits=bits)
    ours = train(strategy, 16)
    reference = sparse_reference(16, 4, 0.95, codec.top_k(8, 32, bits))
    for parameters, _ in ours:
        assert distance(parameters, reference) < 1e-5


def test_sparse_loco_that_sends_everything_is_averaging() -> None:
    everything = strategies.sparse_loco(4, top_k=32, chunk=32, bits=32)
    plain = replace(strategies.local_sgd(4), outer=outer.nesterov(1.0, 0.0))
    assert distance(train(everything, 12)[0][0], train(plain, 12)[0][0]) < 1e-6


@pytest.mark.parametrize("feedback", [0.9, 1.0])
@pytest.mark.parametrize("top_k", [4, 32])
def test_sparse_loco_keeps_a_share_of_even_progress(top_k: int, feedback: float) -> None:
    rounds, between, lr = 64, 32 // top_k, 3.0
    strategy = strategies.sparse_loco(2, top_k, 32, bits=32, feedback=feedback, outer_lr=lr)

    def work(group: Group) -> list[Tensor]:
        weight = nn.Parameter(torch.zeros(32))
        optimizer = torch.optim.SGD([weight], lr=0.5)
        model = nn.ParameterList([weight])
        sync = postlocal.attach(model, optimizer, strategy, process_group=group)
        places = []
        for _ in range(rounds):
            for _ in range(2):
                weight.grad = -torch.ones(32)  # so that replicas move by 1 a round
                optimizer.step()
                sync.step()
            places.append(weight.detach().clone())
        sync.close()
        return places

    places = virtual.run(2, work)[0]
    moved = float((places[-1] - places[-1 - between]).mean()) / between
    kept = sum(feedback**age for age in range(between)) / between
    assert moved == pytest.approx(lr * kept, rel=1e-3)


def leap(sync: postlocal.Sync, model: nn.Module, step: int, when: int, ranks: set[int]) -> None:
    if step == when and sync.groups["world"].rank in ranks:
        with torch.no_grad():
            for parameter in model[0].parameters():  # type: ignore[index]
                parameter.add_(100.0)


JUDGED = Strategy(
    schedule.periodic(2), outer.nesterov(1.0, 0.0), guard=guard.outliers(warmup=4, max_norm=1e6)
)


def test_a_layer_that_leaps_is_left_out_and_only_that_layer() -> None:
    calm = train(JUDGED, 12)
    wild = train(JUDGED, 12, after=partial(leap, when=12, ranks={1}))
    for (parameters, sync), (expected, _) in zip(wild, calm, strict=True):
        assert distance(parameters, expected) < 0.1  # not 100 / 3
        assert equal(parameters, wild[0][0])
        assert sync.meter.records[-1].excluded == ()  # its other layer counts


def test_a_module_in_which_every_replica_leaps_is_rolled_back() -> None:
    before = train(JUDGED, 10)[0][0]
    after = train(JUDGED, 12, after=partial(leap, when=12, ranks={0, 1, 2}))
    for parameters, _ in after:
        assert torch.equal(parameters[0], before[0])
        assert torch.equal(parameters[1], before[1])
        assert not torch.equal(parameters[2], before[2])


def test_a_guard_without_jury_takes_the_leap_in() -> None:
    trusting = replace(JUDGED, guard=guard.non_finite())
    wild = train(trusting, 12, after=partial(leap, when=12, ranks={1}))[0][0]
    assert distance(wild, train(trusting, 12)[0][0]) > 30


def test_outer_learning_rates_follow_the_clock() -> None:
    factors = outer.piecewise({0: 1.0, 8: 0.5})
    strategy = Strategy(schedule.periodic(4), outer.scheduled(outer.nesterov(0.8, 0.0), factors))
    marks: dict[int, list[list[Tensor]]] = {}

    def keep(sync: postlocal.Sync, model: nn.Module, step: int) -> None:
        if sync.groups["world"].rank == 0:
            marks[step] = [values(model)]

    final = train(strategy, 8, workers=1, after=keep)[0][0]
    start = values(mlp())
    first = [a + 0.8 * (b - a) for a, b in zip(start, marks[4][0], strict=True)]
    second = [a + 0.4 * (b - a) for a, b in zip(first, marks[8][0], strict=True)]
    assert distance(final, second) < 1e-6


ADAPTIVE = Strategy(schedule.adaptive(target_drift=0.02, initial=2, longest=16))


def rounds(strategy: Strategy, steps: int) -> list[list[int]]:
    """Steps at which each of three workers synchronized."""
    return [
        [record.step for record in sync.meter.records]
        for _, sync in train(strategy, steps, finish=False)
    ]


def test_the_period_follows_the_drift_and_is_the_same_on_all_ranks() -> None:
    tight = Strategy(schedule.adaptive(target_drift=1e-4, initial=8))
    loose = Strategy(schedule.adaptive(target_drift=10.0, initial=2, longest=16))
    first, *others = rounds(loose, 40)
    assert first[:4] == [2, 6, 14, 30]  # twice as long each time, to the longest
    assert others == [first, first]
    assert rounds(tight, 20)[0][:6] == [8, 12, 14, 15, 16, 17]


def test_an_adaptive_period_goes_on_after_a_resume() -> None:
    whole = rounds(ADAPTIVE, 40)[0]
    models, again = mlps(3), mlps(3)

    def work(group: Group) -> list[int]:
        model = models[group.rank]
        optimizer = OPTIMIZERS["adamw"](model)
        sync = postlocal.attach(model, optimizer, ADAPTIVE, process_group=group)
        stream = list(batches(group.rank, 40))
        for x, y in stream[:19]:
            train_step(model, optimizer, x, y)
            sync.step()
        synced = [record.step for record in sync.meter.records]
        state: Any = deepcopy(packing.pack(sync.state_dict()))
        twin = again[group.rank]
        optimizer_state = deepcopy(optimizer.state_dict())
        optimizer = OPTIMIZERS["adamw"](twin)
        sync = postlocal.attach(twin, optimizer, ADAPTIVE, process_group=group)
        twin.load_state_dict(model.state_dict())
        optimizer.load_state_dict(optimizer_state)
        sync.load_state_dict(packing.unpack(*state))
        for x, y in stream[19:]:
            train_step(twin, optimizer, x, y)
            sync.step()
        return synced + [record.step for record in sync.meter.records]

    assert virtual.run(3, work) == [whole, whole, whole]


def test_a_wire_between_nodes_changes_nothing_where_it_is_exact() -> None:
    plain = strategies.diloco(4)
    two_level = replace(plain, wire=wire.two_level(wire.fp32(), "node"))
    models = mlps(4)

    def work(group: Group, strategy: Strategy) -> list[Tensor]:
        model = models[group.rank]
        model.load_state_dict(start)
        optimizer = OPTIMIZERS["adamw"](model)
        sync = postlocal.attach(
            model, optimizer, strategy,
            process_group=group, topology=postlocal.topology.nodes(size=2),
        )  # fmt: skip
        for x, y in batches(group.rank, 8):
            train_step(model, optimizer, x, y)
            sync.step()
        return values(model)

    start = deepcopy(models[0].state_dict())
    direct = virtual.run(4, lambda group: work(group, plain))
    by_node = virtual.run(4, lambda group: work(group, two_level))
    assert distance(direct[0], by_node[0]) < 1e-6
    assert all(equal(by_node[0], other) for other in by_node)
