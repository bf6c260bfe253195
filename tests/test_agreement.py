"""Ranks find out before training that they were given different things."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import postlocal
from postlocal import DisagreementError, PostlocalError, Strategy, schedule, strategies, virtual
from postlocal.comm.agreement import check, same_values_, together
from postlocal.comm.group import Group
from tests.launcher import Table, in_one_launch
from tests.models import batches, equal, mlp, sgd, train_step, values

Ranks = Callable[..., list[Any]]

lines = st.lists(st.sampled_from("abc"), max_size=3)


@settings(deadline=None)
@given(everyones=st.lists(lines, min_size=1, max_size=3), same=lines)
def test_check_raises_on_all_or_on_none_and_only_where_something_differs(
    everyones: list[list[str]], same: list[str]
) -> None:
    def work(group: Group) -> str:
        try:
            check(group, {"same": same, "item": everyones[group.rank]})
        except DisagreementError as error:
            return str(error)
        return ""

    (message,) = set(virtual.run(len(everyones), work))
    agreed = all(theirs == everyones[0] for theirs in everyones)
    assert (message == "") == agreed
    assert agreed or message.startswith("ranks differ in item: rank 0 has ")


def test_the_first_line_that_differs_is_shown() -> None:
    def work(group: Group) -> None:
        check(group, {"item": ["a", "b" if group.rank < 2 else "c", str(group.rank)]})

    message = "ranks differ in item: rank 0 has '0', rank 1 has '1'"
    with pytest.raises(DisagreementError, match=message):
        virtual.run(2, work)
    with pytest.raises(DisagreementError, match="rank 0 has '0', rank 1 has '1'"):
        virtual.run(3, work)


def test_a_part_that_is_missing_is_counted() -> None:
    def work(group: Group) -> None:
        check(group, {"item": ["a", "b"][: 2 - group.rank]})

    with pytest.raises(DisagreementError, match="rank 0 has 2 of them, rank 1 1"):
        virtual.run(2, work)


def test_a_failure_on_some_ranks_is_a_failure_on_all() -> None:
    def work(group: Group) -> str:
        try:
            with together(group):
                if group.rank in (1, 2):
                    raise TypeError(f"no {group.rank}")
        except (TypeError, PostlocalError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    others = "TypeError: no 1 (rank 1); TypeError: no 2 (rank 2)"
    told = f"DisagreementError: another rank cannot go on: {others}"
    assert virtual.run(4, work) == [
        told,
        "TypeError: no 1",
        "TypeError: no 2",
        told,
    ]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool]
)
def test_values_of_rank_0_are_taken_in_place_and_what_differed_is_named(dtype: torch.dtype) -> None:
    def work(group: Group) -> tuple[list[str], dict[str, Tensor], bool]:
        tensors = {
            "same": torch.ones(3).to(dtype),
            "other": torch.full((2, 3), float(group.rank)).to(dtype).t(),
            "empty": torch.zeros(0).to(dtype),
            "number": torch.tensor(1.0 + group.rank).to(dtype),
        }
        before = [(tensor.data_ptr(), tensor.stride()) for tensor in tensors.values()]
        changed = same_values_(group, tensors)
        after = [(tensor.data_ptr(), tensor.stride()) for tensor in tensors.values()]
        return changed, tensors, before == after

    results = virtual.run(2, work)
    assert results[0][0] == []
    assert results[1][0] == (["other"] if dtype == torch.bool else ["other", "number"])
    for _, tensors, in_place in results:
        assert in_place
        assert all(torch.equal(tensors[name], results[0][1][name]) for name in tensors)


class Kinds(nn.Module):
    """Buffers of kinds that not every backend can reduce."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4, 3), float(rank)).t())
        for dtype in (torch.bool, torch.uint8, torch.int16, torch.float16, torch.complex64):
            name = str(dtype).removeprefix("torch.")
            self.register_buffer(name, torch.full((3,), float(rank)).to(dtype))
        self.register_buffer("empty", torch.zeros(0))


def kinds(rank: int) -> dict[str, Tensor]:
    model = Kinds(rank)
    postlocal.attach(model, sgd(model), strategies.local_sgd(2))
    return dict(model.state_dict())


def test_all_kinds_of_tensors_start_from_those_of_rank_0(ranks: Ranks) -> None:
    expected = Kinds(0).state_dict()
    for state in ranks(3, kinds):
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def strided(rank: int) -> nn.Module:
    return nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last if rank else None)  # type: ignore[call-overload, no-any-return]


def with_buffer(rank: int) -> nn.Module:
    model = mlp()
    if rank:
        model.register_buffer("extra", torch.zeros(1))
    return model


def complex_on(rank: int) -> nn.Module:
    dtype = torch.complex64 if rank else torch.float32
    return nn.ParameterList([nn.Parameter(torch.zeros(2, dtype=dtype))])


def frozen_on(rank: int) -> nn.Module:
    return mlp().requires_grad_(rank == 0)


