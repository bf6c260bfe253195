"""The planner beside a published table: bandwidth needed for a share of time computing.

    python -m benchmarks.utilisation

The table is Table 4 of Streaming DiLoCo (arXiv 2501.18512), the rows of 1 B parameters at 0.1 s a
step. Nothing is run; the planner is asked for the bandwidth.
"""

from collections.abc import Mapping
from dataclasses import replace

import typer
from rich.console import Console
from rich.table import Table

from postlocal import Strategy, strategies, wire
from postlocal.planning import Cluster, Job, Link, bandwidth_for

SHARES = (0.5, 0.8, 0.9, 0.95, 0.99)
"""Of time computing: the columns."""

PUBLISHED: Mapping[str, tuple[float, ...]] = {
    "data parallel": (86.8, 152.6, 184.2, 222.3, 569.0),
    "DiLoCo": (1.4, 6.2, 13.3, 23.3, 86.8),
    "streaming": (1.4, 5.2, 9.1, 16.0, 28.1),
    "streaming, overlap": (1.4, 4.3, 6.2, 9.1, 11.0),
    "streaming, overlap, 4 bit": (0.4, 0.9, 1.7, 2.0, 3.0),
}
"""Gbit/s."""

_H, _FRAGMENTS = 100, 8  # 24 layers, 3 in a fragment

STRATEGIES: Mapping[str, Strategy] = {
    "data parallel": replace(strategies.ddp(), gradient_wire=wire.bf16()),
    "DiLoCo": replace(strategies.diloco(_H), wire=wire.bf16()),
    "streaming": replace(
        strategies.streaming_diloco(_H, _FRAGMENTS, delay=0, mix=0.0), wire=wire.bf16()
    ),
    "streaming, overlap": replace(
        strategies.streaming_diloco(_H, _FRAGMENTS, delay=1), wire=wire.bf16()
    ),
    "streaming, overlap, 4 bit": strategies.streaming_diloco(_H, _FRAGMENTS, delay=1),
}

# There, any exchange starts layer by layer within the backward pass of its step.
JOB = Job(parameters=10**9, step=0.1, steps=20_000, parameter_overlap=2 / 3)
TWO = Cluster(workers=2, links={"world": Link(bandwidth=1e9)})


def needed(name: str) -> tuple[float, ...]:
    """Gbit/s that a row needs, by the planner."""
    strategy = STRATEGIES[name]
    return tuple(bandwidth_for(strategy, JOB, TWO, share) / 1e9 for share in SHARES)


def main() -> None:
    """Print both, cell by cell."""
    table = Table(title="Gbit/s, planned (published)")
    table.add_column("computing", no_wrap=True)
    for share in SHARES:
        table.add_column(f"{share:.0%}", justify="right")
    for name, published in PUBLISHED.items():
        pairs = zip(needed(name), published, strict=True)
        table.add_row(name, *(f"{ours:.3g} ({theirs:g})" for ours, theirs in pairs))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
