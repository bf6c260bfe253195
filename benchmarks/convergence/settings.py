"""The strategies that are compared, by name."""

from dataclasses import replace
from typing import Any

from postlocal import Strategy, codec, strategies, wire

CONTROL = "ddp"

MOMENTA = {0.0: (1.0, 1.5, 2.0), 0.5: (0.7, 1.0, 1.4), 0.9: (0.4, 0.7, 1.0)}
"""Outer momenta that are tried, each with outer learning rates; 0 and 1 is averaging."""
LR, MOMENTUM = 0.7, 0.9
"""Those of the DiLoCo paper, at which wires and delays are compared. The default of
`streaming_diloco` is 0.4 and 0.9."""


def _diloco(period: int, lr: float = LR, momentum: float = MOMENTUM, **axes: Any) -> Strategy:
    return replace(strategies.diloco(period, lr, momentum), **axes)


def _streaming(
    period: int,
    lr: float = LR,
    momentum: float = MOMENTUM,
    delay: int = 1,
    mix: float = 0.5,
    carry: bool = False,
    **axes: Any,
) -> Strategy:
    strategy = strategies.streaming_diloco(
        period,
        delay=delay,
        mix=mix,
        outer_lr=lr,
        outer_momentum=momentum,
        keep_delayed_steps=carry,
    )
    return replace(strategy, **{"wire": wire.fp32()} | axes)


def _settings() -> dict[str, Strategy]:
    settings = {CONTROL: strategies.ddp()}
    for period in (10, 30, 100):
        for momentum, lr in ((m, lr) for m, lrs in MOMENTA.items() for lr in lrs):
            outer = f"{period}-lr{lr}-m{momentum}"
            settings[f"diloco-{outer}"] = _diloco(period, lr, momentum)
            settings[f"streaming-{outer}"] = _streaming(period, lr, momentum)
        settings[f"streaming-{period}-fp4"] = _streaming(period, wire=wire.quantised(codec.fp4()))
    settings |= _streams()
    for name in ("int8", "int4", "fp4", "sign"):
        bare = wire.quantised(getattr(codec, name)())
        settings[f"diloco-30-{name}"] = _diloco(30, wire=bare)
        settings[f"diloco-30-{name}-feedback"] = _diloco(30, wire=wire.error_feedback(bare))
    for lr in (1.0, 1.5, 2.0, 4.0, 6.0, 8.0):
        settings[f"sparse-30-lr{lr}"] = strategies.sparse_loco(30, outer_lr=lr)
        settings[f"sparse-30-k128-lr{lr}"] = strategies.sparse_loco(30, top_k=128, outer_lr=lr)
    forgetful = replace(strategies.sparse_loco(30, outer_lr=2.0), wire=wire.gathered(codec.top_k()))
    settings["sparse-30-lr2.0-no-feedback"] = forgetful
    return settings


def _streams() -> dict[str, Strategy]:
    """Streaming every 30 steps, by delay, mix and carry."""
    settings = {f"streaming-30-delay{delay}": _streaming(30, delay=delay) for delay in (0, 3, 5)}
    for delay in (0, 1, 3, 5, 20):
        for mix in (0.0, 0.25):
            settings[f"streaming-30-delay{delay}-mix{mix}"] = _streaming(30, delay=delay, mix=mix)
        if delay:
            carried = _streaming(30, delay=delay, mix=0.0, carry=True)
            settings[f"streaming-30-delay{delay}-mix0.0-carry"] = carried
    settings["streaming-30-fp4-mix0.0"] = _streaming(30, mix=0.0, wire=wire.quantised(codec.fp4()))
    return settings


SETTINGS = _settings()
