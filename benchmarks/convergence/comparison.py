"""Figures of several seeds in words, and their differences from the control in a plot."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.report import drawing


def seeds_in_words(seeds: Sequence[int]) -> str:
    """The seeds of a run.

    Example:
        >>> seeds_in_words(range(3))
        'seeds 0 to 2'
    """
    return f"seeds {seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"seed {seeds[0]}"


def with_deviation(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation over seeds; the mean alone of one seed.

    Example:
        >>> with_deviation([1.0, 2.0], digits=1)
        '1.5 ± 0.7'
    """
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def with_range(differences: Sequence[float]) -> str:
    """Mean, least and greatest difference over seeds, with signs.

    Example:
        >>> with_range([1.0, 2.0])
        '+1.50 (+1.00..+2.00)'
    """
    least, most = min(differences), max(differences)
    return f"{statistics.mean(differences):+.2f} ({least:+.2f}..{most:+.2f})"


def plot(differences: Mapping[str, Sequence[float]], label: str, to: Path) -> None:
    """Draw differences from the control and their spread over seeds, a line a setting."""
    with drawing(to, width=8, height=1.2 + 0.35 * len(differences)) as figure:
        axes = figure.subplots()
        for place, values in enumerate(differences.values()):
            axes.plot([min(values), max(values)], [place, place], color="C0", alpha=0.5)
            axes.plot([statistics.mean(values)], [place], "o", color="C0")
        axes.axvline(0, color="grey", linewidth=1)
        axes.set_yticks(range(len(differences)), list(differences))
        axes.invert_yaxis()
        axes.set_xlabel(label)
        axes.grid(axis="x", alpha=0.3)
