"""Contenders of `benchmarks.time_to_loss`: ours, and each peer as its documentation sets it up."""

from collections.abc import Mapping

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
from postlocal import strategies

__all__ = ["ALONE", "CONTENDERS", "DDP", "PERIOD", "Contender", "Training"]

PERIOD = 8
"""Steps a round, of ours and of peers; but where a name has another."""

ALONE, DDP = "no communication", "DDP, torch"

CONTENDERS: Mapping[str, Contender] = {
    ALONE: Contender(plain.alone, period=4),
    DDP: Contender(plain.ddp, settling=3),
    "ddp, postlocal": Contender(ours(strategies.ddp()), settling=3),
    "local_sgd 8, postlocal": Contender(ours(strategies.local_sgd(PERIOD)), PERIOD),
    "streaming 8 fp4, postlocal": Contender(
        ours(strategies.streaming_diloco(PERIOD, outer_lr=1.0, outer_momentum=0.5)),
        PERIOD,
        settling=2 * PERIOD,
    ),
    "streaming 4 fp4, postlocal": Contender(
        ours(strategies.streaming_diloco(4, outer_lr=1.0, outer_momentum=0.5)), 4, settling=8
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
"""By name."""
