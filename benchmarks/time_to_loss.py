"""How long until a loss, on a given network: ours, other packages, and the limit.

    python -m benchmarks.time_to_loss --resume

Four hosts of an emulated cluster train one language model. Each contender trains to its end once a
seed with no limit on the network, which gives its losses by step. Then some of its steps are timed
at each rate, in rounds that all take part in, and one that never communicates too. Steps times
seconds a step is its time; such rows are marked as composed. Contenders that ``--whole`` names are
run to the end over the network as well. The target is the last loss of plain DDP's run of the same
seed. Needs root and iproute2.
"""

from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.comparison import choose
from benchmarks.contenders import ALONE, CONTENDERS, DDP
from benchmarks.hosts import bits
from benchmarks.launches import Launch, Results, together
from benchmarks.measure import write_record
from benchmarks.network import missing
from benchmarks.options import Record, Resume, Rounds
from benchmarks.scoreboard import Scores, plot, table
from benchmarks.standings import Pace, paces
from postlocal.train import TrainConfig, make_config

HOSTS = 4
FOLDER = Path("runs/time_to_loss")
RATES = "1gbit,100mbit,25mbit,10mbit"


def contenders_of(patterns: str) -> list[str]:
    """The contenders that match and are installed; DDP and no communication always.

    Raises:
        typer.BadParameter: if a pattern matches nothing.
    """
    chosen = choose(CONTENDERS, patterns, ALONE, DDP, between=" | ")
    return [name for name, contender in chosen.items() if contender.installed]


def measure(
    names: Sequence[str],
    config: TrainConfig,
    rates: Sequence[str],
    rounds: int,
    seeds: Sequence[int],
    whole: Sequence[str],
    results: Results,
) -> Scores:
    """Run what is not known yet."""
    scores = Scores(seeds)
    seeded = {seed: config.model_copy(update={"seed": seed}) for seed in seeds}
    for seed, name in product(seeds, names[1:]):  # the first one trains nothing in common
        (scores.curves[name, seed],) = results.of(Launch((name,), seeded[seed]))
    for rate in rates:
        found: dict[str, Pace] = {}
        for part in together(names):
            found = paces(results.of(Launch(part, config, rate, rounds))) | found
        scores.paces[rate] = {name: found[name] for name in names}
    for seed, name, rate in product(seeds, names, rates):
        if any(fnmatch(f"{name} @ {rate}", pattern) for pattern in whole):
            (scores.wholes[name, seed, rate],) = results.of(Launch((name,), seeded[seed], rate))
    return scores


def about(config: TrainConfig, rounds: int, seeds: Sequence[int]) -> str:
    """The setting in a sentence or two."""
    missing_peers = [name for name, each in CONTENDERS.items() if not each.installed]
    lines = [
        f"Model `{config.model}`, {config.workers} hosts of one rank, {config.batch_size} x "
        f"{config.sequence_length} bytes a rank a step, AdamW, peak learning rate {config.lr:g}; "
        f"DDP takes {config.steps} steps, others what the column `length` of the JSON says times "
        f"that. Seeds {', '.join(map(str, seeds))}; figures are medians (least..greatest): of "
        f"seconds a step over {rounds} rounds, of steps, seconds and losses over seeds. Computing "
        "is the time of a step without communication, of its time. The limit of a contender is the "
        "time that its steps take without communication.",
    ]
    if missing_peers:
        lines.append(f"Not installed: {', '.join(missing_peers)}.")
    return "\n\n".join(lines) + "\n\n"


def as_json(scores: Scores) -> dict[str, Any]:
    """All of it."""
    return {
        "rows": {
            rate: {name: scores.row(name, rate) for name in row}
            for rate, row in scores.paces.items()
        },
        "length": {name: CONTENDERS[name].length for name, _ in scores.curves},
        "curves": {f"{name}, seed {seed}": r.losses for (name, seed), r in scores.curves.items()},
        "wholes": {
            f"{name}, seed {seed}, {rate}": asdict(report)
            for (name, seed, rate), report in scores.wholes.items()
        },
    }


def main(
    contenders: Annotated[str, typer.Option(help="Names or patterns, with | between.")] = "*",
    rates: Annotated[str, typer.Option(help="Of each host's link, with commas.")] = RATES,
    steps: Annotated[int, typer.Option(help="Steps of DDP's run.")] = 500,
    batch_size: Annotated[int, typer.Option(help="Sequences a step for each rank.")] = 4,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 4e-3,
    rounds: Rounds = 3,
    seeds: Annotated[int, typer.Option(min=1, help="Whole runs of each.")] = 1,
    whole: Annotated[
        str, typer.Option(help="Also to be run to the end at a rate: 'NAME @ RATE', | between.")
    ] = "streaming* @ 25mbit|streaming* @ 10mbit",
    resume: Resume = False,
    record: Record = True,
) -> None:
    """Find how long each contender takes to the loss that plain DDP comes to."""
    console = Console()
    if reason := missing():
        console.print(f"Skipped: {reason}")
        return
    asked = [rate.strip() for rate in rates.split(",")]
    for rate in asked:
        try:
            bits(rate)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    config = make_config(model="tiny", steps=steps, batch_size=batch_size, lr=lr, workers=HOSTS)
    results = Results(FOLDER / "results.jsonl", resume, console)
    scores = measure(
        contenders_of(contenders), config, asked, rounds, range(seeds), whole.split("|"), results
    )
    text = about(config, rounds, range(seeds)) + table(scores)
    console.print(text, markup=False, soft_wrap=True)
    draw = partial(plot, scores)
    draw(FOLDER / "time_to_loss.png")
    if record:
        path = write_record("time_to_loss", "Time to a loss", as_json(scores), text, draw)
        console.print(f"Record: {path}")


if __name__ == "__main__":
    typer.run(main)
