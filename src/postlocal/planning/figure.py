"""A plot of the share of time computing over bandwidth."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from postlocal.planning.cluster import Cluster
from postlocal.planning.drawing import new_figure
from postlocal.planning.job import Job
from postlocal.planning.plan import plan_rounds
from postlocal.planning.rounds import rounds_of
from postlocal.schedule import WORLD
from postlocal.strategies import Strategy

_POINTS = 41


def draw(
    chosen: Mapping[str, Strategy], job: Job, cluster: Cluster, to: Path, level: str = WORLD
) -> None:
    """Plot the share of time computing of strategies, over six decades of bandwidth.

    Args:
        chosen: label -> strategy.
        job: the job.
        cluster: the cluster; its bandwidth at the level is marked, in the middle.
        to: the PNG file.
        level: the level whose bandwidth varies.

    Raises:
        ImportError: if matplotlib cannot be imported.
    """
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    here = cluster.link(level).bandwidth
    bandwidths = here * np.logspace(-3, 3, _POINTS)
    for label, strategy in chosen.items():
        rounds = rounds_of(strategy, job)
        clusters = [cluster.with_bandwidth(float(each), level) for each in bandwidths]
        plans = [plan_rounds(rounds, strategy, job, there) for there in clusters]
        axes.plot(bandwidths, [100 * each.share_computing for each in plans], label=label)
    axes.axvline(here, color="gray", linestyle=":", label="as given")
    axes.set(
        xscale="log",
        xlabel=f"bandwidth at level {level} (bit/s)",
        ylabel="share of time computing (%)",
        ylim=(0, 101),
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(to, dpi=120)
