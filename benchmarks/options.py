"""Options that several benchmarks take."""

from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Annotated, TypeVar

import typer

from benchmarks.cluster import bits

Seeds = Annotated[int, typer.Option(min=1, help="number of seeds of each setting")]
FirstSeed = Annotated[
    int, typer.Option(min=0, help="first seed; settings are tuned on other seeds than reported")
]
Jobs = Annotated[int, typer.Option(min=1, help="runs at a time, each on one core")]
Rounds = Annotated[int, typer.Option(min=1, help="rounds in which steps of all methods are timed")]
Resume = Annotated[bool, typer.Option(help="reuse results of an earlier, interrupted call")]
Record = Annotated[bool, typer.Option(help="write a record to benchmarks/records")]
Worlds = Annotated[list[int] | None, typer.Option(help="number of ranks; repeatable")]

Setting = TypeVar("Setting")


def choose(
    settings: Mapping[str, Setting], patterns: str, *always: str, between: str = ", "
) -> dict[str, Setting]:
    """The settings whose names match, in the order of the table, and those that always take part.

    Args:
        settings: by name.
        patterns: what names have to match, one or the other.
        always: names of those that take part whatever the patterns are, such as the control.
        between: what stands between patterns; spaces around it do not count.

    Raises:
        typer.BadParameter: if a pattern matches nothing.
    """
    wanted = [pattern.strip() for pattern in patterns.split(between.strip())]
    for pattern in wanted:
        if not any(fnmatch(name, pattern) for name in settings):
            raise typer.BadParameter(f"{pattern!r} is none of {between.join(settings)}")
    return {
        name: setting
        for name, setting in settings.items()
        if name in always or any(fnmatch(name, pattern) for pattern in wanted)
    }


def checked_rate(rate: str | None) -> str | None:
    """A rate as it is.

    Raises:
        typer.BadParameter: if it is no rate.
    """
    try:
        bits(rate or "1bit")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return rate


def checked_rates(rates: str) -> str:
    """Rates with commas between them, as they are.

    Raises:
        typer.BadParameter: if one of them is no rate.
    """
    for rate in rates.split(","):
        checked_rate(rate.strip())
    return rates
