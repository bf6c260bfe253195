"""Communication hooks: what torch has right is the same here, and what is beyond it holds."""

import copy
import logging
import pickle
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks as torch_default
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as torch_powersgd
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook as torch_noop
from torch.nn.parallel import DistributedDataParallel

from postlocal import virtual, wire
from postlocal.comm.group import Group
from postlocal.ddp_comm_hooks import (
    DDPCommHookType,
    debugging,
    default,
    optimizer_overlap,
    powerSGD,
    quantization,
    register_ddp_comm_hook,
)
from postlocal.ddp_comm_hooks.debugging_hooks import MeasureState, measure_hook
from postlocal.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from postlocal.ddp_comm_hooks.powerSGD_hook import PowerSGDState
from postlocal.ddp_comm_hooks.quantization_hooks import QuantizationState
from postlocal.wire import low_rank as powersgd
from tests.launcher import Table, in_one_launch, run_table
from tests.models import batches, distance, equal, mlp, sgd, train_step, values

Ranks = Callable[..., list[Any]]
Register = Callable[[DistributedDataParallel], None]


def wide(seed: int = 0) -> nn.Module:
    """Matrices that are worth compressing, some of one shape, in several buckets."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(8, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(),
        nn.Linear(40, 4),
    )  # fmt: skip


def wrap(make: Callable[[], nn.Module] = wide, **options: Any) -> DistributedDataParallel:
    return DistributedDataParallel(make(), bucket_cap_mb=0.006, **options)


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def compare(
    rank: int, ours: Register, theirs: Register, steps: int = 6, relative: bool = True
) -> list[float]:
    """Largest difference of gradients, a step."""
    models = [wrap(), wrap()]
    ours(models[0])
    theirs(models[1])
    differences = []
    for x, y in batches(rank, steps):
        mine, other = (gradients(model, x, y) for model in models)
        scale = max(float(g.abs().max()) for g in other) if relative else 1.0
        differences.append(distance(mine, other) / scale)
    return differences


def plain(model: DistributedDataParallel) -> None:
    return None


def our_all_reduce(model: DistributedDataParallel) -> None:
    model.register_comm_hook(None, default.allreduce_hook)


def their_all_reduce(model: DistributedDataParallel) -> None:
    model.register_comm_hook(None, torch_default.allreduce_hook)


def our_fp16(model: DistributedDataParallel) -> None:
    model.register_comm_hook(dist.group.WORLD, default.fp16_compress_hook)


def their_fp16(model: DistributedDataParallel) -> None:
    model.register_comm_hook(dist.group.WORLD, torch_default.fp16_compress_hook)


def our_fp16_wrapper(model: DistributedDataParallel) -> None:
    model.register_comm_hook(None, default.fp16_compress_wrapper(default.allreduce_hook))


def our_bf16(model: DistributedDataParallel) -> None:
    model.register_comm_hook(None, default.bf16_compress_hook)


def our_bf16_wrapper(model: DistributedDataParallel) -> None:
    model.register_comm_hook(None, default.bf16_compress_wrapper(default.allreduce_hook))


def our_noop(model: DistributedDataParallel) -> None:
    model.register_comm_hook(None, debugging.noop_hook)


def their_noop(model: DistributedDataParallel) -> None:
    model.register_comm_hook(None, torch_noop)


def our_powersgd(model: DistributedDataParallel, **options: Any) -> None:
    model.register_comm_hook(PowerSGDState(None, **options), powerSGD.powerSGD_hook)


def their_powersgd(model: DistributedDataParallel, **options: Any) -> None:
    state = torch_powersgd.PowerSGDState(None, **options)
    model.register_comm_hook(state, torch_powersgd.powerSGD_hook)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_allreduce_has_the_bits_of_torchs_hook(ranks: Ranks, world: int) -> None:
    for differences in ranks(world, compare, our_all_reduce, their_all_reduce):
        assert differences == [0.0] * 6


@pytest.mark.parametrize("world", [2, 4])
def test_allreduce_has_the_bits_of_plain_ddp(ranks: Ranks, world: int) -> None:
    for differences in ranks(world, compare, our_all_reduce, plain):
        assert differences == [0.0] * 6


@pytest.mark.parametrize("ours", [our_fp16, our_fp16_wrapper])
def test_fp16_gives_what_torchs_hook_gives(ranks: Ranks, ours: Register) -> None:
    for differences in ranks(2, compare, ours, their_fp16, relative=False):
        assert max(differences) <= 1e-6


@pytest.mark.parametrize("ours", [our_bf16, our_bf16_wrapper])
def test_bf16_works_on_gloo(ranks: Ranks, ours: Register) -> None:
    for differences in ranks(3, compare, ours, plain):
        assert 0 < max(differences) <= 2.0**-6


def test_noop_leaves_gradients_alone(ranks: Ranks) -> None:
    for differences in ranks(2, compare, our_noop, their_noop):
        assert differences == [0.0] * 6


POWERSGD = {
    "rank 1": {"matrix_approximation_rank": 1},
    "rank 2": {"matrix_approximation_rank": 2},
    "QR": {"matrix_approximation_rank": 4},
    "no error feedback": {"use_error_feedback": False},
    "no warm start": {"warm_start": False},
    "batched by shape": {"batch_tensors_with_same_shape": True},
    "epsilon": {"orthogonalization_epsilon": 1e-8},
    "seed": {"random_seed": 7},
    "high rate": {"min_compression_rate": 12},
}


def compare_powersgd(rank: int, options: dict[str, Any]) -> tuple[list[float], bool]:
    settings = {"start_powerSGD_iter": 2} | options
    models = [DistributedDataParallel(wide()), DistributedDataParallel(wide())]
    states: list[Any] = [PowerSGDState(None, **settings)]
    states.append(torch_powersgd.PowerSGDState(None, **settings))
    hooks: list[Any] = [powerSGD.powerSGD_hook, torch_powersgd.powerSGD_hook]
    for model, state, hook in zip(models, states, hooks, strict=True):
        model.register_comm_hook(state, hook)
    differences = []
    for x, y in batches(rank, 6):
        mine, other = (gradients(model, x, y) for model in models)
        differences.append(distance(mine, other) / max(float(g.abs().max()) for g in other))
    return differences, states[0].compression_stats() == states[1].compression_stats()


beside_torchs = in_one_launch(2, {k: (compare_powersgd, some) for k, some in POWERSGD.items()})


@pytest.mark.parametrize("name", POWERSGD)
def test_powersgd_gives_what_torchs_hook_gives(beside_torchs: Table, name: str) -> None:
    for differences, same_statistics in beside_torchs[name]:
        assert max(differences) <= 1e-6
        assert same_statistics


def reference_powersgd(
    matrices: list[Tensor], errors: list[Tensor], q: Tensor
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Algorithms 1 and 2 of the paper on all workers' matrices at once, in fp64."""
    with_errors = [m.double() + e for m, e in zip(matrices, errors, strict=True)]
    p = torch.stack([m @ q for m in with_errors]).mean(0)
    p = torch.linalg.qr(p).Q
    q = torch.stack([m.T @ p for m in with_errors]).mean(0)
    output = p @ q.T
    return output, [m - output for m in with_errors], q


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("workers", [1, 3])
def test_powersgd_is_the_papers_algorithm(rank: int, workers: int) -> None:
    generator = torch.Generator().manual_seed(0)
    steps = [[torch.randn(20, 12, generator=generator) for _ in range(workers)] for _ in range(5)]
    start = torch.randn(12, rank, generator=generator)

    def work(group: Group) -> list[Tensor]:
        error, q, outputs = torch.zeros(1, 20, 12), start[None].clone(), []
        for matrices in steps:
            value = matrices[group.rank] + error
            output = torch.empty_like(value)
            (q,) = powersgd.mean_([value], [q.clone()], [output], [], group)
            error = value - output
            outputs.append(output[0])
        return outputs

    found = virtual.run(workers, work)
    errors, q = [torch.zeros(20, 12).double()] * workers, start.double()
    for step, matrices in enumerate(steps):
        expected, errors, q = reference_powersgd(matrices, errors, q)
        for outputs in found:
            assert torch.allclose(outputs[step].double(), expected, atol=1e-4)
            assert torch.equal(outputs[step], found[0][step])


