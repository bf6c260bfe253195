"""torch's DistributedDataParallel as it is, and no communication at all."""

from benchmarks.time_to_loss.methods.method import Training
from benchmarks.training import Worker
from postlocal.train import TrainConfig


def alone(config: TrainConfig, rank: int) -> Training:
    """Each trains by itself: the limit of what any of them can compute in a time."""
    return Training(Worker(config, [rank]), agrees=lambda steps: False)


def ddp(config: TrainConfig, rank: int) -> Training:
    """DistributedDataParallel with its own settings."""
    return Training(Worker(config, [rank], distributed=True))
