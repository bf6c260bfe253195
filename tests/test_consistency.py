"""What is said to be equal is compared; a model that changed is followed or refused."""

import copy
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import postlocal
from postlocal import DisagreementError, ModelChangedError, checkpoint, strategies, virtual
from postlocal.comm.group import Group
from postlocal.strategies import Strategy
from postlocal.sync.consistency import Held, check_equal_, fingerprint
from postlocal.sync.parameters import Replica
from tests.launcher import Table, in_one_launch
from tests.models import adamw, batches, convnet, equal, listen, mlp, sgd, train_step, values

Ranks = Callable[..., list[Any]]

STRATEGIES: dict[str, Strategy] = {
    "no anchor": strategies.local_sgd(4),
    "anchor": strategies.diloco(4),
    "fragments": strategies.streaming_diloco(4, fragments=2, delay=0, mix=0.0),
    "delay": strategies.streaming_diloco(4, fragments=1, delay=1),
}

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64]


@settings(deadline=None, max_examples=40)
@given(
    dtype=st.sampled_from(DTYPES),
    numel=st.sampled_from([1, 7, 4096, 40_003]),
    data=st.data(),
)
def test_a_fingerprint_differs_where_one_value_does(
    dtype: torch.dtype, numel: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(numel)
    tensor = torch.randint(0, 2, (numel,), generator=generator).to(dtype)
    other = tensor.clone()
    assert fingerprint(other) == fingerprint(tensor)
    index = data.draw(st.integers(0, numel - 1))
    other[index] = 1 - other[index].to(torch.complex64).real
    assert fingerprint(other) != fingerprint(tensor)


@pytest.mark.parametrize("offset", range(4))
def test_a_fingerprint_is_of_values_wherever_they_lie(offset: int) -> None:
    memory = torch.arange(50_000, dtype=torch.float32)
    tensor = memory[offset : offset + 40_000].view(200, 200)
    assert fingerprint(tensor) == fingerprint(tensor.clone())
    assert fingerprint(tensor.t()) == fingerprint(tensor)  # as it lies in memory
    assert fingerprint(tensor[:, ::2]) == fingerprint(tensor[:, ::2].clone())


def test_a_fingerprint_takes_nan_as_equal_to_itself_and_zeros_as_of_two_signs() -> None:
    assert fingerprint(torch.tensor([float("nan")])) == fingerprint(torch.tensor([float("nan")]))
    assert fingerprint(torch.tensor([0.0])) != fingerprint(torch.tensor([-0.0]))


def settled(world: int, make: Callable[[int], dict[str, Tensor]]) -> list[Any]:
    def work(group: Group) -> Any:
        tensors = make(group.rank)
        try:
            check_equal_(group, Held(tensors), "they should be", "do so")
        except DisagreementError as error:
            return str(error)
        return tensors

    return virtual.run(world, work)


def test_values_that_differ_by_rounding_become_those_of_rank_0(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def make(rank: int) -> dict[str, Tensor]:
        return {"same": torch.ones(3), "near": torch.ones(2, 3).t() * (1 + 1e-6 * rank)}

    for tensors in settled(3, make):
        assert torch.equal(tensors["near"], torch.ones(3, 2))
    (message,) = caplog.messages
    assert "ranks differed by 2.0e-06 of a tensor's norm at most although they should be" in message


def test_values_that_differ_are_named_with_ranks_and_distances_on_all_ranks() -> None:
    def make(rank: int) -> dict[str, Tensor]:
        tensors = {f"layer.{index}": torch.ones(4) for index in range(6)}
        for index in range(1, 6):
            tensors[f"layer.{index}"] *= 1 + 0.5 * (rank == 2)
        return tensors

    (message,) = set(settled(3, make))
    assert message == (
        "ranks hold different values although they should be: "
        "'layer.1' (rank 2: 5.0e-01 of its norm from rank 0's), "
        "'layer.2' (rank 2: 5.0e-01 of its norm from rank 0's), "
        "'layer.3' (rank 2: 5.0e-01 of its norm from rank 0's) and 2 more; do so"
    )


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), 1.0])
def test_one_value_that_is_not_a_number_or_not_zero_is_more_than_rounding(odd: float) -> None:
    messages = settled(2, lambda rank: {"w": torch.tensor([0.0, odd if rank else 0.0])})
    assert all("'w' (rank 1: inf of its norm" in message for message in messages)


