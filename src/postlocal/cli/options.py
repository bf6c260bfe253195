"""Options that several commands take, and settings of the trainer made from them."""

import os
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from postlocal.expressions import Call, ExpressionError, read, read_all
from postlocal.planning import drawing
from postlocal.strategies import AXIS, NAMED, parameters_of
from postlocal.train.config import TrainConfig, make_config
from postlocal.wire import NAMED as WIRES

ALL = "all"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MOST_STEPS = 10_000_000
MOST_FRAGMENTS = 10_000
MOST_WORKERS = 1_000_000
_PERIODS = ("hierarchical", "qsr")  # they have a period under another name
_DRAWINGS = (".png", ".pdf", ".svg")


def option(panel: str, text: str, *names: str, **settings: Any) -> Any:
    """An option that the help shows in a panel."""
    return typer.Option(*names, help=text, rich_help_panel=panel, **settings)


of_job = partial(option, "The job")
of_strategy = partial(option, "The strategy")
of_output = partial(option, "Output")


def _having(parameter: str) -> str:
    """The strategies that have a parameter, for the help."""
    return ", ".join(name for name in NAMED if parameter in parameters_of(name))


_EXAMPLE = "diloco, or 'diloco(period=32, wire=int4())'"
_SEE = "`postlocal strategies` lists them"

PeakLr = Annotated[float, of_job("Peak learning rate, on which the rounds of qsr depend.")]
Dtype = Annotated[str, of_job(f"Data type of parameters: {', '.join(DTYPES)}.")]
StrategyText = Annotated[str, of_strategy(f"The strategy, such as {_EXAMPLE}; {_SEE}.")]
Strategies = Annotated[
    str, of_strategy(f"{ALL}, or one or more separated by commas, such as {_EXAMPLE}; {_SEE}.")
]
Period = Annotated[
    int | None,
    of_strategy(
        f"Steps between synchronizations ({_having('period')}).",
        show_default="the strategy's own",
    ),
]
Warmup = Annotated[
    int | None,
    of_strategy(
        f"Steps of plain data-parallel training before the first round ({_having('warmup')}).",
        show_default="three tenths of the run; edit: 0",
    ),
]
OuterLr = Annotated[
    float | None,
    of_strategy(f"Outer learning rate ({_having('outer_lr')}).", show_default="the strategy's own"),
]
OuterMomentum = Annotated[
    float | None,
    of_strategy(
        f"Outer Nesterov momentum ({_having('outer_momentum')}).",
        show_default="the strategy's own",
    ),
]
WireName = Annotated[
    str | None,
    of_strategy(
        f"Encoding of parameters on the network: {', '.join(WIRES)}; arguments as in "
        "'top_k(k=32)'.",
        show_default="the strategy's own, or bf16",
    ),
]
GradientWire = Annotated[
    str | None,
    of_strategy(
        "Encoding of gradients on the network, as for --wire.",
        show_default="the strategy's own, or bf16",
    ),
]


def parse_dtype(text: str) -> torch.dtype:
    """A dtype of parameters by name.

    Raises:
        ValueError: if the name is unknown.
    """
    if text not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {text!r}")
    return DTYPES[text]


def check_size(name: str, value: int, most: int) -> None:
    """Check a number of things that are simulated one by one.

    Raises:
        ValueError: if it is too great.
    """
    if value > most:
        raise ValueError(f"{name} must be at most {most:,}, got {value}")


def check_plot(plot: Path | None) -> None:
    """Check that the plot can be drawn, before anything is computed.

    Raises:
        ValueError: if it cannot be drawn.
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


def configure(text: str, base: Mapping[str, Any], given: Mapping[str, Any]) -> list[TrainConfig]:
    """Settings of the trainer for some strategies.

    Args:
        text: `ALL`, or expressions separated by commas.
        base: settings that all have in common.
        given: options of strategies; None: not given. A single strategy must have all of them; of
            several, each uses those that it has, and one line on standard error has the others.
    """
    options = {name: value for name, value in given.items() if value is not None}
    calls = _all(options) if text == ALL else _read(text)
    few = [_only(call, options) if len(calls) > 1 else options for call in calls]
    _say_unused(calls, options, {"period": _PERIODS} if text == ALL else {})
    configs = [
        make_config(**base, strategy=str(call), **taken)
        for call, taken in zip(calls, few, strict=True)
    ]
    for config in configs:
        check_size("fragments", config.make_strategy().fragments.count, MOST_FRAGMENTS)
    return configs


def _read(text: str) -> list[Call]:
    try:
        return read_all(text, AXIS)
    except ExpressionError as error:
        raise error.of("strategy") from None


def _only(call: Call, options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in call.parameters}


def _all(options: Mapping[str, Any]) -> list[Call]:
    """All named strategies, with a given period under other names too."""
    written = {name: name for name in NAMED}
    if "period" in options:
        inner = max(1, options["period"] // 4)
        written["hierarchical"] = f'hierarchical(periods={{"node": {inner}, "world": {4 * inner}}})'
        written["qsr"] = f"qsr(base={options['period']})"
    return [read(each, AXIS) for each in written.values()]


def _say_unused(
    calls: Sequence[Call], options: Mapping[str, Any], renamed: Mapping[str, Collection[str]]
) -> None:
    """Say which strategies do not have an option, where others do.

    Args:
        calls: the strategies; a single one is refused by its settings.
        options: that were given.
        renamed: strategies that use an option under another name.

    Raises:
        ValueError: if none of several has an option.
    """
    said = []
    for option in options if len(calls) > 1 else ():
        without = [
            call.name
            for call in calls
            if option not in call.parameters and call.name not in renamed.get(option, ())
        ]
        names, flag = ", ".join(dict.fromkeys(without)), option.replace("_", "-")
        if len(without) == len(calls):
            raise ValueError(f"{flag} must not be given to {names}, which have no such argument")
        if without:
            said.append(f"--{flag} does not concern {names}")
    if said and os.environ.get("RANK", "0") == "0":
        typer.echo(f"postlocal: {'; '.join(said)}", err=True)
