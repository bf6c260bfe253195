"""The methods that are compared: ours, and each peer as its documentation sets it up."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from benchmarks.time_to_loss.methods import (
    accelerate_local_sgd,
    plain,
    torch_hooks,
    torch_post_local_sgd,
    torchft_diloco,
    torchft_local_sgd,
)
from benchmarks.time_to_loss.methods.method import Method, Training
from benchmarks.time_to_loss.methods.ours import ours
from postlocal import Strategy, codec, strategies, wire
from postlocal.train import TrainConfig

__all__ = ["ALONE", "DDP", "METHODS", "PERIOD", "PLANNED", "Method", "Training", "named"]

PERIOD = 8
"""Steps a round, of ours and of peers, but where a name has another."""

ALONE, DDP = "no communication", "DDP, torch"


OUTER = 1.0, 0.5
"""Outer learning rate and momentum, of ours and of peers."""

LOCAL_LENGTH = 1.5
"""Of runs that are local for `PERIOD` steps at a time, of ours and of peers."""


def _of(
    strategy: Strategy, period: int, rounds: int = 2, length: float = 1.0, stretch: int = 16
) -> Method:
    return Method(
        ours(strategy), period, settling=rounds * period, package="postlocal", length=length,
        stretch=stretch,
    )  # fmt: skip


def _peer(
    make: Callable[[TrainConfig, int], Training],
    package: str,
    rounds: int = 1,
    replica_groups: bool = False,
) -> Method:
    return Method(make, PERIOD, rounds * PERIOD, package, replica_groups, LOCAL_LENGTH)


# Those that hardly wait are timed for 64 steps: these are short, and differ by little.
METHODS: Mapping[str, Method] = {
    ALONE: Method(plain.alone, period=4, stretch=64),
    DDP: Method(plain.ddp, settling=3),
    "DDP fp16, torch": Method(torch_hooks.fp16, settling=3, length=1.05),
    "DDP PowerSGD, torch": Method(
        torch_hooks.power_sgd(matrix_rank=2),
        settling=torch_hooks.POWER_SGD_START + 2,
        dense=torch_hooks.POWER_SGD_START,
        length=1.25,
    ),
    "post-local SGD 8, torch": _peer(torch_post_local_sgd.post_local_sgd(PERIOD), "torch"),
    "LocalSGD 8, accelerate": _peer(accelerate_local_sgd.local_sgd(PERIOD), "accelerate"),
    "LocalSGD 8, torchft": _peer(
        torchft_local_sgd.local_sgd(PERIOD), "torchft", replica_groups=True
    ),
    "DiLoCo 8, torchft": _peer(
        torchft_diloco.diloco(PERIOD, *OUTER), "torchft", replica_groups=True
    ),
    "streaming DiLoCo 8, torchft": _peer(
        torchft_diloco.diloco(PERIOD, *OUTER, fragments=2, delay=1),
        "torchft",
        rounds=2,
        replica_groups=True,
    ),
    "ddp, postlocal": _of(strategies.ddp(), 1, rounds=3),
    "ddp PowerSGD, postlocal": _of(
        replace(strategies.ddp(), gradient_wire=wire.powersgd(rank=2)), 1, rounds=3, length=1.25
    ),
    "local_sgd 8, postlocal": _of(strategies.local_sgd(PERIOD), PERIOD, 1, LOCAL_LENGTH),
    # With rounds as short as these, a replica that keeps a half of its own drifts too far.
    "streaming 8 fp4, postlocal": _of(
        strategies.streaming_diloco(
            PERIOD, delay=3, mix=0.0, outer_lr=OUTER[0], outer_momentum=OUTER[1]
        ),
        PERIOD,
        length=LOCAL_LENGTH,
        stretch=64,
    ),
}
"""The methods that are compared, by name."""

PLANNED: Mapping[str, Strategy] = {
    "ddp": strategies.ddp(),
    "local_sgd, period 8": strategies.local_sgd(8),
    "diloco, period 16": strategies.diloco(16),
    "diloco, period 4, int8": replace(strategies.diloco(4), wire=wire.quantised(codec.int8())),
    "streaming_diloco, period 8, fp32": replace(
        strategies.streaming_diloco(8, delay=2), wire=wire.fp32()
    ),
    "streaming_diloco, period 4": strategies.streaming_diloco(4),
    "sparse_loco, period 4": strategies.sparse_loco(4),
}
"""Strategies whose steps are planned and measured, by name."""


def named(name: str) -> Method:
    """A method, or a strategy that is planned, by name."""
    if name in METHODS:
        return METHODS[name]
    strategy = PLANNED[name]
    period = 1 if strategy == strategies.ddp() else strategy.schedule(0, 1.0).steps
    rounds = 3 if period == 1 else 1 + strategy.streams
    return _of(strategy, period, rounds, stretch=32)