def test_integers_that_differ_are_more_than_rounding() -> None:
    messages = settled(2, lambda rank: {"count": torch.tensor([10**9 + rank])})
    assert all("'count' (rank 1: inf" in message for message in messages)


class Centred(nn.Module):
    """Assigns its buffer anew in each forward pass."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        self.mean = 0.5 * self.mean + y.detach().mean(0)
        return y


def train_centred(rank: int, name: str) -> tuple[Tensor, Tensor, bool]:
    """The buffer of this rank before the last synchronization, and after it."""
    model = Centred()
    optimizer = sgd(model)
    sync = postlocal.attach(model, optimizer, STRATEGIES[name])
    for x, y in batches(rank, 7):
        train_step(model, optimizer, x, y)
        sync.step()
    before = model.mean.clone()
    sync.finish()
    agreed = sync.agreed
    sync.close()
    return before, model.mean, agreed


def look_at_centred(rank: int, name: str) -> tuple[Tensor, Tensor, bool]:
    """The agreed buffer within a round, that of this rank, and whether that came back."""
    model = Centred()
    optimizer = sgd(model)
    sync = postlocal.attach(model, optimizer, STRATEGIES[name])
    for x, y in batches(rank, 7):
        train_step(model, optimizer, x, y)
        sync.step()
    local = model.mean.clone()
    with sync.agreed_parameters():
        agreed = model.mean.clone()
    return agreed, local, equal([local], [model.mean])


LOOKED_AT = ["anchor", "fragments", "delay"]
looked_at = in_one_launch(2, {name: (look_at_centred, name) for name in LOOKED_AT})


@pytest.mark.parametrize("name", LOOKED_AT)
def test_the_agreed_model_has_agreed_buffers_where_they_are_assigned_anew(
    looked_at: Table, name: str
) -> None:
    results = looked_at[name]
    for agreed, local, back in results:
        assert equal([agreed], [results[0][0]])
        assert not equal([agreed], [local])
        assert back


centred = in_one_launch(2, {name: (train_centred, name) for name in STRATEGIES})


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_buffer_that_is_assigned_anew_is_averaged(centred: Table, name: str) -> None:
    results = centred[name]
    mean = torch.stack([before for before, _, _ in results]).mean(0)
    for _, after, agreed in results:
        assert agreed
        torch.testing.assert_close(after, mean)


def train_moved(rank: int, name: str, how: str) -> list[Tensor]:
    model = convnet().double().float()  # not what is tested: the same memory format for all
    optimizer = adamw(model)
    sync = postlocal.attach(model, optimizer, STRATEGIES[name])
    for step, (x, y) in enumerate(batches(rank, 10, (1, 6, 6))):
        if step in (2, 5):
            MOVES[how](model)
        train_step(model, optimizer, x, y)
        sync.step()
    sync.finish()
    sync.close()
    return [tensor.clone() for tensor in model.state_dict().values()]


def reassign(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    for layer in model.modules():
        for name, buffer in list(layer.named_buffers(recurse=False)):
            setattr(layer, name, buffer.clone())


def swap(model: nn.Module) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double().float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


MOVES: dict[str, Callable[[nn.Module], object]] = {
    "not at all": lambda model: None,
    "double and back": lambda model: model.double().float(),
    "other memory": reassign,
    "swapped": swap,
}


moved = in_one_launch(
    2,
    {(name, how): (train_moved, name, how) for name in STRATEGIES for how in MOVES}
    | {(name, "stayed"): (train_moved, name, "not at all") for name in STRATEGIES},
)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_model_that_was_moved_and_back_is_synchronized_where_it_is(
    moved: Table, name: str
) -> None:
    stayed = moved[name, "stayed"]
    for how in MOVES:
        for mine, other in zip(moved[name, how], stayed, strict=True):
            assert equal(mine, other), how
            assert equal(mine, stayed[0])


def unfreeze(model: Any, optimizer: Any) -> None:
    model[0].requires_grad_(True)


def unfreeze_and_train(model: Any, optimizer: Any) -> None:
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(model[0].parameters())})


def add_head(model: Any, optimizer: Any) -> None:
    model.append(nn.Linear(4, 4))


def train_stranger(model: Any, optimizer: Any) -> None:
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})


def drop_group(model: Any, optimizer: Any) -> None:
    optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"][:1]


def assign(model: Any, optimizer: Any) -> None:
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


def resize_buffer(model: Any, optimizer: Any) -> None:
    model.scale = torch.ones(5)


def widen(model: Any, optimizer: Any) -> None:
    model[2].double()


def drop_layer(model: Any, optimizer: Any) -> None:
    del model[2]


CHANGES: dict[Callable[[Any, Any], None], str] = {
    unfreeze: r"parameter '0.weight' requires grad now and did not at attach; call sync.finish\(\)",
    unfreeze_and_train: "parameter '0.weight' requires grad now and did not at attach",
    add_head: "'3.weight' was not in the model at attach",
    train_stranger: r"optimizer must hold parameters of model only, got 1 that it lacks .*\(3,\)",
    drop_group: "optimizer held parameter '2.bias' at attach and does not any more",
    assign: "parameter '2.weight' is not the object that it was at attach",
    resize_buffer: r"'scale' was \(4,\) of torch.float32 .* at attach and is \(5,\) of torch",
    widen: r"'2.weight' was \(4, 16\) of torch.float32 .* and is \(4, 16\) of torch.float64",
    drop_layer: "'2.weight' was in the model at attach and is not any more",
}


def change(rank: int, name: str, where: tuple[int, ...]) -> dict[str, str]:
    messages = {}
    for make in CHANGES:
        model = mlp()
        model[0].requires_grad_(False)  # type: ignore[index]
        model.register_buffer("scale", torch.ones(4))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        sync = postlocal.attach(model, optimizer, STRATEGIES[name])
        if rank in where:
            make(model, optimizer)
        with pytest.raises(ModelChangedError) as caught:
            for _ in range(5):
                sync.step()
        messages[make.__name__] = str(caught.value)
        sync.close()
    return messages


WHOLE = ["no anchor", "anchor", "delay"]
changed = in_one_launch(
    2, {(name, where): (change, name, where) for name in WHOLE for where in ((0, 1), (1,))}
)


@pytest.mark.parametrize("where", [(0, 1), (1,)], ids=["all", "one"])
@pytest.mark.parametrize("name", WHOLE)
def test_a_model_that_cannot_be_synchronized_any_more_is_refused_on_all_ranks(
    changed: Table, name: str, where: tuple[int, ...]
) -> None:
    who = "" if len(where) == 2 else " (rank 1)"
    for messages in changed[name, where]:
        for make, expected in CHANGES.items():
            assert messages[make.__name__].endswith(who)
            assert re.search(expected, messages[make.__name__]), messages[make.__name__]


def change_beside_uneven_work(rank: int, name: str) -> str:
    model = mlp()
    sync = postlocal.attach(model, sgd(model), STRATEGIES[name])
    if rank == 1:
        assign(model, None)
    with pytest.raises(ModelChangedError) as caught:
        for _ in range(5):
            sync.step(work=0.5 if rank == 2 else 1.0)
    sync.close()
    return str(caught.value)


changed_beside_uneven_work = in_one_launch(
    3, {name: (change_beside_uneven_work, name) for name in WHOLE}
)


@pytest.mark.parametrize("name", WHOLE)
def test_a_changed_model_is_refused_on_all_ranks_where_they_did_unequal_work(
    changed_beside_uneven_work: Table, name: str
) -> None:
    for message in changed_beside_uneven_work[name]:
        assert message.startswith("parameter '0.weight' is not the object")
        assert message.endswith(" (rank 1)")


def train_a_part_at_a_time(rank: int) -> tuple[list[Tensor], list[int]]:
    """Two parts take turns: what rests does not require grad, and some steps end like that."""
    model: Any = mlp()
    optimizer = sgd(model)
    sync = postlocal.attach(model, optimizer, strategies.diloco(3))
    for step, (x, y) in enumerate(batches(rank, 6)):
        for index, layer in enumerate((model[0], model[2])):
            layer.requires_grad_(index == step % 2)
        train_step(model, optimizer, x, y)
        sync.step()
    return values(model), [record.step for record in sync.meter.records]


def test_parameters_that_rest_for_some_steps_are_synchronized_all_the_same(ranks: Ranks) -> None:
    (one, steps), (other, _) = ranks(2, train_a_part_at_a_time)
    assert steps == [3, 6]
    assert equal(one, other)


def train_added_group(rank: int) -> tuple[list[Tensor], list[Tensor]]:
    model: Any = mlp()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9)
    strategy = dataclasses.replace(strategies.local_sgd(4), optimizer_state="average")
    sync = postlocal.attach(model, optimizer, strategy)
    for step, (x, y) in enumerate(batches(rank, 8)):
        if step == 2:
            optimizer.add_param_group({"params": list(model[2].parameters())})
        train_step(model, optimizer, x, y)
        sync.step()
    state = [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
    return values(model), state


def test_parameters_of_the_model_that_join_the_optimizer_have_their_state_averaged(
    ranks: Ranks,
) -> None:
    (one, state), (other, other_state) = ranks(2, train_added_group)
    assert len(state) == 4
    assert equal(one, other)
    assert equal(state, other_state)


class Target(nn.Module):
    """A network, and a frozen one that follows it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.online, self.target, self.fixed = mlp(), mlp(), nn.Linear(64, 64)
        self.target.requires_grad_(False)
        self.fixed.requires_grad_(False)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.online(x)
        return y

    @torch.no_grad()
    def follow(self) -> None:
        for mine, theirs in zip(self.target.parameters(), self.online.parameters(), strict=True):
            if self.how == "data":
                mine.data.mul_(0.9).add_(theirs.data, alpha=0.1)
            else:
                mine.lerp_(theirs, 0.1)


