"""DistributedDataParallel with torch's hooks that compress gradients.

Set up as "DDP Communication Hooks" of torch's documentation (2.13) does it. ``bf16_compress_hook``,
the quantization hooks and ``batched_powerSGD_hook`` are not here: they fail on gloo.

Of ``powerSGD_hook`` it says: start with a matrix rank of 1, and compress after a tenth of all
steps, at the least after two. Here it is the 10 of its examples, so that stretches that are timed
come after it. All gradients are one bucket, which is ours: with several, the hook starts
collectives from callbacks, in an order that differs from rank to rank, and gloo ends the process.
"""

from collections.abc import Callable
from math import ceil

from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from benchmarks.time_to_loss.methods.method import Training
from benchmarks.training import Worker
from postlocal.train import TrainConfig

POWER_SGD_START = 10
"""Steps before ``powerSGD_hook`` compresses."""


def fp16(config: TrainConfig, rank: int) -> Training:
    """Gradients travel as halves."""
    worker = Worker(config, [rank])
    model = DistributedDataParallel(worker.model)
    model.register_comm_hook(None, fp16_compress_hook)
    worker.model = model
    return Training(worker)


def power_sgd(matrix_rank: int) -> Callable[[TrainConfig, int], Training]:
    """A maker of training with gradients that travel as matrices of a rank."""

    def make(config: TrainConfig, rank: int) -> Training:
        worker = Worker(config, [rank])
        megabytes = sum(parameter.nbytes for parameter in worker.model.parameters()) / 2**20
        model = DistributedDataParallel(worker.model, bucket_cap_mb=ceil(megabytes))
        state = PowerSGDState(
            process_group=None,
            matrix_approximation_rank=matrix_rank,
            start_powerSGD_iter=POWER_SGD_START,
        )
        model.register_comm_hook(state, powerSGD_hook)
        worker.model = model
        return Training(worker)

    return make
