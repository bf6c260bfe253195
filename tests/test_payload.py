"""Bytes that reducers count are those that they hand to their groups, rank by rank."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from postlocal import codec, virtual, wire
from postlocal.comm.group import Group, Operation, TensorsByRank, Value, Work
from postlocal.comm.groups import LevelGroups
from postlocal.topology import WORLD, Partition
from postlocal.wire import Wire, maximum_, sent_bytes

WIRES: dict[str, Wire] = {
    **{name: make() for name, make in wire.NAMED.items()},
    "bare int4": wire.quantised(codec.int4(block=64)),
    "quantised top_k": wire.quantised(codec.top_k(k=4, chunk=32)),
    "quantised random_k": wire.quantised(codec.random_k(k=4, chunk=32)),
    "two levels fp32": wire.two_level(wire.fp32(), level="pair"),
    "two levels int8": wire.two_level(wire.named("int8"), level="pair"),
    "two levels powersgd": wire.two_level(wire.powersgd(rank=1), level="pair"),
    "two levels twice": wire.two_level(wire.two_level(wire.bf16(), level="four"), level="pair"),
}


class Counting:
    """A group that counts bytes; an all-reduce counts as one along a ring."""

    def __init__(self, group: Group, counts: list[int]) -> None:
        self._group = group
        self._counts = counts
        self.rank = group.rank
        self.size = group.size

    def all_reduce(self, tensor: Tensor, operation: Operation = "sum") -> Work:
        most = -(-tensor.numel() // self.size) * tensor.itemsize
        self._counts.append(2 * (self.size - 1) * most)
        return self._group.all_reduce(tensor, operation)

    def all_gather(self, output: Tensor, tensor: Tensor) -> Work:
        self._counts.append((self.size - 1) * tensor.nbytes)
        return self._group.all_gather(output, tensor)

    def all_to_all(self, sent: TensorsByRank, received: TensorsByRank) -> Work:
        others = [parts for rank, parts in enumerate(sent) if rank != self.rank]
        self._counts += [part.nbytes for parts in others for part in parts]
        return self._group.all_to_all(sent, received)

    def broadcast(self, tensor: Tensor, source: int = 0) -> Work:
        raise AssertionError("no wire broadcasts")

    def all_gather_object(self, value: Value) -> list[Value]:
        return self._group.all_gather_object(value)

    def subgroup(self, partition: Sequence[Sequence[int]]) -> Group:
        return Counting(self._group.subgroup(partition), self._counts)

    def announce(self, step: int) -> None:
        return None

    def wait_for_all(self, step: int, place: str) -> None:
        return None

    def close(self, subgroups: Sequence[Group]) -> None:
        raise AssertionError("no wire closes a group")


class nested:
    """Pairs within fours; the last ones may be smaller."""

    def partition(self, size: int) -> dict[str, Partition]:
        return {"pair": runs(size, 2), "four": runs(size, 4), WORLD: runs(size, size)}


def runs(size: int, length: int) -> Partition:
    return tuple(tuple(range(start, min(start + length, size))) for start in range(0, size, length))


def shaped(numel: int, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = {"flat": torch.ones(numel, dtype=dtype), "scalar": torch.ones((), dtype=dtype)}
    if numel == 300:
        tensors["matrix"] = torch.ones(20, 15, dtype=dtype)
        tensors["wide"] = torch.ones(31, 97, dtype=torch.float64)
    return tensors


@pytest.mark.parametrize("name", WIRES)
@pytest.mark.parametrize("workers", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("numel", [1, 300, 100_003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_counted_and_predicted_is_what_was_sent(
    name: str, workers: int, numel: int, dtype: torch.dtype
) -> None:
    def work(group: Group) -> tuple[int, int, int]:
        counts: list[int] = []
        groups = LevelGroups(Counting(group, counts), nested())
        reducer, tensors = WIRES[name].open(groups, WORLD), shaped(numel, dtype)
        legs = WIRES[name].messages(tensors, groups, WORLD)
        return sent_bytes(legs), reducer.mean_(tensors), sum(counts)

    for predicted, returned, sent in virtual.run(workers, work):
        assert predicted == returned == sent


@pytest.mark.parametrize("name", [name for name in WIRES if "two levels" not in name])
@pytest.mark.parametrize("workers", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("numel", [1, 300, 100_003])
def test_the_recipe_tells_the_most_that_a_rank_sends(name: str, workers: int, numel: int) -> None:
    def work(group: Group) -> int:
        groups, flat = LevelGroups(group, nested()), {"flat": torch.zeros(numel)}
        return sent_bytes(WIRES[name].messages(flat, groups, WORLD))

    most = max(virtual.run(workers, work))
    if name != "powersgd":  # its estimate is that of a square matrix
        assert most == WIRES[name].payload_bytes(numel, workers)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_bytes_of_maxima_are_those_sent(workers: int) -> None:
    def work(group: Group) -> tuple[int, int]:
        counts: list[int] = []
        tensors = [torch.ones(7, dtype=torch.int64), torch.ones(2), torch.tensor(True)]
        return maximum_(tensors, Counting(group, counts)), sum(counts)

    for returned, sent in virtual.run(workers, work):
        assert returned == sent
