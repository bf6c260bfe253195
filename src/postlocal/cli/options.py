"""What the commands that look ahead have in common: options, and strategies made from them."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from postlocal import drawing
from postlocal.strategies import parameters_of
from postlocal.train.config import TrainConfig, make_config
from postlocal.wire import NAMED as WIRES

ALL = "all"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_PERIOD = 16  # of strategies that have no default of their own


def option(panel: str, text: str, *names: str, **settings: Any) -> Any:
    """An option that help shows in a panel."""
    return typer.Option(*names, help=text, rich_help_panel=panel, **settings)


of_job = partial(option, "The job")
of_strategy = partial(option, "The strategy")
of_output = partial(option, "Output")

PeakLr = Annotated[float, of_job("Peak learning rate, for strategies that follow it.")]
Dtype = Annotated[str, of_job(f"Of parameters: {', '.join(DTYPES)}.")]
Period = Annotated[
    int | None, of_strategy("Steps a round.", show_default="the strategy's own, or 16")
]
Warmup = Annotated[
    int | None, of_strategy("Synchronous steps of post_local_sgd.", show_default="three tenths")
]
WireName = Annotated[
    str | None,
    of_strategy(f"How parameters travel: {', '.join(WIRES)}.", show_default="its own, or bf16"),
]
GradientWire = Annotated[
    str | None, of_strategy("How gradients travel, as above.", show_default="bf16")
]
FragmentCount = Annotated[int | None, of_strategy("Parts that streaming_diloco sends.")]
Delay = Annotated[
    int | None, of_strategy("Steps that streaming_diloco goes on before a result is applied.")
]


def parse_dtype(text: str) -> torch.dtype:
    """A dtype of parameters by name.

    Raises:
        ValueError: if the name is unknown.
    """
    if text not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {text!r}")
    return DTYPES[text]


def check_plot(plot: Path | None) -> None:
    """Check, before anything is computed, that a plot that was asked for can be drawn.

    Raises:
        ValueError: if it cannot.
    """
    if plot is None:
        return
    try:
        drawing.require()
    except ImportError as error:
        raise ValueError(f"plot must be drawable, got {str(plot)!r}: {error}") from error


def configure(base: Mapping[str, Any], given: Mapping[str, Any], strict: bool) -> TrainConfig:
    """Settings of the trainer for one strategy, with what it takes of the options given.

    Args:
        base: settings of all.
        given: parameters of strategies; None: not given.
        strict: whether a parameter that the strategy does not take is an error.
    """
    taken = parameters_of(base["strategy"])
    period = given["period"] or _PERIOD
    wanted = {name: value for name, value in given.items() if value is not None}
    if "periods" in taken:
        inner = max(1, period // 4)
        wanted["periods"] = {"node": inner, "world": 4 * inner}
        wanted.pop("period", None)
    if "alpha" in taken:
        # The ratio of the paper, whose first rounds are the shortest: QSR has no other default.
        wanted["alpha"] = 0.0175 / 0.008 * base["lr"]
        if "period" in wanted:
            wanted["base"] = wanted.pop("period")
    parameters = {name: value for name, value in wanted.items() if strict or name in taken}
    return make_config(**base, parameters=parameters)
