"""Held-out loss at equal tokens: strategies against DDP, over several seeds.

    python -m benchmarks.convergence --settings 'ddp,diloco-*' --resume

Four workers train a small language model on the standard library's sources, as threads of one
process (`postlocal.virtual`). The control is one model that takes the batches of all four at once,
which is what DDP computes. Results are kept, run by run, under ``runs/convergence``.
"""

import re
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.cache import Cache
from benchmarks.convergence.campaign import Campaign, Result
from benchmarks.convergence.comparison import plot
from benchmarks.convergence.settings import CONTROL, SETTINGS
from benchmarks.convergence.table import name_and_title, summarize, table
from benchmarks.options import FirstSeed, Jobs, Record, Resume, Seeds, choose
from benchmarks.report import write_record
from postlocal.train import make_config

FOLDER = Path("runs/convergence")
WORKERS = 4


def _label(value: str) -> str:
    if value and not re.fullmatch(r"[a-z0-9]+( [a-z0-9]+)*", value):
        raise typer.BadParameter(
            f"label is {value!r}: it must be words of a-z and 0-9 with single spaces, such as "
            "'long periods'"
        )
    return value


def main(
    model: Annotated[str, typer.Option(help="size of the model: tiny or small")] = "tiny",
    steps: Annotated[int, typer.Option(help="steps of each run")] = 600,
    batch_size: Annotated[int, typer.Option(help="sequences a step of each worker")] = 1,
    lr: Annotated[float, typer.Option(help="peak learning rate of the inner optimizer")] = 3e-3,
    settings: Annotated[
        str, typer.Option(help="names or patterns of settings, such as 'diloco-*'")
    ] = "*",
    seeds: Seeds = 3,
    first_seed: FirstSeed = 0,
    jobs: Jobs = 2,
    resume: Resume = False,
    record: Record = True,
    label: Annotated[
        str, typer.Option(callback=_label, help="words for the record's title and file name")
    ] = "",
) -> None:
    """Train each setting with several seeds, and compare held-out losses with DDP's."""
    console = Console()
    config = make_config(
        model=model, steps=steps, lr=lr, workers=WORKERS, batch_size=batch_size, eval_sequences=512
    )
    campaign = Campaign(
        config, choose(SETTINGS, settings, CONTROL), range(first_seed, first_seed + seeds)
    )
    results = campaign.train(Cache(FOLDER / "results.jsonl", Result), jobs, resume)
    rows = summarize(campaign, results)
    text = table(campaign, rows)
    console.print(text, markup=False, soft_wrap=True)
    draw = partial(
        plot,
        {name: row["penalties"] for name, row in rows.items()},
        f"held-out loss above DDP's, % ({model}, {steps} steps, equal tokens)",
    )
    drawn = FOLDER / f"{model}-{steps}-steps.png"
    draw(drawn)
    console.print(f"Plot: {drawn}")
    if record:
        write_record(*name_and_title(model, steps, label), {"settings": rows}, text, draw)


if __name__ == "__main__":
    typer.run(main)
