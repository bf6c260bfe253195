"""Attaching a strategy, and what a mistake on one rank or all of them leads to."""

import copy
import logging
import math
import re
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import postlocal
from postlocal import (
    DisagreementError,
    PeerError,
    Strategy,
    checkpoint,
    guard,
    outer,
    schedule,
    strategies,
    topology,
    virtual,
    wire,
)
from postlocal.comm.group import Group
from postlocal.meter import Meter
from tests.launcher import Table, in_one_launch
from tests.models import (
    adamw,
    batches,
    convnet,
    distance,
    equal,
    listen,
    mlp,
    sgd,
    train,
    train_step,
    values,
)

Ranks = Callable[..., list[Any]]


def attach(model: nn.Module, strategy: Strategy, **options: Any) -> postlocal.Sync:
    return postlocal.attach(model, sgd(model), strategy, **options)


class Named(nn.Module):
    """A linear layer under a name of one's choice."""

    def __init__(self, name: str, width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.add_module(name, nn.Linear(8, width))


def disagree(rank: int, item: str) -> str:
    odd = rank == 1
    strategy = strategies.local_sgd(8 if odd and item == "period" else 4)
    if odd and item == "strategy":
        strategy = strategies.diloco(4)
    name = "other" if odd and item == "name" else "layer"
    model: nn.Module = Named(name, 5 if odd and item == "shape" else 4)
    if odd and item == "frozen":
        next(model.parameters()).requires_grad_(False)
    if odd and item == "dtype":
        model = model.bfloat16()
    recipe = topology.nested({"node": 3 if odd and item == "topology" else 1})
    options = {"initial": "perhaps"} if odd and item == "argument" else {}
    optimizer = sgd(mlp() if odd and item == "optimizer" else model)
    with pytest.raises((DisagreementError, ValueError)) as error:
        postlocal.attach(model, optimizer, strategy, topology=recipe, **options)  # type: ignore[arg-type]
    return f"{type(error.value).__name__}: {error.value}"


DISAGREEMENTS = {
    "period": "ranks differ in strategy: rank 0 has .*period=4.*rank 1 has .*period=8",
    "strategy": "ranks differ in strategy: .*rank 1 has 'diloco",
    "name": "ranks differ in parameters and buffers: .*'layer.weight.*rank 1 has 'other.weight",
    "shape": r"ranks differ in parameters and buffers: .*\(4, 8\).*rank 1 has .*\(5, 8\)",
    "frozen": "ranks differ in parameters and buffers: ",
    "dtype": "ranks differ in parameters and buffers: .*float32.*rank 1 has .*bfloat16",
    "topology": "ranks differ in topology: ",
    "argument": "another rank cannot go on: ValueError: initial must be",
    "optimizer": "another rank cannot go on: ValueError: optimizer must hold parameters of model",
}


disagreed = in_one_launch(3, {item: (disagree, item) for item in DISAGREEMENTS})


@pytest.mark.parametrize("item", DISAGREEMENTS)
def test_what_only_one_rank_was_given_is_an_error_on_all_ranks(disagreed: Table, item: str) -> None:
    for rank, message in enumerate(disagreed[item]):
        if rank == 1 and item in ("argument", "optimizer"):
            assert message.startswith("ValueError: ")
        else:
            assert message.startswith("DisagreementError: ")
            assert re.search(DISAGREEMENTS[item], message), message


def start_apart(rank: int, initial: Any) -> tuple[list[Tensor], str]:
    model = mlp(seed=rank)
    try:
        attach(model, strategies.local_sgd(4), initial=initial)
    except DisagreementError as error:
        return values(model), str(error)
    return values(model), ""


def test_values_that_differ_at_the_start_become_those_of_rank_0(ranks: Ranks) -> None:
    for result, message in ranks(3, start_apart, "broadcast"):
        assert equal(result, values(mlp(seed=0)))
        assert message == ""


def test_values_that_differ_at_the_start_are_refused_if_asked(ranks: Ranks) -> None:
    for _, message in ranks(2, start_apart, "refuse"):
        assert message.startswith("ranks differ in initial values: '0.weight' on rank 1 is not")


def forget_a_step(rank: int) -> str:
    model = mlp()
    sync = attach(model, strategies.local_sgd(4))
    with pytest.raises(DisagreementError) as error:
        for step in range(9):
            if rank == 1 and step == 2:
                sync._timeline = replace(sync._timeline, steps=sync.steps - 1)
            sync.step()
            if rank == 1 and step == 3:
                sync.finish()
    return str(error.value)


def test_a_rank_that_is_at_another_step_is_named(ranks: Ranks) -> None:
    for message in ranks(2, forget_a_step, leaving=(0, 1)):
        assert "rank 1 of the group has taken 3 steps, rank 0 4" in message


def plan_apart(rank: int) -> str:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sync = postlocal.attach(model, optimizer, strategies.qsr(alpha=0.2, base=4))
    optimizer.param_groups[0]["lr"] = 0.1 if rank == 0 else 0.05
    with pytest.raises(DisagreementError) as error:
        for _ in range(4):
            sync.step()
    return str(error.value)


def test_learning_rates_that_lead_to_different_rounds_are_named(ranks: Ranks) -> None:
    for message in ranks(2, plan_apart):
        assert "rank 1 of the group 16 steps at learning rate 0.05" in message
        assert "rank 0 4 steps at 0.1" in message


def never_attach(rank: int) -> str:
    if rank == 1:
        return ""
    with pytest.raises(PeerError) as error:
        attach(mlp(), strategies.local_sgd(4), timeout=2.0)
    return str(error.value)


def test_a_rank_that_never_attaches_is_named(ranks: Ranks) -> None:
    assert "missing at attach: rank 1 (never seen)" in ranks(2, never_attach, leaving=(1,))[0]


def stay_away(rank: int) -> tuple[str, float]:
    group = dist.new_group(timeout=timedelta(seconds=2))
    sync = attach(mlp(), strategies.local_sgd(1), process_group=group)
    if rank == 1:
        return "", 0.0
    start = time.perf_counter()
    with pytest.raises(PeerError) as error:
        sync.step()
    return str(error.value), time.perf_counter() - start


def test_without_a_timeout_a_missing_rank_costs_that_of_the_process_group(ranks: Ranks) -> None:
    message, waited = ranks(2, stay_away)[0]
    assert message.startswith("missing at the synchronization after step 1: rank 1")
    assert waited < 7


def wrong_models(rank: int) -> dict[str, str]:
    def message(make: Callable[[], object]) -> str:
        with pytest.raises((ValueError, TypeError, RuntimeError)) as error:
            make()
        return str(error.value)

    hooked = DistributedDataParallel(mlp())
    hooked.register_comm_hook(None, allreduce_hook)
    inside = DistributedDataParallel(mlp())
    sync = attach(inside, strategies.ddp())

    def step_inside() -> None:
        with inside.no_sync():
            sync.step()

    return {
        "no ddp": message(lambda: attach(mlp(), strategies.ddp())),
        "hook": message(lambda: attach(hooked, strategies.ddp())),
        "level": message(lambda: attach(mlp(), Strategy(schedule.periodic(4, parameters="rack")))),
        "no_sync": message(step_inside),
    }


def test_models_and_loops_that_cannot_work_are_refused_with_the_fix(ranks: Ranks) -> None:
    for messages in ranks(2, wrong_models):
        assert "wrap it in torch.nn.parallel.DistributedDataParallel" in messages["no ddp"]
        assert "already has a communication hook" in messages["hook"]
        assert "level must be one that the topology has (world), got 'rack'" in messages["level"]
        assert "called inside model.no_sync()" in messages["no_sync"]


def overlapping() -> nn.Module:
    memory = torch.zeros(12)
    return nn.ParameterList([nn.Parameter(memory[:8]), nn.Parameter(memory[4:])])


BAD_MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "frozen": (lambda: mlp().requires_grad_(False), "must have a parameter that requires grad"),
    "overlapping": (overlapping, "'0' and '1' overlap in memory"),
    "complex": (
        lambda: nn.ParameterList([nn.Parameter(torch.zeros(2, dtype=torch.complex64))]),
        "'0' is complex",
    ),
    "meta": (lambda: nn.Linear(2, 2, device="meta"), "'weight' is on the meta device"),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_a_model_that_cannot_be_averaged_is_refused(name: str) -> None:
    make, message = BAD_MODELS[name]
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises((ValueError, TypeError), match=message):
        postlocal.attach(model, optimizer, strategies.local_sgd(4))


def test_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="timeout must be above 0 seconds, got 0"):
        attach(mlp(), strategies.local_sgd(4), timeout=0.0)
    with pytest.raises(ValueError, match=r"optimizer_state must be one of .*, got 'lose'"):
        Strategy(schedule.periodic(4), optimizer_state="lose")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="outer_lr must be above 0, got 0"):
        strategies.diloco(outer_lr=0)
    with pytest.raises(ValueError, match="momentum must be at least 0 and below 1, got 1"):
        outer.slow_momentum(momentum=1)
    with pytest.raises(ValueError, match="max_norm must be above 0, got 0"):
        guard.clip(0)
    with pytest.raises(ValueError, match="workers must be at least 1 worker, got 0"):
        virtual.run(0, lambda group: None)


