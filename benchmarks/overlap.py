"""Waiting for a slow link, and bytes counted against bytes sent.

    python -m benchmarks.overlap

Ranks are processes in a network namespace of their own, whose loopback interface they share at
one limited rate: all bytes of all ranks go through it one after the other. The rate is chosen such
that blocking DiLoCo waits about 30 % of its time. Needs root and iproute2.
"""

import operator
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
import typer
from rich.console import Console

import postlocal
from benchmarks.cluster.network import missing, own_loopback
from benchmarks.measure import loopback_traffic, run_ranks, slowest
from benchmarks.options import Record, Worlds
from benchmarks.report import markdown_table, write_record
from benchmarks.training import Worker
from postlocal import Strategy, codec, strategies, wire
from postlocal.train import TrainConfig, make_config
from postlocal.train.model import SIZES, Transformer
from postlocal.wire import fp32

PERIOD = 30
SHARE = 0.3  # of its time that blocking DiLoCo shall wait
GOAL = 0.03  # for strategies that overlap
FRAME = 66  # bytes of Ethernet, IP and TCP headers a packet


@dataclass(frozen=True)
class Case:
    """A strategy and how long to run it.

    Attributes:
        strategy: what is measured.
        steps: number of steps.
        overlaps: whether the goal for waiting applies.
        finish: whether to end with a synchronization of all, and count its bytes.
    """

    strategy: Strategy
    steps: int = 2 * PERIOD
    overlaps: bool = False
    finish: bool = True


def _streaming(delay: int, recipe: wire.Wire) -> Case:
    strategy = strategies.streaming_diloco(PERIOD, fragments=4, delay=delay)
    return Case(replace(strategy, wire=recipe), overlaps=True)


def _every_step(recipe: wire.Wire) -> Case:
    return Case(replace(strategies.diloco(period=1), wire=recipe), steps=4)


WAITING: dict[str, Case] = {
    "DDP": Case(strategies.ddp(), steps=3),
    "DiLoCo, blocking": Case(strategies.diloco(PERIOD)),
    "streaming fp32, delay 5": _streaming(5, wire.fp32()),
    "streaming fp4, delay 1": _streaming(1, wire.quantised(codec.fp4())),
    "streaming fp4, delay 5": _streaming(5, wire.quantised(codec.fp4())),
}
"""Over the slow wire."""

RARE = "streaming fp4, period 100"

COUNTED: dict[str, Case] = {
    "DDP": Case(strategies.ddp(), steps=4),
    "local SGD": Case(strategies.local_sgd(period=1), steps=4),
    "DiLoCo": _every_step(wire.fp32()),
    "DiLoCo bf16": _every_step(wire.bf16()),
    "DiLoCo int8": _every_step(wire.quantised(codec.int8())),
    "DiLoCo fp4": _every_step(wire.quantised(codec.fp4())),
    "DiLoCo top-k": _every_step(wire.gathered(codec.top_k())),
    # One step more, so that the last fragment of the one round has landed.
    RARE: Case(strategies.streaming_diloco(100, fragments=4), steps=101, finish=False),
}
"""Over a wire of unlimited rate, for their bytes."""


def compute_time(rank: int, config: TrainConfig, steps: int = 20) -> float:
    """Seconds that a step takes on all ranks at once, with no communication."""
    worker = Worker(config, [rank])
    for step in range(3):
        worker.step(step)
    dist.barrier()
    start = time.perf_counter()
    for step in range(steps):
        worker.step(step)
    return slowest(time.perf_counter() - start) / steps


def measure(rank: int, config: TrainConfig, case: Case) -> dict[str, float]:
    """Time and waiting of a case's steps, and bytes of all."""
    worker = Worker(config, [rank], distributed=True)
    sync = postlocal.attach(worker.model, worker.optimizer, case.strategy)
    dist.barrier()
    traffic = loopback_traffic()
    start = time.perf_counter()
    for step in range(case.steps):
        worker.step(step)
        sync.step()
    seconds, waited = time.perf_counter() - start, sync.meter.wait_seconds
    if case.finish:
        sync.finish()
    dist.barrier()
    sent, packets = map(operator.sub, loopback_traffic(), traffic)
    sync.close()
    seconds, waited = slowest(seconds), slowest(waited)
    counted = sync.meter.total_bytes * config.workers  # each rank sends as many
    return {
        "seconds_a_step": seconds / case.steps,
        "wait_share": waited / seconds,
        "payload_bytes": counted,
        "interface_bytes": sent,
        "packets": packets,
        "interface_over_payload": (sent - FRAME * packets) / counted,
    }