ODD: dict[str, tuple[Callable[[int], dict[str, Any]], str, str]] = {
    "stride": (
        lambda odd: {"model": strided(odd)},
        r"ranks differ in parameters and buffers: rank 0 has 'weight: .*, rank 1 has 'weight: ",
        "",
    ),
    "one layer more": (
        lambda odd: {"model": nn.Sequential(*[nn.Linear(2, 2) for _ in range(1 + odd)])},
        "ranks differ in parameters and buffers: rank 0 has 2 of them, rank 1 4",
        "",
    ),
    "one buffer more": (
        lambda odd: {"model": with_buffer(odd)},
        "ranks differ in parameters and buffers: rank 0 has 4 of them, rank 1 5",
        "",
    ),
    "initial": (
        lambda odd: {"initial": "refuse" if odd else "broadcast"},
        "ranks differ in initial: rank 0 has 'broadcast', rank 1 has 'refuse'",
        "",
    ),
    "learning rate that plans another round": (
        lambda odd: {"strategy": strategies.qsr(alpha=0.2, base=4), "lr": 0.05 if odd else 0.1},
        r"ranks differ in first round: .*steps=4.*rank 1 has .*steps=16",
        "",
    ),
    "complex parameter": (
        lambda odd: {"model": complex_on(odd)},
        "another rank cannot go on: TypeError: parameter '0' is complex",
        "parameter '0' is complex: keep it as two real parameters",
    ),
    "nothing to train": (
        lambda odd: {"model": frozen_on(odd)},
        "another rank cannot go on: ValueError: model must have a parameter that requires grad",
        "model must have a parameter that requires grad, got none",
    ),
    "unknown level": (
        lambda odd: {"strategy": strategies.hierarchical({"rack" if odd else "world": 4})},
        "another rank cannot go on: ValueError: level must be one that the topology has",
        r"level must be one that the topology has \(world\), got 'rack'",
    ),
    "gradients that nothing reduces": (
        lambda odd: {"strategy": strategies.ddp()},
        "model has nothing that reduces gradients: wrap it",
        "model has nothing that reduces gradients: wrap it",
    ),
    "timeout": (
        lambda odd: {"timeout": -1.0 if odd else 5.0},
        "another rank cannot go on: ValueError: timeout must be above 0",
        "timeout must be above 0 seconds, got -1",
    ),
}


def attach_odd(rank: int, case: str) -> tuple[str, str]:
    given = ODD[case][0](int(rank == 1))
    model = given.pop("model", None) or mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=given.pop("lr", 0.1))
    strategy = given.pop("strategy", strategies.local_sgd(4))
    with pytest.raises((ValueError, TypeError, DisagreementError)) as caught:
        postlocal.attach(model, optimizer, strategy, **given)
    return type(caught.value).__name__, str(caught.value)


odd = in_one_launch(3, {case: (attach_odd, case) for case in ODD})


@pytest.mark.parametrize("case", ODD)
def test_one_odd_rank_is_an_error_on_every_rank(odd: Table, case: str) -> None:
    _, others, own = ODD[case]
    everywhere = own == others
    for rank, (kind, message) in enumerate(odd[case]):
        mine = everywhere or (rank == 1 and own)
        assert kind in (("ValueError", "TypeError") if mine else ("DisagreementError",))
        assert re.search(own if mine else others, message), message


def forgetful(rank: int) -> tuple[str, bool]:
    """Rank 2 leaves one of six calls of step() out."""
    model = mlp()
    optimizer = sgd(model)
    sync = postlocal.attach(model, optimizer, strategies.diloco(4))
    start: list[Tensor] = []
    for step, (x, y) in enumerate(batches(rank, 6)):
        train_step(model, optimizer, x, y)
        if rank != 2 or step != 4:
            sync.step()
        start = values(model) if step == 3 else start
    with pytest.raises(DisagreementError) as caught:
        sync.finish()
    return str(caught.value), equal(start, values(model))


def test_a_call_of_step_that_one_rank_left_out_is_noticed_at_the_next_sync(ranks: Ranks) -> None:
    for message, taken_back in ranks(3, forgetful):
        assert "rank 2 of the group has taken 5 steps, rank 0 6" in message
        assert "count each iteration once on every rank (sync.step()" in message
        assert taken_back


def refused(rank: int) -> str:
    model = mlp()
    if rank == 2:
        with torch.no_grad():
            model[2].bias.add_(1.0)  # type: ignore[index]
    with pytest.raises(DisagreementError) as caught:
        postlocal.attach(model, sgd(model), strategies.local_sgd(2), initial="refuse")
    return str(caught.value)


def test_refuse_names_the_tensor_and_the_rank_on_all_ranks(ranks: Ranks) -> None:
    expected = "ranks differ in initial values: '2.bias' on rank 2 is not rank 0's"
    assert all(message.startswith(expected) for message in ranks(3, refused))


def attached_again(rank: int) -> list[tuple[int, ...]]:
    """A first attach that fails must not spoil the next one."""
    model = mlp()
    with pytest.raises((ValueError, DisagreementError)):
        postlocal.attach(
            model, sgd(model), Strategy(schedule.periodic(2, "rack" if rank else "rank"))
        )
    sync = postlocal.attach(model, sgd(model), strategies.local_sgd(1))
    sync.step()
    return [record.excluded for record in sync.meter.records]


def test_attach_can_be_tried_again_after_it_failed(ranks: Ranks) -> None:
    assert ranks(2, attached_again) == [[()], [()]]