def test_orthogonalising_columns_of_zeros_gives_no_nan() -> None:
    for columns in (1, 2, 3):
        matrices = torch.zeros(2, 5, columns)
        powersgd.orthogonalise_(matrices)
        assert bool(torch.isfinite(matrices).all())


def distance_from_residuals(rank: int, state: Any, hook: Any) -> list[float]:
    """How far gradient + old residual and output + new residual are apart in the mean, a step."""
    model = DistributedDataParallel(wide(), find_unused_parameters=True)
    model.register_comm_hook(state, hook)
    alone = wide()
    parameters = list(model.parameters())
    worst = []
    for x, y in batches(rank, 5):
        before = {key: value.clone() for key, value in state.errors.items()}
        mine, sent = gradients(alone, x, y), gradients(model, x, y)
        keys = [state._residuals._index[p] for p in parameters]
        balance = torch.cat(
            [m.flatten() + before.get(k, 0.0) - state.errors[k]
             for k, m in zip(keys, mine, strict=True)]
        )  # fmt: skip
        dist.all_reduce(balance)
        sums = torch.cat([s.flatten() for s in sent]) * dist.get_world_size()
        worst.append(float((balance - sums).abs().max()))
    return worst


@pytest.mark.parametrize("hook", ["powerSGD_hook", "batched_powerSGD_hook"])
@pytest.mark.parametrize("rank", [1, 4])
def test_what_powersgd_does_not_send_is_the_residual(ranks: Ranks, hook: str, rank: int) -> None:
    state = PowerSGDState(None, start_powerSGD_iter=0, matrix_approximation_rank=rank)
    for worst in ranks(2, distance_from_residuals, state, getattr(powerSGD, hook)):
        assert max(worst) <= 1e-6


