"""Whatever wraps a model or its optimizer is recognised: worked with, or refused with the fix."""

import copy
import gc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import postlocal
from postlocal import checkpoint, strategies, virtual
from postlocal.comm.group import Group
from postlocal.errors import CheckpointError, DisagreementError
from postlocal.model_averaging.averagers import PeriodicModelAverager
from postlocal.optim import PostLocalSGDOptimizer as OurPostLocalSGDOptimizer
from postlocal.sync.supported_wrappers import gradients_reduced_elsewhere
from tests.models import batches, listen, mlp, momentum, sgd, train_step, values

Ranks = Callable[..., list[Any]]


def refusal(model: Any, optimizer: Any = None) -> str:
    given = sgd(model) if optimizer is None else optimizer
    with pytest.raises((ValueError, TypeError)) as error:
        postlocal.attach(model, given, strategies.local_sgd(2))
    return f"{type(error.value).__name__}: {error.value}"


class Holder(nn.Module):
    """A user's module around another."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.inner(x)
        return output


def foreign(name: str, module: str, base: type) -> type:
    """A class that claims to be from a package that is not installed."""
    return type(name, (base,), {"__module__": module})


class Stage:
    """Stands for a pipeline stage, which needs devices to be made."""


def wrapped_models(rank: int) -> dict[str, str]:
    mesh = DeviceMesh("cpu", [0, 1])
    sharded_buffer = mlp()
    sharded_buffer.register_buffer("mean", distribute_tensor(torch.zeros(4), mesh))
    second = mlp()
    fully_shard(second, mesh=mesh)
    stage = foreign("PipelineStage", "torch.distributed.pipelining.stage", Stage)()
    engine = foreign("DeepSpeedEngine", "deepspeed.runtime.engine", Holder)(mlp())
    of_megatron = foreign("DistributedDataParallel", "megatron.core.distributed.ddp", Holder)(mlp())
    of_a_user = foreign("Parallel", "parallel.megatron_like", Holder)(mlp())
    postlocal.attach(of_a_user, sgd(of_a_user), strategies.local_sgd(2)).close()
    any_optimizer = sgd(mlp())
    flat = FullyShardedDataParallel(mlp(), device_id=torch.device("cpu"))
    original = FullyShardedDataParallel(mlp(), device_id=torch.device("cpu"), use_orig_params=True)
    return {
        "fsdp": refusal(flat),
        "fsdp inside": refusal(Holder(original)),
        "inside of fsdp": refusal(original.module, any_optimizer),
        "fully_shard": refusal(second),
        "buffer": refusal(sharded_buffer),
        "data parallel": refusal(nn.DataParallel(mlp())),
        "nested": refusal(Holder(DistributedDataParallel(mlp()))),
        "stage": refusal(stage, any_optimizer),
        "engine": refusal(engine),
        "megatron": refusal(of_megatron),
        "no module": refusal(values(mlp()), any_optimizer),
    }


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_models_that_something_else_manages_are_refused_with_the_fix(ranks: Ranks) -> None:
    for found in ranks(2, wrapped_models):
        for name in ("fsdp", "fsdp inside", "engine", "megatron", "fully_shard"):
            assert "TypeError: model must not hold" in found[name], name
            assert "DistributedDataParallel" in found[name], name
        assert "FullyShardedDataParallel; 'inner', which is one" in found["fsdp inside"]
        assert "model is inside a torch.distributed.fsdp" in found["inside of fsdp"]
        assert "buffer 'mean' is a DTensor" in found["buffer"]
        assert "use one process a device" in found["data parallel"]
        assert "must be outermost, and 'inner' in model is one" in found["nested"]
        assert "got a pipeline stage" in found["stage"]
        assert "model must be a torch.nn.Module, got a value of type list" in found["no module"]


def inside_ddp(rank: int) -> dict[str, str | None]:
    net = mlp()
    ddp = DistributedDataParallel(net)
    optimizer = sgd(net)
    found: dict[str, str | None] = {
        "bare": refusal(net),
        "part": refusal(net.get_submodule("0")),
        "compiled": refusal(torch.compile(net, backend="eager")),
        "asked": gradients_reduced_elsewhere(net.parameters()),
        "copy": gradients_reduced_elsewhere(copy.deepcopy(net).parameters()),
    }
    postlocal.attach(ddp, optimizer, strategies.ddp()).close()
    dist.barrier()
    with pytest.raises((ValueError, DisagreementError)) as error:
        postlocal.attach(net if rank else ddp, optimizer, strategies.local_sgd(2))
    found["one rank"] = str(error.value)
    ddp.__dict__["itself"] = ddp  # garbage that only a collection finds
    gc.disable()
    del ddp, error
    sync = postlocal.attach(net, optimizer, strategies.local_sgd(2))
    gc.enable()
    for x, y in batches(rank, 2):
        train_step(net, optimizer, x, y)
        sync.step()
    found["gone"] = gradients_reduced_elsewhere(net.parameters())
    return found


def test_a_model_that_is_inside_a_ddp_alive_is_refused(ranks: Ranks) -> None:
    for found in ranks(2, inside_ddp):
        for name in ("bare", "part", "compiled", "one rank"):
            assert "model is inside a torch.nn.parallel.distributed.Distributed" in found[name]
            assert "pass that wrapper" in found[name]
        assert "DistributedDataParallel of torch.nn.modules.container.Seq" in str(found["asked"])
        assert found["copy"] is None
        assert found["gone"] is None


class Proxy:
    """An optimizer as trainers wrap it: all is handed on."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        return self.optimizer.state

    def step(self) -> None:
        self.optimizer.step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()


