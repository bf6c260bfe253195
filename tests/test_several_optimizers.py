"""Several optimizers of one model: a list of them is saved, averaged and reset as one would be."""

import logging
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, StepLR

import postlocal
from postlocal import (
    CheckpointError,
    DisagreementError,
    Strategy,
    checkpoint,
    schedule,
    strategies,
    virtual,
)
from postlocal.comm.group import Group
from postlocal.sync.clock import Sync
from tests.models import batches, equal, mlp, values

Ranks = Callable[..., list[Any]]
Make = Callable[[nn.Module], list[Optimizer]]

AVERAGED = replace(strategies.local_sgd(4), optimizer_state="average")
STRATEGIES = {
    "kept": strategies.diloco(4),
    "averaged": AVERAGED,
    "reset": replace(strategies.local_sgd(4), optimizer_state="reset"),
    "delayed": strategies.streaming_diloco(4, fragments=2, delay=3),
}


def halves(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Matrices, and the rest."""
    parameters = list(model.parameters())
    return [p for p in parameters if p.dim() == 2], [p for p in parameters if p.dim() != 2]


def two_of_a_kind(model: nn.Module) -> list[Optimizer]:
    first, second = halves(model)
    return [
        torch.optim.SGD(first, lr=0.1, momentum=0.9),
        torch.optim.SGD(second, lr=0.01, momentum=0.9),
    ]


def one_with_two_groups(model: nn.Module) -> list[Optimizer]:
    first, second = halves(model)
    groups = [{"params": first, "lr": 0.1}, {"params": second, "lr": 0.01}]
    return [torch.optim.SGD(groups, momentum=0.9)]


def unlike(model: nn.Module) -> list[Optimizer]:
    first, second = halves(model)
    return [torch.optim.SGD(first, lr=0.1, momentum=0.9), torch.optim.AdamW(second, lr=0.01)]


def train_step(model: nn.Module, optimizers: list[Optimizer], x: Tensor, y: Tensor) -> None:
    nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def trained(strategy: Strategy, make: Make, steps: int = 9) -> list[list[Tensor]]:
    """Parameters and state of two workers."""
    models = [mlp() for _ in range(2)]  # made here: threads share torch's generator

    def work(group: Group) -> list[Tensor]:
        model = models[group.rank]
        optimizers = make(model)
        sync = postlocal.attach(model, optimizers, strategy, process_group=group)
        for x, y in batches(group.rank, steps):
            train_step(model, optimizers, x, y)
            sync.step()
        assert sync.steps == steps
        return [*values(model), *sync.inner.tensors.values()]

    return virtual.run(2, work)


@pytest.mark.parametrize("name", STRATEGIES)
def test_two_optimizers_train_as_one_with_two_groups_does(name: str) -> None:
    strategy = STRATEGIES[name]
    pairs = zip(
        trained(strategy, two_of_a_kind), trained(strategy, one_with_two_groups), strict=True
    )
    for several, one in pairs:
        assert equal(several, one)


def test_a_state_that_is_reset_is_that_of_all_of_them() -> None:
    for tensors in trained(STRATEGIES["reset"], unlike, steps=8):
        assert len(tensors) == len(values(mlp()))


def test_the_schedule_sees_the_greatest_learning_rate_of_all(alone: None) -> None:
    model = mlp()
    optimizers = two_of_a_kind(model)
    sync = postlocal.attach(model, optimizers, Strategy(schedule.quadratic(alpha=0.02, base=1)))
    assert sync.inner.lr == 0.1
    optimizers[1].param_groups[0]["lr"] = 0.5
    assert sync.inner.lr == 0.5
    assert str(sync.inner) == "SGD of 2 and SGD of 2 of the 4 parameters"


def resume(rank: int, name: str, folder: Path) -> list[list[Tensor]]:
    """What a whole run ends with, and one that goes on from a checkpoint in its middle."""
    ends: list[list[Tensor]] = []
    for until in (9, 14, 14):
        model = mlp()
        optimizers = unlike(model)
        schedulers: list[LRScheduler] = [StepLR(optimizers[0], 3), StepLR(optimizers[1], 5)]
        sync = postlocal.attach(model, optimizers, STRATEGIES[name])
        restored = None if ends == [[]] else checkpoint.restore(folder, sync)
        if restored is not None:
            for scheduler, state in zip(schedulers, restored.extra["schedulers"], strict=True):
                scheduler.load_state_dict(state)
        for x, y in list(batches(rank, until))[sync.steps :]:
            train_step(model, optimizers, x, y)
            for scheduler in schedulers:
                scheduler.step()
            sync.step()
        if until == 9:
            states = [scheduler.state_dict() for scheduler in schedulers]
            checkpoint.save(folder, sync, {"schedulers": states})
        state = [*values(model), *(t.clone() for t in sync.inner.tensors.values())]
        ends.append([] if until == 9 else state)
        sync.close()
    return ends[1:]


@pytest.mark.parametrize("name", STRATEGIES)
def test_several_optimizers_and_schedulers_resume_to_the_bit(
    ranks: Ranks, tmp_path: Path, name: str
) -> None:
    for whole, resumed in ranks(2, resume, name, tmp_path):
        assert equal(whole, resumed)


def test_a_checkpoint_of_other_optimizers_is_refused(alone: None, tmp_path: Path) -> None:
    model = mlp()
    path = checkpoint.save(tmp_path, postlocal.attach(model, unlike(model), AVERAGED))
    other = mlp()
    with pytest.raises(CheckpointError, match="is of other optimizers: 2 saved, 1 here") as caught:
        checkpoint.restore(tmp_path, postlocal.attach(other, one_with_two_groups(other), AVERAGED))
    assert (caught.value.path, caught.value.ranks) == (path, (0,))
    turned = list(reversed(unlike(other)))
    with pytest.raises(CheckpointError, match=r"is of another optimizer \(optimizer\[0\]\): "):
        checkpoint.restore(tmp_path, postlocal.attach(other, turned, AVERAGED))


def bad(case: str, model: nn.Module) -> Any:
    sgd = torch.optim.SGD
    first, second = halves(model)
    return {
        "none": [],
        "a number": [sgd(first), 7],
        "a list": [[sgd(first), sgd(second)]],
        "a generator": (sgd(each) for each in (first, second)),
        "shared": [sgd(first), sgd([*second, first[1]])],
        "twice": [sgd(first)] * 2,
        "a stranger": [sgd(first), sgd([*second, nn.Parameter(torch.ones(3))])],
        "of nothing here": [sgd(first), sgd(mlp().parameters())],
    }[case]


REFUSED = {
    "none": r"optimizer must be one, or a list of at least one, got \[\]",
    "a number": r"optimizer\[1\] must be a torch.optim.Optimizer, got 7",
    "a list": r"optimizer\[0\] must be .*Optimizer, got .* list: for several, pass a list of them",
    "a generator": r"optimizer must be .*Optimizer, got .*: for several, pass a list of them",
    "shared": r"optimizer\[0\] and optimizer\[1\] both hold '2.weight': give each parameter to one",
    "twice": r"optimizer\[0\] and optimizer\[1\] both hold '0.weight'",
    "a stranger": r"optimizer\[1\] must hold parameters of model only, got 1 that it lacks",
    "of nothing here": r"optimizer\[1\] must hold parameters of model, got one that holds none",
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_list_that_does_not_fit_is_refused_with_the_number_of_the_optimizer(
    alone: None, case: str
) -> None:
    model = mlp()
    with pytest.raises((ValueError, TypeError), match=REFUSED[case]):
        postlocal.attach(model, bad(case, model), AVERAGED)


def test_ranks_whose_optimizers_differ_cannot_average_their_state() -> None:
    def work(group: Group) -> str:
        model = mlp()
        optimizers = unlike(model) if group.rank else two_of_a_kind(model)
        with pytest.raises(DisagreementError) as error:
            postlocal.attach(model, optimizers, AVERAGED, process_group=group)
        return str(error.value)

    said = "ranks differ in optimizers: rank 0 has 'SGD of 0.bias', rank 1 has 'AdamW of 0.bias'"
    assert virtual.run(2, work) == [said] * 2


def test_an_optimizer_that_comes_to_share_a_parameter_is_told_of(alone: None) -> None:
    model = mlp()
    optimizers = unlike(model)
    sync = postlocal.attach(model, optimizers, strategies.diloco(2))
    optimizers[1].add_param_group({"params": halves(model)[0][:1]})
    problem = sync.follow_model()
    assert problem is not None
    assert "optimizer[0] and optimizer[1] both hold '0.weight'" in problem


def gan() -> nn.ModuleDict:
    return nn.ModuleDict({"generator": nn.Linear(4, 8), "critic": nn.Linear(8, 1)})


@pytest.mark.parametrize("mistaken", [False, True], ids=["resting", "replaced"])
def test_only_an_optimizer_whose_parameters_move_without_it_is_told_of(
    alone: None, caplog: pytest.LogCaptureFixture, mistaken: bool
) -> None:
    torch.manual_seed(0)
    model = gan()
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in model.values()]
    sync = postlocal.attach(model, optimizers, strategies.diloco(period=2))
    used = [torch.optim.SGD(model["generator"].parameters(), lr=0.1)] if mistaken else []
    for _ in range(4):  # the generator's own optimizer rests all the time
        model["critic"](model["generator"](torch.randn(5, 4))).mean().backward()
        for optimizer in (*used, optimizers[1]):
            optimizer.step()
        sync.step()
    told = [message for message in caplog.messages if "took no step" in message]
    assert len(told) == mistaken
    assert all("the optimizer[0] that attach was given" in message for message in told)


def test_a_parameter_that_joins_an_optimizer_is_not_taken_for_one_that_was_written_to(
    alone: None, caplog: pytest.LogCaptureFixture
) -> None:
    model = gan()
    critic = model.get_submodule("critic")
    joining, others = critic.get_parameter("bias"), [critic.get_parameter("weight")]
    with torch.no_grad():
        joining.add_(1.0)  # so that torch has counted writes to it
    optimizers = [
        torch.optim.SGD(model["generator"].parameters(), lr=0.1),
        torch.optim.SGD(others, lr=0.1),
    ]
    sync = postlocal.attach(model, optimizers, strategies.diloco(period=2))
    optimizers[1].add_param_group({"params": [joining]})
    for _ in range(6):  # as where a GradScaler skips all steps
        sync.step()
    assert "took no step" not in caplog.text


def load(model: nn.Module, sync: Sync) -> None:
    state, saved = deepcopy(sync.state_dict()), deepcopy(model.state_dict())
    model.load_state_dict(saved)
    sync.load_state_dict(state)


def evaluate(model: nn.Module, sync: Sync) -> None:
    with sync.agreed_parameters():
        pass


@pytest.mark.parametrize("last", [load, evaluate, lambda model, sync: None])
def test_what_is_written_between_two_steps_is_no_sign_of_another_optimizer(
    caplog: pytest.LogCaptureFixture, last: Callable[[nn.Module, Sync], None]
) -> None:
    def work(group: Group) -> None:
        for steps in (2, 3, 6):
            model = mlp()
            optimizers = two_of_a_kind(model)
            strategy = strategies.streaming_diloco(4, fragments=2, delay=0)
            sync = postlocal.attach(model, optimizers, strategy, process_group=group)
            for x, y in batches(group.rank, steps):
                nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
                for optimizer in optimizers:
                    optimizer.step()
                sync.step()
            last(model, sync)
            sync.finish()
            sync.close()

    virtual.run(2, work)
    assert not [message for message in caplog.messages if "took no step" in message]


def test_both_optimizers_of_a_gan_count_as_one_step(alone: None, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "postlocal")
    model = gan()
    optimizers = [torch.optim.Adam(part.parameters()) for part in model.values()]
    sync = postlocal.attach(model, optimizers, strategies.diloco(period=2))
    for step in range(4):
        model["critic"](model["generator"](torch.ones(5, 4))).mean().backward()
        optimizers[1].step()
        if step % 2:
            optimizers[0].step()
        sync.step()
    assert (sync.steps, sync.meter.syncs) == (4, 2)
    assert any("Adam of 2 and Adam of 2 of the 4 parameters" in m for m in caplog.messages)