def train_target(
    rank: int, name: str, how: str
) -> tuple[list[Tensor], list[Tensor], set[str], int]:
    model = Target(how)
    optimizer = sgd(model.online)
    sync = postlocal.attach(model, optimizer, STRATEGIES[name])
    for x, y in batches(rank, 7):
        train_step(model, optimizer, x, y)
        model.follow()
        sync.step()
    before = values(model.target)
    sync.finish()
    sync.close()
    sent = sync.meter.payload_bytes["buffers"]
    return before, values(model.target), sync.replica.moving, sent


followed = in_one_launch(
    2, {(name, how): (train_target, name, how) for name in WHOLE for how in ("data", "in place")}
)


@pytest.mark.parametrize("how", ["data", "in place"])
@pytest.mark.parametrize("name", WHOLE)
def test_frozen_parameters_that_the_loop_writes_to_are_averaged_and_others_not_sent(
    followed: Table, name: str, how: str
) -> None:
    results = followed[name, how]
    names = {f"target.{name}" for name in ("0.weight", "0.bias", "2.weight", "2.bias")}
    for before, after, moving, sent in results:
        assert moving == names
        assert equal(after, results[0][1])
        assert sent < 8 * sum(tensor.nbytes for tensor in before)  # fixed has 16 kB
    means = [
        torch.stack(pair).mean(0) for pair in zip(*(before for before, *_ in results), strict=True)
    ]
    for mean, after in zip(means, results[0][1], strict=True):
        torch.testing.assert_close(after, mean)


