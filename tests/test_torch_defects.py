"""Each known defect of torch 2.13's classes, by its number: torch's fail, and ours pass.

`make test` runs our half. `make test-torch-defects` runs the other one, which is expected to fail;
a torch that has been repaired shows as a failure there.
"""

import copy
import os
import pickle
import time
from collections import OrderedDict
from collections.abc import Callable
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import OneCycleLR, StepLR

from postlocal import DisagreementError, PeerError
from postlocal.model_averaging.averagers import PeriodicModelAverager
from tests.future_hook import hook as hook_with_string_annotations
from tests.launcher import await_event, say
from tests.models import batches, distance, equal, mlp, momentum, sgd, train_step, values

Ranks = Callable[..., list[Any]]

fails = [
    pytest.mark.torch_defect,
    pytest.mark.xfail(
        reason="a defect of torch 2.13", strict=torch.__version__.startswith("2.13.")
    ),
]
both = pytest.mark.parametrize("package", ["postlocal", pytest.param("torch", marks=fails)])


def classes(package: str) -> Any:
    """The classes and functions of one package, under one set of names."""
    if package == "torch":
        from torch.distributed.algorithms import ddp_comm_hooks
        from torch.distributed.algorithms.ddp_comm_hooks import post_localSGD_hook as post_local
        from torch.distributed.algorithms.model_averaging import averagers, utils
        from torch.distributed.algorithms.model_averaging import (
            hierarchical_model_averager as hierarchical,
        )
        from torch.distributed.optim import PostLocalSGDOptimizer
    else:
        from postlocal import ddp_comm_hooks  # type: ignore[no-redef]
        from postlocal.ddp_comm_hooks import post_localSGD_hook as post_local  # type: ignore[no-redef]
        from postlocal.model_averaging import averagers, utils  # type: ignore[no-redef]
        from postlocal.model_averaging import (  # type: ignore[no-redef]
            hierarchical_model_averager as hierarchical,
        )
        from postlocal.optim import PostLocalSGDOptimizer  # type: ignore[assignment]
    return SimpleNamespace(
        hooks=ddp_comm_hooks,
        State=post_local.PostLocalSGDState,
        hook=post_local.post_localSGD_hook,
        Periodic=averagers.PeriodicModelAverager,
        Hierarchical=hierarchical.HierarchicalModelAverager,
        utils=utils,
        Optimizer=PostLocalSGDOptimizer,
    )


def beyond(package: str, **options: Any) -> dict[str, Any]:
    """Arguments that torch's classes do not have."""
    return options if package == "postlocal" else {}


def two_nodes(rank: int, package: str) -> list[Tensor]:
    model = DistributedDataParallel(mlp())
    state = classes(package).State(None, None, 2)
    model.register_comm_hook(state, classes(package).hook)
    optimizer = sgd(model)
    for x, y in batches(rank, 4):
        train_step(model, optimizer, x, y)
    return values(model)


@both
def test_01_the_default_subgroup_is_the_node_on_cpu(ranks: Ranks, package: str) -> None:
    first, second, third, fourth = ranks(4, two_nodes, package, local_world_size=2)
    assert equal(first, second)
    assert equal(third, fourth)
    assert not equal(first, third)


def half_the_world(rank: int, package: str) -> list[int]:
    halves = [dist.new_group(members) for members in ([0, 2], [1, 3])]
    half = halves[rank % 2]
    model = DistributedDataParallel(mlp(), process_group=half)
    state = classes(package).State(half, None, 1)
    model.register_comm_hook(state, classes(package).hook)
    for x, y in batches(rank, 3):
        train_step(model, sgd(model), x, y)
    return dist.get_process_group_ranks(state.subgroup)


@both
def test_01_the_default_subgroup_lies_within_the_process_group(ranks: Ranks, package: str) -> None:
    found = ranks(4, half_the_world, package, local_world_size=4)
    assert found == [[0, 2], [1, 3], [0, 2], [1, 3]]


