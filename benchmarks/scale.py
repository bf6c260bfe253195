"""Where each strategy stops scaling: simulated fleets of up to 10,000 replicas.

    python -m benchmarks.scale

Nothing is trained; `postlocal.planning.simulate` follows each fleet by the model in
``docs/scale.md``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from benchmarks.options import Record
from benchmarks.report import markdown_table, write_record
from postlocal import Strategy, strategies, wire
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

Results = Sequence[tuple[str, Simulated]]

HOUR, DAY = 3600.0, 86_400.0
# 419 unexpected interruptions in 54 days of 16,384 GPUs (Llama 3, arXiv 2407.21783, Section 3.3.4).
GPU_APART = 16_384 * 54 * DAY / 419


def chosen(steps: int, narrowed: Callable[[wire.Wire], wire.Wire]) -> Mapping[str, Strategy]:
    """The strategies, with wires for a fleet; a warm-up takes three tenths of the steps."""
    bf16 = narrowed(wire.bf16())
    streaming = strategies.streaming_diloco(period=100, fragments=4, delay=5)
    return {
        "ddp": strategies.ddp(),
        "post_local_sgd": replace(strategies.post_local_sgd(3 * steps // 10), wire=bf16),
        "local_sgd": replace(strategies.local_sgd(16), wire=bf16),
        "diloco, 100 steps": replace(strategies.diloco(100), wire=bf16),
        "diloco, 500 steps": replace(strategies.diloco(500), wire=bf16),
        "streaming, 100 steps": replace(streaming, wire=narrowed(streaming.wire)),
        "sparse_loco": strategies.sparse_loco(),
    }


@dataclass(frozen=True)
class Case:
    """A kind of fleet.

    Attributes:
        about: one line.
        fleet: its number of replicas does not count.
        job: what is trained.
        replicas: how many, each in turn.
    """

    about: str
    fleet: Fleet
    job: Job
    replicas: Sequence[int]

    @property
    def strategies(self) -> Mapping[str, Strategy]:
        """Those that are compared; hosts of several replicas send once a host."""
        several = self.fleet.node_size > 1
        return chosen(self.job.steps, wire.two_level if several else lambda bare: bare)


def hosts(uplink: Link) -> Fleet:
    """Hosts of 8 replicas."""
    failures = Failures(GPU_APART / 8, away=HOUR, restart=300.0, saving=20.0)
    speeds = exponential_tail(1.0, 0.01)
    return Fleet(8, uplink, speeds, failures, node_size=8, node_link=Link(3.2e12))


def homes(*links: tuple[float, Link]) -> Fleet:
    """Machines on their own, that come and go."""
    failures = Failures(3 * DAY, away=2 * HOUR, restart=300.0, saving=20.0)
    return Fleet(1, links, exponential_tail(1.0, 0.1), failures)


QUICK = Job(10**9, normal(1.0, 0.02), steps=20_000)
SLOW = Job(10**9, normal(10.0, 0.5), steps=2000)
BY_EIGHT = (8, 64, 512, 4096, 10_000)
BY_TEN = (1, 10, 100, 1000, 10_000)
HOMES_LINKS = ((0.1, Link(10e6, 0.03)), (0.6, Link(100e6, 0.03)), (0.3, Link(1e9, 0.03)))

CASES: Mapping[str, Case] = {
    "cluster": Case(
        "hosts of 8, with 100 Gbit/s and 10 us between them; 1 s a step",
        hosts(Link(100e9, 1e-5)),
        QUICK,
        BY_EIGHT,
    ),
    "regions": Case(
        "the same hosts, with 1 Gbit/s and 30 ms between them",
        hosts(Link(1e9, 0.03)),
        QUICK,
        BY_EIGHT,
    ),
    "homes": Case(
        "a tenth has 10 Mbit/s, six 100 Mbit/s, three 1 Gbit/s, all 30 ms; 10 s a step",
        homes(*HOMES_LINKS),
        SLOW,
        BY_TEN,
    ),
    "homes of 1 Gbit/s": Case(
        "those of the fastest class alone", homes((1.0, Link(1e9, 0.03))), SLOW, BY_TEN
    ),
}


def run(case: Case, seed: int) -> Results:
    """Simulate a case, with a bar."""
    results = sweep(case.strategies, case.job, case.fleet, case.replicas, seed)
    total = len(case.strategies) * len(case.replicas)
    return list(track(results, case.about, total=total, console=Console(stderr=True)))


def by_label(results: Results) -> Mapping[str, Sequence[Simulated]]:
    """The results of each strategy."""
    labels = dict.fromkeys(label for label, _ in results)
    return {each: [done for label, done in results if label == each] for each in labels}


def scaling(case: Case, results: Results) -> str:
    """Efficiencies, and up to how many replicas it is at least a half."""
    counts = [f"{count:,}" for count in case.replicas]
    rows = []
    for label, row in by_label(results).items():
        half = max((done.replicas for done in row if done.efficiency >= 0.5), default=0)
        shares = [f"{done.efficiency:.1%}" for done in row]
        rows.append([label, *shares, f"{half:,}" if half else "none"])
    return markdown_table(["strategy", *counts, "half up to"], rows)


def causes(results: Results) -> str:
    """What time goes into, of the largest fleet."""
    names = [field.name for field in fields(Spent)]
    rows = []
    for label, row in by_label(results).items():
        largest = row[-1]
        shares = [f"{share:.1%}" for share in largest.shares.values()]
        rows.append([label, *shares, f"{largest.failures:,}"])
    return markdown_table(["strategy", *names, "failures"], rows)


def section(name: str, case: Case, results: Results) -> str:
    """A case as text."""
    largest = f"What time goes into, of {case.replicas[-1]:,} replicas:"
    parts = [f"## {name[0].upper()}{name[1:]}", f"{case.about[0].upper()}{case.about[1:]}."]
    return "\n\n".join([*parts, scaling(case, results), largest, causes(results)]) + "\n"


def content(results: Mapping[str, Results]) -> dict[str, Any]:
    """All figures as plain values."""
    plain = {
        name: [
            {
                "strategy": label,
                "replicas": done.replicas,
                "efficiency": done.efficiency,
                "finished": done.finished,
                "failures": done.failures,
                "shares": done.to_dict()["shares"],
                "planned": done.planned.share_computing,
            }
            for label, done in pairs
        ]
        for name, pairs in results.items()
    }
    return {"cases": {name: str(CASES[name]) for name in results}, "results": plain}


def main(
    cases: Annotated[list[str] | None, typer.Option(help="kind of fleet; repeatable")] = None,
    seed: Annotated[int, typer.Option(help="seed of speeds, steps and failures")] = 0,
    plot: Annotated[Path | None, typer.Option(help="PNG file to draw into")] = None,
    record: Record = True,
) -> None:
    """Simulate fleets, and tell where each strategy stops scaling."""
    wanted = {name: CASES[name] for name in cases or CASES}
    results = {name: run(case, seed) for name, case in wanted.items()}
    text = "\n".join(section(name, case, results[name]) for name, case in wanted.items())
    console = Console()
    console.print(text, markup=False, soft_wrap=True)
    draw = partial(draw_sweep, results)
    if plot is not None:
        draw(plot)
    if record:
        write_record("scale", "Where each strategy stops scaling", content(results), text, draw)


if __name__ == "__main__":
    typer.run(main)