def train_powersgd(rank: int, hook: str, options: dict[str, Any], steps: int) -> list[list[Tensor]]:
    model = wrap()
    our = PowerSGDState(None, start_powerSGD_iter=1, **options)
    model.register_comm_hook(our, getattr(powerSGD, hook))
    optimizer = sgd(model)
    history = []
    for x, y in batches(rank, steps):
        train_step(model, optimizer, x, y)
        history.append(values(model))
    return history


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_batched_powersgd_works_at_every_rank(ranks: Ranks, rank: int) -> None:
    options = {"matrix_approximation_rank": rank}
    histories = ranks(2, train_powersgd, "batched_powerSGD_hook", options, 5)
    assert all(equal(a, b) for a, b in zip(*histories, strict=True))
    assert distance(histories[0][0], histories[0][-1]) > 0


def all_reduces_a_step(rank: int) -> int:
    count = 0
    original = dist.all_reduce

    def counting(*args: Any, **keywords: Any) -> Any:
        nonlocal count
        count += 1
        return original(*args, **keywords)

    model = wrap()
    model.register_comm_hook(PowerSGDState(None, start_powerSGD_iter=2), powerSGD.powerSGD_hook)
    for step, (x, y) in enumerate(batches(rank, 4)):
        if step == 3:
            dist.all_reduce = counting
        gradients(model, x, y)
    dist.all_reduce = original
    return count


def test_powersgd_takes_two_collectives_a_step_whatever_the_number_of_buckets(
    ranks: Ranks,
) -> None:
    assert ranks(2, all_reduces_a_step) == [2, 2]


KEEP: dict[str, Callable[[Any], Any]] = {
    "state_dict": lambda state: pickle.loads(pickle.dumps(state.state_dict())),
    "pickle": pickle.dumps,
    "deepcopy": copy.deepcopy,
}


def taken_up(way: str, fresh: Any, saved: Any) -> Any:
    if way == "state_dict":
        fresh.load_state_dict(saved)
        return fresh
    return pickle.loads(saved) if way == "pickle" else saved


def resumed(rank: int, make: Callable[[], Any], hook: Any, way: str) -> float:
    """How far a run that is taken up after 3 steps, in a new model, is from the whole one."""
    data = list(batches(rank, 6))
    # Buckets are made anew in the second pass of the whole run, and of the one that is taken up.
    model, state = wrap(), make()
    model.register_comm_hook(state, hook)
    optimizer = sgd(model)
    for x, y in data[:3]:
        train_step(model, optimizer, x, y)
    weights, saved = copy.deepcopy(model.module.state_dict()), KEEP[way](state)
    for x, y in data[3:]:
        train_step(model, optimizer, x, y)

    again = wrap()
    again.module.load_state_dict(weights)
    again.register_comm_hook(taken_up(way, make(), saved), hook)
    optimizer = sgd(again)
    for x, y in data[3:]:
        train_step(again, optimizer, x, y)
    return distance(values(model), values(again))


