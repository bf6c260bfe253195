"""``postlocal plan``."""

import json
import math
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from postlocal.cli.options import (
    ALL,
    DTYPES,
    MOST_STEPS,
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
    by_level,
    parse_bandwidth,
    parse_count,
    parse_latency,
)
from postlocal.meter import human_bytes
from postlocal.planning import Cluster, Job, Link, LinksError, Plan, best, draw, normal, quantiles
from postlocal.planning import plan as plan_strategy
from postlocal.strategies import Strategy
from postlocal.topology import nodes
from postlocal.train.config import TrainConfig, make_config
from postlocal.train.measure import Measured, measure
from postlocal.train.progress import human_rate
from postlocal.train.tables import print_table
from postlocal.train.world import launched

_where = partial(option, "The cluster")
_LOSS = "The plan does not predict loss: docs/strategies.md has measurements."


def plan(
    workers: Annotated[int, _where("Number of workers; with --measure, that of torchrun.")] = 8,
    node_size: Annotated[int, _where("Workers per node; they share its link to other nodes.")] = 1,
    bandwidth: Annotated[
        str, _where("Bandwidth between nodes, or of each level, as in node=100Gbit,world=1Gbit.")
    ] = "1Gbit",
    latency: Annotated[
        str | None,
        _where(
            "One-way latency between nodes, such as 20ms, or of each level, as in "
            "node=10us,world=20ms.",
            show_default="0",
        ),
    ] = None,
    measured: Annotated[
        bool, _where("Under torchrun: measure bandwidth, latency and step time.", "--measure")
    ] = False,
    parameters: Annotated[
        str | None, of_job("Number of parameters, such as 350M or 1e9.", show_default="1e9")
    ] = None,
    step_seconds: Annotated[float, of_job("Compute time of a step, in seconds.")] = 1.0,
    step_deviation: Annotated[
        float, of_job("Standard deviation of the compute time over workers and steps, in seconds.")
    ] = 0.0,
    steps: Annotated[
        int | None, of_job("Optimizer steps.", show_default="10,000, or the token budget's")
    ] = None,
    tokens_a_step: Annotated[str | None, of_job("Tokens per step, over all workers.")] = None,
    token_budget: Annotated[str | None, of_job("Tokens to train on, such as 20B.")] = None,
    lr: PeakLr = 3e-3,
    dtype: Dtype = "fp32",
    optimizer_bytes: Annotated[float, of_job("Bytes of optimizer state for each parameter.")] = 8.0,
    overlap: Annotated[
        float,
        of_job(
            "Share of a step that the reduction of gradients can overlap.",
            show_default="two thirds",
        ),
    ] = 2 / 3,
    model: Annotated[str, of_job("Size of the trainer's model, for --measure.")] = "tiny",
    strategy: Strategies = ALL,
    period: Period = None,
    warmup: Warmup = None,
    outer_lr: OuterLr = None,
    outer_momentum: OuterMomentum = None,
    wire: WireName = None,
    gradient_wire: GradientWire = None,
    share: Annotated[
        float, of_output("Share of time spent computing that the proposed strategy must reach.")
    ] = 0.95,
    plot: Annotated[
        Path | None,
        of_output("File (png, pdf, svg) for a plot of the share of time computing over bandwidth."),
    ] = None,
    as_json: Annotated[bool, of_output("Print JSON instead of a table.", "--json")] = False,
) -> None:
    """Predict time, bytes and memory of training on a given network.

    Rounds, bytes and memory are those of `postlocal train` with the same
    options; seconds come from the cost model in docs/plan.md.
    """
    check_plot(plot)
    steps = _steps(steps, tokens_a_step, token_budget)
    check_size("steps", steps, MOST_STEPS)
    base: dict[str, Any] = {
        "workers": workers,
        "node_size": node_size,
        "steps": steps,
        "lr": lr,
        "model": model,
    }
    seen = _measure(make_config(**base)) if measured else None
    if seen is not None:
        base["workers"] = seen.workers
    given = {
        "period": period, "warmup": warmup, "outer_lr": outer_lr, "outer_momentum": outer_momentum,
        "wire": wire, "gradient_wire": gradient_wire,
    }  # fmt: skip
    configs = configure(strategy, base, given)
    job = Job(
        _parameters(parameters, seen),
        normal(step_seconds, step_deviation) if seen is None else quantiles(seen.step_seconds),
        steps,
        configs[0].lr_at,
        parse_dtype(dtype),
        optimizer_bytes,
        overlap,
    )
    links = _links(bandwidth, latency) if seen is None else seen.links
    if int(os.environ.get("RANK", "0")):
        return  # all ranks measure, one prints
    try:
        cluster = Cluster(base["workers"], links, nodes(node_size))
        _Answer(configs, job, cluster, share).give(as_json, plot)
    except LinksError as error:
        raise ValueError(
            f"bandwidth {error.problem}; all levels are written as in node=100Gbit,world=1Gbit"
        ) from None


