"""Tables, plots and plain values of the time to a loss."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from benchmarks.cluster import bits
from benchmarks.report import drawing, markdown_table
from benchmarks.time_to_loss.analysis import Measurements
from benchmarks.time_to_loss.methods import ALONE, METHODS
from postlocal.train import TrainConfig


def about(config: TrainConfig, rounds: int, seeds: Sequence[int]) -> str:
    """The setting in words, for a record."""
    absent = [name for name, method in METHODS.items() if not method.installed]
    lines = [
        f"Model `{config.model}`, {config.workers} hosts of one rank, {config.batch_size} x "
        f"{config.sequence_length} bytes a rank a step, AdamW, peak learning rate {config.lr:g}; "
        f"DDP takes {config.steps} steps, others what the column `length` of the JSON says times "
        f"that. Seeds {', '.join(map(str, seeds))}; figures are medians (least..greatest): of "
        f"seconds a step over {rounds} rounds, of steps, seconds and losses over seeds. Computing "
        "is the time of a step without communication, of its time. The limit of a method is the "
        "time that its steps take without communication.",
    ]
    if absent:
        lines.append(f"Not installed: {', '.join(absent)}.")
    return "\n\n".join(lines) + "\n\n"


def _in_words(figures: Mapping[str, Any], name: str, form: str, scale: float = 1.0) -> str:
    if name not in figures:
        return ""
    middle, least, most = (format(scale * value, form) for value in figures[name])
    return middle if least == most else f"{middle} ({least}..{most})"


def table(measured: Measurements) -> str:
    """A table for each rate, in Markdown."""
    header = [
        "method", "s a step", "computing, %", "MB up a step", "last loss", "steps to the loss",
        "seconds", "sooner than DDP", "over its limit", "",
    ]  # fmt: skip
    parts = []
    for rate, paces in measured.paces.items():
        rows = {name: measured.row(name, rate) for name in paces}
        cells = [_cells(name, row, len(measured.seeds)) for name, row in rows.items()]
        parts.append(f"## {rate} a host\n\n{markdown_table(header, cells)}\n")
    return "\n".join(parts)


def _cells(name: str, row: Mapping[str, Any], seeds: int) -> list[str]:
    return [
        name,
        _in_words(row, "seconds_a_step", ".3f"),
        _in_words(row, "computing", ".1f", 100),
        f"{row['bytes_up_a_step'] / 1e6:.3f}",
        _in_words(row, "last_loss", ".4f"),
        _in_words(row, "steps", ".0f") or _missed(row, seeds),
        _in_words(row, "seconds", ".0f"),
        _in_words(row, "sooner_than_ddp", ".2f"),
        _in_words(row, "over_its_limit", ".2f"),
        "" if "steps" not in row else "composed" if row["composed"] else "run",
    ]


def _missed(row: Mapping[str, Any], seeds: int) -> str:
    return f"not reached by {seeds - row['reached']} of {seeds}" if "reached" in row else ""


def plot(measured: Measurements, to: Path) -> None:
    """Draw seconds to the loss against the rate, and shares of computing."""
    with drawing(to, width=11, height=5) as figure:
        left, right = figure.subplots(1, 2)
        names = [name for name in next(iter(measured.paces.values())) if name != ALONE]
        for index, name in enumerate(names):
            style = {
                "color": f"C{index % 10}",
                "marker": "os^Dv"[index % 5],
                "linestyle": "-" if "postlocal" in name else "--",
                "label": name,
            }
            _draw(left, measured, name, style, "seconds")
            _draw(right, measured, name, style, "computing", 100)
        left.set_yscale("log")
        left.set_ylabel("seconds to the loss of DDP's run")
        right.set_ylabel("computing, % of time")
        right.set_ylim(0, 105)
        for axes in (left, right):
            axes.set_xscale("log")
            axes.set_xlabel("Mbit/s a host")
            axes.grid(alpha=0.3)
        figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=3)


def _draw(
    axes: Axes,
    measured: Measurements,
    name: str,
    style: dict[str, Any],
    figure: str,
    scale: float = 1,
) -> None:
    rows = {bits(rate) / 1e6: measured.row(name, rate) for rate in measured.paces}
    points = [(rate, scale * row[figure][0]) for rate, row in sorted(rows.items()) if figure in row]
    if points:
        axes.plot(*zip(*points, strict=True), **style)


def as_json(measured: Measurements) -> dict[str, Any]:
    """All figures as plain values, for a record."""
    return {
        "rows": {
            rate: {name: measured.row(name, rate) for name in row}
            for rate, row in measured.paces.items()
        },
        "length": {name: METHODS[name].length for name, _ in measured.curves},
        "curves": {f"{name}, seed {seed}": r.losses for (name, seed), r in measured.curves.items()},
        "wholes": {
            f"{name}, seed {seed}, {rate}": asdict(report)
            for (name, seed, rate), report in measured.wholes.items()
        },
    }