def make_powersgd() -> PowerSGDState:
    return PowerSGDState(None, start_powerSGD_iter=1)


def make_quantisation() -> QuantizationState:
    return QuantizationState(None, block=8)


@pytest.mark.parametrize("way", ["state_dict", "pickle", "deepcopy"])
def test_powersgd_resumes_bit_for_bit_in_a_new_process_with_other_buckets(
    ranks: Ranks, way: str
) -> None:
    assert ranks(2, resumed, make_powersgd, powerSGD.powerSGD_hook, way) == [0.0, 0.0]


def load_of_another_model(rank: int) -> str:
    state = PowerSGDState(None, start_powerSGD_iter=0)
    model = wrap()
    model.register_comm_hook(state, powerSGD.powerSGD_hook)
    x, y = next(iter(batches(rank, 1)))
    gradients(model, x, y)
    other = PowerSGDState(None, start_powerSGD_iter=0)
    other.load_state_dict(state.state_dict())
    small = wrap(mlp)
    small.register_comm_hook(other, powerSGD.powerSGD_hook)
    with pytest.raises(ValueError, match="load it for the same model"):
        gradients(small, x, y)
    return "refused"


def test_the_state_of_another_model_is_refused(ranks: Ranks) -> None:
    assert ranks(1, load_of_another_model) == ["refused"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"matrix_approximation_rank": 0}, "matrix_approximation_rank must be at least 1"),
        ({"start_powerSGD_iter": -1}, "start_powerSGD_iter must be at least 0"),
        ({"min_compression_rate": 0}, "min_compression_rate must be above 0"),
        ({"orthogonalization_epsilon": -1}, "orthogonalization_epsilon must be at least 0"),
    ],
)
def test_powersgd_refuses_settings_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PowerSGDState(None, **options)


def to_channels_last(net: nn.Module) -> nn.Module:
    for parameter in net.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.to(memory_format=torch.channels_last)
    return net


def channels_last(rank: int) -> bool:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 32, 3), nn.Flatten(), nn.Linear(32 * 16, 4))
    model = DistributedDataParallel(to_channels_last(net))
    state = PowerSGDState(None, start_powerSGD_iter=0, matrix_approximation_rank=32)
    state.min_compression_rate = 0.1
    model.register_comm_hook(state, powerSGD.powerSGD_hook)
    plain = DistributedDataParallel(copy.deepcopy(net))
    for x, y in batches(rank, 2, (4, 6, 6)):
        mine, exact = gradients(model, x, y), gradients(plain, x, y)
    return distance(mine, exact) < 1e-5


def test_powersgd_takes_weights_in_channels_last(ranks: Ranks) -> None:
    assert ranks(2, channels_last) == [True, True]


def compare_quantised(rank: int, name: str) -> tuple[list[float], list[Tensor], float]:
    model, exact = wrap(), wrap()
    if name == "blockwise":
        state = QuantizationState(None, error_feedback=False)
        model.register_comm_hook(state, quantization.quantization_blockwise_hook)
    else:
        model.register_comm_hook(None, getattr(quantization, f"quantization_{name}_hook"))
    worst = []
    for x, y in batches(rank, 4):
        mine, right = gradients(model, x, y), gradients(exact, x, y)
        worst.append(distance(mine, right))
    greatest = torch.tensor(max(float(g.abs().max()) for g in gradients(wide(), x, y)))
    dist.all_reduce(greatest, dist.ReduceOp.MAX)
    return worst, mine, float(greatest)


QUANTISED = ["pertensor", "perchannel", "blockwise"]


@pytest.fixture(scope="module")
def quantised() -> Callable[[int], Table]:
    cases = {name: (compare_quantised, name) for name in QUANTISED}
    return cache(lambda world: run_table(world, cases))


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("world", [2, 3])
def test_quantised_gradients_are_within_a_step_and_equal_on_all_ranks(
    quantised: Callable[[int], Table], name: str, world: int
) -> None:
    results = quantised(world)[name]
    for worst, mine, greatest in results:
        assert 0 < max(worst) <= 2 * greatest / 127
        assert equal(mine, results[0][1])


