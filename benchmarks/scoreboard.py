"""Tables and plots of who comes to a loss when."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.contenders import ALONE, CONTENDERS, DDP
from benchmarks.contest import Report
from benchmarks.hosts import bits
from benchmarks.standings import Arrival, Pace, arrival

Spread = tuple[float, float, float]
"""Median, least and greatest."""


@dataclass
class Scores:
    """What was measured.

    Attributes:
        seeds: of the runs.
        paces: by rate, and then by contender.
        curves: whole runs with no limit on the network, by contender and seed.
        wholes: whole runs over a network, by contender, seed and rate.
    """

    seeds: Sequence[int]
    paces: dict[str, dict[str, Pace]] = field(default_factory=dict)
    curves: dict[tuple[str, int], Report] = field(default_factory=dict)
    wholes: dict[tuple[str, int, str], Report] = field(default_factory=dict)

    def arrivals(self, name: str, rate: str) -> list[Arrival | None]:
        """When a contender came to DDP's last loss at a rate, seed by seed."""
        return [
            arrival(
                self.curves[name, seed],
                partial(self.seconds, name, rate),
                self.wholes.get((name, seed, rate)),
                target=self.curves[DDP, seed].losses[-1][2],
            )
            for seed in self.seeds
        ]

    def seconds(self, name: str, rate: str, steps: float) -> float:
        """For so many steps from the start, at the paces of stretches."""
        dense = min(steps, CONTENDERS[name].dense)
        paces = self.paces[rate]
        return dense * paces[DDP].median + (steps - dense) * paces[name].median

    def row(self, name: str, rate: str) -> dict[str, Any]:
        """All figures of a contender at a rate; those about arrivals are None if there is none."""
        pace = self.paces[rate][name]
        figures: dict[str, Any] = {
            "seconds_a_step": spread(pace.seconds),
            "computing": spread(pace.computing),
            "bytes_up_a_step": pace.bytes_up,
        }
        if name == ALONE:
            return figures
        arrivals, first = self.arrivals(name, rate), self.arrivals(DDP, rate)
        last = [self.curves[name, seed].losses[-1][2] for seed in self.seeds]
        arrived = [(a, b) for a, b in zip(arrivals, first, strict=True) if a is not None and b]
        figures |= {
            "last_loss": spread(last),
            "arrived": len(arrived),
            "composed": any(a.composed for a, _ in arrived),
        }
        if len(arrived) < len(self.seeds):
            return figures
        alone = statistics.median(pace.alone)
        return figures | {
            "steps": spread(a.steps for a, _ in arrived),
            "seconds": spread(a.seconds for a, _ in arrived),
            "sooner_than_ddp": spread(b.seconds / a.seconds for a, b in arrived),
            "over_its_limit": spread(a.seconds / (a.steps * alone) for a, _ in arrived),
        }


def spread(values: Iterable[float]) -> Spread:
    """Median, least and greatest."""
    kept = list(values)
    return statistics.median(kept), min(kept), max(kept)


def _said(figures: Mapping[str, Any], name: str, form: str, scale: float = 1.0) -> str:
    if name not in figures:
        return ""
    middle, least, most = (format(scale * value, form) for value in figures[name])
    return middle if least == most else f"{middle} ({least}..{most})"


def table(scores: Scores) -> str:
    """In Markdown, a part for each rate."""
    parts = []
    for rate, paces in scores.paces.items():
        lines = [
            f"## {rate} a host",
            "",
            "| contender | s a step | computing, % | MB up a step | last loss | steps to the loss "
            "| seconds | sooner than DDP | over its limit | |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for name in paces:
            row = scores.row(name, rate)
            cells = [
                name,
                _said(row, "seconds_a_step", ".3f"),
                _said(row, "computing", ".1f", 100),
                f"{row['bytes_up_a_step'] / 1e6:.3f}",
                _said(row, "last_loss", ".4f"),
                _said(row, "steps", ".0f") or _missed(row, len(scores.seeds)),
                _said(row, "seconds", ".0f"),
                _said(row, "sooner_than_ddp", ".2f"),
                _said(row, "over_its_limit", ".2f"),
                "" if "steps" not in row else "composed" if row["composed"] else "run",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _missed(row: Mapping[str, Any], seeds: int) -> str:
    return f"not reached by {seeds - row['arrived']} of {seeds}" if "arrived" in row else ""


def plot(scores: Scores, to: Path) -> None:
    """Draw seconds to the loss against the rate, and shares of computing."""
    mpl.use("Agg", force=False)
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [name for name in next(iter(scores.paces.values())) if name != ALONE]
    for index, name in enumerate(names):
        style = {
            "color": f"C{index % 10}",
            "marker": "os^Dv"[index % 5],
            "linestyle": "-" if "postlocal" in name else "--",
            "label": name,
        }
        _draw(left, scores, name, style, "seconds")
        _draw(right, scores, name, style, "computing", 100)
    left.set_yscale("log")
    left.set_ylabel("seconds to the loss of DDP's run")
    right.set_ylabel("computing, % of time")
    right.set_ylim(0, 105)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlabel("Mbit/s a host")
        axes.grid(alpha=0.3)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(to, dpi=110)


def _draw(
    axes: Axes, scores: Scores, name: str, style: dict[str, Any], figure: str, scale: float = 1
) -> None:
    rows = {bits(rate) / 1e6: scores.row(name, rate) for rate in scores.paces}
    points = [(rate, scale * row[figure][0]) for rate, row in sorted(rows.items()) if figure in row]
    if points:
        axes.plot(*zip(*points, strict=True), **style)