def write_on_one(rank: int) -> list[float]:
    """One rank alone writes to a frozen parameter."""
    model: Any = Target("data")
    sync = postlocal.attach(model, sgd(model.online), strategies.local_sgd(2))
    if rank == 1:
        model.target[2].bias.data.fill_(3.0)
    for _ in range(4):
        sync.step()
    sync.finish()
    bias: list[float] = model.target[2].bias.tolist()
    return bias


def test_a_frozen_parameter_that_one_rank_writes_to_is_averaged_on_all(ranks: Ranks) -> None:
    start = Target("data").target[2].bias  # type: ignore[index]
    one, other = ranks(2, write_on_one)
    assert one == other
    torch.testing.assert_close(torch.tensor(one), (start + 3.0) / 2)


def forget_to_count(rank: int, name: str, counted: int) -> tuple[bool, str]:
    model = mlp()
    optimizer = sgd(model)
    sync = postlocal.attach(model, optimizer, STRATEGIES[name])
    for step, (x, y) in enumerate(batches(rank, 10)):
        train_step(model, optimizer, x, y)
        if step < counted:
            sync.step()
    agreed = sync.agreed
    try:
        sync.finish()
    except DisagreementError as error:
        return agreed, str(error)
    return agreed, ""


forgotten = in_one_launch(
    2,
    {(name, n): (forget_to_count, name, n) for name in ("no anchor", "anchor") for n in (0, 4)},
)


@pytest.mark.parametrize("counted", [0, 4])
@pytest.mark.parametrize("name", ["no anchor", "anchor"])
def test_steps_that_were_not_counted_are_noticed_at_the_end(
    forgotten: Table, name: str, counted: int
) -> None:
    claim = "they were synchronized after step 4" if counted else "no call of sync.step() told"
    for agreed, message in forgotten[name, counted]:
        assert not agreed
        assert message.startswith(f"ranks hold different values although {claim}")
        assert "'0.weight' (rank 1: " in message
        assert message.endswith("not the module inside it")
        assert "call sync.step() on every rank after each optimizer step" in message


