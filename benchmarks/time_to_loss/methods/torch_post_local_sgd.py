"""torch's post-local SGD: a hook for gradients and an optimizer that averages parameters.

Set up as the example in the docstring of ``torch.distributed.optim.PostLocalSGDOptimizer`` (torch
2.13) does it, with two things of ours:

- ``subgroup`` is given, as on CPU the hook cannot make one: a rank by itself, since each host has
  one, which is what the default would come to. Gradients then stay on the host.
- Parameters are averaged once more at the end, with the same utility. torch leaves that out, and
  replicas that differ would be evaluated.

There is no warm-up, the default of ``PeriodicModelAverager`` and the shortest there is: of all
settings the one that communicates least. It averages after steps 1, 9, 17, ... for a period of 8.
"""

from collections.abc import Callable

import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import (
    PostLocalSGDState,
    post_localSGD_hook,
)
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.algorithms.model_averaging.utils import average_parameters
from torch.nn.parallel import DistributedDataParallel

from benchmarks.time_to_loss.methods.method import Training
from benchmarks.training import Worker
from postlocal.train import TrainConfig

WARMUP = 0


def post_local_sgd(period: int) -> Callable[[TrainConfig, int], Training]:
    """A maker of training that averages parameters once a period."""

    def make(config: TrainConfig, rank: int) -> Training:
        from torch.distributed.optim import PostLocalSGDOptimizer  # warns when it is imported

        worker = Worker(config, [rank])
        model = DistributedDataParallel(worker.model)
        subgroup, _ = dist.new_subgroups(group_size=1)  # type: ignore[no-untyped-call]
        state = PostLocalSGDState(  # type: ignore[no-untyped-call]
            process_group=None, subgroup=subgroup, start_localSGD_iter=WARMUP
        )
        model.register_comm_hook(state, post_localSGD_hook)
        averager = PeriodicModelAverager(period=period, warmup_steps=WARMUP)
        worker.model = model
        worker.optimizer = PostLocalSGDOptimizer(optim=worker.optimizer, averager=averager)
        return Training(
            worker,
            agrees=lambda steps: steps <= WARMUP or (steps - WARMUP) % period == 1,
            finish=lambda: average_parameters(iter(model.parameters()), averager.process_group),
            close=lambda: dist.destroy_process_group(subgroup),
        )

    return make