def quantised_dtype(rank: int) -> list[torch.dtype]:
    found = []
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        model = DistributedDataParallel(mlp().to(dtype))
        model.register_comm_hook(None, quantization.quantization_perchannel_hook)
        model(torch.ones(2, 8, dtype=dtype)).sum().backward()
        gradient = next(model.parameters()).grad
        assert gradient is not None
        found.append(gradient.dtype)
    return found


def test_quantised_gradients_keep_their_dtype(ranks: Ranks) -> None:
    assert ranks(2, quantised_dtype)[0] == [torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("world", [2, 3])
def test_what_quantisation_does_not_send_is_the_residual(ranks: Ranks, world: int) -> None:
    hook = quantization.quantization_blockwise_hook
    for worst in ranks(world, distance_from_residuals, QuantizationState(None, block=32), hook):
        assert max(worst) <= 1e-6


def errors_after_resume(rank: int, way: str) -> bool:
    data = list(batches(rank, 3))
    model, state = wrap(), make_quantisation()
    model.register_comm_hook(state, quantization.quantization_blockwise_hook)
    for x, y in data:
        gradients(model, x, y)
    fresh = taken_up(way, make_quantisation(), KEEP[way](state))
    return len(fresh.errors) == 8 and all(
        torch.equal(fresh.errors[key], part) for key, part in state.errors.items()
    )


@pytest.mark.parametrize("way", ["state_dict", "pickle", "deepcopy"])
def test_errors_of_quantisation_are_saved(ranks: Ranks, way: str) -> None:
    assert ranks(2, errors_after_resume, way) == [True, True]


def test_quantisation_resumes_with_its_errors(ranks: Ranks) -> None:
    # Blocks are those of the buckets, which are others in the first pass of a resume: near, then.
    hook = quantization.quantization_blockwise_hook
    for away in ranks(2, resumed, make_quantisation, hook, "state_dict"):
        assert away < 2e-4


@pytest.mark.parametrize("world", [2, 4])
def test_traffic_of_quantised_hooks_does_not_grow_with_the_number_of_ranks(world: int) -> None:
    recipe = QuantizationState(None).wire
    assert recipe.payload_bytes(2**20, world) <= 2 * 2**20 * (1 + 4 / 256)


class PlainSGD:
    """A functional optimizer, as torch.distributed.optim has them."""

    def step_param(self, param: Tensor, grad: Tensor) -> None:
        with torch.no_grad():
            param.add_(grad, alpha=-0.1)


def overlapped(rank: int) -> float:
    model, plain_model = wrap(), wrap()
    state = optimizer_overlap._OptimizerHookState(PlainSGD())
    hook = optimizer_overlap._hook_then_optimizer(default.allreduce_hook, state)
    model.register_comm_hook(None, hook)
    reference = torch.optim.SGD(plain_model.parameters(), lr=0.1)
    for x, y in batches(rank, 4):
        gradients(model, x, y)
        train_step(plain_model, reference, x, y)
    return distance(values(model), values(plain_model))


def test_an_optimizer_after_the_hook_steps_as_one_after_the_backward_pass(ranks: Ranks) -> None:
    assert ranks(2, overlapped) == [0.0, 0.0]


def overlapped_in_part(rank: int) -> tuple[bool, bool]:
    model = wrap()
    chosen = list(model.parameters())[:2]
    before = values(model)
    state = optimizer_overlap._OptimizerHookState(PlainSGD(), chosen)
    hook = optimizer_overlap._hook_then_optimizer(default.allreduce_hook, state)
    model.register_comm_hook(None, hook)
    gradients(model, *next(iter(batches(rank, 1))))
    after = values(model)
    return not equal(before[:2], after[:2]), equal(before[2:], after[2:])


def test_the_overlapped_optimizer_leaves_other_parameters_alone(ranks: Ranks) -> None:
    assert ranks(2, overlapped_in_part) == [(True, True)] * 2


def test_an_optimizer_without_step_param_is_refused() -> None:
    with pytest.raises(ValueError, match="step_param"):
        optimizer_overlap._OptimizerHookState(object())  # type: ignore[arg-type]


def in_backward(rank: int, view: bool) -> tuple[float, bool, int]:
    model, plain_model = wrap(gradient_as_bucket_view=view), wrap()
    optimizer_overlap.apply_optimizer_in_backward(
        model, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}
    )
    reference = torch.optim.SGD(plain_model.parameters(), lr=0.1, momentum=0.9)
    for x, y in batches(rank, 4):
        nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        train_step(plain_model, reference, x, y)
    empty = all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ValueError, match="already"):
        optimizer_overlap.apply_optimizer_in_backward(model, torch.optim.SGD, {"lr": 0.1})
    from torch.distributed.optim.apply_optimizer_in_backward import _get_in_backward_optimizers

    count = len(_get_in_backward_optimizers(model))
    return distance(values(model), values(plain_model)), empty, count