def four_backward_passes_a_step(rank: int, package: str) -> list[list[Tensor]]:
    """Parameters after each of 4 steps of warm-up."""
    api = classes(package)
    model = DistributedDataParallel(mlp())
    averager = api.Periodic(2, warmup_steps=4)
    subgroup, _ = dist.new_subgroups(group_size=1)  # type: ignore[no-untyped-call]
    state = api.State(None, subgroup, 4, **beyond(package, clock=averager))
    model.register_comm_hook(state, api.hook)
    optimizer = sgd(model)
    history = []
    for x, y in batches(rank, 4):
        for _ in range(4):
            nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        averager.average_parameters(model.parameters())
        history.append(values(model))
    return history


@both
def test_02_hook_and_averager_have_one_clock(ranks: Ranks, package: str) -> None:
    first, second = ranks(2, four_backward_passes_a_step, package)
    assert all(equal(a, b) for a, b in zip(first, second, strict=True))


def accumulated(rank: int) -> list[int]:
    api = classes("postlocal")
    model = DistributedDataParallel(mlp())
    state = api.State(None, None, 2, gradient_accumulation_steps=3)
    model.register_comm_hook(state, api.hook)
    found = []
    for x, y in batches(rank, 8):
        nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        found.append(state.iter)
    return found


def test_02_the_hook_counts_steps_of_several_passes_when_told(ranks: Ranks) -> None:
    assert ranks(2, accumulated)[0] == [0, 0, 1, 1, 1, 2, 2, 2]


def taken_up(rank: int, package: str) -> tuple[int, bool]:
    """The hook's iteration after a resume, and whether gradients then stay within the subgroup."""
    api = classes(package)
    subgroup, _ = dist.new_subgroups(group_size=1)  # type: ignore[no-untyped-call]
    model = DistributedDataParallel(mlp())
    state = api.State(None, subgroup, 2)
    model.register_comm_hook(state, api.hook)
    for x, y in batches(rank, 3):
        train_step(model, sgd(model), x, y)
    again = pickle.loads(pickle.dumps(state))
    again.subgroup = subgroup
    fresh = DistributedDataParallel(mlp())
    fresh.register_comm_hook(again, api.hook)
    x, y = next(iter(batches(rank, 1)))
    train_step(fresh, sgd(fresh), x, y)
    mine = torch.cat([value.flatten() for value in values(fresh)])
    everyones = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(everyones, mine)
    return again.iter, not torch.equal(*everyones)


@both
def test_03_the_hooks_iteration_is_saved(ranks: Ranks, package: str) -> None:
    assert ranks(2, taken_up, package) == [(2, True)] * 2


def stepped_scheduler(rank: int, package: str) -> tuple[float, float]:
    api = classes(package)
    optimizer = api.Optimizer(sgd(mlp()), api.Periodic(4))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    scheduler = StepLR(optimizer, step_size=1, gamma=0.5)
    for _ in range(3):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        scheduler.step()
    return optimizer.optim.param_groups[0]["lr"], float(scheduler.get_last_lr()[0])


@both
def test_04_a_scheduler_drives_the_inner_optimizer_after_loading(
    ranks: Ranks, package: str
) -> None:
    assert ranks(1, stepped_scheduler, package) == [(0.0125, 0.0125)]


def through_dcp(rank: int, package: str, flat: bool) -> tuple[int, int, bool]:
    """The averager's step after reading a fresh wrapper's state, and after a save and a load."""
    api = classes(package)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model = mlp()
    optimizer = api.Optimizer(momentum(model), api.Periodic(4))
    get_optimizer_state_dict(model, optimizer)
    fresh = optimizer.averager.step
    for x, y in batches(rank, 3):
        train_step(model, optimizer, x, y)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    twin = mlp()
    other = api.Optimizer(momentum(twin), api.Periodic(4))
    set_optimizer_state_dict(twin, other, state, options=options)
    pairs = zip(optimizer.optim.state.values(), other.optim.state.values(), strict=True)
    same = all(torch.equal(a["momentum_buffer"], b["momentum_buffer"]) for a, b in pairs)
    return fresh, other.averager.step, same