def test_the_state_of_another_strategy_is_refused() -> None:
    one, other = attach(mlp(), strategies.local_sgd(4)), attach(mlp(), strategies.diloco(4))
    with pytest.raises(ValueError, match="state is of strategy"):
        other.load_state_dict(one.state_dict())


def test_with_no_process_group_diloco_is_lookahead() -> None:
    model, reference = mlp(), mlp()
    optimizer, reference_optimizer = adamw(model), adamw(reference)
    sync = postlocal.attach(model, optimizer, strategies.diloco(3, 0.5, 0.0))
    slow = values(reference)
    for step, (x, y) in enumerate(batches(0, 9)):
        train_step(model, optimizer, x, y)
        sync.step()
        train_step(reference, reference_optimizer, x, y)
        if step % 3 == 2:
            slow = [a + 0.5 * (b - a) for a, b in zip(slow, values(reference), strict=True)]
            for parameter, tensor in zip(reference.parameters(), slow, strict=True):
                parameter.data.copy_(tensor)
    assert distance(values(model), slow) < 1e-6
    assert sync.meter.total_bytes == 0


def test_any_torch_optimizer_can_be_the_outer_one() -> None:
    model = mlp()
    strategy = Strategy(schedule.periodic(2), outer=partial(torch.optim.Adam, lr=0.01))
    sync = attach(model, strategy)
    before = values(model)
    for x, y in batches(0, 2):
        train_step(model, sync.inner.optimizer, x, y)
        sync.step()
    moved = [(a - b).abs().max() for a, b in zip(before, values(model), strict=True)]
    assert max(moved) == pytest.approx(0.01, rel=1e-3)


