"""Wires in use: what all carriers have in common, and what each remembers."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from postlocal import virtual, wire
from postlocal.codec import int8
from postlocal.group import Group
from postlocal.tensors import weigh_
from postlocal.topology import WORLD, Layout, nested
from postlocal.wire import Carrier, Wire

Ranks = Callable[..., list[Any]]

WIRES: dict[str, Wire] = {
    "fp32": wire.fp32(),
    "bf16": wire.bf16(),
    "int8": wire.quantised(int8()),
    "bf16 with feedback": wire.error_feedback(wire.bf16()),
    "int8 with feedback": wire.error_feedback(wire.quantised(int8()), decay=0.9),
}
SHAPES = {"norm": (7,), "scale": (), "none": (0, 3), "weight": (64, 33), "conv": (5, 4, 3, 2)}


def make(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()
    }
    tensors["conv"] = tensors["conv"].to(memory_format=torch.channels_last)
    tensors["gaps"] = torch.randn(6, 8, generator=generator).to(dtype)[:, ::2]
    tensors["turned"] = torch.randn(6, 8, generator=generator).to(dtype).t()
    return tensors


def opened(recipe: Wire, group: Group) -> Carrier:
    return recipe.open(Layout(group, nested({"pair": 1})), WORLD)


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", WIRES)
@pytest.mark.parametrize("workers", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_all_ranks_end_with_identical_bits_in_the_memory_they_had(
    name: str, workers: int, dtype: torch.dtype
) -> None:
    def work(group: Group) -> list[dict[str, Tensor]]:
        carrier = opened(WIRES[name], group)
        rounds = []
        for step in range(3):
            tensors = make(10 * step + group.rank, dtype)
            places = [(t.data_ptr(), t.stride()) for t in tensors.values()]
            carrier.mean_(tensors)
            assert places == [(t.data_ptr(), t.stride()) for t in tensors.values()]
            rounds.append(tensors)
        return rounds

    results = virtual.run(workers, work)
    for rounds in results:
        assert all(equal(*pair) for pair in zip(rounds, results[0], strict=True))


@pytest.mark.parametrize("name", WIRES)
@pytest.mark.parametrize("workers", [1, 2, 3, 4, 5])
def test_bytes_are_as_predicted(name: str, workers: int) -> None:
    def work(group: Group) -> None:
        carrier = opened(WIRES[name], group)
        for step in range(2):
            tensors = make(step)
            predicted = carrier.payload_bytes(tensors)
            assert carrier.mean_(tensors) == predicted
            assert (predicted > 0) == (workers > 1)

    virtual.run(workers, work)


@pytest.mark.parametrize("name", WIRES)
def test_weights_are_divided_out(name: str) -> None:
    def work(group: Group) -> Tensor:
        mine = torch.full((300,), float(group.rank + 1))
        weigh_([mine], float(group.rank))
        opened(WIRES[name], group).mean_({"weight": mine}, lambda: 3.0)
        return mine

    for result in virtual.run(3, work):
        assert torch.allclose(result, torch.tensor((2 * 1 + 3 * 2) / 3), rtol=2.0**-7)


@pytest.mark.parametrize("name", WIRES)
@pytest.mark.parametrize("workers", [1, 3])
def test_a_state_taken_in_the_middle_goes_on_bit_for_bit(name: str, workers: int) -> None:
    def work(group: Group) -> None:
        carrier = opened(WIRES[name], group)
        for step in range(3):
            carrier.mean_(make(10 * step + group.rank))
        restored = opened(WIRES[name], group)
        restored.load_state_dict(carrier.state_dict())
        for step in range(3, 6):
            one, other = make(10 * step + group.rank), make(10 * step + group.rank)
            carrier.mean_(one)
            restored.mean_(other)
            assert equal(one, other)
        assert equal(carrier.state_dict(), restored.state_dict())

    virtual.run(workers, work)


@pytest.mark.parametrize("name", WIRES)
def test_tensors_may_come_in_parts_that_change(name: str) -> None:
    def work(group: Group) -> Tensor:
        carrier = opened(WIRES[name], group)
        everything = make(group.rank)
        carrier.mean_(everything)
        for step in range(2):
            some = make(step + group.rank)
            names = list(some)[:: 1 - 2 * step]
            carrier.mean_({each: some[each] for each in names[:3]})
            carrier.mean_({each: some[each] for each in names[3:]})
        return some["weight"]

    results = virtual.run(3, work)
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_state_of_another_model_is_refused() -> None:
    def work(group: Group) -> None:
        carrier = opened(WIRES["int8 with feedback"], group)
        carrier.load_state_dict({"weight": torch.zeros(3)})
        with pytest.raises(ValueError, match=r"shape \(3,\) for 'weight', the tensor has \(4,\)"):
            carrier.mean_({"weight": torch.zeros(4)})

    virtual.run(2, work)


def test_what_is_forgotten_is_not_sent() -> None:
    def work(group: Group) -> bool:
        carrier = opened(WIRES["int8 with feedback"], group)
        carrier.mean_({"weight": torch.randn(99)})
        carrier.forget()
        return carrier.state_dict() == {}

    assert virtual.run(2, work) == [True, True]


@pytest.mark.parametrize(
    ("make_wire", "message"),
    [
        (lambda: wire.error_feedback(wire.fp32()), "must be a wire that loses something"),
        (
            lambda: wire.error_feedback(wire.error_feedback(wire.bf16())),
            "must be a wire that remembers nothing",
        ),
        (lambda: wire.error_feedback(wire.bf16(), decay=0.0), "above 0 and at most 1, got 0.0"),
        (lambda: wire.error_feedback(wire.bf16(), decay=1.1), "above 0 and at most 1, got 1.1"),
    ],
)
def test_feedback_that_makes_no_sense_is_refused(
    make_wire: Callable[[], Wire], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_wire()
