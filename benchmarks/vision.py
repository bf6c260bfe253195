"""Test accuracy at equal epochs: post-local SGD against DDP with large batches, over several seeds.

    python -m benchmarks.vision --resume

The question of Lin et al. 2018 (arXiv 1808.07217), on Fashion-MNIST with a small residual network:
does post-local SGD generalise at least as well as DDP with as many workers? Results are kept, run
by run, under ``runs/vision``.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks import images
from benchmarks.classifying import Classifying, Score
from benchmarks.comparison import choose, plot, said
from benchmarks.measure import write_record
from benchmarks.options import FirstSeed, Jobs, Record, Resume, Seeds
from benchmarks.pool import Cache, Run, train_all
from postlocal import strategies

RESULTS = Path("runs/vision")
CONTROL = "ddp"
SMALL_LR, LARGE_LR = 0.05, 0.2
"""The best learning rates of one worker alone (of 0.05 and 0.1) and of DDP (0.1 to 0.8)."""


def settings(control: Classifying, small_lr: float) -> dict[str, Classifying]:
    """What is compared, by name: runs that use the same images equally often."""
    drop = control.first_drop
    kinds = {
        "post-local-16": strategies.post_local_sgd(drop, 16, gradients="rank"),
        "post-local-8": strategies.post_local_sgd(drop, 8, gradients="rank"),
        "local-16": strategies.local_sgd(16),
    }
    return {
        "small-batch": replace(control, workers=1, lr=small_lr),
        CONTROL: control,
        **{name: replace(control, strategy=strategy) for name, strategy in kinds.items()},
    }


def summarize(results: Mapping[Run, Score], seeds: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Over seeds: accuracies, differences in points from the control of the same seed, bytes."""
    rows = {}
    for name in dict.fromkeys(name for name, _ in results):
        own = [results[name, seed] for seed in seeds]
        control = [results[CONTROL, seed] for seed in seeds]
        rows[name] = {
            "accuracies": [score.accuracy for score in own],
            "differences": [a.accuracy - b.accuracy for a, b in zip(own, control, strict=True)],
            "losses": [score.loss for score in own],
            "train_accuracies": [score.train_accuracy for score in own],
            "payload_bytes": own[0].payload_bytes,
            "seconds": [score.seconds for score in own],
            "keys": [score.key for score in own],
            "source": sorted({score.source for score in own}),
        }
    return rows


def table(
    control: Classifying, small_lr: float, rows: Mapping[str, Mapping[str, Any]], seeds: str
) -> str:
    """The summary in Markdown."""
    lines = [
        f"Fashion-MNIST, its first {control.train_images} training images and all 10000 test "
        f"images. ResNet-8 with BatchNorm, {control.channels} channels in its first stage. "
        f"{control.epochs} epochs, {control.workers} workers with {control.batch_size} images a "
        f"step each; `small-batch` is one such worker alone. SGD with Nesterov momentum 0.9, "
        f"learning rate {control.lr:g} after one epoch of warm-up ({small_lr:g} and none for "
        f"`small-batch`), a tenth of it from 1/2 and again from 3/4 of the run, {seeds}. "
        "Post-local SGD is synchronous until 1/2; the number is its period. Accuracy is top-1 in "
        "percent on the test images with its standard deviation over seeds; the difference is "
        "from `ddp` of the same seed in points, mean (least..greatest).",
        "",
        "| setting | accuracy, % | difference | test loss | on training images, % | MB a worker |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        off = row["differences"]
        lines.append(
            f"| {name} | {_spread(row['accuracies'], 2)} | {statistics.mean(off):+.2f} "
            f"({min(off):+.2f}..{max(off):+.2f}) | {_spread(row['losses'], 4)} "
            f"| {_spread(row['train_accuracies'], 2)} | {row['payload_bytes'] / 1e6:.2f} |"
        )
    lines += [
        "",
        "BatchNorm takes the statistics of each worker's own batch. Those kept for tests are rank "
        "0's while gradients are averaged, as in DDP, and averaged at each synchronization after.",
    ]
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def main(
    workers: Annotated[int, typer.Option(min=2, help="Number of workers.")] = 8,
    epochs: Annotated[int, typer.Option(min=4, help="Epochs a run.")] = 24,
    batch_size: Annotated[int, typer.Option(min=2, help="Images a step, each worker.")] = 64,
    train_images: Annotated[int, typer.Option(help="Training images, 60000 at most.")] = 12_000,
    channels: Annotated[int, typer.Option(help="Of the model's first stage.")] = 16,
    lr: Annotated[float, typer.Option(help="Learning rate of all workers.")] = LARGE_LR,
    small_lr: Annotated[float, typer.Option(help="Learning rate of one alone.")] = SMALL_LR,
    chosen: Annotated[str, typer.Option("--settings", help="Names, or patterns.")] = "*",
    seeds: Seeds = 3,
    first_seed: FirstSeed = 0,
    data: Annotated[Path, typer.Option(help="Folder of the images.")] = images.FOLDER,
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
    text = table(control, small_lr, rows, said(every))
    console.print(text, markup=False, soft_wrap=True)
    draw = partial(
        plot,
        {name: row["differences"] for name, row in rows.items()},
        "test accuracy above DDP's, points (Fashion-MNIST, equal epochs)",
    )
    draw(RESULTS / "fashion.png")
    if record:
        path = write_record("vision", "Accuracy at equal epochs", {"settings": rows}, text, draw)
        console.print(f"Record: {path}")


if __name__ == "__main__":
    typer.run(main)