@pytest.mark.parametrize("view", [False, True])
def test_an_optimizer_in_backward_steps_as_one_after_it(ranks: Ranks, view: bool) -> None:
    assert ranks(2, in_backward, view) == [(0.0, True, 8)] * 2


def in_backward_of_some(rank: int) -> tuple[float, list[bool]]:
    model, plain_model = wrap(), wrap()
    chosen = list(model.parameters())
    optimizer_overlap.apply_optimizer_in_backward(
        model, torch.optim.SGD, {"lr": 0.1}, params=chosen[:3]
    )
    rest = torch.optim.SGD(chosen[3:], lr=0.2)
    parameters = list(plain_model.parameters())
    reference = torch.optim.SGD(
        [{"params": parameters[:3], "lr": 0.1}, {"params": parameters[3:], "lr": 0.2}]
    )
    for x, y in batches(rank, 4):
        nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        rest.step()
        train_step(plain_model, reference, x, y)
        used = [p.grad is None for p in chosen]
        rest.zero_grad()
    return distance(values(model), values(plain_model)), used


def test_parameters_without_an_optimizer_in_backward_keep_their_gradients(ranks: Ranks) -> None:
    assert ranks(2, in_backward_of_some) == [(0.0, [True] * 3 + [False] * 5)] * 2


def measured(rank: int) -> tuple[float, list[int], int, str]:
    model = wrap()
    state = MeasureState(None)
    model.register_comm_hook(state, measure_hook)
    with pytest.raises(RuntimeError, match="nothing is measured yet"):
        state.report()
    for x, y in batches(rank, 6):
        gradients(model, x, y)
    report = state.report()
    numel = sum(parameter.numel() for parameter in model.parameters())
    assert sum(bucket.numel for bucket in report.buckets) == numel
    assert sum(bucket.nbytes for bucket in report.buckets) == 4 * numel
    assert all(bucket.seconds > 0 for bucket in report.buckets)
    assert 0 < report.exposed_seconds < report.seconds
    return report.headroom, [b.index for b in report.buckets], report.steps, str(report)


def test_measuring_reports_buckets_and_headroom(ranks: Ranks) -> None:
    for headroom, indices, steps, text in ranks(2, measured):
        assert headroom > 1
        assert indices == list(range(len(indices)))
        assert len(indices) > 1
        assert steps == 4
        assert "times as fast without" in text


def registered(rank: int, name: str) -> list[Tensor]:
    model = wrap()
    kind = DDPCommHookType[name]
    state: Any = dist.group.WORLD
    if name == "POST_LOCAL_SGD":
        state = PostLocalSGDState(None, None, 2)
    elif name == "MEASURE":
        state = MeasureState()
    register_ddp_comm_hook(kind, model, state)
    for x, y in batches(rank, 3):
        found = gradients(model, x, y)
    return found


NAMED = [kind.name for kind in DDPCommHookType]
registered_by_name = in_one_launch(2, {name: (registered, name) for name in NAMED})


@pytest.mark.parametrize("name", NAMED)
def test_every_hook_can_be_registered_by_name(registered_by_name: Table, name: str) -> None:
    first, second = registered_by_name[name]
    assert equal(first, second) == (name != "NOOP")


@pytest.mark.parametrize("name", ["POST_LOCAL_SGD", "MEASURE"])
def test_a_hook_that_needs_a_state_says_so(ranks: Ranks, name: str) -> None:
    assert ranks(1, registering_without_state, name) == ["refused"]


def registering_without_state(rank: int, name: str) -> str:
    with pytest.raises(ValueError, match="needs a state"):
        register_ddp_comm_hook(DDPCommHookType[name], wrap(), None)
    return "refused"