def choose_rate(config: TrainConfig, seconds_a_step: float) -> float:
    """Bits a second at which a round of blocking DiLoCo waits `SHARE` of its time."""
    numel = sum(p.numel() for p in Transformer(SIZES[config.model]).parameters())
    sent = config.workers * fp32().payload_bytes(numel, config.workers)
    return 8 * sent / (PERIOD * seconds_a_step * SHARE / (1 - SHARE))


def _waiting_table(rate: float, compute: float, rows: Mapping[str, Mapping[str, float]]) -> str:
    about = (
        f"A step computes for {1000 * compute:.0f} ms; the wire that all ranks share carries "
        f"{rate / 1e6:.0f} Mbit/s."
    )
    figures = markdown_table(
        ["strategy", "ms a step", "waiting, %", "goal", "MB a rank a step"],
        [
            [
                name,
                f"{1000 * row['seconds_a_step']:.0f}",
                f"{100 * row['wait_share']:.1f}",
                f"< {100 * GOAL:.0f}" if WAITING[name].overlaps else "",
                f"{row['payload_bytes'] / row['ranks'] / row['steps'] / 1e6:.3f}",
            ]
            for name, row in rows.items()
        ],
    )
    return f"{about}\n\n{figures}\n"


def _bytes_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    about = "Bytes of all ranks, by the meter and by the interface; the ratio is without headers."
    figures = markdown_table(
        ["strategy", "MB, meter", "MB, interface", "interface / meter"],
        [
            [
                name,
                f"{row['payload_bytes'] / 1e6:.2f}",
                f"{row['interface_bytes'] / 1e6:.2f}",
                f"{row['interface_over_payload']:.4f}",
            ]
            for name, row in rows.items()
        ],
    )
    return f"{about}\n\n{figures}\n"


def _savings(rows: Mapping[str, Mapping[str, float]]) -> str:
    """How many times fewer bytes the rarest synchronization sends than DDP in as many steps."""
    steps = COUNTED[RARE].strategy.schedule(0, 1.0).steps
    times = {
        name: steps * rows["DDP"][key] / rows["DDP"]["steps"] / rows[RARE][key]
        for name, key in (("the meter", "payload_bytes"), ("the interface", "interface_bytes"))
    }
    counted = " and ".join(f"{ratio:.0f} times by {name}" for name, ratio in times.items())
    return f"In {steps} steps, {RARE}, sends fewer bytes than DDP: {counted}.\n"


def _run(config: TrainConfig, cases: Mapping[str, Case], console: Console) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for name, case in cases.items():
        with console.status(f"{config.workers} ranks: {name}"):
            row = run_ranks(config.workers, measure, config, case)
        rows[name] = {"ranks": config.workers, "steps": case.steps, **row}
    return rows


def main(
    world: Worlds = None,
    record: Record = True,
) -> None:
    """Measure waiting over a slow wire, and compare bytes counted with bytes sent."""
    console = Console()
    if reason := missing():
        console.print(f"Skipped: {reason}")
        return
    # Nobody resolves names in such a namespace, and each connection says so.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    content: dict[str, Any] = {}
    texts = []
    for ranks in world or [2, 4]:
        config = make_config(model="tiny", workers=ranks, batch_size=4, steps=1000)
        with own_loopback() as limit:
            counted = _run(config, COUNTED, console)
            compute = run_ranks(ranks, compute_time, config)
            rate = choose_rate(config, compute)
            limit(rate)
            waiting = _run(config, WAITING, console)
        content[f"{ranks} ranks"] = {
            "bits_a_second": rate, "compute_seconds": compute, "waiting": waiting,
            "counted": counted,
        }  # fmt: skip
        tables = (
            _waiting_table(rate, compute, waiting),
            _bytes_table(counted | {f"{name}, slow wire": row for name, row in waiting.items()}),
            _savings(counted),
        )
        texts.append("\n".join([f"## {ranks} ranks", "", *tables]))
        console.print(texts[-1], markup=False, soft_wrap=True)
    if record:
        write_record("overlap", "Waiting for a slow wire", content, "\n".join(texts))


if __name__ == "__main__":
    typer.run(main)
