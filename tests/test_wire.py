"""Means over a group: precision, equal bits, bounded staging, and bytes as predicted."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from postlocal import codec, virtual, wire
from postlocal.comm.group import Group
from postlocal.tensors import all_finite, flat_view, squared_norm, weigh_
from postlocal.wire import ChunkWire, maximum_, mean_

Ranks = Callable[..., list[Any]]

WIRES: dict[str, ChunkWire] = {"fp32": wire.fp32(), "bf16": wire.bf16(), "fp16": wire.fp16()}
PRECISION = {"fp32": 2.0**-22, "bf16": 2.0**-7, "fp16": 2.0**-10}
SHAPES = [(7,), (), (0, 3), (64, 33), (5, 4, 3, 2), (300_000,)]


def make(rank: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    tensors[4] = tensors[4].to(memory_format=torch.channels_last)
    tensors.append(torch.randn(6, 8, generator=generator).to(dtype)[:, ::2])
    tensors.append(torch.randn(6, 8, generator=generator).to(dtype).t())
    return tensors


def means(workers: int, dtype: torch.dtype, recipe: ChunkWire) -> list[tuple[list[Tensor], int]]:
    def work(group: Group) -> tuple[list[Tensor], int]:
        tensors = make(group.rank, dtype)
        places = [(t.data_ptr(), t.stride()) for t in tensors]
        sent = mean_(tensors, group, recipe)
        assert places == [(t.data_ptr(), t.stride()) for t in tensors]
        return tensors, sent

    return virtual.run(workers, work)


@pytest.mark.parametrize("name", WIRES)
@pytest.mark.parametrize("workers", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_mean_is_exact_to_the_wires_precision_and_equal_to_the_bit(
    name: str, workers: int, dtype: torch.dtype
) -> None:
    results = means(workers, dtype, WIRES[name])
    inputs = [make(rank, dtype) for rank in range(workers)]
    precision = max(PRECISION[name], torch.finfo(dtype).eps)
    for index, mean in enumerate(results[0][0]):
        stacked = torch.stack([tensors[index].double() for tensors in inputs])
        bound = precision * (stacked.abs().amax(0) if workers > 1 else torch.tensor(0.0))
        assert bool(((mean.double() - stacked.mean(0)).abs() <= bound + 1e-7 * precision).all())
        for tensors, _ in results:
            assert torch.equal(tensors[index], mean)


def test_fp64_tensors_keep_their_precision() -> None:
    results = means(3, torch.float64, wire.fp32())
    exact = torch.stack([make(rank, torch.float64)[3] for rank in range(3)]).mean(0)
    assert float((results[0][0][3] - exact).abs().max()) < 1e-15


@settings(deadline=None, max_examples=30)
@given(workers=st.integers(1, 9), numel=st.integers(1, 50), seed=st.integers(0, 100))
def test_identical_replicas_are_a_fixed_point_of_the_exact_wire(
    workers: int, numel: int, seed: int
) -> None:
    values = torch.randn(numel, generator=torch.Generator().manual_seed(seed))

    def work(group: Group) -> Tensor:
        mine = values.clone()
        mean_([mine], group, wire.fp32())
        return mine

    assert all(torch.equal(result, values) for result in virtual.run(workers, work))


@pytest.mark.parametrize("name", WIRES)
@pytest.mark.parametrize("workers", [2, 3])
def test_payload_is_what_the_wire_predicts(name: str, workers: int) -> None:
    recipe = WIRES[name]
    sizes = [wire.CHUNK // 2 + 5, 11, 300_000]

    def work(group: Group) -> int:
        return mean_([torch.zeros(size) for size in sizes], group, recipe)

    limit = recipe.limit(workers, sum(sizes))
    full, rest = divmod(sum(sizes), limit)
    chunks = [limit] * full + [rest]
    sent = virtual.run(workers, work)
    assert max(sent) == sent[0] == sum(recipe.payload_bytes(numel, workers) for numel in chunks)
    width = {"fp32": 4, "bf16": 2, "fp16": 2}[name]
    assert sum(sent) == pytest.approx(2 * (workers - 1) * width * sum(chunks), rel=1e-4)


def test_means_of_small_models_travel_in_chunks_that_are_worth_their_calls() -> None:
    wires = (wire.fp32(), wire.bf16(), wire.quantised(codec.fp4()))
    assert [each.limit(4, numel=200_000) >= 200_000 for each in wires] == [False, False, True]


@pytest.mark.parametrize("apart", [False, True])
def test_codes_are_made_of_values_where_they_lie_if_that_is_end_to_end(apart: bool) -> None:
    taken: list[torch.dtype] = []

    class Watched(wire.Staging):
        def allocate(self, numel: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
            taken.append(dtype or like.dtype)
            return super().allocate(numel, like, dtype)

    def values(rank: int) -> Tensor:
        return torch.randn(8_001, generator=torch.Generator().manual_seed(rank))

    def work(group: Group) -> Tensor:
        tensors = torch.split(values(group.rank), [3_000, 1, 5_000])
        if apart:
            tensors = tuple(tensor.clone() for tensor in tensors)
        mean_(tensors, group, wire.bf16(), staging=Watched())
        return torch.cat(tensors)

    expected = [values(0), values(1)]

    def whole(group: Group) -> None:
        mean_([expected[group.rank]], group, wire.bf16())

    virtual.run(2, whole)
    for mean in virtual.run(2, work):
        assert torch.equal(mean, expected[0])
    assert (torch.float32 in taken) == apart


@pytest.mark.parametrize("name", WIRES)
def test_weights_are_divided_out(name: str) -> None:
    def work(group: Group) -> Tensor:
        weight = float(group.rank)
        mine = torch.full((10,), float(group.rank + 1))
        weigh_([mine], weight)
        mean_([mine], group, WIRES[name], lambda: 3.0)
        return mine

    for result in virtual.run(3, work):
        assert torch.allclose(result, torch.tensor((2 * 1 + 3 * 2) / 3), rtol=PRECISION[name])


def test_fp16_takes_its_largest_value_where_a_value_is_too_large() -> None:
    def work(group: Group) -> Tensor:
        mine = torch.tensor([1e6, -1e6, 1.0])
        mean_([mine], group, wire.fp16())
        return mine

    assert virtual.run(2, work)[0].tolist() == [65504.0, -65504.0, 1.0]


def test_the_maximum_keeps_dtypes_and_large_integers() -> None:
    def work(group: Group) -> list[Tensor]:
        big = 2**60 + group.rank
        tensors = [
            torch.tensor([big, -group.rank]), torch.tensor(group.rank == 1), torch.tensor(0.5)
        ]  # fmt: skip
        maximum_(tensors, group)
        return tensors

    for integers, flag, number in virtual.run(3, work):
        assert integers.tolist() == [2**60 + 2, 0]
        assert flag.dtype == torch.bool
        assert bool(flag)
        assert float(number) == 0.5


def over_processes(rank: int, name: str) -> list[Tensor]:
    import torch.distributed as dist

    from postlocal.comm.group import resolve

    assert dist.is_initialized()
    tensors = make(rank, torch.float32)
    mean_(tensors, resolve(None, None), WIRES[name])
    return tensors


@pytest.mark.parametrize("name", WIRES)
@pytest.mark.parametrize("world", [2, 3])
def test_processes_and_threads_give_the_same_mean(ranks: Ranks, name: str, world: int) -> None:
    real = ranks(world, over_processes, name)
    pretended = means(world, torch.float32, WIRES[name])
    for index, tensor in enumerate(real[0]):
        assert all(torch.equal(tensor, other[index]) for other in real)
        assert torch.allclose(tensor, pretended[0][0][index], atol=1e-6)


def test_flat_views_share_memory_where_there_are_no_gaps() -> None:
    for tensor in make(0, torch.float32)[:6]:
        flat = flat_view(tensor)
        assert flat is not None
        assert flat.data_ptr() == tensor.data_ptr()
        assert flat.numel() == tensor.numel()
    assert flat_view(torch.zeros(6, 8)[:, ::2]) is None
    assert flat_view(torch.zeros(3).expand(4, 3)) is None


@settings(deadline=None)
@given(numel=st.integers(0, 40_000), scale=st.floats(1e-3, 1e3))
def test_the_squared_norm_is_that_of_fp64(numel: int, scale: float) -> None:
    tensor = torch.randn(numel) * scale
    expected = float(tensor.double().square().sum())
    assert squared_norm([tensor]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_found_among_many(bad: float) -> None:
    tensors = [torch.randn(20_000), torch.randn(30, 40)[:, ::2]]
    assert all_finite(tensors, squared_norm(tensors))
    tensors[0][17_123] = bad
    assert not all_finite(tensors, squared_norm(tensors))


def test_large_finite_values_are_finite_though_their_squares_are_not() -> None:
    tensors = [torch.full((10,), 1e30)]
    assert squared_norm(tensors) == float("inf")
    assert all_finite(tensors, squared_norm(tensors))
