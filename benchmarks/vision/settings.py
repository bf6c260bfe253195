"""The runs that are compared, by name."""

from dataclasses import replace

from benchmarks.vision.training import Classifying
from postlocal import strategies

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