def agree_or_not(rank: int) -> list[bool]:
    model: Any = mlp()
    optimizer = sgd(model)
    sync = postlocal.attach(model, optimizer, strategies.local_sgd(2))
    agreed = [sync.agreed]
    for x, y in batches(rank, 4):
        train_step(model, optimizer, x, y)
        agreed.append(sync.agreed)
        sync.step()
        agreed.append(sync.agreed)
    sync.finish()
    agreed.append(sync.agreed)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    return [*agreed, sync.agreed]


def test_agreed_is_true_until_a_parameter_is_written_to(ranks: Ranks) -> None:
    expected = [True, False, False, False, True, False, False, False, True, True, False]
    assert ranks(2, agree_or_not) == [expected] * 2


def agree_in_a_warm_up(rank: int) -> list[bool]:
    model = DistributedDataParallel(mlp())
    optimizer = sgd(model)
    sync = postlocal.attach(model, optimizer, strategies.post_local_sgd(2, 2, "rank"))
    agreed = []
    for x, y in batches(rank, 3):
        train_step(model, optimizer, x, y)
        sync.step()
        agreed.append(sync.agreed)
        if sync.steps == 2:
            sync.finish()
            agreed.append(sync.agreed)
    return agreed


def test_agreed_is_true_where_a_warm_up_ends(ranks: Ranks) -> None:
    assert ranks(2, agree_in_a_warm_up) == [[True, True, True, False]] * 2


def bypass(rank: int, first: int) -> tuple[int, str]:
    """Forward passes of a warm-up leave DDP out from some step on."""
    model = DistributedDataParallel(mlp())
    optimizer = sgd(model)
    sync = postlocal.attach(model, optimizer, strategies.edit(period=4, warmup=5))
    with pytest.raises(DisagreementError) as caught:
        for step, (x, y) in enumerate(batches(rank, 12)):
            train_step(model if step < first else model.module, optimizer, x, y)
            sync.step()
    return sync.steps, str(caught.value)


@pytest.mark.parametrize(("first", "noticed"), [(0, 1), (3, 5)])
def test_a_forward_pass_that_leaves_ddp_out_is_noticed_before_replicas_part(
    ranks: Ranks, first: int, noticed: int
) -> None:
    for steps, message in ranks(2, bypass, first):
        assert steps == noticed
        assert (
            f"although gradients were averaged over all ranks in each of {steps} steps" in message
        )
        assert "not the module inside it" in message


def round_otherwise(rank: int) -> list[list[Tensor]]:
    """One rank rounds the parameters of a warm-up in another way."""
    model = DistributedDataParallel(mlp())
    optimizer = sgd(model)
    sync = postlocal.attach(model, optimizer, strategies.edit(period=4, warmup=5))
    history = []
    for x, y in batches(rank, 9):
        train_step(model, optimizer, x, y)
        if rank == 1:
            with torch.no_grad():
                model.module[2].weight.mul_(1 + 1e-6)
        sync.step()
        history.append(values(model))
    return history


def test_processors_that_round_differently_start_their_rounds_from_equal_values(
    ranks: Ranks,
) -> None:
    one, other = ranks(2, round_otherwise)
    assert not equal(one[3], other[3])
    assert equal(one[4], other[4])
    assert equal(one[8], other[8])


def normalised(rank: int, name: str, steps: int, folder: str) -> dict[str, Any]:
    """Buffers of the agreed model, of the local one, and after a resume."""
    model: nn.Module = convnet()
    if name == "warm-up":
        model = DistributedDataParallel(model)
    optimizer = adamw(model)
    strategy = strategies.edit(4, warmup=5) if name == "warm-up" else STRATEGIES[name]
    sync = postlocal.attach(model, optimizer, strategy)
    for x, y in batches(rank, steps, (1, 6, 6)):
        train_step(model, optimizer, x, y)
        sync.step()

    def buffers() -> list[Tensor]:
        return [buffer.clone() for buffer in model.buffers()]

    local = buffers()
    with sync.agreed_parameters():
        agreed = buffers()
    same_again = equal(local, buffers())
    checkpoint.save(folder, sync)
    fresh: nn.Module = convnet(seed=1)
    if name == "warm-up":
        fresh = DistributedDataParallel(fresh)
    resumed = postlocal.attach(fresh, adamw(fresh), strategy)
    assert checkpoint.restore(folder, resumed) is not None
    with resumed.agreed_parameters():
        after = [buffer.clone() for buffer in fresh.buffers()]
    return {"local": local, "agreed": agreed, "same again": same_again, "resumed": after}


