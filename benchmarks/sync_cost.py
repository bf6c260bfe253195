"""What one synchronization costs, as a multiple of one raw all-reduce of as many elements.

    python -m benchmarks.sync_cost

Each case has ranks of its own, and a copy in memory and the raw all-reduce beside it, round by
round; figures are medians over rounds of ratios within a round.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from torch import nn

import postlocal
from benchmarks.measure import (
    as_text,
    bytes_of,
    extra_memory,
    ratios,
    run_ranks,
    slowest,
)
from benchmarks.options import Record, Worlds
from benchmarks.peers import PEERS, Case, installed
from benchmarks.report import markdown_table, write_record
from benchmarks.shapes import fifty_million, small, ten_million
from postlocal import Strategy, strategies, wire

SIZES = {"10 M": ten_million, "50 M": fifty_million}

OURS: dict[str, Strategy] = {
    "local SGD, postlocal": strategies.local_sgd(period=1),
    "DiLoCo, postlocal": strategies.diloco(period=1),
    "DiLoCo bf16, postlocal": replace(strategies.diloco(period=1), wire=wire.bf16()),
    "DiLoCo int8 + feedback, postlocal": replace(
        strategies.diloco(period=1), wire=wire.named("int8")
    ),
    "DiLoCo int4 + feedback, postlocal": replace(
        strategies.diloco(period=1), wire=wire.named("int4")
    ),
    "streaming fp32, postlocal": replace(
        strategies.streaming_diloco(period=8, fragments=4, delay=1), wire=wire.fp32()
    ),
    "streaming fp4, postlocal": strategies.streaming_diloco(period=8, fragments=4, delay=1),
}
"""A strategy whose round has several steps is timed over one round, on the main thread alone."""

GOALS = {"local SGD, postlocal": 1.15, "DiLoCo, postlocal": 1.6}
MEMORY_GOAL = 64  # MiB beyond the outer optimizer's state


def attached(module: nn.Module, strategy: Strategy) -> Case:
    """One round of a strategy on a module that nobody trains."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    sync = postlocal.attach(module, optimizer, strategy)
    return Case(sync.step, sync.round.steps, sync.state_dict)


def make(name: str, module: nn.Module) -> Case:
    """The case of a name in `OURS` or in `PEERS`."""
    return attached(module, OURS[name]) if name in OURS else PEERS[name][1](module)


def measure(rank: int, name: str, size: str, rounds: int, warmup: int = 3) -> dict[str, Any]:
    """Times, bytes and memory of one case."""
    torch.manual_seed(0)
    first = make(name, small())  # connects, and loads and compiles what is needed at first use
    for _ in range(first.calls):
        first.call()
    module = SIZES[size]()
    flat = torch.randn(sum(parameter.numel() for parameter in module.parameters()))
    drift = drifting(module, rank)
    case = make(name, module)
    drift()
    state = case.state_bytes()
    memory = extra_memory(lambda: [case.call() for _ in range(case.calls)])
    memory -= case.state_bytes() - state
    seconds: dict[str, list[float]] = {"raw": [], "copy": [], "case": []}
    other = torch.empty_like(flat)
    for index in range(warmup + rounds):
        drift()
        flat.div_(dist.get_world_size())  # else the sums of sums overflow
        copy = _time(lambda: other.copy_(flat), calls=1, pause=0.0)
        raw = _time(lambda: dist.all_reduce(flat), calls=1, pause=0.0)
        own = _time(case.call, case.calls, pause=raw)
        if index >= warmup:
            seconds["raw"].append(raw)
            seconds["copy"].append(copy)
            seconds["case"].append(own)
    beyond = [own - raw for own, raw in zip(seconds["case"], seconds["raw"], strict=True)]
    return {
        "time_over_raw": ratios(seconds, "case", "raw"),
        "copies_beyond_raw": ratios({"beyond": beyond, **seconds}, "beyond", "copy"),
        "raw_over_copy": ratios(seconds, "raw", "copy"),
        "bytes": bytes_of(case.call, times=case.calls) * case.calls,
        "extra_memory": memory,
        "seconds": seconds,
    }


def _time(call: Callable[[], object], calls: int, pause: float) -> float:
    """Seconds in ``calls`` calls, with a pause between them as training would make."""
    dist.barrier()
    seconds = 0.0
    for index in range(calls):
        if index:
            time.sleep(pause)
        start = time.perf_counter()
        call()
        seconds += time.perf_counter() - start
    return slowest(seconds)


def drifting(module: nn.Module, rank: int) -> Callable[[], None]:
    """A function that moves parameters as training would, ranks apart from each other."""

    @torch.no_grad()
    def drift() -> None:
        for parameter in module.parameters():
            parameter.mul_(1 + 1e-4 * (rank + 1))

    return drift


def _rows(world: int, size: str, rounds: int, console: Console) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for name in [*OURS, *PEERS]:
        if name in PEERS and not installed(name):
            rows[name] = None
            continue
        with console.status(f"{size} parameters, {world} ranks: {name}"):
            rows[name] = run_ranks(world, measure, name, size, rounds)
    return rows


def _table(world: int, size: str, rows: dict[str, Any]) -> str:
    about = (
        "Median and quartiles of ratios within a round. Copies are of all parameters, within "
        f"memory; the raw all-reduce takes as long as {_all_reduce_in_copies(rows):.1f} of them. "
        "Memory is the peak of the first synchronization, without outer state "
        f"(goal: at most {MEMORY_GOAL} MiB)."
    )
    header = [
        "synchronization", "time / raw all-reduce", "goal", "copies beyond it", "MB a rank",
        "MiB more",
    ]  # fmt: skip
    figures = markdown_table(header, [_cells(name, row) for name, row in rows.items()])
    return "\n\n".join([f"## {size} parameters, {world} ranks", about, figures]) + "\n"


def _cells(name: str, row: dict[str, Any] | None) -> list[str]:
    if row is None:
        return [name, "not installed", "", "", "", ""]
    return [
        name,
        as_text(row["time_over_raw"]),
        f"{GOALS[name]:.2f}" if name in GOALS else "",
        f"{row['copies_beyond_raw']['median']:.1f}",
        f"{row['bytes'] / 1e6:.0f}",
        f"{row['extra_memory'] / 2**20:.0f}",
    ]


def _all_reduce_in_copies(rows: dict[str, Any]) -> float:
    return float(statistics.median(row["raw_over_copy"]["median"] for row in rows.values() if row))


def main(
    world: Worlds = None,
    size: Annotated[
        list[str] | None, typer.Option(help="number of parameters, 10 M or 50 M; repeatable")
    ] = None,
    rounds: Annotated[int, typer.Option(min=4, help="rounds of each case")] = 40,
    record: Record = True,
) -> None:
    """Measure synchronizations of ours and of other packages against a raw all-reduce."""
    console = Console()
    content: dict[str, Any] = {}
    texts = []
    for ranks in world or [2, 4]:
        for parameters in size or list(SIZES):
            rows = _rows(ranks, parameters, rounds, console)
            content[f"{parameters} parameters, {ranks} ranks"] = rows
            texts.append(_table(ranks, parameters, rows))
            console.print(texts[-1], markup=False, soft_wrap=True)
    if record:
        write_record("sync_cost", "Cost of a synchronization", content, "\n".join(texts))


if __name__ == "__main__":
    typer.run(main)
