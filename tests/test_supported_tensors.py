"""Tensors of every kind in a model: synchronized rightly, or refused by name on all ranks."""

import copy
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import postlocal
from postlocal import DisagreementError, Strategy, schedule, strategies, topology, virtual, wire
from postlocal.comm.group import Group, Processes
from postlocal.comm.groups import LevelGroups, by_node
from postlocal.ddp_comm_hooks import default_hooks, powerSGD_hook, quantization_hooks
from postlocal.sync import supported_tensors
from tests.models import mlp, sgd, train, train_step

Ranks = Callable[..., list[Any]]
MODEL = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
STRATEGIES = {
    "local": strategies.local_sgd(2),
    "diloco": strategies.diloco(2),
    "streaming": strategies.streaming_diloco(period=4, fragments=2, delay=1),
}

INTEGERS = (
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32,
)  # fmt: skip
FLOATS = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.complex32, torch.complex64, torch.complex128,
)  # fmt: skip


def buffer_after(strategy: Strategy, values: list[Tensor]) -> list[Tensor]:
    """What becomes of a buffer of these values, one a rank, written before the first step."""

    def work(group: Group) -> Tensor:
        model = copy.deepcopy(MODEL)
        model.register_buffer("odd", torch.zeros_like(values[0]))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sync = postlocal.attach(model, optimizer, strategy, process_group=group)
        buffer = model.get_buffer("odd")
        buffer.copy_(values[group.rank])
        for _ in range(8):
            model(torch.full((2, 4), float(group.rank))).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            sync.step()
        sync.finish()
        sync.close()
        return buffer.clone()

    return virtual.run(len(values), work, timeout=20)


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_of_integers_the_greatest_is_taken(strategy: Strategy, dtype: torch.dtype) -> None:
    most = torch.iinfo(dtype).max
    values = [torch.tensor([3, 0, most], dtype=dtype), torch.tensor([1, 5, 0], dtype=dtype)]
    for result in buffer_after(strategy, values):
        assert result.tolist() == [3, 5, most]


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_of_booleans_true_is_taken(strategy: Strategy) -> None:
    for result in buffer_after(strategy, [torch.tensor([True, False]), torch.tensor([False] * 2)]):
        assert result.tolist() == [True, False]


@pytest.mark.filterwarnings("ignore:ComplexHalf support:UserWarning")
@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_of_floats_the_mean_is_taken(strategy: Strategy, dtype: torch.dtype) -> None:
    values = [torch.tensor([1.0, 2.0]).to(dtype), torch.tensor([3.0, 6.0]).to(dtype)]
    for result in buffer_after(strategy, values):
        assert result.dtype == dtype
        assert result.to(torch.complex64).tolist() == [2, 4]


SHAPES: dict[str, Callable[[], Tensor]] = {
    "no dimension": lambda: torch.zeros(()),
    "no elements": lambda: torch.zeros(0, 3),
    "gaps": lambda: torch.zeros(4, 4)[:, ::2],
    "transposed": lambda: torch.zeros(4, 3).t(),
    "expanded along one of length 1": lambda: torch.arange(4.0).expand(1, 4),
}


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize("case", SHAPES)
def test_of_any_shape_and_strides_the_mean_is_taken(strategy: Strategy, case: str) -> None:
    odd = SHAPES[case]()
    for result in buffer_after(strategy, [odd + 1, odd + 3]):
        torch.testing.assert_close(result, odd + 2)


REFUSED: dict[str, tuple[Callable[[], Tensor], str]] = {
    "expanded": (lambda: torch.zeros(1).expand(4), r"is expanded: .* give it .contiguous\(\)"),
    "overlapping": (lambda: torch.zeros(5).as_strided((3, 3), (1, 1)), "is expanded: several"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "is sparse or of another special layout"),
    "rows of sparse": (lambda: torch.eye(3).to_sparse_csr(), "is sparse or of another"),
    "mkldnn": (lambda: torch.eye(3).to_mkldnn(), "is sparse or of another special layout"),
    "quantized": (
        lambda: torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8),
        "is quantized: keep integers and scale",
    ),
    "meta": (lambda: torch.zeros(3, device="meta"), "is on the meta device: materialize"),
    "conjugated": (
        lambda: torch.zeros(3, dtype=torch.complex64).conj(),
        ".* it .resolve_conj",
    ),
    "negated": (lambda: torch.zeros(3, dtype=torch.complex64).conj().imag, ".* or .resolve_neg"),
}