def test_a_clipped_outer_step_has_the_greatest_norm() -> None:
    model = mlp()
    sync = attach(model, replace(strategies.diloco(2, 1.0, 0.0), guard=guard.clip(0.01)))
    before = values(model)
    for x, y in batches(0, 2):
        train_step(model, sync.inner.optimizer, x, y)
        sync.step()
    square = sum((a - b).square().sum() for a, b in zip(before, values(model), strict=True))
    assert float(square) ** 0.5 == pytest.approx(0.01, rel=1e-4)


def meter_of(rank: int, strategy: Strategy, steps: int) -> Meter:
    model = DistributedDataParallel(convnet())
    optimizer = sgd(model)
    sync = postlocal.attach(model, optimizer, strategy, topology=topology.nodes(1))
    for x, y in batches(rank, steps, (1, 6, 6)):
        train_step(model, optimizer, x, y)
        sync.step()
    sync.close()
    return sync.meter


def exchanged(numel: int, world: int, rank: int) -> int:
    """Bytes of an exact mean: what others own goes to them, and what a rank owns to the others."""
    share = -(-numel // world)
    own = min(share, numel - rank * share)
    return 4 * (numel - own + (world - 1) * own)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_meter_counts_what_is_sent_by_purpose(ranks: Ranks, world: int) -> None:
    model = convnet()
    numel = sum(parameter.numel() for parameter in model.parameters())
    share = -(-numel // world)
    warm = strategies.post_local_sgd(warmup=3, period=4)
    for rank, meter in enumerate(ranks(world, meter_of, warm, 11)):
        assert meter.payload_bytes["gradients"] == 3 * 2 * (world - 1) * share * 4
        assert meter.payload_bytes["parameters"] == 2 * exchanged(numel, world, rank)
        integers = 2 * (world - 1) * 8
        assert meter.payload_bytes["buffers"] == 2 * (exchanged(8, world, rank) + integers)
        # two synchronizations, and two comparisons: of the first step and of the warm-up's end
        assert meter.payload_bytes["control"] == 4 * 104 * (world - 1)
        assert meter.syncs == 2
        assert [record.step for record in meter.records] == [7, 11]
        assert all(0 < record.drift < 1 for record in meter.records)
        assert meter.wait_seconds > 0


def test_a_bf16_wire_halves_the_bytes(ranks: Ranks) -> None:
    strategy = replace(
        strategies.post_local_sgd(warmup=2, period=2), wire=wire.bf16(), gradient_wire=wire.bf16()
    )
    narrow = ranks(2, meter_of, strategy, 4)[0].payload_bytes
    wide = ranks(2, meter_of, strategies.post_local_sgd(warmup=2, period=2), 4)[0].payload_bytes
    assert wide["gradients"] == 2 * narrow["gradients"]
    assert wide["parameters"] == 2 * narrow["parameters"]


def test_drift_is_the_distance_of_replicas_from_their_mean() -> None:
    for strategy in (strategies.local_sgd(1), strategies.diloco(1, 1.0, 0.0)):

        def work(group: Group, strategy: Strategy = strategy) -> float:
            model = nn.Linear(3, 1, bias=False)
            with torch.no_grad():
                model.weight.fill_(2.0)
            sync = attach(model, strategy, process_group=group)
            with torch.no_grad():
                model.weight.add_(group.rank - 0.5)
            sync.step()
            return sync.meter.records[0].drift

        assert virtual.run(2, work) == pytest.approx([0.25, 0.25])


def test_threads_train_as_processes_do(ranks: Ranks) -> None:
    real = ranks(2, train, strategies.local_sgd(1), 6, "sgd", wrap=False)
    models = [mlp(), mlp()]  # made here: threads share torch's generator

    def loop(group: Group) -> list[Tensor]:
        model = models[group.rank]
        optimizer = sgd(model)
        sync = postlocal.attach(model, optimizer, strategies.local_sgd(1), process_group=group)
        for x, y in batches(group.rank, 6):
            train_step(model, optimizer, x, y)
            sync.step()
        return values(model)

    pretended = virtual.run(2, loop)
    assert distance(pretended[0], real[0][-1]) < 1e-6
    assert equal(pretended[0], pretended[1])


def test_a_worker_that_raises_releases_the_others() -> None:
    def work(group: Group) -> None:
        if group.rank == 1:
            raise KeyError("mine")
        group.all_reduce(torch.zeros(1)).wait()

    with pytest.raises(KeyError, match="mine"):
        virtual.run(3, work)


def test_finish_can_be_called_twice_and_training_goes_on_after_it(ranks: Ranks) -> None:
    for results in ranks(2, finish_and_go_on):
        assert results == [6, 6, 8, 12]


def finish_and_go_on(rank: int) -> list[int]:
    model = mlp()
    optimizer = sgd(model)
    sync = postlocal.attach(model, optimizer, strategies.local_sgd(4))
    stream = batches(rank, 20)
    for _ in range(6):
        train_step(model, optimizer, *next(stream))
        sync.step()
    sync.finish()
    first = sync.meter.records[-1].step
    sync.finish()
    marks = [first, sync.meter.records[-1].step]
    for _ in range(6):
        train_step(model, optimizer, *next(stream))
        sync.step()
    marks += [record.step for record in list(sync.meter.records)[2:]]
    assert dist.is_initialized()
    return marks


def attach_with_one_node(rank: int) -> list[str]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("postlocal").addHandler(handler)
    model = DistributedDataParallel(mlp())
    strategy = strategies.post_local_sgd(warmup=2, period=2)
    postlocal.attach(model, sgd(model), strategy, topology=topology.nodes())
    return said


def test_one_rank_warns_of_a_node_that_is_the_whole_world(ranks: Ranks) -> None:
    (message,), others = ranks(2, attach_with_one_node)
    assert not others
    assert message.startswith("level 'node' holds all 2 ranks")
    assert "topology.nodes(size=1)" in message


@pytest.mark.parametrize("name", ["ddp", "post_local_sgd", "local_sgd", "slowmo", "diloco"])
def test_every_strategy_runs_with_one_process_and_no_process_group(name: str) -> None:
    model = mlp()
    optimizer = sgd(model)
    strategy = strategies.named(name, **({"warmup": 2} if name == "post_local_sgd" else {}))
    sync = postlocal.attach(model, optimizer, strategy, topology=topology.nodes(4))
    for x, y in batches(0, 20):
        train_step(model, optimizer, x, y)
        sync.step()
    sync.finish()
    assert sync.agreed
    assert sync.meter.total_bytes == 0


def describe(rank: int) -> tuple[list[str], list[str]]:
    said = listen()
    logging.getLogger("postlocal").setLevel(logging.DEBUG)
    model = DistributedDataParallel(mlp())
    optimizer = sgd(model)
    sync = attach(model, strategies.edit(period=4, warmup=2))
    shown = [repr(sync)]
    for x, y in batches(rank, 6):
        train_step(model, optimizer, x, y)
        sync.step()
    return [*shown, repr(sync)], said


def test_a_clock_says_in_words_what_it_did(ranks: Ranks) -> None:
    (shown, said), (_, elsewhere) = ranks(2, describe)
    assert shown[0] == "<Sync: edit on 2 ranks: 0 steps, 0 synchronizations, 0 B sent, waited 0 s>"
    pattern = (
        r"<Sync: edit on 2 ranks: 6 steps, 1 synchronizations, [\d.]+ kB sent "
        r"\([\d.]+% of DDP's\), waited [\d.]+ s>"
    )
    assert re.fullmatch(pattern, shown[1]), shown[1]
    assert said[0] == (
        f"attached: {shown[0]}; 4 parameters of 212 values, 0 frozen, 0 buffers; "
        "SGD of 4 of the 4 parameters"
    )
    assert "after step 2 replicas part: rounds of local steps begin" in said
    assert any(line.startswith("synchronized: step 6, world: ") for line in said)
    assert not elsewhere, "one rank speaks for all"


def drifted(period: int = 4) -> tuple[nn.Module, postlocal.Sync]:
    """A model and its clock in the middle of a round."""
    model = mlp()
    sync = attach(model, strategies.diloco(period))
    for x, y in batches(0, 2):
        train_step(model, sync.inner.optimizer, x, y)
        sync.step()
    return model, sync


@pytest.mark.parametrize(
    "call",
    [
        lambda sync, _: sync.step(),
        lambda sync, _: sync.finish(),
        lambda sync, _: sync.state_dict(),
        lambda sync, _: sync.load_state_dict({}),
        lambda sync, folder: checkpoint.save(folder, sync),
        lambda sync, folder: checkpoint.restore(folder, sync),
    ],
    ids=["step", "finish", "state_dict", "load_state_dict", "save", "restore"],
)
def test_nothing_is_synchronized_or_saved_while_the_model_holds_agreed_parameters(
    call: Callable[[postlocal.Sync, Path], object], tmp_path: Path
) -> None:
    model, sync = drifted()
    own = values(model)
    with sync.agreed_parameters():
        assert not equal(values(model), own)
        with pytest.raises(RuntimeError, match=r"inside sync.agreed_parameters\(\), where"):
            call(sync, tmp_path)
    assert equal(values(model), own)
    sync.step()


def save_within(rank: int, folder: Path) -> str:
    """One rank alone saves within the block."""
    _, sync = drifted()
    try:
        with sync.agreed_parameters() if rank == 0 else nullcontext():
            checkpoint.save(folder, sync)
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_rank_that_saves_agreed_parameters_is_named_on_all(ranks: Ranks, tmp_path: Path) -> None:
    for message in ranks(2, save_within, tmp_path):
        assert "called inside sync.agreed_parameters()" in message
    assert not list(tmp_path.glob("step-*"))


@pytest.mark.parametrize("work", ["1", None, torch.ones(1), -1, math.nan, math.inf])
def test_work_that_is_no_share_of_a_step_is_refused_and_not_counted(work: Any) -> None:
    sync = attach(mlp(), strategies.local_sgd(2))
    with pytest.raises((TypeError, ValueError), match="work must be a"):
        sync.step(work=work)
    assert sync.steps == 0


WRONG_STATES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "nothing": (lambda state: None, "state must be what state_dict() of a Sync gave, got None"),
    "of a model": (lambda state: mlp().state_dict(), "got one without 'strategy'"),
    "cut": (lambda state: {**state, "fragments": []}, "state is of another model"),
    "of another model": (
        lambda state: attach(nn.Linear(1, 4), strategies.diloco(4)).state_dict(),
        "state is of another model: names or shapes",
    ),
}


@pytest.mark.parametrize("method", ["load_state_dict", "restart"])
@pytest.mark.parametrize("name", WRONG_STATES)
def test_what_is_no_state_of_the_clock_is_refused_and_changes_nothing(
    name: str, method: str
) -> None:
    make, message = WRONG_STATES[name]
    model, sync = drifted()
    before, own = copy.deepcopy(sync.state_dict()["fragments"]), values(model)
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        getattr(sync, method)(make(sync.state_dict()))
    assert sync.steps == 2
    assert equal(values(model), own)
    after = sync.state_dict()["fragments"]
    for one, other in zip(before, after, strict=True):
        tensors = (list(state["anchor"]["tensors"].values()) for state in (one, other))
        assert equal(*tensors)


def test_a_checkpoint_of_a_closed_clock_or_of_none_is_refused(tmp_path: Path) -> None:
    model, sync = drifted()
    for call in (checkpoint.save, checkpoint.restore):
        with pytest.raises(TypeError, match="sync must be the Sync that"):
            call(tmp_path, model)  # type: ignore[arg-type]
    sync.close()
    for call in (checkpoint.save, checkpoint.restore):
        with pytest.raises(RuntimeError, match=rf"call checkpoint.{call.__name__} before"):
            call(tmp_path, sync)


def test_a_model_has_one_clock_at_a_time() -> None:
    model: Any = mlp()
    first = attach(model, strategies.diloco(4))
    second = postlocal.attach(model, sgd(model[2]), strategies.diloco(4))
    for call in (first.step, first.finish, first.state_dict):
        with pytest.raises(RuntimeError, match="the model was attached again since"):
            call()
    first.close()
    second.step()
    second.close()


def test_two_parts_of_a_model_are_attached_side_by_side() -> None:
    model: Any = mlp()
    one, other = (attach(part, strategies.diloco(2)) for part in (model[0], model[2]))
    for x, y in batches(0, 4):
        train_step(model, one.inner.optimizer, x, y)
        one.step()
        other.step()
    assert one.steps == other.steps == 4
