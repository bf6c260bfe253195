"""Test accuracy at equal epochs: post-local SGD against DDP with large batches, over several seeds.

    python -m benchmarks.vision --resume

The question of Lin et al. 2018 (arXiv 1808.07217), on Fashion-MNIST with a small residual network:
does post-local SGD generalise at least as well as DDP with as many workers? Results are kept, run
by run, under ``runs/vision``.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.cache import Cache
from benchmarks.convergence.comparison import plot, seeds_in_words
from benchmarks.convergence.pool import train_all
from benchmarks.options import FirstSeed, Jobs, Record, Resume, Seeds, choose
from benchmarks.report import write_record
from benchmarks.vision import images
from benchmarks.vision.settings import CONTROL, LARGE_LR, SMALL_LR, settings
from benchmarks.vision.table import summarize, table
from benchmarks.vision.training import Classifying, Score
from postlocal import strategies

RESULTS = Path("runs/vision")


def main(
    workers: Annotated[int, typer.Option(min=2, help="number of workers")] = 8,
    epochs: Annotated[int, typer.Option(min=4, help="epochs of each run")] = 24,
    batch_size: Annotated[int, typer.Option(min=2, help="images a step of each worker")] = 64,
    train_images: Annotated[int, typer.Option(help="training images, at most 60000")] = 12_000,
    channels: Annotated[int, typer.Option(help="channels of the model's first stage")] = 16,
    lr: Annotated[float, typer.Option(help="learning rate of runs with all workers")] = LARGE_LR,
    small_lr: Annotated[float, typer.Option(help="learning rate of one worker alone")] = SMALL_LR,
    chosen: Annotated[str, typer.Option("--settings", help="names or patterns of settings")] = "*",
    seeds: Seeds = 3,
    first_seed: FirstSeed = 0,
    data: Annotated[Path, typer.Option(help="folder of the images")] = images.FOLDER,
    jobs: Jobs = 2,
    resume: Resume = False,
    record: Record = True,
) -> None:
    """Train each setting with several seeds, and compare accuracies with DDP's."""
    console = Console()
    control = Classifying(
        strategies.ddp(), workers, lr, epochs, batch_size, train_images, channels, folder=data
    )
    compared = choose(settings(control, small_lr), chosen, CONTROL)
    every = range(first_seed, first_seed + seeds)
    tasks = {(name, s): replace(task, seed=s) for s in every for name, task in compared.items()}
    results = train_all(tasks, Cache(RESULTS / "results.jsonl", Score), jobs, resume)
    rows = summarize(results, every)
    text = table(control, small_lr, rows, seeds_in_words(every))
    console.print(text, markup=False, soft_wrap=True)
    draw = partial(
        plot,
        {name: row["differences"] for name, row in rows.items()},
        "test accuracy above DDP's, points (Fashion-MNIST, equal epochs)",
    )
    draw(RESULTS / "fashion.png")
    if record:
        write_record("vision", "Accuracy at equal epochs", {"settings": rows}, text, draw)


if __name__ == "__main__":
    typer.run(main)
