"""Contenders of `benchmarks.time_to_loss`: ours, and each peer as its documentation sets it up."""

from collections.abc import Mapping
from dataclasses import replace

from benchmarks.contenders import (
    accelerate_local_sgd,
    plain,
    torch_hooks,
    torch_post_local_sgd,
    torchft_diloco,
    torchft_local_sgd,
)
from benchmarks.contenders.ours import ours
from benchmarks.contenders.training import Contender, Training
from postlocal import Strategy, strategies, wire

__all__ = ["ALONE", "CONTENDERS", "DDP", "PERIOD", "PLANNED", "Contender", "Training", "named"]

PERIOD = 8
"""Steps a round, of ours and of peers, but where a name has another."""

ALONE, DDP = "no communication", "DDP, torch"


def _of(strategy: Strategy, period: int, rounds: int = 1, length: float = 1.0) -> Contender:
    return Contender(
        ours(strategy), period, settling=rounds * period, package="postlocal", length=length
    )


CONTENDERS: Mapping[str, Contender] = {
    ALONE: Contender(plain.alone, period=4),
    DDP: Contender(plain.ddp, settling=3),
    "ddp, postlocal": _of(strategies.ddp(), 1, rounds=3),
    "local_sgd 8, postlocal": _of(strategies.local_sgd(PERIOD), PERIOD),
    "streaming 8 fp4, postlocal": _of(
        strategies.streaming_diloco(PERIOD, outer_lr=1.0, outer_momentum=0.5), PERIOD, rounds=2
    ),
    "streaming 4 fp4, postlocal": _of(
        strategies.streaming_diloco(4, outer_lr=1.0, outer_momentum=0.5), 4, rounds=2
    ),
    "post-local SGD 8, torch": Contender(torch_post_local_sgd.post_local_sgd(PERIOD), PERIOD),
    "DDP fp16, torch": Contender(torch_hooks.fp16, settling=3),
    "DDP PowerSGD, torch": Contender(
        torch_hooks.power_sgd(matrix_rank=1), settling=torch_hooks.POWER_SGD_START + 2
    ),
    "LocalSGD 8, accelerate": Contender(
        accelerate_local_sgd.local_sgd(PERIOD), PERIOD, package="accelerate"
    ),
    "LocalSGD 8, torchft": Contender(
        torchft_local_sgd.local_sgd(PERIOD), PERIOD, settling=PERIOD, package="torchft", apart=True
    ),
    "DiLoCo 8, torchft": Contender(
        torchft_diloco.diloco(PERIOD), PERIOD, settling=PERIOD, package="torchft", apart=True
    ),
    "streaming DiLoCo 8, torchft": Contender(
        torchft_diloco.diloco(PERIOD, fragments=2, delay=1),
        PERIOD,
        settling=2 * PERIOD,
        package="torchft",
        apart=True,
    ),
}
"""Of the contest, by name."""

PLANNED: Mapping[str, Strategy] = {
    "ddp": strategies.ddp(),
    "local_sgd, period 8": strategies.local_sgd(8),
    "diloco, period 16": strategies.diloco(16),
    "diloco, period 4, int8": replace(strategies.diloco(4), wire=wire.int8()),
    "streaming_diloco, period 8, fp32": replace(
        strategies.streaming_diloco(8, delay=2), wire=wire.fp32()
    ),
    "streaming_diloco, period 4": strategies.streaming_diloco(4),
    "sparse_loco, period 4": strategies.sparse_loco(4),
}
"""Strategies whose steps are planned and measured, by name."""


def named(name: str) -> Contender:
    """A contender, or a strategy that is planned, by name."""
    if name in CONTENDERS:
        return CONTENDERS[name]
    strategy = PLANNED[name]
    period = 1 if strategy == strategies.ddp() else strategy.schedule(0, 1.0).steps
    return _of(strategy, period, rounds=max(2, 3 // period))
