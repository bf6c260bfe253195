"""Gradients over wires: close to DDP, with state by parameter, resumed bit for bit."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import postlocal
from postlocal import codec, strategies, topology, wire
from postlocal.checkpoint.packing import pack, unpack
from postlocal.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from postlocal.sync.clock import Sync
from postlocal.wire import Wire
from tests.models import OPTIMIZERS, batches, distance, equal, mlp, train_plain, train_step, values

Ranks = Callable[..., list[Any]]

WIRES: dict[str, Wire] = {
    "int8": wire.int8(block=32),
    "top_k": wire.error_feedback(wire.gathered(codec.top_k(k=16, chunk=64))),
    "powersgd": wire.powersgd(rank=2, min_compression=1.0),
    "two levels": wire.two_level(wire.int8(block=32)),
}
SMALL: dict[str, Any] = {
    "bucket_cap_mb": 0.0002
}  # so that there are several buckets, made anew after one pass


def start(strategy: strategies.Strategy, **options: Any) -> tuple[Any, Any, Sync]:
    model = DistributedDataParallel(mlp(), **SMALL, **options)
    optimizer = OPTIMIZERS["momentum"](model)
    sync = postlocal.attach(model, optimizer, strategy, topology=topology.nodes(size=2))
    return model, optimizer, sync


def train_twice(rank: int, name: str) -> tuple[list[Tensor], list[Tensor]]:
    """12 steps at one go, and with all state through a file's form after step 6."""
    strategy = replace(strategies.ddp(), gradient_wire=WIRES[name])
    model, optimizer, sync = start(strategy)
    steps = list(batches(rank, 12))
    saved: Any = None
    for step, (x, y) in enumerate(steps):
        if step == 6:
            state = {"model": dict(model.state_dict()), "sync": sync.state_dict()}
            saved = unpack(*pack(state | {"optimizer": optimizer.state_dict()}))
        train_step(model, optimizer, x, y)
        sync.step()
    sync.close()
    resumed, other, clock = start(strategy)
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    clock.load_state_dict(saved["sync"])
    for x, y in steps[6:]:
        train_step(resumed, other, x, y)
        clock.step()
    clock.close()
    return values(model), values(resumed)


@pytest.mark.parametrize("name", WIRES)
def test_gradients_by_a_wire_with_memory_resume_bit_for_bit(ranks: Ranks, name: str) -> None:
    plain = ranks(4, train_plain, 12, "momentum")
    results = ranks(4, train_twice, name)
    for whole, resumed in results:
        assert equal(whole, resumed)
        assert equal(whole, results[0][0])
    far = distance(plain[0], values(mlp()))
    near = 0.05 if name in ("int8", "two levels") else 0.5
    assert 0 < distance(plain[0], results[0][0]) < near * far


def train_by(rank: int, way: str, options: dict[str, Any]) -> list[Tensor]:
    start_with = wire.powersgd(rank=64, min_compression=1e-6)
    if way == "wire":
        model, optimizer, sync = start(
            replace(strategies.ddp(), gradient_wire=start_with), **options
        )
        for x, y in batches(rank, 5):
            train_step(model, optimizer, x, y)
            sync.step()
        sync.close()
        return values(model)
    model = DistributedDataParallel(mlp(), **SMALL, **options)
    optimizer = OPTIMIZERS["momentum"](model)
    state = PowerSGDState(None, 64, start_powerSGD_iter=0, min_compression_rate=1e-6)
    model.register_comm_hook(state, powerSGD_hook)
    for x, y in batches(rank, 5):
        train_step(model, optimizer, x, y)
    return values(model)


@pytest.mark.parametrize("option", ["gradient_as_bucket_view", "find_unused_parameters"])
def test_full_rank_gradients_by_wire_and_by_hook_are_equal_to_rounding(
    ranks: Ranks, option: str
) -> None:
    by_wire = ranks(2, train_by, "wire", {option: True})
    by_hook = ranks(2, train_by, "hook", {})
    assert equal(*by_wire)
    assert distance(by_wire[0], by_hook[0]) < 1e-5


def count_bytes(rank: int) -> list[int]:
    sent = []
    for recipe in (wire.fp32(), wire.int8(), wire.int4()):
        model, optimizer, sync = start(replace(strategies.ddp(), gradient_wire=recipe))
        for x, y in batches(rank, 3):
            train_step(model, optimizer, x, y)
            sync.step()
        sync.close()
        sent.append(sync.meter.payload_bytes["gradients"])
    return sent


def test_bytes_of_gradients_are_those_of_the_wire(ranks: Ranks) -> None:
    numel = sum(parameter.numel() for parameter in mlp().parameters())
    plain, int8, int4 = ranks(2, count_bytes)[0]
    assert plain >= 3 * 4 * numel
    assert int8 == 3 * wire.quantised(codec.int8()).payload_bytes(numel, 2)
    assert int4 == 3 * wire.quantised(codec.int4()).payload_bytes(numel, 2)