def with_buffer(tensor: Tensor) -> nn.Module:
    model = mlp()
    model.register_buffer("odd", tensor)
    return model


@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning", "ignore:.*quantize:UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_a_tensor_without_plain_memory_is_refused_by_name(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(TypeError, match=f"buffer 'odd' {message}"):
        supported_tensors.check(with_buffer(make()))
    if case in ("expanded", "sparse", "meta"):
        model = mlp()
        model.odd = nn.Parameter(make())
        with pytest.raises(TypeError, match=f"parameter 'odd' {message}"):
            supported_tensors.check(model)


def test_what_has_no_maximum_is_refused_as_a_buffer_and_kept_as_a_frozen_parameter() -> None:
    huge = torch.zeros(2, dtype=torch.uint64)
    with pytest.raises(TypeError, match=r"buffer 'odd' is of torch\.uint64, of which no mean"):
        supported_tensors.check(with_buffer(huge))
    model = mlp()
    model.odd = nn.Parameter(huge, requires_grad=False)
    supported_tensors.check(model)


def test_training_in_8_bits_is_refused_by_name() -> None:
    model = mlp()
    model.odd = nn.Parameter(torch.zeros(2, dtype=torch.float8_e4m3fn))
    with pytest.raises(TypeError, match=r"'odd' is of torch\.float8_e4m3fn and trained: train in"):
        supported_tensors.check(model)


def test_a_lazy_module_is_refused_by_name() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(TypeError, match=r"parameter '0.weight' is not initialized: run the model"):
        supported_tensors.check(model)


def test_an_odd_buffer_on_one_rank_is_an_error_on_all() -> None:
    def work(group: Group) -> str:
        model = copy.deepcopy(MODEL)
        odd = torch.zeros(1).expand(4) if group.rank else torch.zeros(4)
        model.register_buffer("odd", odd)
        try:
            postlocal.attach(model, sgd(model), strategies.local_sgd(2), process_group=group)
        except (TypeError, DisagreementError) as error:
            return str(error)
        return "attached"

    first, second = virtual.run(2, work)
    assert second.startswith("buffer 'odd' is expanded")
    assert first == f"another rank cannot go on: TypeError: {second} (rank 1)"


def embedding() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 4))


HOOKS: dict[str, tuple[Callable[[], Any], Any]] = {
    "powerSGD": (lambda: powerSGD_hook.PowerSGDState(None, start_powerSGD_iter=1000),
                 powerSGD_hook.powerSGD_hook),
    "fp16": (lambda: None, default_hooks.fp16_compress_hook),
    "quantization": (lambda: None, quantization_hooks.quantization_pertensor_hook),
}  # fmt: skip


def sparse_cases(rank: int) -> tuple[dict[str, str], bool]:
    """What is said of sparse gradients, and whether the exact wire equals DDP to the bit."""
    said = {}
    for name, gradient_wire in (("bf16", wire.bf16()), ("powersgd", wire.powersgd())):
        model = DistributedDataParallel(embedding())
        strategy = replace(strategies.ddp(), gradient_wire=gradient_wire)
        said[name] = error_of(partial(postlocal.attach, model, sgd(model), strategy))
    for name, (state, hook) in HOOKS.items():
        model = DistributedDataParallel(embedding())
        model.register_comm_hook(state(), hook)
        said[name] = error_of(partial(step_on, model, rank, 2))
    plain, ours = (DistributedDataParallel(embedding()) for _ in range(2))
    optimizers = sgd(plain), sgd(ours)
    sync = postlocal.attach(ours, optimizers[1], strategies.ddp())
    for step in range(3):
        for model, optimizer in zip((plain, ours), optimizers, strict=True):
            step_on(model, rank, step, optimizer)
        sync.step()
    pairs = zip(plain.parameters(), ours.parameters(), strict=True)
    return said, all(torch.equal(a, b) for a, b in pairs)


