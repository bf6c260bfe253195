"""What a checkpoint is compared with before it is loaded, and what is taken over on purpose."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer

import postlocal
from postlocal import CheckpointError, Strategy, checkpoint, outer, strategies, topology
from postlocal.schedule import post_local
from tests.models import OPTIMIZERS, batches, distance, equal, mlp, train_step, values

Ranks = Callable[..., list[Any]]
Make = Callable[[nn.Module], Optimizer]


def halves(model: nn.Module, order: int = 1) -> list[dict[str, Any]]:
    """Two param groups: weights and biases."""
    parameters = list(model.parameters())
    groups = [{"params": [p for p in parameters if p.dim() == dim]} for dim in (2, 1)]
    return groups[::order]


def clock(make: Make, model: nn.Module | None = None, steps: int = 0) -> postlocal.Sync:
    model = model or mlp()
    optimizer = make(model)
    sync = postlocal.attach(model, optimizer, strategies.diloco(4))
    for x, y in batches(0, steps):
        train_step(model, optimizer, x, y)
        sync.step()
    return sync


def adamw(model: nn.Module) -> Optimizer:
    return AdamW(halves(model), lr=1e-3)


def frozen() -> nn.Module:
    model = mlp()
    model[0].requires_grad_(False)  # type: ignore[index]
    return model


DIFFERENT: dict[str, tuple[Make, nn.Module, str]] = {
    "class": (
        lambda m: SGD(halves(m), lr=1e-3),
        mlp(),
        r"of another optimizer: torch.optim.adamw.AdamW saved, torch.optim.sgd.SGD here",
    ),
    "number of groups": (
        lambda m: AdamW(m.parameters()),
        mlp(),
        "of another optimizer: 2 param groups saved, 1 here",
    ),
    "order of groups": (
        lambda m: AdamW(halves(m, -1)),
        mlp(),
        r"parameter 0 of param group 0: 0.weight saved, 0.bias here",
    ),
    "order within a group": (
        lambda m: AdamW([{"params": half["params"][::-1]} for half in halves(m)]),
        mlp(),
        r"parameter 0 of param group 0: 0.weight saved, 2.weight here",
    ),
    "size of a group": (
        lambda m: AdamW([halves(m)[0], {"params": halves(m)[1]["params"][:1]}]),
        mlp(),
        r"parameter 1 of param group 1: 2.bias saved, none here",
    ),
    "what is trained": (
        adamw,
        frozen(),
        r"'0.weight' is \(16, 8\) of torch.float32 there, .*, not trained here",
    ),
    "shape": (
        adamw,
        nn.Sequential(nn.Linear(8, 3), nn.Tanh(), nn.Linear(3, 4)),
        r"'0.weight' is \(16, 8\) of torch.float32 there, \(3, 8\) of",
    ),
    "dtype": (adamw, mlp().double(), "torch.float32 there, .* of torch.float64 here"),
    "name": (adamw, nn.Sequential(mlp()), "'0.0.weight' is missing there"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_is_named_and_nothing_is_loaded(tmp_path: Path, name: str) -> None:
    checkpoint.save(tmp_path, clock(adamw, steps=3))
    make, model, words = DIFFERENT[name]
    sync = clock(make, model)
    before = values(model)
    with pytest.raises(CheckpointError, match=words):
        checkpoint.restore(tmp_path, sync)
    assert equal(values(model), before)
    assert sync.inner.optimizer.state_dict()["state"] == {}
    assert sync.steps == 0


def test_state_of_other_kinds_is_refused_where_there_is_some(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, clock(adamw, steps=1))
    sync = clock(lambda m: AdamW(halves(m), amsgrad=True), steps=1)
    words = "exp_avg, exp_avg_sq, step saved, exp_avg, exp_avg_sq, max_exp_avg_sq, step here"
    with pytest.raises(CheckpointError, match=f"state of parameter 0: {words}"):
        checkpoint.restore(tmp_path, sync)


def test_values_of_param_groups_are_the_saved_ones_and_those_that_differ_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint.save(tmp_path, clock(adamw))
    sync = clock(lambda m: AdamW(halves(m), lr=0.5, weight_decay=0.3))
    checkpoint.restore(tmp_path, sync)
    assert [group["lr"] for group in sync.inner.optimizer.param_groups] == [1e-3] * 2
    assert "weight_decay of param group 1: 0.01 saved, 0.3 here" in caplog.text
    assert "lr of" not in caplog.text


class Master(SGD):
    """Keeps its state in fp32 for parameters of bf16."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state.setdefault("master", p.detach().float())
                state["master"] -= 1e-3 * p.grad.float()
                p.data.copy_(state["master"])


