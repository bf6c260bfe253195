"""Plots of training runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from postlocal.planning.drawing import new_figure
from postlocal.train.metrics import Metrics


def plot(runs: Mapping[str, Path], to: Path) -> None:
    """Draw loss over training time and over bytes sent.

    Args:
        runs: label -> folder of a run.
        to: the PNG file.

    Raises:
        ImportError: if matplotlib cannot be imported.
    """
    figure = new_figure(11, 4.5)
    by_time, by_bytes = figure.subplots(1, 2, sharey=True)
    for index, (label, folder) in enumerate(runs.items()):
        entries = Metrics(folder).read()
        steps = [entry for entry in entries if entry["kind"] == "step"]
        evals = [entry for entry in entries if entry["kind"] == "eval"]
        for axes, across, unit in ((by_time, "train_seconds", 1), (by_bytes, "payload_bytes", 1e6)):
            _line(axes, steps, across, unit, "loss", color=f"C{index}", alpha=0.35, linewidth=1)
            _line(
                axes, evals, across, unit, "val_loss",
                color=f"C{index}", marker="o", markersize=4, label=label,
            )  # fmt: skip
    by_time.set(xlabel="training time (s)", ylabel="loss (nats a byte)")
    by_bytes.set(xlabel="bytes sent by a worker (MB)")
    by_bytes.set_xscale("symlog", linthresh=1)
    for axes in (by_time, by_bytes):
        axes.grid(alpha=0.3)
    by_time.legend(title="held-out loss; training loss behind it")
    figure.savefig(to, dpi=120)


def _line(
    axes: Any, entries: Sequence[Mapping[str, Any]], across: str, unit: float, up: str, **style: Any
) -> None:
    horizontal = [entry[across] / unit for entry in entries]
    axes.plot(horizontal, [entry[up] for entry in entries], **style)