def wrapped_optimizers(rank: int) -> dict[str, str]:
    # Imported here: the module of torch warns when it is imported.
    from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer

    net = mlp()
    zero = ZeroRedundancyOptimizer(net.parameters(), torch.optim.SGD, lr=0.1)
    averager = PeriodicModelAverager(period=2)
    horovod = foreign("SGD", "horovod.torch.optimizer", torch.optim.SGD)
    deepspeed = foreign("ZeroOptimizer", "deepspeed.runtime.zero.stage3", torch.optim.SGD)
    return {
        "zero": refusal(net, zero),
        "zero in a proxy": refusal(net, Proxy(Proxy(zero))),
        "torch's": refusal(net, PostLocalSGDOptimizer(sgd(net), averager)),  # type: ignore[arg-type]
        "ours": refusal(net, OurPostLocalSGDOptimizer(sgd(net), averager)),
        "horovod": refusal(net, horovod(net.parameters(), lr=0.1)),
        "deepspeed": refusal(net, deepspeed(net.parameters(), lr=0.1)),
        "scheduler": refusal(net, torch.optim.lr_scheduler.StepLR(sgd(net), 3)),
        "parameters": refusal(net, list(net.parameters())),
    }


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_optimizers_that_reduce_or_shard_are_refused_with_the_fix(ranks: Ranks) -> None:
    for found in ranks(2, wrapped_optimizers):
        for name in ("zero", "zero in a proxy", "torch's", "ours", "horovod", "deepspeed"):
            assert "TypeError: optimizer must not be" in found[name], name
            assert "make the optimizer that it wraps" in found[name], name
        assert "got a value of type StepLR: pass its optimizer" in found["scheduler"]
        assert "optimizer[0] must be a torch.optim.Optimizer, got" in found["parameters"]


def train_by_proxy(rank: int, proxied: bool) -> list[Tensor]:
    net = mlp()
    inner = momentum(net)
    optimizer: Any = Proxy(inner) if proxied else inner
    sync = postlocal.attach(net, optimizer, strategies.local_sgd(2))
    for x, y in batches(rank, 5):
        train_step(net, optimizer, x, y)
        sync.step()
    sync.finish()
    sync.close()
    return values(net)


def test_a_proxy_of_an_optimizer_is_an_optimizer(ranks: Ranks) -> None:
    plain, proxied = (ranks(2, train_by_proxy, way) for way in (False, True))
    for left, right in zip(plain[0], proxied[1], strict=True):
        assert torch.equal(left, right)


class Own(nn.Module):
    """A module with a part that belongs to its rank, of a shape of its own."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.body = mlp()
        self.head = nn.Linear(4, 2 + rank)
        self.seen = torch.full((1 + rank,), float(rank))
        self.body.register_buffer("seen", self.seen)

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1)
        output: Tensor = self.head(self.body(x))
        return output


def own_parts(rank: int, wrap: bool) -> tuple[Own, nn.Module]:
    net = Own(rank)
    nn.init.constant_(net.head.weight, float(rank))
    names = ["head.weight", "head.bias", "body.seen"]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, names)  # type: ignore[no-untyped-call]
    return net, DistributedDataParallel(net) if wrap else net


def with_own_parts(rank: int, wrap: bool) -> dict[str, Any]:
    net, model = own_parts(rank, wrap)
    optimizer = momentum(model)
    first = net.head.weight.detach().clone()
    sync = postlocal.attach(model, optimizer, strategies.diloco(2))
    kept = torch.equal(first, net.head.weight)
    for x, _ in batches(rank, 4):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        sync.step()
    sync.finish()
    return {
        "own": sorted(sync.replica.own),
        "synchronized": sorted(sync.replica.tensors),
        "kept": kept,
        "body": values(net.body),
        "head": values(net.head),
        "seen": net.seen.tolist(),
    }


@pytest.mark.parametrize("wrap", [True, False], ids=["ddp", "plain"])
def test_what_ddp_was_told_to_ignore_stays_of_its_rank(ranks: Ranks, wrap: bool) -> None:
    left, right = ranks(2, with_own_parts, wrap)
    for rank, found in enumerate((left, right)):
        assert found["own"] == ["body.seen", "head.bias", "head.weight"]
        assert all(name.startswith("body.") for name in found["synchronized"])
        assert found["kept"]
        assert found["seen"] == [rank + 4.0] * (rank + 1)
        assert found["head"][0].shape == (2 + rank, 4)
    for mine, theirs in zip(left["body"], right["body"], strict=True):
        assert torch.equal(mine, theirs)


def resume_own_parts(rank: int, folder: str) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors of this rank when a checkpoint was saved, and after a resume from it."""
    net, model = own_parts(rank, wrap=True)
    optimizer = momentum(model)
    sync = postlocal.attach(model, optimizer, strategies.diloco(2))
    for x, _ in batches(rank, 3):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        sync.step()
    checkpoint.save(folder, sync)
    fresh, wrapped = own_parts(rank, wrap=True)
    checkpoint.restore(folder, postlocal.attach(wrapped, momentum(wrapped), strategies.diloco(2)))
    return list(net.state_dict().values()), list(fresh.state_dict().values())


