"""A DistributedDataParallel under a strategy: what attach does to it, and that close undoes it."""

import copy
import gc
import io
import os
import pickle
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import BuiltinCommHookType
from torch.distributed import distributed_c10d
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import postlocal
from postlocal import codec, schedule, strategies, topology, wire
from postlocal.errors import DisagreementError
from postlocal.strategies import Strategy
from tests.launcher import await_event, say
from tests.models import batches, convnet, distance, equal, mlp, momentum, sgd, train_step, values

Ranks = Callable[..., list[Any]]
Refusal = Callable[[Callable[[], object]], str]


def refusal(act: Callable[[], object]) -> str:
    with pytest.raises((ValueError, TypeError, RuntimeError)) as error:
        act()
    return f"{type(error.value).__name__}: {error.value}"


def everyones(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def same_everywhere(model: nn.Module) -> bool:
    return all(equal(values(model), theirs) for theirs in everyones(values(model)))


def gradients_of(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


# After close.


def go_on(rank: int, strategy: Strategy, options: dict[str, Any]) -> dict[str, Any]:
    """Steps under a strategy, then plain DDP on the same object; and DDP from there on."""
    model = DistributedDataParallel(convnet(), **options)
    before = {name: getattr(model, name) for name in ATTRIBUTES}
    optimizer = sgd(model)
    steps = list(batches(rank, 16, (1, 6, 6)))
    sync = postlocal.attach(model, optimizer, strategy, topology=topology.nodes(size=2))
    for x, y in steps[:6]:
        train_step(model, optimizer, x, y)
        sync.step()
    between = {name: getattr(model, name) for name in ATTRIBUTES}
    sync.finish()
    sync.close()
    after = {name: getattr(model, name) for name in ATTRIBUTES}
    hooks = len(model._forward_hooks) + len(model._forward_pre_hooks) + len(model._comm_hooks)
    fresh = DistributedDataParallel(copy.deepcopy(model.module), **options)
    other = sgd(fresh)
    for x, y in steps[6:11]:
        train_step(model, optimizer, x, y)
        train_step(fresh, other, x, y)
    same = equal(values(model), values(fresh)) and same_everywhere(model)
    model.register_comm_hook(None, counted)
    train_step(model, optimizer, *steps[11])
    return {
        "same": same,
        "hooks": hooks,
        "untouched": before == between == after,
        "hooked": same_everywhere(model),
    }


ATTRIBUTES = (
    "require_backward_grad_sync",
    "require_forward_param_sync",
    "broadcast_buffers",
    "training",
)


def counted(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    buffer = bucket.buffer().div_(dist.get_world_size())
    work = dist.all_reduce(buffer, async_op=True)
    assert work is not None
    future: torch.futures.Future[list[Tensor]] = work.get_future()
    return future.then(lambda done: done.value()[0])


STRATEGIES: dict[str, Strategy] = {
    "ddp": strategies.ddp(),
    "int8": replace(strategies.ddp(), gradient_wire=wire.quantised(codec.int8())),
    "diloco": strategies.diloco(period=4),
    "node": Strategy(schedule.periodic(4, gradients="node")),
    "warm-up": strategies.post_local_sgd(3, 2),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "static_graph": {"static_graph": True},
    "gradient_as_bucket_view": {"gradient_as_bucket_view": True},
    "find_unused_parameters": {"find_unused_parameters": True},
}


def go_on_with_all(rank: int) -> dict[str, dict[str, Any]]:
    return {
        f"{name}, {option}": go_on(rank, strategy, options)
        for name, strategy in STRATEGIES.items()
        for option, options in OPTIONS.items()
    }


def test_after_close_a_ddp_model_is_plain_again_bit_for_bit(ranks: Ranks) -> None:
    for results in ranks(4, go_on_with_all, local_world_size=2, timeout=200.0):
        for case, found in results.items():
            assert found == {"same": True, "hooks": 0, "untouched": True, "hooked": True}, case


def two_phases(rank: int) -> tuple[list[Tensor], list[Tensor], str, list[str]]:
    """One strategy and then another on one DDP, and on a new one each."""

    def run(renew: bool) -> nn.Module:
        model = DistributedDataParallel(mlp())
        optimizer = sgd(model)
        steps = list(batches(rank, 12))
        for part, strategy in ((steps[:6], strategies.ddp()), (steps[6:], strategies.diloco(3))):
            sync = postlocal.attach(model, optimizer, strategy)
            for x, y in part:
                train_step(model, optimizer, x, y)
                sync.step()
            sync.finish()
            sync.close()
            sync.close()
            if renew:
                model = DistributedDataParallel(model.module)
        return model

    model = DistributedDataParallel(mlp())
    optimizer = sgd(model)
    sync = postlocal.attach(model, optimizer, strategies.ddp())
    twice = refusal(lambda: postlocal.attach(model, optimizer, strategies.ddp()))
    state = sync.state_dict()
    sync.close()
    closed = [
        refusal(act)
        for act in (
            sync.step,
            sync.finish,
            lambda: sync.load_state_dict(state),
            lambda: sync.restart(state),
        )
    ]
    return values(run(False)), values(run(True)), twice, closed


def test_a_training_has_two_phases_on_one_ddp_model(ranks: Ranks) -> None:
    for once, renewed, twice, closed in ranks(2, two_phases):
        assert equal(once, renewed)
        assert "ValueError: model is attached already: call close()" in twice
        assert all("RuntimeError: this Sync was closed: attach again" in text for text in closed)


# Copies.


def copies(rank: int, level: str) -> dict[str, list[Tensor]]:
    """Gradients of copies that are taken in a round at a level, and of plain DDP."""
    model = DistributedDataParallel(mlp())
    optimizer = sgd(model)
    steps = list(batches(rank, 6))
    where = topology.nodes(size=2)
    strategy = Strategy(schedule.periodic(100, gradients=level))
    sync = postlocal.attach(model, optimizer, strategy, topology=where)
    for x, y in steps[:2]:
        train_step(model, optimizer, x, y)
        sync.step()
    state = [value.clone() for value in model.module.state_dict().values()]
    for value in state:
        dist.broadcast(value, 0)
    for target, value in zip(model.module.state_dict().values(), state, strict=True):
        target.copy_(value)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    taken: dict[str, nn.Module] = {
        "plain": DistributedDataParallel(copy.deepcopy(model.module)),
        "deepcopy": copy.deepcopy(model),
        "averaged": AveragedModel(model).module,
        "pickle": pickle.loads(pickle.dumps(model)),
        "save": torch.load(file, weights_only=False),
        "copy of a copy": copy.deepcopy(copy.deepcopy(model)),
    }
    found = {name: gradients_of(one, *steps[3]) for name, one in taken.items()}
    optimizer_of_copy = sgd(taken["deepcopy"])
    other = postlocal.attach(taken["deepcopy"], optimizer_of_copy, strategies.local_sgd(2))
    for x, y in steps[4:]:
        train_step(taken["deepcopy"], optimizer_of_copy, x, y)
        other.step()
    found["attached copy"] = values(taken["deepcopy"])
    train_step(model, optimizer, *steps[3])
    sync.step()
    return found


@pytest.mark.parametrize("level", ["rank", "node", "world"])
def test_copies_taken_while_attached_are_plain_ddp_models(ranks: Ranks, level: str) -> None:
    results = ranks(4, copies, level, local_world_size=2)
    for found in results:
        for name in ("deepcopy", "averaged", "pickle", "save", "copy of a copy"):
            assert equal(found[name], found["plain"]), name
        assert equal(found["plain"], results[0]["plain"])
        assert equal(found["attached copy"], results[0]["attached copy"])


def pickled(rank: int) -> bytes:
    model = DistributedDataParallel(mlp())
    postlocal.attach(model, sgd(model), strategies.diloco(4))
    return pickle.dumps(model)


def test_a_pickled_model_needs_no_postlocal(ranks: Ranks) -> None:
    assert b"postlocal" not in ranks(1, pickled)[0]


# Within a round.


def accumulate_by_hand(rank: int, by_hand: bool) -> tuple[list[Tensor], bool]:
    """Micro-batches in local rounds, with DDP's switch turned by the loop."""
    model = DistributedDataParallel(mlp())
    optimizer = sgd(model)
    sync = postlocal.attach(model, optimizer, strategies.local_sgd(period=3))
    apart = False
    for index, (x, y) in enumerate(batches(rank, 8)):
        if by_hand:
            model.require_backward_grad_sync = index % 2 == 1
        nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        if index % 2 == 1:
            optimizer.step()
            optimizer.zero_grad()
            sync.step()
            apart = apart or not same_everywhere(model)
    return values(model), apart


def test_a_loop_that_turns_the_switch_of_ddp_by_hand_stays_local(ranks: Ranks) -> None:
    by_hand, plain = (ranks(2, accumulate_by_hand, way) for way in (True, False))
    for (found, apart), (expected, _) in zip(by_hand, plain, strict=True):
        assert apart
        assert equal(found, expected)


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()
        self.fail: type[BaseException] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.fail is not None:
            raise self.fail
        output: Tensor = self.inner(x)
        return output


def fail_in_forward(rank: int) -> list[Any]:
    model = DistributedDataParallel(Failing())
    optimizer = sgd(model)
    sync = postlocal.attach(model, optimizer, strategies.local_sgd(period=2))
    steps = list(batches(rank, 5))
    train_step(model, optimizer, *steps[0])
    found: list[Any] = []
    for kind in (ValueError, KeyboardInterrupt):
        model.module.fail = kind
        with pytest.raises(kind):
            model(steps[0][0])
        model.module.fail = None
        sync.step()
        found.append([getattr(model, name) for name in ATTRIBUTES[:3]])
        train_step(model, optimizer, *steps[1])
        with model.no_sync():
            found.append(refusal(sync.step))
    sync.step()
    sync.finish()
    sync.close()
    gradients_of(model, *steps[4])
    train_step(model, optimizer, *steps[3])
    found.append(same_everywhere(model))
    return found


def test_an_exception_in_a_forward_pass_leaves_no_switch_turned(ranks: Ranks) -> None:
    for found in ranks(2, fail_in_forward):
        assert found[0] == found[2] == [True, True, True]
        assert all("inside model.no_sync()" in text for text in (found[1], found[3]))
        assert found[4]


def train_compiled(rank: int, way: str, name: str) -> list[list[Tensor]]:
    torch._dynamo.reset()
    net = convnet()
    if way == "in place":
        net.compile(backend="eager")
    model: nn.Module = DistributedDataParallel(net)
    given = model
    optimizer = momentum(model)
    steps = list(batches(rank, 9, (1, 6, 6)))
    if way == "around":
        given = model = torch.compile(model, backend="eager")  # type: ignore[assignment]
    if way == "method":
        model.compile(backend="eager")
    train_step(model, optimizer, *steps[0])  # compiled before attach
    sync = postlocal.attach(given, optimizer, STRATEGIES[name], topology=topology.nodes(size=2))
    history = []
    for x, y in steps[1:]:
        train_step(model, optimizer, x, y)
        history.append(values(model))
        sync.step()
    sync.finish()
    sync.close()
    train_step(model, optimizer, *steps[0])
    history.append(values(model))
    return history


def all_compiled(rank: int) -> dict[tuple[str, str], list[list[Tensor]]]:
    return {
        (way, name): train_compiled(rank, way, name)
        for name in ("ddp", "diloco", "node", "warm-up")
        for way in ("eager", "around", "method", "in place")
    }


def test_compiled_ddp_models_take_the_steps_of_eager_ones(ranks: Ranks) -> None:
    for found in ranks(4, all_compiled, local_world_size=2, timeout=200.0):
        for (way, name), history in found.items():
            for mine, expected in zip(history, found["eager", name], strict=True):
                assert distance(mine, expected) < 1e-5, (way, name)


# Groups, threads and descriptors.


def resources() -> tuple[int, int, int]:
    gc.collect()
    return (
        len(os.listdir("/proc/self/task")),
        len(os.listdir("/proc/self/fd")),
        len(distributed_c10d._world.pg_names),
    )


def test_a_clock_that_was_closed_keeps_no_wrapper_alive(alone: None) -> None:
    model = DistributedDataParallel(mlp())
    sync = postlocal.attach(model, sgd(model), strategies.local_sgd(2))
    sync.close()
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
    assert sync.closed


def attach_often(rank: int) -> list[tuple[int, int, int]]:
    model = DistributedDataParallel(mlp())
    optimizer = sgd(model)
    every = (
        replace(
            strategies.streaming_diloco(period=4, fragments=1),
            gradient_wire=wire.quantised(codec.int8()),
        ),
        Strategy(schedule.hierarchical({"node": 1, "world": 2})),
    )
    found = []
    x, y = next(batches(rank, 1))
    for _ in range(20):
        for strategy in every:
            sync = postlocal.attach(model, optimizer, strategy, topology=topology.nodes(size=2))
            for _ in range(3):
                train_step(model, optimizer, x, y)
                sync.step()
            sync.finish()
            sync.close()
        found.append(resources())
    return found


def test_40_attachments_leave_no_thread_no_descriptor_and_no_group(ranks: Ranks) -> None:
    for found in ranks(4, attach_often, local_world_size=2, timeout=200.0):
        assert found[-1] == found[0] == found[len(found) // 2]
        assert found[0][2] == 1


def close_unevenly(rank: int) -> dict[str, Any]:
    """Rank 1 closes late, or never; nobody waits for it, and the next attach works."""
    model = mlp()
    optimizer = sgd(model)
    first = postlocal.attach(model, optimizer, strategies.local_sgd(2))
    if rank == 0:
        first.close()
        say("rank 0 has closed")
    await_event("rank 0 has closed")
    sync = postlocal.attach(model, optimizer, strategies.local_sgd(2))
    for x, y in batches(rank, 4):
        train_step(model, optimizer, x, y)
        sync.step()
    equal_now = same_everywhere(model)
    first.close()
    sync.close()
    dist.barrier()
    last = postlocal.attach(model, optimizer, strategies.local_sgd(2))
    last.close()
    return {"equal": equal_now, "groups": resources()[2]}


def test_a_rank_that_did_not_close_keeps_nobody_from_attaching_again(ranks: Ranks) -> None:
    for found in ranks(2, close_unevenly):
        assert found["equal"]
        assert found["groups"] == 1


def leave_early(rank: int) -> float:
    """Close at once after a synchronization, while others still receive."""
    model = nn.Linear(500, 2000)
    optimizer = sgd(model)
    for index in range(20):
        sync = postlocal.attach(model, optimizer, strategies.diloco(1))
        sync.step()
        if index % 2:
            time.sleep(0.01 * rank)
        sync.close()
    return float(model.weight.detach().sum())


def test_closing_cuts_off_no_peer(ranks: Ranks) -> None:
    assert len(set(ranks(4, leave_early))) == 1


def fail_halfway(rank: int) -> tuple[str, int, str]:
    torch.manual_seed(rank)
    model = DistributedDataParallel(mlp())
    with torch.no_grad():
        next(model.parameters()).add_(rank)
    optimizer = sgd(model)
    message = refusal(
        lambda: postlocal.attach(
            model, optimizer, strategies.diloco(4), topology=topology.nodes(2), initial="refuse"
        )
    )
    groups = resources()[2]
    postlocal.attach(model, optimizer, strategies.ddp()).close()
    other = nn.Linear(2, 1) if rank else DistributedDataParallel(nn.Linear(2, 1), init_sync=False)
    apart = refusal(lambda: postlocal.attach(other, sgd(other), strategies.local_sgd(2)))
    return message, groups, apart


def test_an_attach_that_fails_leaves_nothing(ranks: Ranks) -> None:
    for message, groups, apart in ranks(2, fail_halfway, local_world_size=2):
        assert "ranks differ in initial values" in message
        assert groups == 1
        assert DisagreementError.__name__ in apart
        assert "wrapper of the model" in apart


@dataclass(frozen=True)
class Scarce:
    """An outer optimizer for whose anchor one rank has no memory left, once all are compared."""

    made: ClassVar[int] = 0

    def __call__(self, anchor: Sequence[Tensor]) -> torch.optim.Optimizer:
        Scarce.made += 1
        if Scarce.made == 2 and dist.get_rank() == 1:
            raise RuntimeError("no memory for the anchor")
        return torch.optim.SGD(anchor, lr=0.7)


def fail_at_the_end(rank: int) -> tuple[str, int, int]:
    model = DistributedDataParallel(mlp())
    strategy = replace(strategies.streaming_diloco(4, fragments=1, delay=1), outer=Scarce())
    before = resources()[2]
    message = refusal(lambda: postlocal.attach(model, sgd(model), strategy))
    threads = [t for t in threading.enumerate() if t.name == "postlocal-background"]
    groups = resources()[2] - before
    postlocal.attach(model, sgd(model), strategy).close()
    return message, len(threads), groups


def test_a_rank_that_fails_last_in_attach_is_told_to_all_and_leaves_nothing(ranks: Ranks) -> None:
    first, second = ranks(2, fail_at_the_end)
    assert first == (
        "DisagreementError: another rank cannot go on: RuntimeError: no memory for the anchor "
        "(rank 1)",
        0,
        0,
    )
    assert second == ("RuntimeError: no memory for the anchor", 0, 0)


def destroy_first(rank: int) -> bool:
    model = DistributedDataParallel(mlp())
    sync = postlocal.attach(model, sgd(model), strategies.diloco(2))
    dist.barrier()
    dist.destroy_process_group()
    sync.close()
    return dist.is_initialized()


def test_close_after_all_groups_were_destroyed_raises_nothing(ranks: Ranks) -> None:
    assert ranks(2, destroy_first) == [False, False]


# DDP's own collectives.


class Halves(nn.Module):
    """Each rank uses one of two layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(8, 4), nn.Linear(8, 4)])

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layers[dist.get_rank() % 2](x)
        return output


def search_in_nodes(rank: int, options: dict[str, Any], lossy: bool) -> list[Tensor]:
    """What steps lead to that the second node begins when the first has done them."""
    model = DistributedDataParallel(Halves(), find_unused_parameters=True, **options)
    optimizer = sgd(model)
    strategy = Strategy(schedule.periodic(100, gradients="node"))
    if lossy:
        strategy = replace(strategy, gradient_wire=wire.quantised(codec.int8()))
    sync = postlocal.attach(model, optimizer, strategy, topology=topology.nodes(size=2))
    dist.barrier()
    if rank >= 2:
        for first in range(2):
            await_event(f"rank {first} has done its steps")
    for x, y in batches(rank, 3):
        train_step(model, optimizer, x, y)
        sync.step()
    say(f"rank {rank} has done its steps")
    found = values(model)
    sync.finish()
    assert same_everywhere(model)
    sync.close()
    train_step(model, optimizer, x, y)
    assert same_everywhere(model)
    return found


@pytest.mark.parametrize("lossy", [False, True], ids=["fp32", "int8"])
def test_the_search_for_unused_parameters_stays_within_the_node(ranks: Ranks, lossy: bool) -> None:
    results = ranks(4, search_in_nodes, {}, lossy, local_world_size=2)
    for one, other in ((0, 1), (2, 3)):
        assert equal(results[one], results[other])
    assert not equal(results[0], results[2])


def join(rank: int) -> list[str]:
    model = DistributedDataParallel(mlp())
    optimizer = sgd(model)
    sync = postlocal.attach(model, optimizer, strategies.local_sgd(2))
    messages = []

    def run() -> None:
        with model.join():
            for x, y in batches(rank, 2 + rank):
                train_step(model, optimizer, x, y)
                sync.step()

    messages.append(refusal(run))
    sync.close()
    messages.append(refusal(lambda: postlocal.attach(model, optimizer, strategies.local_sgd(2))))
    return messages


def test_join_is_refused_with_what_to_do_instead(ranks: Ranks) -> None:
    for messages in ranks(2, join):
        assert "sync.step() was called inside model.join()" in messages[0]
        assert "is or was inside join()" in messages[1]
        assert all("sync.step(work=0)" in message for message in messages)


def refused_options(rank: int) -> dict[str, str]:
    def attach(model: DistributedDataParallel) -> str:
        return refusal(lambda: postlocal.attach(model, sgd(model), strategies.local_sgd(2)))

    mixed = DistributedDataParallel(mlp())
    mixed.mixed_precision = object()  # type: ignore[assignment]  # the real one needs an accelerator
    net = mlp()
    named = [(name, p) for name, p in net.named_parameters() if name == "0.weight"]
    delayed = DistributedDataParallel(
        net,
        delay_all_reduce_named_params=named,
        param_to_hook_all_reduce=net.get_parameter("2.weight"),
    )
    overlapped = DistributedDataParallel(mlp())
    next(overlapped.parameters())._in_backward_optimizers = []  # type: ignore[attr-defined]
    builtin = DistributedDataParallel(mlp())
    builtin._register_builtin_comm_hook(BuiltinCommHookType.ALLREDUCE)  # type: ignore[no-untyped-call]
    only_one = DistributedDataParallel(mlp(), find_unused_parameters=rank == 1)
    return {
        "mixed": attach(mixed),
        "delayed": attach(delayed),
        "overlapped": attach(overlapped),
        "builtin": attach(builtin),
        "only one": attach(only_one),
    }


def test_options_of_ddp_that_work_against_a_strategy_are_refused(ranks: Ranks) -> None:
    for found in ranks(2, refused_options):
        assert "has mixed_precision" in found["mixed"]
        assert "torch.autocast" in found["mixed"]
        assert "delay_all_reduce_named_params" in found["delayed"]
        assert "optimizers in its backward pass" in found["overlapped"]
        assert "already has a communication hook, BuiltinCommHookType" in found["builtin"]
        assert "find_unused_parameters=False" in found["only one"]
        assert "find_unused_parameters=True" in found["only one"]


# The end of a rank that fails.


FAILING_RANK = """
import sys, time
import torch
import torch.distributed as dist
from postlocal.comm.background import BackgroundThread

store = dist.TCPStore("127.0.0.1", 0, 1, True)
begun = time.monotonic()

def exchange():  # on another thread, and most of the time within torch
    while time.monotonic() < begun + float(sys.argv[2]):
        store.check(["nothing"])

BackgroundThread().submit(torch.zeros(1), exchange)
time.sleep(0.2)
raise {"ValueError": ValueError, "SystemExit": SystemExit}[sys.argv[1]](3)
"""


@pytest.mark.parametrize(
    ("error", "seconds", "code"),
    [("ValueError", 1.0, 1), ("SystemExit", 1.0, 3), ("ValueError", 1000.0, 1)],
)
def test_a_rank_that_fails_ends_soon_with_the_code_of_its_failure(
    error: str, seconds: float, code: int
) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", FAILING_RANK, error, str(seconds)],
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == code
    assert "terminate called" not in ended.stderr
    assert error == "SystemExit" or "ValueError: 3" in ended.stderr
