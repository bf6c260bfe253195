"""``postlocal simulate``."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from postlocal.cli.options import (
    ALL,
    MOST_STEPS,
    MOST_WORKERS,
    Dtype,
    GradientWire,
    OuterLr,
    OuterMomentum,
    PeakLr,
    Period,
    Strategies,
    Warmup,
    WireName,
    check_plot,
    check_size,
    configure,
    of_job,
    of_output,
    option,
    parse_dtype,
)
from postlocal.cli.units import (
    parse_bandwidth,
    parse_count,
    parse_duration,
    parse_latency,
    parse_shares,
)
from postlocal.planning import (
    Failures,
    Fleet,
    Job,
    Link,
    Simulated,
    Spent,
    draw_sweep,
    exponential_tail,
    normal,
    sweep,
)
from postlocal.train.tables import print_table

_who = partial(option, "The fleet")


def simulate(
    workers: Annotated[
        str,
        _who("Numbers of workers, such as 8,64,512: each a multiple of the node size, or less."),
    ] = "1,10,100,1000,10000",
    node_size: Annotated[int, _who("Workers per node; they share its link and fail together.")] = 1,
    bandwidth: Annotated[
        str,
        _who("Bandwidth of a node's link, or several with shares, as in 10Mbit:0.1,100Mbit:0.9."),
    ] = "1Gbit",
    latency: Annotated[str, _who("One-way latency between nodes, such as 20ms.")] = "0",
    node_bandwidth: Annotated[str, _who("Bandwidth between workers of a node.")] = "400Gbit",
    speed_deviation: Annotated[
        float, _who("Standard deviation of relative speeds between workers, fixed for the run.")
    ] = 0.0,
    mtbf: Annotated[
        str | None,
        _who("Mean time between failures of a node, such as 30d.", show_default="no failures"),
    ] = None,
    away: Annotated[str, _who("Time until a failed node returns.")] = "30m",
    restart: Annotated[
        str, _who("Time to load a checkpoint after a failure that stops all workers.")
    ] = "2m",
    saving: Annotated[
        str, _who("Time to save a checkpoint, during which all workers stop.")
    ] = "10s",
    parameters: Annotated[str, of_job("Number of parameters, such as 350M or 1e9.")] = "1e9",
    step_seconds: Annotated[float, of_job("Compute time of a step, in seconds.")] = 1.0,
    step_deviation: Annotated[
        float, of_job("Standard deviation of the compute time from step to step, in seconds.")
    ] = 0.0,
    steps: Annotated[int, of_job("Optimizer steps.")] = 2000,
    tokens_a_worker: Annotated[str, of_job("Tokens per step of one worker.")] = "8192",
    lr: PeakLr = 3e-3,
    dtype: Dtype = "fp32",
    strategy: Strategies = ALL,
    period: Period = None,
    warmup: Warmup = None,
    outer_lr: OuterLr = None,
    outer_momentum: OuterMomentum = None,
    wire: WireName = None,
    gradient_wire: GradientWire = None,
    seed: Annotated[int, of_output("Random seed of speeds, steps and failures.")] = 0,
    plot: Annotated[
        Path | None, of_output("File (png, pdf, svg) for a plot of efficiency over workers.")
    ] = None,
    as_json: Annotated[bool, of_output("Print JSON instead of tables.", "--json")] = False,
) -> None:
    """Simulate how strategies scale to thousands of uneven workers that fail.

    Rounds and bytes are those of `postlocal plan`. docs/scale.md describes the
    model of speeds, links and failures, and what it leaves out.
    """
    check_plot(plot)
    check_size("steps", steps, MOST_STEPS)
    counts = [parse_count(each, "workers") for each in workers.split(",")]
    check_size("workers", max(counts), MOST_WORKERS)
    if min(counts) < 1:
        raise ValueError(f"workers must be at least 1, got {workers!r}")
    _check_nodes(counts, node_size)
    given = {
        "period": period, "warmup": warmup, "outer_lr": outer_lr, "outer_momentum": outer_momentum,
        "wire": wire, "gradient_wire": gradient_wire,
    }  # fmt: skip
    configs = configure(strategy, {"steps": steps, "lr": lr, "seed": seed}, given)
    job = Job(
        parse_count(parameters, "parameters"),
        normal(step_seconds, step_deviation),
        steps,
        configs[0].lr_at,
        parse_dtype(dtype),
    )
    delayed = parse_latency(latency)
    fleet = Fleet(
        node_size,
        [(share, Link(bits, delayed)) for bits, share in parse_shares(bandwidth, parse_bandwidth)],
        exponential_tail(1.0, speed_deviation),
        Failures(
            float("inf") if mtbf is None else parse_duration(mtbf, "mtbf"),
            parse_duration(away, "away"),
            parse_duration(restart, "restart"),
            parse_duration(saving, "saving"),
        ),
        node_size,
        Link(parse_bandwidth(node_bandwidth)),
    )
    chosen = {config.label: config.make_strategy() for config in configs}
    results = track(
        sweep(chosen, job, fleet, counts, seed),
        "Simulating",
        total=len(chosen) * len(counts),
        console=Console(stderr=True),
        transient=True,
        disable=not Console(stderr=True).is_terminal,
    )
    _Answer(list(results), parse_count(tokens_a_worker, "tokens-a-worker")).give(as_json, plot)


def _check_nodes(counts: Sequence[int], node_size: int) -> None:
    if node_size < 1:
        raise ValueError(f"node-size must be at least 1, got {node_size}")
    for count in counts:
        if count > node_size and count % node_size:
            raise ValueError(
                f"workers must be a multiple of the node-size {node_size}, or less, got {count}"
            )


@dataclass(frozen=True)
class _Answer:
    """The output of the command.

    Attributes:
        results: label and result, strategy by strategy.
        tokens: number of tokens of a worker's step.
    """

    results: Sequence[tuple[str, Simulated]]
    tokens: int

    def give(self, as_json: bool, plot: Path | None) -> None:
        if plot is not None:
            draw_sweep({"": self.results}, plot)
        if as_json:
            typer.echo(json.dumps([self._values(each) for _, each in self.results], indent=1))
            return
        console = Console()
        console.print("Efficiency, by workers", style="bold")
        print_table(console, self._efficiencies())
        console.print(f"Share of time by cause, with {self._most:,} workers", style="bold")
        print_table(console, self._causes())
        if plot is not None:
            console.print(f"Drawn in {plot}.", markup=False, highlight=False, soft_wrap=True)

    @property
    def _most(self) -> int:
        return max(done.replicas for _, done in self.results)

    def _values(self, done: Simulated) -> Mapping[str, Any]:
        return done.to_dict() | {"tokens_a_second": self._speed(done)}

    def _speed(self, done: Simulated) -> float:
        return self.tokens * done.steps_a_second

    def _efficiencies(self) -> Table:
        counts = list(dict.fromkeys(done.replicas for _, done in self.results))
        table = _table(*(f"{count:,}" for count in counts), "most tokens/s")
        for name, group in groupby(self.results, key=lambda pair: pair[0]):
            row = [done for _, done in group]
            shares = [f"{done.efficiency:.1%}" for done in row]
            table.add_row(escape(name), *shares, f"{max(map(self._speed, row)):,.0f}")
        return table

    def _causes(self) -> Table:
        table = _table(*(field.name for field in fields(Spent)))
        for name, done in self.results:
            if done.replicas == self._most:
                table.add_row(escape(name), *(f"{share:.1%}" for share in done.shares.values()))
        return table


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("strategy", overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table