@both
@pytest.mark.parametrize("flat", [False, True])
def test_05_dcp_reads_and_loads_the_wrapper(ranks: Ranks, package: str, flat: bool) -> None:
    assert ranks(1, through_dcp, package, flat) == [(0, 3, True)]


def one_cycle(model: nn.Module, optimizer: Any) -> bool:
    scheduler = OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    for x, y in batches(0, 3):
        train_step(model, optimizer, x, y)
        scheduler.step()
    return bool(optimizer.optim.param_groups[0]["lr"] == scheduler.get_last_lr()[0])


def deepcopied(model: nn.Module, optimizer: Any) -> bool:
    twin = copy.deepcopy(optimizer)
    for x, y in batches(0, 1):
        train_step(model, optimizer, x, y)
    return (optimizer.averager.step, twin.averager.step) == (1, 0)


def pickled(model: nn.Module, optimizer: Any) -> bool:
    return bool(pickle.loads(pickle.dumps(optimizer)).averager.step == 0)


def post_hook(model: nn.Module, optimizer: Any) -> bool:
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(1))
    for x, y in batches(0, 2):
        train_step(model, optimizer, x, y)
    return seen == [1, 1]


def closure(model: nn.Module, optimizer: Any) -> bool:
    x, y = next(iter(batches(0, 1)))

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(model(x), y)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    first, second = (float(optimizer.step(loss).detach()) for _ in range(2))
    return second < first and bool(optimizer.averager.step == 2)


FEATURES = {f.__name__: f for f in (one_cycle, deepcopied, pickled, post_hook, closure)}


def feature(rank: int, package: str, name: str) -> bool:
    api = classes(package)
    model = mlp()
    local = torch.optim.LBFGS(model.parameters()) if name == "closure" else momentum(model)
    return FEATURES[name](model, api.Optimizer(local, api.Periodic(4)))


@both
@pytest.mark.parametrize("name", FEATURES)
def test_06_the_wrapper_is_an_optimizer(ranks: Ranks, package: str, name: str) -> None:
    assert ranks(1, feature, package, name) == [True]


def scaled(rank: int, package: str) -> tuple[int, list[Tensor]]:
    api = classes(package)
    model = mlp()
    optimizer = api.Optimizer(sgd(model), api.Periodic(3))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for step, (x, y) in enumerate(batches(rank, 7)):
        scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()  # type: ignore[no-untyped-call]
        if (rank, step) == (1, 1):
            next(model.parameters()).grad = torch.full((16, 8), float("inf"))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return optimizer.averager.step, values(model)


@both
def test_07_a_step_that_a_grad_scaler_skips_is_counted(ranks: Ranks, package: str) -> None:
    first, second = ranks(2, scaled, package, leaving=(0, 1) if package == "torch" else ())
    assert first[0] == second[0] == 7
    assert equal(first[1], second[1])  # the last averaging comes after step 6


def branches(rank: int, package: str) -> list[float]:
    """Two parameters of one shape; each rank has a gradient for another one of them."""
    parameters = [nn.Parameter(torch.full((3,), float(10 * index + rank))) for index in range(2)]
    parameters[rank].grad = torch.ones(3)
    classes(package).Periodic(2).average_parameters(parameters)
    return [float(parameter.detach()[0]) for parameter in parameters]


@both
def test_08_each_parameter_is_averaged_with_itself(ranks: Ranks, package: str) -> None:
    assert ranks(2, branches, package) == [[0.5, 10.5]] * 2


def without_gradients(rank: int, package: str) -> list[float]:
    parameter = nn.Parameter(torch.full((3,), float(rank)))
    classes(package).Periodic(2).average_parameters([parameter])
    return parameter.detach().tolist()


@both
def test_08_parameters_are_averaged_after_zero_grad(ranks: Ranks, package: str) -> None:
    assert ranks(2, without_gradients, package) == [[0.5] * 3] * 2


def differing_sets(rank: int, sizes: tuple[int, int]) -> str:
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(4))]
    with pytest.raises(DisagreementError) as caught:
        classes("postlocal").Periodic(2).average_parameters(parameters[: sizes[rank]])
    return str(caught.value)


