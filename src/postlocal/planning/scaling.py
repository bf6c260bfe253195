"""Simulations of one job with different numbers of replicas, and a plot of them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import cycle, groupby
from pathlib import Path
from typing import TYPE_CHECKING

from postlocal.planning.drawing import new_figure
from postlocal.planning.fleet import Fleet
from postlocal.planning.job import Job
from postlocal.planning.simulation import Simulated, simulate
from postlocal.strategies import Strategy

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def sweep(
    chosen: Mapping[str, Strategy], job: Job, fleet: Fleet, replicas: Sequence[int], seed: int = 0
) -> Iterator[tuple[str, Simulated]]:
    """Simulate each strategy with each number of replicas of one fleet.

    Each replica takes its own steps, so more replicas train on more tokens. Fewer replicas than a
    node has are one node.

    Args:
        chosen: label -> strategy.
        job: the job.
        fleet: the fleet; its number of replicas is ignored.
        replicas: the numbers of replicas.
        seed: seed of all random numbers.

    Returns:
        Label and result, strategy by strategy, one at a time.

    Example:
        >>> from postlocal import strategies
        >>> from postlocal.planning import Link
        >>> job = Job(parameters=10**8, step=1.0, steps=100)
        >>> chosen = {"ddp": strategies.ddp()}
        >>> for _, done in sweep(chosen, job, Fleet(1, Link(10e9, 0.001)), replicas=(1, 10, 100)):
        ...     print(done.replicas, f"{done.efficiency:.0%}")
        1 100%
        10 96%
        100 83%
    """
    for label, strategy in chosen.items():
        for count in replicas:
            size = min(count, fleet.node_size)
            smaller = replace(fleet, replicas=count, node_size=size)
            yield label, simulate(strategy, job, smaller, seed)


def draw_sweep(panels: Mapping[str, Sequence[tuple[str, Simulated]]], to: Path) -> None:
    """Plot efficiency over the number of replicas, with a line for each label.

    Args:
        panels: title -> what `sweep` gives, two in a row.
        to: the PNG file.

    Raises:
        ImportError: if matplotlib cannot be imported.
    """
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(2.5 + 4 * columns, 1 + 3 * rows)
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes, (title, results) in zip(grid.flat, panels.items(), strict=False):
        _draw(axes, results)
        axes.set(title=title, xscale="log", xlabel="replicas", ylim=(0, 101))
        axes.grid(alpha=0.3)
    for axes in grid[:, 0]:
        axes.set_ylabel("efficiency (%)")
    figure.legend(
        *grid[0, 0].get_legend_handles_labels(), fontsize="small", loc="outside right center"
    )
    figure.savefig(to, dpi=72)


def _draw(axes: "Axes", results: Sequence[tuple[str, Simulated]]) -> None:
    markers = cycle("osv^D<>Pph*X")
    for label, group in groupby(results, key=lambda pair: pair[0]):
        done = [each for _, each in group]
        replicas = [each.replicas for each in done]
        shares = [100 * each.efficiency for each in done]
        axes.plot(replicas, shares, marker=next(markers), markersize=4, label=label)
