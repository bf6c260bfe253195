"""Accuracies over seeds beside those of the control."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.convergence.comparison import with_deviation, with_range
from benchmarks.convergence.pool import Run
from benchmarks.report import markdown_table
from benchmarks.vision.settings import CONTROL
from benchmarks.vision.training import Classifying, Score


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
    about = (
        f"Fashion-MNIST, its first {control.train_images} training images and all 10000 test "
        f"images. ResNet-8 with BatchNorm, {control.channels} channels in its first stage. "
        f"{control.epochs} epochs, {control.workers} workers with {control.batch_size} images a "
        f"step each; `small-batch` is one such worker alone. SGD with Nesterov momentum 0.9, "
        f"learning rate {control.lr:g} after one epoch of warm-up ({small_lr:g} and none for "
        f"`small-batch`), a tenth of it from 1/2 and again from 3/4 of the run, {seeds}. "
        "Post-local SGD is synchronous until 1/2; the number is its period. Accuracy is top-1 in "
        "percent on the test images with its standard deviation over seeds; the difference is "
        "from `ddp` of the same seed in points, mean (least..greatest)."
    )
    figures = markdown_table(
        ["setting", "accuracy, %", "difference", "test loss", "on training images, %",
         "MB a worker"],
        [
            [
                name,
                with_deviation(row["accuracies"], 2),
                with_range(row["differences"]),
                with_deviation(row["losses"], 4),
                with_deviation(row["train_accuracies"], 2),
                f"{row['payload_bytes'] / 1e6:.2f}",
            ]
            for name, row in rows.items()
        ],
    )  # fmt: skip
    norms = (
        "BatchNorm takes the statistics of each worker's own batch. Those kept for tests are rank "
        "0's while gradients are averaged, as in DDP, and averaged at each synchronization after."
    )
    return "\n\n".join([about, figures, norms]) + "\n"