@pytest.mark.parametrize("sizes", [(1, 2), (0, 1)])
def test_08_sets_that_differ_between_ranks_are_an_error_on_all(
    ranks: Ranks, sizes: tuple[int, int]
) -> None:
    known = f"rank 0 has {sizes[0]} of them, rank 1 {sizes[1]}"
    for message in ranks(2, differing_sets, sizes):
        assert message == f"ranks differ in parameters to average: {known}"


def one_nan(rank: int, package: str) -> list[float]:
    parameter = nn.Parameter(torch.full((3,), float("nan") if rank == 1 else float(rank)))
    parameter.grad = torch.ones(3)
    classes(package).Periodic(2).average_parameters([parameter])
    return parameter.detach().tolist()


@both
def test_09_nan_on_one_rank_does_not_become_everybodys(ranks: Ranks, package: str) -> None:
    assert ranks(3, one_nan, package) == [[1.0] * 3] * 3


class Held(nn.Module):
    """BatchNorm, whose forward pass waits for an event where there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.awaited = ""
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        if self.awaited:
            await_event(self.awaited, seconds=5.0)
        output: Tensor = self.layers(x)
        return output


def local_steps(rank: int, package: str, unused: bool) -> bool:
    """Rank 0 goes on within its first local step when rank 1 has done all of its 4."""
    api = classes(package)
    model = DistributedDataParallel(Held(), find_unused_parameters=unused)
    subgroup, _ = dist.new_subgroups(group_size=1)  # type: ignore[no-untyped-call]
    state = api.State(None, subgroup, 2, **beyond(package, model=model))
    model.register_comm_hook(state, api.hook)
    optimizer = sgd(model)
    done = "rank 1 has done its local steps"
    for step, (x, y) in enumerate(batches(rank, 6)):
        model.module.awaited = done if (rank, step) == (0, 2) else ""
        train_step(model, optimizer, x, y)
    if rank == 1:
        say(done)
    dist.barrier()
    return True


@both
@pytest.mark.parametrize("unused", [False, True])
def test_10_local_steps_wait_for_nobody(ranks: Ranks, package: str, unused: bool) -> None:
    assert ranks(2, local_steps, package, unused, leaving=(0, 1)) == [True, True]


def storage(rank: int, package: str) -> dict[str, bool]:
    torch.manual_seed(rank)
    conv = nn.Conv2d(4, 8, 3)
    conv.weight.data = conv.weight.data.to(memory_format=torch.channels_last)
    parameters = [conv.weight, nn.Parameter(torch.randn(500, 500)), nn.Parameter(torch.randn(3))]
    view = parameters[1].detach()[0]
    before = [(p.data_ptr(), p.stride()) for p in parameters]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    classes(package).Periodic(2).average_parameters(parameters)
    file = BytesIO()
    torch.save(parameters[2], file)
    return {
        "place": before == [(p.data_ptr(), p.stride()) for p in parameters],
        "view": torch.equal(view, parameters[1].detach()[0]),
        "file": len(file.getvalue()) < 10_000,
    }


@both
@pytest.mark.parametrize("what", ["place", "view", "file"])
def test_11_parameters_stay_where_they_are(ranks: Ranks, package: str, what: str) -> None:
    assert all(found[what] for found in ranks(2, storage, package))


def identical(rank: int, package: str) -> bool:
    model = mlp()
    before = values(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    classes(package).Periodic(2).average_parameters(model.parameters())
    return equal(before, values(model))


@both
def test_12_identical_replicas_stay_as_they_are(ranks: Ranks, package: str) -> None:
    assert ranks(3, identical, package) == [True] * 3


def bf16_mean(rank: int, package: str) -> bool:
    everyones = [
        torch.randn(10_000, generator=torch.Generator().manual_seed(seed)).bfloat16()
        for seed in range(3)
    ]
    parameter = nn.Parameter(everyones[rank].clone())
    parameter.grad = torch.ones_like(parameter)
    classes(package).Periodic(2).average_parameters([parameter])
    exact = torch.stack(everyones).float().mean(0)
    return torch.equal(parameter.detach(), exact.bfloat16())


@both
def test_12_bf16_parameters_are_averaged_in_fp32(ranks: Ranks, package: str) -> None:
    assert ranks(3, bf16_mean, package) == [True] * 3


def refused(rank: int, package: str, levels: list[tuple[int, int]]) -> bool:
    with pytest.raises(ValueError, match=r"sorted|multiple"):
        classes(package).Hierarchical(OrderedDict(levels))
    return True


@both
@pytest.mark.parametrize("levels", [[(4, 2), (2, 4)], [(2, 2), (3, 4)]], ids=str)
def test_13_levels_that_would_be_dropped_are_refused(
    ranks: Ranks, package: str, levels: list[tuple[int, int]]
) -> None:
    assert ranks(4, refused, package, levels) == [True] * 4


def ended(rank: int, package: str) -> list[Tensor]:
    api = classes(package)
    model = mlp()
    optimizer = api.Optimizer(sgd(model), api.Periodic(4))
    for x, y in batches(rank, 23):
        train_step(model, optimizer, x, y)
    if hasattr(optimizer, "finish"):
        optimizer.finish()
    return values(model)


@both
def test_14_a_run_can_end_with_equal_replicas(ranks: Ranks, package: str) -> None:
    first, second = ranks(2, ended, package)
    assert equal(first, second)


def left_alone(rank: int, package: str) -> str:
    model = mlp()
    averager = classes(package).Periodic(2)
    for x, y in batches(rank, 3):
        train_step(model, sgd(model), x, y)
        if rank == 1 and averager.step == 2:
            os._exit(0)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        try:
            averager.average_parameters(model.parameters())
        except RuntimeError as error:
            return str(error)
    return "nothing noticed"


@both
def test_15_a_rank_that_is_gone_is_named(ranks: Ranks, package: str) -> None:
    message, _ = ranks(2, left_alone, package, expect_dead=(1,))
    assert "missing" in message
    assert "rank 1" in message


def stopped(rank: int) -> tuple[str, float]:
    """Rank 1 does not come, though its process lives."""
    averager = PeriodicModelAverager(2, timeout=1.5)
    model = mlp()
    if rank == 1:
        return "", 0.0
    start = time.perf_counter()
    with pytest.raises(PeerError) as caught:
        averager.average_parameters(model.parameters())
    return str(caught.value), time.perf_counter() - start


def test_15_a_rank_that_is_stopped_costs_the_averagers_own_timeout(ranks: Ranks) -> None:
    (message, seconds), _ = ranks(2, stopped)
    assert "rank 1" in message
    assert seconds < 5


def local_of(parameter: Tensor) -> Tensor:
    assert isinstance(parameter, DTensor)
    return parameter.to_local().detach()


def sharded(rank: int, package: str) -> float:
    """How far the sharded parameters of two replicas are from the mean of the two."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model: Any = fully_shard(mlp(), mesh=mesh["shard"])
    for x, y in batches(rank, 2):
        train_step(model, sgd(model), x, y)
    nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
    parts = [local_of(parameter).clone() for parameter in model.parameters()]
    assert len(parts) == 4
    classes(package).Periodic(2, 0, mesh["replicate"].get_group()).average_parameters(
        model.parameters()
    )
    worst = 0.0
    for parameter, part in zip(model.parameters(), parts, strict=True):
        moved = distance([local_of(parameter)], [part]) if part.numel() else 0.0
        dist.all_reduce(part, group=mesh["replicate"].get_group())
        if part.numel():
            worst = max(worst, distance([local_of(parameter)], [part / 2]))
            assert moved > 0
    return worst