def step_on(model: nn.Module, rank: int, step: int, optimizer: Optimizer | None = None) -> None:
    tokens, targets = torch.tensor([rank, step]), torch.tensor([0, 1])
    train_step(model, optimizer or sgd(model), tokens, targets)


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except (TypeError, ValueError) as error:
        return str(error)
    return "nothing"


def test_sparse_gradients_are_refused_by_name_where_they_would_be_compressed(ranks: Ranks) -> None:
    for said, equal in ranks(2, sparse_cases):
        for name in ("bf16", "powersgd"):
            assert said[name].startswith("parameter '0.weight' has sparse gradients"), said
        for name in HOOKS:
            assert said[name].startswith("the gradient of a parameter of shape (10, 4) is sparse")
        assert equal


def attach_outside(rank: int) -> str:
    group = dist.new_group([0])
    model = mlp()
    strategy = strategies.local_sgd(2)
    return error_of(lambda: postlocal.attach(model, sgd(model), strategy, process_group=group))


def test_a_process_group_that_this_rank_is_not_in_is_an_error_that_says_so(ranks: Ranks) -> None:
    inside, outside = ranks(2, attach_outside)
    assert inside == "nothing"
    assert outside.startswith("process_group must be one that this rank is in, got one of other")


class Said(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def train_without_topology(rank: int) -> tuple[bool, list[str]]:
    """Whether weights are those of a run that was given the nodes, and what is said."""
    said = Said()
    logging.getLogger("postlocal").addHandler(said)
    strategy = strategies.post_local_sgd(warmup=2, period=2)
    found = train(rank, strategy, 6, finish=True)
    whole = topology.nodes()
    size = whole.size if len(whole.partition(4)["node"]) > 1 else 1
    given = train(rank, strategy, 6, finish=True, topology=topology.nodes(size))
    same = all(torch.equal(*pair) for a, b in zip(found, given, strict=True)
               for pair in zip(a, b, strict=True))  # fmt: skip
    return same, said.lines


@pytest.mark.parametrize("local", [2, 4])
def test_without_a_topology_nodes_are_those_of_the_launcher_or_ranks(
    ranks: Ranks, local: int
) -> None:
    results = ranks(4, train_without_topology, local_world_size=local)
    assert all(same for same, _ in results)
    lines = [line for _, said in results for line in said]
    assert len(lines) == (local == 4)
    assert all("all 4 ranks share one machine" in line for line in results[0][1])


def nodes_of_sizes(rank: int, sizes: list[int]) -> topology.Partition:
    node = next(n for n in range(len(sizes)) if rank < sum(sizes[: n + 1]))
    os.environ["LOCAL_WORLD_SIZE"] = str(sizes[node])
    os.environ["GROUP_RANK"] = str(node)
    group = Processes(dist.group.WORLD)  # type: ignore[arg-type]
    machines = by_node(group)
    groups = LevelGroups(group, topology.default({"node"}, machines))
    assert groups["node"].size == sizes[node]
    return layout_partition(machines)


def layout_partition(machines: topology.Partition) -> topology.Partition:
    return topology.default({"node"}, machines).partition(sum(map(len, machines)))["node"]


def test_nodes_of_uneven_size_are_levels_as_they_are(ranks: Ranks) -> None:
    assert ranks(3, nodes_of_sizes, [1, 2]) == [((0,), (1, 2))] * 3


def test_a_schedule_of_several_levels_needs_no_topology() -> None:
    def work(group: Group) -> dict[str, int]:
        model = copy.deepcopy(MODEL)
        levels = Strategy(schedule.hierarchical({"node": 2, "world": 4}))
        sync = postlocal.attach(model, sgd(model), levels, process_group=group)
        return {level: sync.groups[level].size for level in sync.groups.levels}

    assert virtual.run(3, work) == [{"rank": 1, "node": 1, "world": 3}] * 3
