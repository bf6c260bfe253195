"""One job with more and more replicas: how well each strategy scales, and a drawing of it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from postlocal.planning.fleet import Fleet
from postlocal.planning.job import Job
from postlocal.planning.simulation import Simulated, simulate
from postlocal.strategies import Strategy


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
        10 100%
        100 86%
    """
    for label, strategy in chosen.items():
        for count in replicas:
            size = min(count, fleet.node_size)
            smaller = replace(fleet, replicas=count, node_size=size)
            yield label, simulate(strategy, job, smaller, seed)


def draw_sweep(results: Sequence[tuple[str, Simulated]], to: Path) -> None:
    """Draw efficiency over the number of replicas, a line for each label.

    Args:
        results: what `sweep` gives.
        to: the PNG file.
    """
    mpl.use("Agg", force=False)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    markers = iter("osv^D<>Pph*X" * len(results))
    for label, group in groupby(results, key=lambda pair: pair[0]):
        done = [each for _, each in group]
        axes.plot(
            [each.replicas for each in done],
            [100 * each.efficiency for each in done],
            marker=next(markers),
            markersize=4,
            label=label,
        )
    axes.set(
        xscale="log",
        xlabel="replicas",
        ylabel="efficiency: useful steps a second,\nof those of as many replicas alone (%)",
        ylim=(0, 101),
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(to, dpi=100)