@both
def test_16_sharded_replicas_are_averaged_part_by_part(ranks: Ranks, package: str) -> None:
    assert max(ranks(4, sharded, package)) < 1e-7


def sharded_over_the_wrong_group(rank: int) -> str:
    model: Any = fully_shard(mlp(), mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(DisagreementError) as caught:
        PeriodicModelAverager(2).average_parameters(model.parameters())
    return str(caught.value)


def test_16_different_parts_are_not_averaged_with_each_other(ranks: Ranks) -> None:
    for message in ranks(2, sharded_over_the_wrong_group):
        assert "part" in message


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def hooked(rank: int, package: str, name: str) -> bool:
    """Whether a hook gives about the gradients of plain DDP, the same on all ranks."""
    hooks = classes(package).hooks
    model = DistributedDataParallel(mlp())
    plain = DistributedDataParallel(mlp())
    if name.startswith("batched"):
        state = hooks.powerSGD.PowerSGDState(
            None, matrix_approximation_rank=int(name[-1]), start_powerSGD_iter=2
        )
        model.register_comm_hook(state, hooks.powerSGD.batched_powerSGD_hook)
    else:
        hooks.register_ddp_comm_hook(hooks.DDPCommHookType[name], model, dist.group.WORLD)
    for x, y in batches(rank, 4):
        for each in (model, plain):
            nn.functional.cross_entropy(each(x), y).backward()  # type: ignore[no-untyped-call]
    found, exact = (
        [p.grad for p in each.parameters() if p.grad is not None] for each in (model, plain)
    )
    scale = max(float(gradient.abs().max()) for gradient in exact)
    return distance(found, exact) < (2.0 if name.startswith("batched") else 0.02) * scale


@both
@pytest.mark.parametrize(
    "name",
    ["BF16_COMPRESS", "QUANTIZE_PER_TENSOR", "QUANTIZE_PER_CHANNEL", "batched 1", "batched 4"],
)
def test_17_hooks_work_on_gloo(ranks: Ranks, package: str, name: str) -> None:
    assert ranks(2, hooked, package, name) == [True] * 2


def in_backward(rank: int, package: str) -> float:
    model, plain = mlp(), DistributedDataParallel(mlp())
    if package == "torch":
        from torch.distributed.optim.apply_optimizer_in_backward import (
            _apply_optimizer_in_backward,
        )

        _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.1})
        model = DistributedDataParallel(model)
    else:
        model = DistributedDataParallel(model)
        overlap = classes(package).hooks.optimizer_overlap
        overlap.apply_optimizer_in_backward(model, torch.optim.SGD, {"lr": 0.1})
    for x, y in batches(rank, 3):
        nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        train_step(plain, sgd(plain), x, y)
    return distance(values(model), values(plain))


