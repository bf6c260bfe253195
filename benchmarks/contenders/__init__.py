"""Contenders of `benchmarks.time_to_loss`: ours, and each peer as its documentation sets it up."""

from collections.abc import Mapping

from benchmarks.contenders import plain
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
}
"""By name."""