@dataclass
class _Answer:
    """The output of the command.

    Attributes:
        configs: settings of the trainer, for each strategy.
        job: the job.
        cluster: the cluster.
        share: share of time computing that the proposed strategy has to reach.
    """

    configs: Sequence[TrainConfig]
    job: Job
    cluster: Cluster
    share: float

    def give(self, as_json: bool, plot: Path | None) -> None:
        chosen = {config.label: config.make_strategy() for config in self.configs}
        plans = [plan_strategy(each, self.job, self.cluster) for each in chosen.values()]
        found = best(self.job, self.cluster, self.share)
        if plot is not None:
            draw(chosen, self.job, self.cluster, plot)
        if as_json:
            typer.echo(json.dumps(self._values(plans, found), indent=1))
            return
        console = Console()
        for line in self._assumed():
            console.print(line, highlight=False, soft_wrap=True, markup=False)
        print_table(console, _table(dict(zip(chosen, plans, strict=True))))
        console.print(self._sentence(found), highlight=False, soft_wrap=True)
        console.print(_LOSS, highlight=False, soft_wrap=True)
        if plot is not None:
            console.print(f"Drawn in {plot}.", markup=False, highlight=False, soft_wrap=True)

    def _assumed(self) -> Iterator[str]:
        """All assumptions, given or default."""
        workers, node_size = self.cluster.workers, self.configs[0].node_size
        links = "; ".join(
            f"{level} {human_rate(link.bandwidth)}, {link.latency * 1000:g} ms one way"
            for level, link in self.cluster.links
        )
        yield f"Assumed: {workers:,} workers, {node_size:,} a node; {links};"
        yield (
            f"{self.job.numel:,} parameters in {_name_of(self.job.dtype)} with "
            f"{self.job.optimizer_bytes:g} bytes of optimizer state each;"
        )
        step = self.job.step_time
        yield (
            f"{self.job.steps:,} steps of {step.mean:.3g} s computing, {step.slowest(workers):.3g} "
            f"s on the slowest of {workers:,};"
        )
        yield (
            f"gradients can overlap {self.job.gradient_overlap:.0%} of a step; peak learning rate "
            f"{self.configs[0].lr:g}; and"
        )
        for config in self.configs:
            yield f"  {config.call}"

    def _values(self, plans: Sequence[Plan], found: tuple[Strategy, Plan] | None) -> dict[str, Any]:
        step = self.job.step_time
        links = {
            level: {"bandwidth": link.bandwidth, "latency": link.latency}
            for level, link in self.cluster.links
        }
        return {
            "workers": self.cluster.workers,
            "links": links,
            "parameters": self.job.numel,
            "steps": self.job.steps,
            "step_seconds": step.mean,
            "step_seconds_of_the_slowest": step.slowest(self.cluster.workers),
            "node_size": self.configs[0].node_size,
            "dtype": _name_of(self.job.dtype),
            "optimizer_bytes": self.job.optimizer_bytes,
            "overlap": self.job.gradient_overlap,
            "lr": self.configs[0].lr,
            "strategies": {each.label: str(each.call) for each in self.configs},
            "plans": [each.to_dict() for each in plans],
            "share": self.share,
            "best": found and {"options": _flags(found[0])} | found[1].to_dict(),
        }

    def _sentence(self, found: tuple[Strategy, Plan] | None) -> str:
        if found is None:
            return f"No strategy that was tried computes {self.share:.0%} of the time."
        strategy, planned = found
        return (
            f"The smallest change that computes {self.share:.0%} of the time: {_flags(strategy)}\n"
            f"({planned.share_computing:.1%}, {human_bytes(planned.payload_bytes_a_day)} a day)"
        )


def _name_of(dtype: torch.dtype) -> str:
    return next(name for name, each in DTYPES.items() if each == dtype)


def _flags(strategy: Strategy) -> str:
    """Options of `postlocal train` for a strategy; its default wire is bf16."""
    name = "gradient_wire" if strategy.name == "ddp" else "wire"
    exact = "" if getattr(strategy, name).lossy else f" --{name.replace('_', '-')} fp32"
    return f"--strategy {shlex.quote(str(strategy))}{exact}"


def _table(plans: Mapping[str, Plan]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("strategy", overflow="fold")
    for heading in ("computes", "a step", "sent/step", "sent/day", "hours", "memory", "syncs"):
        table.add_column(heading, justify="right", no_wrap=True)
    for label, each in plans.items():
        table.add_row(
            escape(label),
            f"{each.share_computing:.1%}",
            f"{each.seconds_a_step:.3g} s",
            human_bytes(each.payload_bytes_a_step),
            human_bytes(each.payload_bytes_a_day),
            f"{each.hours:,.1f}",
            human_bytes(each.memory.total),
            str(each.syncs),
        )
    return table


def _steps(steps: int | None, tokens_a_step: str | None, token_budget: str | None) -> int:
    if (tokens_a_step is None) != (token_budget is None):
        raise ValueError("tokens-a-step and token-budget must be given together, got one of them")
    if tokens_a_step is None or token_budget is None:
        return 10_000 if steps is None else steps
    if steps is not None:
        raise ValueError(
            "steps must not be given together with token-budget, which determines them"
        )
    a_step = parse_count(tokens_a_step, "tokens-a-step")
    if not a_step:
        raise ValueError(f"tokens-a-step must be at least 1, got {tokens_a_step!r}")
    return math.ceil(parse_count(token_budget, "token-budget") / a_step)


def _parameters(text: str | None, seen: Measured | None) -> int:
    if text is not None or seen is None:
        return parse_count("1e9" if text is None else text, "parameters")
    return seen.parameters


def _links(bandwidth: str, latency: str | None) -> dict[str, Link]:
    latencies = by_level(latency, parse_latency) if latency is not None else {}
    bandwidths = by_level(bandwidth, parse_bandwidth)
    for level in latencies:
        if level not in bandwidths:
            raise ValueError(f"bandwidth must be given for each level with a latency: {level!r}")
    return {level: Link(bits, latencies.get(level, 0.0)) for level, bits in bandwidths.items()}


def _measure(config: TrainConfig) -> Measured:
    if not launched():
        raise ValueError(
            "measure needs the workers of a launcher, got none: "
            "torchrun --nproc-per-node 2 -m postlocal plan --measure"
        )
    return measure(config)