@both
def test_17_the_optimizer_in_backward_needs_no_accelerator(ranks: Ranks, package: str) -> None:
    assert ranks(2, in_backward, package) == [0.0, 0.0]


def composed(rank: int, package: str) -> float:
    """The first local gradient with 8-bit codes within the subgroup, against the exact one."""
    api = classes(package)
    reducer = classes("postlocal").hooks.quantization.quantization_perchannel_hook
    models = []
    for options in ({"reducer": reducer}, {}):
        model = DistributedDataParallel(mlp())
        subgroup, _ = dist.new_subgroups(group_size=2)  # type: ignore[no-untyped-call]
        model.register_comm_hook(api.State(None, subgroup, 0, **options), api.hook)
        x, y = next(iter(batches(rank, 1)))
        nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        models.append(gradients(model))
    return distance(*models)


@both
def test_17_another_reducer_composes_with_the_hook(ranks: Ranks, package: str) -> None:
    for difference in ranks(4, composed, package):
        assert 0 < difference < 0.01


def registered(rank: int, package: str) -> bool:
    model = DistributedDataParallel(mlp())
    if package == "torch":
        model.register_comm_hook(None, hook_with_string_annotations)
    else:
        classes(package).hooks.register_ddp_comm_hook(hook_with_string_annotations, model)
    x, y = next(iter(batches(rank, 1)))
    nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
    return True


@both
def test_18_a_hook_with_string_annotations_can_be_registered(ranks: Ranks, package: str) -> None:
    assert ranks(2, registered, package) == [True, True]
