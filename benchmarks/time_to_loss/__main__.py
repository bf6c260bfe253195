"""Seconds to a loss on a given network: ours, other packages, and the limit.

    python -m benchmarks.time_to_loss --resume

Four hosts of an emulated cluster train one language model. Each method trains to its end once a
seed with no limit on the network, which gives its losses by step. Then some of its steps are timed
at each rate, in rounds of all methods, with one that never communicates. Steps times
seconds a step is its time; such rows are marked as composed. Methods that ``--whole`` names are
run to the end over the network as well. The target is the last loss of plain DDP's run of the same
seed. Needs root and iproute2.
"""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.cluster.network import missing
from benchmarks.options import Record, Resume, Rounds, checked_rates, choose
from benchmarks.report import write_record
from benchmarks.time_to_loss.launches import Results, measure
from benchmarks.time_to_loss.methods import ALONE, DDP, METHODS
from benchmarks.time_to_loss.table import about, as_json, plot, table
from postlocal.train import make_config

HOSTS = 4
FOLDER = Path("runs/time_to_loss")
RATES = "1gbit,100mbit,25mbit,10mbit"


def methods_of(patterns: str) -> list[str]:
    """The methods that match and are installed, with DDP and no communication.

    Raises:
        typer.BadParameter: if a pattern matches nothing.
    """
    chosen = choose(METHODS, patterns, ALONE, DDP, between=" | ")
    return [name for name, method in chosen.items() if method.installed]


def main(
    methods: Annotated[
        str, typer.Option(help="names or patterns of methods, separated by |")
    ] = "*",
    rates: Annotated[
        str, typer.Option(callback=checked_rates, help="rates of each host's link, comma-separated")
    ] = RATES,
    steps: Annotated[int, typer.Option(help="steps of DDP's run")] = 500,
    batch_size: Annotated[int, typer.Option(help="sequences a step of each rank")] = 4,
    lr: Annotated[float, typer.Option(help="peak learning rate")] = 4e-3,
    rounds: Rounds = 3,
    seeds: Annotated[int, typer.Option(min=1, help="seeds of whole runs")] = 1,
    whole: Annotated[
        str, typer.Option(help="patterns of 'NAME @ RATE' to run to the end, separated by |")
    ] = "streaming* @ 25mbit|streaming* @ 10mbit",
    resume: Resume = False,
    record: Record = True,
) -> None:
    """Measure how long each method takes to the final loss of plain DDP."""
    console = Console()
    if reason := missing():
        console.print(f"Skipped: {reason}")
        return
    config = make_config(model="tiny", steps=steps, batch_size=batch_size, lr=lr, workers=HOSTS)
    results = Results(FOLDER / "results.jsonl", resume, console)
    measured = measure(
        methods_of(methods),
        config,
        [rate.strip() for rate in rates.split(",")],
        rounds,
        range(seeds),
        whole.split("|"),
        results,
    )
    text = about(config, rounds, range(seeds)) + table(measured)
    console.print(text, markup=False, soft_wrap=True)
    draw = partial(plot, measured)
    draw(FOLDER / "time_to_loss.png")
    if record:
        write_record("time_to_loss", "Time to a loss", as_json(measured), text, draw)


if __name__ == "__main__":
    typer.run(main)