def refuse_own_parts(rank: int, folder: str) -> str:
    _, model = own_parts(rank, wrap=True)
    sync = postlocal.attach(model, momentum(model), strategies.diloco(2))
    with pytest.raises(CheckpointError) as error:
        checkpoint.restore(folder, sync)
    return str(error.value)


def test_what_is_of_one_rank_is_saved_by_it_and_not_resumed_on_other_ranks(
    ranks: Ranks, tmp_path: Path
) -> None:
    for saved, resumed in ranks(2, resume_own_parts, str(tmp_path)):
        for one, other in zip(saved, resumed, strict=True):
            assert torch.equal(one, other)
    for message in ranks(3, refuse_own_parts, str(tmp_path)):
        assert "holds tensors that belong to one rank alone" in message


def no_parameters_on_one_rank(rank: int) -> str:
    model = mlp() if rank == 0 else nn.Identity()
    optimizer = sgd(mlp())
    with pytest.raises((ValueError, DisagreementError)) as error:
        postlocal.attach(model, sgd(model) if rank == 0 else optimizer, strategies.local_sgd(2))
    return str(error.value)


def test_a_model_without_parameters_on_one_rank_is_told_by_all(ranks: Ranks) -> None:
    messages = ranks(2, no_parameters_on_one_rank)
    assert "another rank cannot go on" in messages[0]
    assert all("model must have a parameter that requires grad" in text for text in messages)


def reduced_behind(rank: int, how: str) -> list[str]:
    """Gradients that something else averages, ranks with the same data, or replicas near by."""
    said = listen()
    net = mlp()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-7 if "near" in how else 0.1)
    model = DistributedDataParallel(net) if "wrapped" in how else net
    sync = postlocal.attach(model, optimizer, strategies.local_sgd(2))
    model = DistributedDataParallel(net) if how == "ddp" else model
    for x, y in batches(0 if "same data" in how else rank, 6):
        train_step(model, optimizer, x, y)
        sync.step()
    return said


@pytest.mark.parametrize(
    "how", ["ddp", "same data", "same data, wrapped", "apart", "near, wrapped", "near"]
)
def test_replicas_that_do_not_go_apart_in_local_steps_are_told_of(ranks: Ranks, how: str) -> None:
    said, elsewhere = ranks(2, reduced_behind, how)
    assert not elsewhere
    if how == "apart" or "near" in how:
        assert not said
        return
    (message,) = said
    assert message.startswith("replicas are equal to the bit after 2 local steps")
    assert ("DistributedDataParallel" in message) == (how == "ddp")
    assert ("the same data" in message) == ("same data" in how)


def synchronized_norms(rank: int) -> list[list[str]]:
    nodes = [dist.new_group([first, first + 1]) for first in (0, 2)]
    warned = []
    for group in (None, nodes[rank // 2]):
        net = nn.Sequential(nn.Linear(8, 4), nn.SyncBatchNorm(4, process_group=group))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            postlocal.attach(net, sgd(net), strategies.local_sgd(2)).close()
        warned.append([str(warning.message) for warning in caught])
    return warned


def test_batch_norm_over_all_ranks_is_warned_of_where_steps_are_local(ranks: Ranks) -> None:
    for world, node in ranks(4, synchronized_norms):
        (message,) = world
        assert message.startswith("'1' is a SyncBatchNorm, which communicates with all 4 ranks")
        assert not node


def test_batch_norm_over_all_ranks_stays_local_where_ranks_are_threads() -> None:
    def steps(group: Group) -> int:
        net = nn.Sequential(nn.Linear(8, 4), nn.SyncBatchNorm(4))
        return postlocal.attach(net, sgd(net), strategies.local_sgd(2), process_group=group).steps

    assert virtual.run(2, steps) == [0, 0]


def round_to_few_bits(rank: int) -> list[str]:
    said = listen()
    model = mlp()
    optimizer = sgd(model)
    sync = postlocal.attach(model, optimizer, strategies.streaming_diloco(4, 2))
    for x, y in batches(rank, 20):
        train_step(model, optimizer, x, y)
        sync.step()
    return said


def test_a_mean_of_few_bits_is_not_taken_for_replicas_that_are_equal(ranks: Ranks) -> None:
    assert ranks(2, round_to_few_bits) == [[], []]