@pytest.mark.parametrize("name", ["anchor", "delay", "warm-up"])
@pytest.mark.parametrize("steps", [3, 6])
def test_buffers_of_the_agreed_model_are_those_last_agreed_on(
    ranks: Ranks, tmp_path: Any, name: str, steps: int
) -> None:
    results = ranks(2, normalised, name, steps, str(tmp_path))
    warming_up = name == "warm-up" and steps < 5
    for result in results:
        assert result["same again"]
        assert equal(result["agreed"], result["resumed"])
        if not warming_up:
            assert equal(result["agreed"], results[0]["agreed"])
            assert not equal(result["agreed"], result["local"])


def end_of_warm_up(rank: int) -> tuple[list[Tensor], bool]:
    model = DistributedDataParallel(convnet())
    optimizer = sgd(model)
    sync = postlocal.attach(model, optimizer, strategies.ddp())
    for x, y in batches(rank, 3, (1, 6, 6)):
        train_step(model, optimizer, x, y)
        sync.step()
    sync.finish()
    return [tensor.clone() for tensor in model.state_dict().values()], sync.agreed


def test_a_run_that_never_parts_ends_with_equal_buffers_too(ranks: Ranks) -> None:
    (one, agreed), (other, _) = ranks(2, end_of_warm_up)
    assert agreed
    assert equal(one, other)


def test_a_change_is_found_by_looking_at_places_alone() -> None:
    model: Any = mlp()
    replica = Replica(model)
    assert replica.refresh() is None
    model[0].weight.data = model[0].weight.data.clone()
    assert replica.refresh() is None
    model[0].weight = nn.Parameter(torch.zeros(16, 8))
    assert "'0.weight' is not the object" in str(replica.refresh())
    assert "'0.weight' is not the object" in str(replica.refresh()), "as long as it is so"


def test_parameters_that_were_tied_and_are_not_any_more_are_named() -> None:
    model: Any = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    model[1].weight.data = model[0].weight.data
    replica = Replica(model)
    assert set(replica.parameters) == {"0.weight", "0.bias", "1.bias"}
    model.double().float()
    assert "'1.weight' was not in the model at attach, or shared memory" in str(replica.refresh())


def end_early(rank: int) -> str:
    model = mlp()
    sync = postlocal.attach(model, sgd(model), strategies.local_sgd(4), timeout=20.0)
    with pytest.raises(DisagreementError) as caught:
        for _ in range(8):
            sync.step()
            if rank == 1 and sync.steps == 4:
                sync.finish()
    return str(caught.value)


def test_a_rank_that_ends_where_replicas_agree_is_told_apart_from_those_that_go_on(
    ranks: Ranks,
) -> None:
    for message in ranks(2, end_early, leaving=(0, 1)):
        assert "rank 1 of the group has taken 4 steps, rank 0 8" in message


