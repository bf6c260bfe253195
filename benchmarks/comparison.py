"""Settings that are compared with one control, seed by seed."""

import statistics
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeVar

import matplotlib as mpl
import typer
from matplotlib.figure import Figure

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


def said(seeds: Sequence[int]) -> str:
    """Seeds in words."""
    return f"seeds {seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"seed {seeds[0]}"


def plot(differences: Mapping[str, Sequence[float]], label: str, to: Path) -> None:
    """Draw differences from the control and their spread over seeds, a line a setting."""
    mpl.use("Agg", force=False)
    figure = Figure(figsize=(8, 1.2 + 0.35 * len(differences)), layout="constrained")
    axes = figure.subplots()
    for place, values in enumerate(differences.values()):
        axes.plot([min(values), max(values)], [place, place], color="C0", alpha=0.5)
        axes.plot([statistics.mean(values)], [place], "o", color="C0")
    axes.axvline(0, color="grey", linewidth=1)
    axes.set_yticks(range(len(differences)), list(differences))
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.3)
    to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(to, dpi=120)