COMPOSED = ["wire", "powersgd", "fp16", "quantised"]


def composed(rank: int, name: str) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of the last step of warm-up and of the first local one, on nodes of two ranks."""
    options: Any = {
        "wire": {"reducer": wire.bf16()},
        "powersgd": {
            "reducer": powerSGD.powerSGD_hook,
            "reducer_state": PowerSGDState(None, start_powerSGD_iter=1),
        },
        "fp16": {"reducer": default.fp16_compress_hook},
        "quantised": {"reducer": quantization.quantization_perchannel_hook},
    }[name]
    state = PostLocalSGDState(None, None, 3, **options)
    model = wrap()
    model.register_comm_hook(state, post_localSGD_hook)
    history = [gradients(model, x, y) for x, y in batches(rank, 5)]
    assert state.subgroup is not None
    assert state.subgroup.size() == 2
    return history[2], history[3]


def test_a_wire_with_residuals_is_refused_as_a_reducer() -> None:
    with pytest.raises(ValueError, match="a hook, or a wire without residuals"):
        PostLocalSGDState(None, None, 0, reducer=wire.powersgd())  # type: ignore[arg-type]


in_nodes = in_one_launch(4, {name: (composed, name) for name in COMPOSED}, local_world_size=2)


@pytest.mark.parametrize("name", COMPOSED)
def test_any_reducer_composes_with_post_local_sgd(in_nodes: Table, name: str) -> None:
    warm, local = zip(*in_nodes[name], strict=True)
    assert all(equal(warm[0], other) for other in warm)
    assert equal(local[0], local[1])
    assert equal(local[2], local[3])
    assert not equal(local[0], local[2])


def test_weak_references_are_all_that_a_hook_in_backward_keeps(ranks: Ranks) -> None:
    assert ranks(1, freed_after_use) == [True]


def freed_after_use(rank: int) -> bool:
    model = wrap()
    optimizer_overlap.apply_optimizer_in_backward(model, torch.optim.SGD, {"lr": 0.1})
    x, y = next(iter(batches(rank, 1)))
    nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
    reference = weakref.ref(model)
    del model
    import gc

    gc.collect()
    return reference() is None


def reloaded(rank: int) -> tuple[list[int], bool, list[str]]:
    """Iterations of copies of a state, whether they keep its groups, and what was logged."""
    heard: list[str] = []
    logger = logging.getLogger("postlocal.ddp_comm_hooks.post_localSGD_hook")
    logger.setLevel(logging.INFO)
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    model = wrap()
    state = PostLocalSGDState(None, None, 2, gradient_accumulation_steps=2)
    model.register_comm_hook(state, post_localSGD_hook)
    for x, y in batches(rank, 3):
        gradients(model, x, y)
    twin = copy.deepcopy(state)
    fresh = PostLocalSGDState(None, None, 2, gradient_accumulation_steps=2)
    fresh.load_state_dict(state.state_dict())
    for x, y in batches(rank, 3):
        gradients(model, x, y)
    kept_passes = fresh.state_dict() == twin.state_dict() == {"iter": 1, "passes": 3}
    same = twin.subgroup is state.subgroup and kept_passes
    return [state.iter, twin.iter, fresh.iter], same, heard


def test_copies_of_the_post_local_state_go_on_alone_and_the_start_is_said_once(
    ranks: Ranks,
) -> None:
    for iterations, same, heard in ranks(2, reloaded):
        assert iterations == [2, 1, 1]
        assert same
        assert heard == ["Local SGD starts after 2 iterations"]


def half_powersgd(model: DistributedDataParallel) -> None:
    state = PowerSGDState(None, 8, start_powerSGD_iter=2)
    model.register_comm_hook(state, default.fp16_compress_wrapper(powerSGD.powerSGD_hook))


def full_powersgd(model: DistributedDataParallel) -> None:
    model.register_comm_hook(PowerSGDState(None, 8, start_powerSGD_iter=2), powerSGD.powerSGD_hook)


def test_powersgd_runs_in_fp16_within_the_wrapper(ranks: Ranks) -> None:
    for differences in ranks(2, compare, half_powersgd, full_powersgd):
        assert 0 < max(differences) <= 0.05