def test_state_that_is_more_precise_than_parameters_stays_so(tmp_path: Path) -> None:
    def make(model: nn.Module) -> Optimizer:
        return Master(model.parameters())

    model = nn.Sequential(nn.Linear(8, 4)).bfloat16()
    optimizer = make(model)
    sync = postlocal.attach(model, optimizer, strategies.diloco(4))
    model(torch.ones(1, 8, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    sync.step()
    checkpoint.save(tmp_path, sync)
    again = clock(make, nn.Sequential(nn.Linear(8, 4)).bfloat16())
    checkpoint.restore(tmp_path, again)
    masters = [
        [state["master"] for state in s.inner.optimizer.state.values()] for s in (sync, again)
    ]
    assert masters[1][0].dtype == torch.float32
    assert equal(*masters)


class Assigning(nn.Module):
    """Its buffer is another object after each forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.get_buffer("mean") + x.detach().mean()
        return self.linear(x)  # type: ignore[no-any-return]


def test_buffers_that_were_assigned_anew_are_saved_and_loaded(tmp_path: Path) -> None:
    model, again = Assigning(), Assigning()
    checkpoint.save(tmp_path, clock(lambda m: AdamW(m.parameters()), model, steps=2))
    sync = clock(lambda m: AdamW(m.parameters()), again, steps=1)
    again.mean = torch.ones(())
    checkpoint.restore(tmp_path, sync)
    assert model.mean != 0
    assert torch.equal(again.mean, model.mean)


def test_a_model_that_is_not_what_attach_was_given_is_not_saved(tmp_path: Path) -> None:
    model = mlp()
    sync = clock(adamw, model)
    checkpoint.save(tmp_path, sync)
    model.append(nn.Linear(4, 4))  # type: ignore[operator]
    for call in (checkpoint.save, checkpoint.restore):
        with pytest.raises(CheckpointError, match=r"'3.weight' was not in the model at attach"):
            call(tmp_path, sync)


def differing(rank: int, folder: Path) -> str:
    """One rank's optimizer has its groups in another order."""
    model = mlp()
    optimizer = AdamW(halves(model, -1 if rank == 1 else 1))
    sync = postlocal.attach(model, optimizer, strategies.diloco(4))
    before = values(model)
    with pytest.raises(CheckpointError) as error:
        checkpoint.restore(folder, sync)
    assert equal(values(model), before)
    sync.close()
    return str(error.value)


def save_two(rank: int, folder: Path) -> None:
    sync = clock(adamw, steps=2)
    checkpoint.save(folder, sync)
    sync.close()


def test_what_differs_on_one_rank_is_refused_by_all(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2, save_two, tmp_path)
    first, second = ranks(2, differing, tmp_path)
    assert first == second
    assert first.endswith("0.weight saved, 0.bias here (rank 1)")


class WithBuffers(nn.Module):
    """A linear layer, and a buffer of each kind that the rank's data moves."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(8, 4)
        self.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seen", torch.zeros(2, dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)  # type: ignore[no-any-return]


def save_buffers(rank: int, folder: Path, not_finite: int | None) -> list[Tensor]:
    model = WithBuffers()
    sync = postlocal.attach(model, OPTIMIZERS["sgd"](model), strategies.local_sgd(8))
    with torch.no_grad():
        model.get_buffer("phase").fill_(complex(rank, -2 * rank))
        model.get_buffer("mean").fill_(rank)
        model.get_buffer("count").fill_(rank)
        model.get_buffer("seen")[0] = rank == 1
        model.linear.weight += rank
        if rank == not_finite:
            model.linear.bias.fill_(torch.nan)
            model.get_buffer("mean").fill_(torch.nan)
    sync.step()
    checkpoint.save(folder, sync)
    sync.close()
    return values(model)


def load_buffers(rank: int, folder: Path) -> tuple[list[Tensor], list[Any]]:
    model = WithBuffers()
    sync = postlocal.attach(model, OPTIMIZERS["sgd"](model), strategies.local_sgd(8))
    assert checkpoint.restore(folder, sync) is not None
    sync.close()
    return values(model), [buffer.tolist() for buffer in model.buffers()]


def test_buffers_of_all_kinds_are_equal_on_another_number_of_ranks(
    ranks: Ranks, tmp_path: Path
) -> None:
    saved = ranks(3, save_buffers, tmp_path, None)
    for parameters, buffers in ranks(2, load_buffers, tmp_path):
        assert buffers == [[1 - 2j] * 2, [1.0] * 2, 2, [True, False]]
        assert distance(parameters, saved[1]) < 1e-6


def test_replicas_that_are_not_finite_are_left_out_of_the_mean(
    ranks: Ranks, tmp_path: Path
) -> None:
    saved = ranks(3, save_buffers, tmp_path, 2)
    mean = [(a + b) / 2 for a, b in zip(saved[0], saved[1], strict=True)]
    ((parameters, buffers),) = ranks(1, load_buffers, tmp_path)
    assert distance(parameters, mean) < 1e-6
    assert buffers[:3] == [[0.5 - 1j] * 2, [0.5] * 2, 2]


def test_the_refusal_of_another_strategy_is_short_and_tells_what_to_do(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, clock(adamw))
    model = mlp()
    strategy = replace(strategies.diloco(32), outer=outer.nesterov(0.7, 0.8))
    sync = postlocal.attach(model, adamw(model), strategy)
    with pytest.raises(CheckpointError) as error:
        checkpoint.restore(tmp_path, sync)
    assert str(error.value).endswith(
        "step-00000000 is of another strategy: diloco(period=4) saved, "
        "diloco(period=32, outer_momentum=0.8) here (period: 4 and 32; outer_momentum: default and "
        '0.8); resume with that one, or pass on_strategy_change="restart" to start '
        "a new round of this one from the parameters last agreed on"
    )
    sync = postlocal.attach(model, adamw(model), strategies.ddp())
    with pytest.raises(CheckpointError) as error:
        checkpoint.restore(tmp_path, sync)
    assert "is of another strategy: diloco(period=4) saved, ddp() here; resume" in str(error.value)
    assert len(str(error.value)) < 600


def levels_differ(rank: int, folder: Path, size: int, change: str) -> str:
    model = mlp()
    strategy = strategies.local_sgd(4)
    sync = postlocal.attach(
        model, OPTIMIZERS["sgd"](model), strategy, topology=topology.nodes(size)
    )
    if change == "save":
        checkpoint.save(folder, sync)
        words = ""
    elif change == "refuse":
        with pytest.raises(CheckpointError) as error:
            checkpoint.restore(folder, sync)
        words = str(error.value)
    else:
        restored = checkpoint.restore(folder, sync, on_strategy_change="restart")
        words = "" if restored is None else "restarted"
    sync.close()
    return words


def test_another_topology_is_another_strategy(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2, levels_differ, tmp_path, 1, "save")
    for words in ranks(2, levels_differ, tmp_path, 2, "refuse"):
        assert "topology: rank of 1, node of 1, world of 2 saved, rank of 1, node of 2, w" in words
    assert ranks(2, levels_differ, tmp_path, 2, "restart") == ["restarted"] * 2


def steps(rank: int, first: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
    for step, batch in enumerate(batches(rank, last)):
        if step >= first:
            yield batch


def train_to(
    rank: int, strategy: Strategy, folder: Path, last: int, change: bool = False
) -> dict[str, Any]:
    """Resume if there is something, train, and save."""
    model = DistributedDataParallel(mlp())
    sync = postlocal.attach(model, OPTIMIZERS["momentum"](model), strategy)
    restored = checkpoint.restore(
        folder, sync, on_strategy_change="restart" if change else "refuse"
    )
    start = values(model), sync.agreed
    fragments = sync.state_dict()["fragments"]
    outer_state = fragments[0]["anchor"] and len(fragments[0]["anchor"]["outer"]["state"])
    for x, y in steps(rank, sync.steps, last):
        train_step(model, sync.inner.optimizer, x, y)
        sync.step()
    checkpoint.save(folder, sync)
    anchor = sync.state_dict()["fragments"][0]["anchor"]
    sync.close()
    return {
        "restored": restored,
        "start": start[0],
        "agreed": start[1],
        "end": values(model),
        "round": sync.round.steps,
        "outer": outer_state,
        "anchor": anchor and list(anchor["tensors"].values()),
    }


def test_from_ddp_to_diloco_equals_a_warm_up(ranks: Ranks, tmp_path: Path) -> None:
    warm = replace(strategies.diloco(4), schedule=post_local(8, strategies.diloco(4).schedule))
    whole = ranks(2, train_to, warm, tmp_path / "whole", 18)
    ranks(2, train_to, strategies.ddp(), tmp_path / "two", 8)
    second = ranks(2, train_to, strategies.diloco(4), tmp_path / "two", 18, True)
    for rank in range(2):
        assert second[rank]["restored"].step == 8
        assert equal(second[rank]["end"], whole[rank]["end"])
        assert equal(second[rank]["anchor"], whole[rank]["anchor"])
    # The same call resumes the new run to the bit, in the middle of a round.
    ranks(2, train_to, warm, tmp_path / "whole", 23)
    third = ranks(2, train_to, strategies.diloco(4), tmp_path / "two", 23, True)
    whole = ranks(2, train_to, warm, tmp_path / "whole", 23)
    for rank in range(2):
        assert third[rank]["restored"].step == 18
        assert equal(third[rank]["end"], whole[rank]["end"])


def test_a_longer_period_starts_from_the_anchor_and_keeps_the_outer_optimizer(
    ranks: Ranks, tmp_path: Path
) -> None:
    saved = ranks(2, train_to, strategies.diloco(4), tmp_path, 10)
    for longer in ranks(2, train_to, strategies.diloco(8), tmp_path, 18, True):
        assert equal(longer["start"], saved[0]["anchor"])
        assert (longer["agreed"], longer["outer"], longer["round"]) == (True, 4, 8)


CHANGES = {
    "to one without anchor": (strategies.local_sgd(4), None),
    "to fragments": (
        replace(
            strategies.streaming_diloco(8, fragments=2, delay=2), outer=strategies.diloco(4).outer
        ),
        2,
    ),
    "to another outer optimizer": (strategies.slowmo(4), 0),
    "to torch's": (replace(strategies.diloco(4), outer=partial(SGD, lr=0.5)), 0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_outer_state_is_kept_where_the_outer_optimizer_is_the_same(
    ranks: Ranks, tmp_path: Path, name: str
) -> None:
    strategy, outer_state = CHANGES[name]
    saved = ranks(2, train_to, strategies.diloco(4), tmp_path, 10)
    first, second = ranks(2, train_to, strategy, tmp_path, 17, True)
    assert equal(first["start"], saved[0]["anchor"])
    assert equal(second["start"], saved[0]["anchor"])
    assert first["outer"] == outer_state


def test_without_anchor_a_new_strategy_starts_from_the_mean(
    ranks: Ranks, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = ranks(2, train_to, strategies.local_sgd(4), tmp_path, 10)
    mean = [(a + b) / 2 for a, b in zip(saved[0]["end"], saved[1]["end"], strict=True)]
    for number in (2, 3):
        for found in ranks(number, agree, strategies.diloco(4), tmp_path):
            assert distance(found, mean) < 1e-7
    model = mlp()
    sync = postlocal.attach(model, OPTIMIZERS["momentum"](model), strategies.diloco(4))
    checkpoint.restore(tmp_path, sync, on_strategy_change="restart")
    assert "was saved by 2 ranks and is resumed on 1 and is of another strategy (" in caplog.text
    assert "(the mean of the saved replicas) with a new round" in caplog.text


def agree(rank: int, strategy: Strategy, folder: Path) -> list[Tensor]:
    model = mlp(seed=5)
    sync = postlocal.attach(model, OPTIMIZERS["momentum"](model), strategy)
    checkpoint.restore(folder, sync, on_strategy_change="restart")
    anchors = [
        tensor
        for one in sync.state_dict()["fragments"]
        for tensor in one["anchor"]["tensors"].values()
    ]
    assert equal(anchors, values(model))
    sync.close()
    return values(model)


def restart_in_bf16(rank: int, folder: str) -> tuple[list[Tensor], list[Tensor]]:
    """The anchor that was saved in the middle of a round, and that of a run with longer rounds."""

    def attached(period: int) -> tuple[nn.Module, torch.optim.Optimizer, postlocal.Sync]:
        model = mlp().bfloat16()
        optimizer = OPTIMIZERS["sgd"](model)
        return model, optimizer, postlocal.attach(model, optimizer, strategies.diloco(period))

    def anchor(sync: postlocal.Sync) -> list[Tensor]:
        (fragment,) = sync.state_dict()["fragments"]
        return [tensor.clone() for tensor in fragment["anchor"]["tensors"].values()]

    model, optimizer, sync = attached(4)
    for x, y in batches(rank, 6):
        train_step(model, optimizer, x.bfloat16(), y)
        sync.step()
    checkpoint.save(folder, sync)
    _, _, other = attached(8)
    checkpoint.restore(folder, other, on_strategy_change="restart")
    return anchor(sync), anchor(other)


def test_an_anchor_keeps_its_bits_when_a_longer_period_takes_over(
    ranks: Ranks, tmp_path: Path
) -> None:
    for saved, restarted in ranks(2, restart_in_bf16, str(tmp_path)):
        assert equal(saved, restarted)
        assert not equal(saved, [tensor.bfloat16().float() for tensor in saved])
