"""Threads that communicate as processes do."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import postlocal
from postlocal import DisagreementError, PeerError, Strategy, strategies, topology, virtual
from postlocal.comm.group import Alone, Group, Processes, resolve
from tests.models import batches, distance, equal, mlp, momentum, sgd, train, train_step, values

Ranks = Callable[..., list[Any]]

TRAINED = {
    "local_sgd": strategies.local_sgd(3),
    "diloco": strategies.diloco(3),
    "hierarchical": strategies.hierarchical({"node": 2, "world": 4}),
}


def pretended(workers: int, strategy: Strategy, steps: int) -> list[list[Tensor]]:
    models = [mlp() for _ in range(workers)]  # made here: threads share torch's generator

    def work(group: Group) -> list[Tensor]:
        model = models[group.rank]
        optimizer = momentum(model)
        sync = postlocal.attach(
            model, optimizer, strategy, topology=topology.nodes(2), process_group=group
        )
        for x, y in batches(group.rank, steps):
            train_step(model, optimizer, x, y)
            sync.step()
        return values(model)

    return virtual.run(workers, work)


@pytest.mark.parametrize("name", TRAINED)
def test_four_threads_train_as_four_processes_do(ranks: Ranks, name: str) -> None:
    options = {"wrap": False, "topology": topology.nodes(2)}
    real = ranks(4, train, TRAINED[name], 7, "momentum", **options)
    threads = pretended(4, TRAINED[name], 7)
    for rank in range(4):
        assert distance(threads[rank], real[rank][-1]) < 1e-6
    assert not equal(threads[0], threads[2])


def collectives(group: Group) -> dict[str, Any]:
    size, rank = group.size, group.rank
    mine = torch.arange(size, dtype=torch.float32) + 10 * rank
    total, largest, copied = mine.clone(), mine.clone(), mine.clone()
    gathered, swapped = torch.empty(size * size), torch.zeros(size)
    group.all_reduce(total).wait()
    group.all_reduce(largest, "max").wait()
    group.all_gather(gathered, mine).wait()
    group.all_to_all([[x] for x in mine.chunk(size)], [[x] for x in swapped.chunk(size)]).wait()
    group.broadcast(copied, source=size - 1).wait()
    return {
        "sum": total.tolist(),
        "max": largest.tolist(),
        "gathered": gathered.tolist(),
        "swapped": swapped.tolist(),
        "broadcast": copied.tolist(),
        "objects": group.all_gather_object({"rank": rank}),
        "mine": mine.tolist(),
    }


def over_processes(rank: int) -> dict[str, Any]:
    group = resolve(None, None)
    assert isinstance(group, Processes)
    return collectives(group)


@pytest.mark.parametrize("world", [2, 3])
def test_every_collective_gives_what_it_gives_processes(ranks: Ranks, world: int) -> None:
    assert virtual.run(world, collectives) == ranks(world, over_processes)


def test_one_thread_gives_what_a_rank_alone_gives() -> None:
    assert virtual.run(1, collectives) == [collectives(Alone())]


@settings(deadline=None, max_examples=20)
@given(workers=st.integers(1, 6))
def test_results_come_in_the_order_of_ranks(workers: int) -> None:
    def work(group: Group) -> int:
        time.sleep(0.001 * (workers - group.rank))
        return group.rank

    assert virtual.run(workers, work) == list(range(workers))


def test_a_subgroup_holds_its_part_only_and_numbers_it_anew() -> None:
    def work(group: Group) -> tuple[int, int, list[int]]:
        part = group.subgroup([[0, 2], [1, 3], [4]])
        return part.rank, part.size, part.all_gather_object(group.rank)

    assert virtual.run(5, work) == [
        (0, 2, [0, 2]),
        (0, 2, [1, 3]),
        (1, 2, [0, 2]),
        (1, 2, [1, 3]),
        (0, 1, [4]),
    ]


@pytest.mark.parametrize("within", ["world", "part"])
def test_a_worker_that_raises_releases_the_others_and_its_error_is_raised(within: str) -> None:
    def work(group: Group) -> None:
        part = group.subgroup([[0, 1], [2, 3]])
        if group.rank == 0:
            raise KeyError("mine")
        (part if within == "part" else group).all_reduce(torch.zeros(1)).wait()

    start = time.perf_counter()
    with pytest.raises(KeyError, match="mine"):
        virtual.run(4, work)
    assert time.perf_counter() - start < 5


def test_a_worker_that_never_comes_is_an_error_after_the_timeout() -> None:
    def work(group: Group) -> None:
        if group.rank:
            group.all_reduce(torch.zeros(1)).wait()

    with pytest.raises(PeerError, match=r"a worker left, or did not come within 0\.2 s"):
        virtual.run(2, work, timeout=0.2)


def test_threads_disagree_as_processes_do() -> None:
    def work(group: Group) -> str:
        model = mlp()
        strategy = strategies.local_sgd(3 if group.rank == 2 else 2)
        with pytest.raises(DisagreementError) as caught:
            postlocal.attach(model, sgd(model), strategy, process_group=group)
        return str(caught.value)

    for message in virtual.run(3, work):
        assert message.startswith("ranks differ in strategy: rank 0 has")
        assert "rank 2 has" in message


@pytest.mark.parametrize("workers", [0, -1])
def test_a_world_of_nobody_is_refused(workers: int) -> None:
    with pytest.raises(ValueError, match=f"workers must be at least 1 worker, got {workers}"):
        virtual.run(workers, lambda group: None)
