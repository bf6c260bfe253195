"""One job with more and more replicas: how well each strategy scales, and a drawing of it."""

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
    """Simulate each strategy with each number of replicas, of a fleet that is otherwise the same.

    Each replica takes steps of its own, so that more replicas train on more tokens. Where there are
    fewer of them than a node has, they are one node.

    Args:
        chosen: label -> strategy.
        job: what is trained.
        fleet: by whom; its number of replicas does not count.
        replicas: how many, each in turn.
        seed: of all that is drawn.

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
    """Draw efficiency over the number of replicas, a line for each label.

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