class Codebook(nn.Module):
    """A layer, and frozen codes that each rank moves by its own data, some rows at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)
        self.codes = nn.Parameter(torch.zeros(16, 4), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        with torch.no_grad():
            self.codes[5].lerp_(y.detach().mean(0), 0.1)
        return y + self.codes[5]


def train_codebook(rank: int, strategy: Strategy, steps: int) -> list[Tensor]:
    torch.manual_seed(0)
    model = DistributedDataParallel(Codebook())
    optimizer = torch.optim.SGD(model.module.layer.parameters(), lr=0.1)
    sync = postlocal.attach(model, optimizer, strategy)
    for x, y in batches(rank, steps):
        train_step(model, optimizer, x, y)
        sync.step()
    sync.finish()
    return values(model)


CODED: dict[str, Strategy] = {
    "local": strategies.local_sgd(2),
    "warm-up": strategies.post_local_sgd(3, 2, "rank"),
    "warm-up and anchor": strategies.edit(2, 3),
}
codebooks = in_one_launch(
    2, {(name, n): (train_codebook, one, n) for name, one in CODED.items() for n in (2, 7)}
)


@pytest.mark.parametrize("steps", [2, 7])
@pytest.mark.parametrize("name", CODED)
def test_frozen_parameters_that_ranks_write_to_in_places_are_equal_at_the_end(
    codebooks: Table, name: str, steps: int
) -> None:
    one, other = codebooks[name, steps]
    assert equal(one, other)
    assert one[0][5].abs().sum() > 0


def start_frozen_apart(rank: int, strategy: Strategy) -> tuple[list[Tensor], set[str]]:
    model = DistributedDataParallel(Target("lerp"))
    with torch.no_grad():
        model.module.fixed.weight.add_(rank)
    optimizer = adamw(model.module.online)
    sync = postlocal.attach(model, optimizer, strategy, timeout=10)
    for x, y in batches(rank, 7):
        train_step(model, optimizer, x, y)
        sync.step()
    sync.finish()
    return values(model), sync.replica.moving


@pytest.mark.parametrize("strategy", [strategies.diloco(2), strategies.edit(2, warmup=3)])
def test_frozen_parameters_that_attach_made_equal_are_not_written_to(
    ranks: Ranks, strategy: Strategy
) -> None:
    (one, moving), (other, also) = ranks(2, start_frozen_apart, strategy)
    assert equal(one, other)
    assert moving == also == set()


def synchronous_after_local(rank: int, lr: float, initial: Any) -> tuple[list[Tensor], str]:
    """Local rounds leave each rank its own state of the optimizer."""
    model = DistributedDataParallel(mlp())
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for strategy in (strategies.diloco(2), strategies.ddp()):
        try:
            sync = postlocal.attach(model, optimizer, strategy, initial=initial)
        except DisagreementError as error:
            return values(model), str(error)
        for x, y in batches(rank, 20 if strategy == strategies.ddp() else 5):
            train_step(model, optimizer, x, y)
            sync.step()
        sync.finish()
        sync.close()
    return values(model), ""


@pytest.mark.parametrize("lr", [1e-2, 1e-4])
def test_averaged_gradients_after_local_rounds_start_from_one_state_of_the_optimizer(
    ranks: Ranks, lr: float
) -> None:
    (one, _), (other, _) = ranks(2, synchronous_after_local, lr, "broadcast")
    assert equal(one, other)


def test_states_of_optimizers_that_differ_are_refused_if_asked(ranks: Ranks) -> None:
    for _, message in ranks(2, synchronous_after_local, 1e-3, "refuse"):
        assert message.startswith(
            "ranks differ in the state of the optimizer: exp_avg of 0.weight; start from equal"
        )


def resume_synchronously(rank: int, folder: Path) -> list[Tensor]:
    for strategy in (strategies.diloco(2), strategies.ddp()):
        model = DistributedDataParallel(mlp())
        optimizer = adamw(model)
        sync = postlocal.attach(model, optimizer, strategy)
        checkpoint.restore(folder, sync, on_strategy_change="restart")
        for x, y in batches(rank, 5):
            train_step(model, optimizer, x, y)
            sync.step()
        checkpoint.save(folder, sync)
        sync.finish()
    return values(model)


def test_a_resume_with_averaged_gradients_starts_from_one_state_of_the_optimizer(
    ranks: Ranks, tmp_path: Path
) -> None:
    one, other = ranks(2, resume_synchronously, tmp_path)
    assert equal(one, other)


def states_of_unlike_optimizers(rank: int) -> str:
    model = DistributedDataParallel(mlp())
    optimizer = adamw(model)
    if rank == 1:
        for x, y in batches(0, 1):
            with model.no_sync():
                train_step(model, optimizer, x, y)
    try:
        postlocal.attach(model, optimizer, strategies.ddp())
    except DisagreementError as error:
        return str(error)
    return ""


def test_a_state_that_only_one_rank_has_is_refused_on_all(ranks: Ranks) -> None:
    for message in ranks(2, states_of_unlike_optimizers):
        assert message.startswith("ranks differ in state of the optimizer: rank 0 has 0 of them")


class Cached(nn.Module):
    """A layer with buffers that grow, and come, as a rank needs them."""

    table: Tensor
    mask: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)
        self.register_buffer("table", torch.ones(2, 4), persistent=False)
        self.register_buffer("mask", None)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > len(self.table):
            self.table = torch.ones(len(x), 4)
        self.mask = torch.ones(4)
        y: Tensor = self.layer(x) * self.table[: len(x)] * self.mask
        return y


def test_buffers_that_a_rank_keeps_for_itself_may_grow_and_come() -> None:
    for name, ignored in (("table", ["mask"]), ("mask", ["table"]), ("", ["table", "mask"])):
        model = Cached()
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(  # type: ignore[no-untyped-call]
            model, ignored
        )
        optimizer = sgd(model)
        sync = postlocal.attach(model, optimizer, strategies.diloco(2))
        for x, y in batches(0, 1):
            train_step(model, optimizer, x, y)
        if not name:
            sync.finish()
            continue
        with pytest.raises(ModelChangedError, match=rf"'{name}' was .* keeps for itself"):
            sync.finish()


def step_another(rank: int, name: str, how: str) -> list[str]:
    """What is logged where another optimizer than the one that attach was given steps."""
    said = listen()
    model = mlp()
    given = adamw(model)
    sync = postlocal.attach(model, given, STRATEGIES[name])
    used = adamw(model) if how == "another" else given
    for x, y in batches(rank, 10):
        train_step(model, used, x, y)
        if how == "both":
            adamw(model).step()
        sync.step()
    sync.close()
    assert not given._optimizer_step_post_hooks, "close leaves nothing behind"
    return said


USED = ["the same", "another", "both"]
stepped = in_one_launch(
    2, {(name, how): (step_another, name, how) for name in WHOLE for how in USED}
)


@pytest.mark.parametrize("how", USED)
@pytest.mark.parametrize("name", WHOLE)
def test_an_optimizer_that_never_steps_while_parameters_change_is_told_of_once(
    stepped: Table, name: str, how: str
) -> None:
    said, elsewhere = stepped[name, how]
    assert not elsewhere
    assert len(said) == (how == "another")
    assert all("the optimizer that attach was given took no step" in words for words in said)


def test_an_attach_that_is_refused_leaves_no_hook_on_the_optimizer() -> None:
    def work(group: Group) -> int:
        model = mlp()
        optimizer = sgd(model)
        with pytest.raises(ValueError, match="nothing that reduces gradients"):
            postlocal.attach(model, optimizer, strategies.ddp(), process_group=group)
        return len(optimizer._optimizer_step_post_hooks)

    assert virtual.run(2, work) == [0, 0]


def step_nothing(rank: int, name: str) -> list[str]:
    """Rounds in which no optimizer steps, as where a GradScaler skips all."""
    said = listen()
    model = mlp(seed=rank)
    sync = postlocal.attach(model, adamw(model), STRATEGIES[name])
    for _ in range(16):
        sync.step()
    return [words for words in said if "optimizer" in words]


without_steps = in_one_launch(2, {name: (step_nothing, name) for name in STRATEGIES})


@pytest.mark.parametrize("name", STRATEGIES)
def test_rounds_without_any_step_are_not_taken_for_those_of_another_optimizer(
    without_steps: Table, name: str
) -> None:
    assert without_steps[name] == [[], []]


class ScheduleFree(torch.optim.SGD):
    """Trains on one point and evaluates another, which is in its state."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            z = state.setdefault("z", parameter.detach().clone())
            z.sub_(parameter.grad, alpha=0.1)
            parameter.detach().lerp_(z, 0.5)

    @torch.no_grad()
    def eval(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.lerp_(self.state[parameter]["z"], -1.0)

    def train(self) -> None:
        raise NotImplementedError


def evaluate_schedule_free(rank: int, state: Any) -> tuple[list[str], list[Tensor]]:
    said = listen()
    model = mlp()
    optimizer = ScheduleFree(model.parameters(), lr=0.1)
    strategy = dataclasses.replace(strategies.local_sgd(4), optimizer_state=state)
    sync = postlocal.attach(model, optimizer, strategy)
    for x, y in batches(rank, 8):
        train_step(model, optimizer, x, y)
        sync.step()
    sync.finish()
    optimizer.eval()
    return said, values(model)


@pytest.mark.parametrize("state", ["keep", "average"])
def test_schedule_free_optimizers_evaluate_equal_models_where_their_state_is_averaged(
    ranks: Ranks, state: str
) -> None:
    (said, one), (elsewhere, other) = ranks(2, evaluate_schedule_free, state)
    assert not elsewhere
    assert equal(one, other) == (state == "average")
    assert len(said) == (state == "keep")
    assert all(words.startswith("ScheduleFree computes the parameters of") for words in said)
