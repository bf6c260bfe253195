"""Options that several commands take, and settings of the trainer made from them."""

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from postlocal.planning import drawing
from postlocal.strategies import parameters_of
from postlocal.train.config import TrainConfig, make_config
from postlocal.wire import NAMED as WIRES

ALL = "all"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MOST_STEPS = 10_000_000
MOST_FRAGMENTS = 10_000
MOST_WORKERS = 1_000_000
_PERIOD = 16  # between nodes of hierarchical, which has no default of its own
_DRAWINGS = (".png", ".pdf", ".svg")


def option(panel: str, text: str, *names: str, **settings: Any) -> Any:
    """An option that help shows in a panel."""
    return typer.Option(*names, help=text, rich_help_panel=panel, **settings)


of_job = partial(option, "The job")
of_strategy = partial(option, "The strategy")
of_output = partial(option, "Output")

PeakLr = Annotated[float, of_job("Peak learning rate (the period of qsr follows it).")]
Dtype = Annotated[str, of_job(f"Dtype of parameters: {', '.join(DTYPES)}.")]
WireName = Annotated[
    str | None,
    of_strategy(
        f"Encoding of parameters on the network: {', '.join(WIRES)}.",
        show_default="its own, or bf16",
    ),
]
GradientWire = Annotated[
    str | None,
    of_strategy("Encoding of gradients on the network, as above.", show_default="its own, or bf16"),
]

_OPTIONS: Mapping[str, Any] = {
    "period": Annotated[
        int | None,
        of_strategy("Steps between synchronizations.", show_default="the strategy's own"),
    ],
    "warmup": Annotated[
        int | None,
        of_strategy(
            "Steps with averaged gradients before the first round (post_local_sgd, edit).",
            show_default="three tenths of the run; edit: 0",
        ),
    ],
    "gradients": Annotated[
        str | None,
        of_strategy(
            "Level that averages gradients in each step of a round: rank (none), node, world."
        ),
    ],
    "outer_lr": Annotated[
        float | None,
        of_strategy("Outer learning rate (diloco, streaming_diloco, sparse_loco, edit)."),
    ],
    "outer_momentum": Annotated[
        float | None, of_strategy("Outer momentum (diloco, streaming_diloco, edit).")
    ],
    "fragments": Annotated[
        int | None,
        of_strategy("Parts of the model that are sent one after the other (streaming_diloco)."),
    ],
    "delay": Annotated[
        int | None,
        of_strategy("Steps between sending a fragment and applying its mean (streaming_diloco)."),
    ],
    "mix": Annotated[
        float | None,
        of_strategy("Share of its own parameters that a worker keeps, 0 to 1 (streaming_diloco)."),
    ],
    "keep_delayed_steps": Annotated[
        bool | None,
        of_strategy("Keep the steps taken during a delay above 0 (streaming_diloco)."),
    ],
    "order": Annotated[
        str | None,
        of_strategy("How layers are dealt to fragments: strided, sequential (streaming_diloco)."),
    ],
    "top_k": Annotated[
        int | None, of_strategy("Values that are sent of each chunk (sparse_loco).")
    ],
    "chunk": Annotated[int | None, of_strategy("Values in a chunk (sparse_loco).")],
    "bits": Annotated[int | None, of_strategy("Bits for each value that is sent (sparse_loco).")],
    "feedback": Annotated[
        float | None,
        of_strategy("Share of what was not sent that is added next time (sparse_loco)."),
    ],
    "max_norm": Annotated[
        float | None, of_strategy("Greatest norm of a layer's mean change in a round (edit).")
    ],
    "slow_lr": Annotated[float | None, of_strategy("Outer learning rate (slowmo).")],
    "slow_momentum": Annotated[float | None, of_strategy("Outer momentum (slowmo).")],
    "alpha": Annotated[
        float | None, of_strategy("Period = (alpha / learning rate) squared (qsr).")
    ],
    "base": Annotated[int | None, of_strategy("Shortest period (qsr).")],
    "periods": Annotated[
        str | None, of_strategy("Period of each level, such as node=4,world=16 (hierarchical).")
    ],
}
"""Options of strategies, by the name of the parameter."""


def takes_strategy(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of strategies; it gets those given as its argument ``given``."""

    @functools.wraps(command)
    def called(**values: Any) -> None:
        options = {name: values.pop(name) for name in _OPTIONS}
        given = {name: value for name, value in options.items() if value is not None}
        if "periods" in given:
            given["periods"] = _parse_periods(given["periods"])
        command(**values, given=given)

    kind = inspect.Parameter.KEYWORD_ONLY
    added = [
        inspect.Parameter(name, kind, default=None, annotation=option)
        for name, option in _OPTIONS.items()
    ]
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        parameters += added if parameter.name == "given" else [parameter.replace(kind=kind)]
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {each.name: each.annotation for each in parameters}
    return called


def _parse_periods(text: str) -> dict[str, int]:
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {level.strip(): int(steps) for level, steps in pairs}
    except ValueError:
        raise ValueError(
            f"periods must be level=steps pairs such as node=4,world=16, got {text!r}"
        ) from None


def parse_dtype(text: str) -> torch.dtype:
    """A dtype of parameters by name.

    Raises:
        ValueError: if the name is unknown.
    """
    if text not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {text!r}")
    return DTYPES[text]


def check_size(name: str, value: int, most: int) -> None:
    """Check that a number of things that are followed one by one comes to an end.

    Raises:
        ValueError: if it is too great.
    """
    if value > most:
        raise ValueError(f"{name} must be at most {most:,}, got {value}")


def check_plot(plot: Path | None) -> None:
    """Check, before anything is computed, that a plot that was asked for can be drawn.

    Raises:
        ValueError: if it cannot.
    """
    if plot is None:
        return
    if plot.suffix not in _DRAWINGS:
        raise ValueError(f"plot must be a file ending in {', '.join(_DRAWINGS)}, got {str(plot)!r}")
    writable = plot.parent.is_dir() and os.access(plot.parent, os.W_OK)
    if plot.is_dir() or not writable:
        raise ValueError(
            f"plot must be a file in a folder that exists and can be written, got {str(plot)!r}"
        )
    try:
        drawing.require()
    except ImportError as error:
        raise ValueError(f"plot must be drawable, got {str(plot)!r}: {error}") from error


def configure(base: Mapping[str, Any], given: Mapping[str, Any], strict: bool) -> TrainConfig:
    """Settings of the trainer for one strategy, with what it takes of the options given.

    Args:
        base: settings of all.
        given: parameters of strategies.
        strict: whether a parameter that the strategy does not take is an error.
    """
    check_size("fragments", given.get("fragments", 1), MOST_FRAGMENTS)
    taken = parameters_of(base["strategy"])
    wanted = dict(given)
    if "periods" in taken and "periods" not in given:
        inner = max(1, wanted.pop("period", _PERIOD) // 4)
        wanted["periods"] = {"node": inner, "world": 4 * inner}
    if "alpha" in taken:
        # The ratio of the paper, whose first rounds are the shortest: QSR has no other default.
        wanted.setdefault("alpha", 0.0175 / 0.008 * base["lr"])
        if "period" in wanted:
            wanted.setdefault("base", wanted.pop("period"))
    parameters = {name: value for name, value in wanted.items() if strict or name in taken}
    return make_config(**base, parameters=parameters)
