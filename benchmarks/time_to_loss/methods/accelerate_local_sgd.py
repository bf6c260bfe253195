"""accelerate's ``LocalSGD``.

Set up as "Using Local SGD with Accelerate" of its documentation (1.15) does it, with
``cpu=True``, since ranks have no GPU. ``accelerator.accumulate`` and ``accelerator.backward`` are
left out: for one batch a step, in full precision, they do nothing but call ``backward``.
"""

from collections.abc import Callable

from benchmarks.time_to_loss.methods.method import Training
from benchmarks.training import Worker
from postlocal.train import TrainConfig


def local_sgd(period: int) -> Callable[[TrainConfig, int], Training]:
    """A maker of training that averages parameters once a period."""

    def make(config: TrainConfig, rank: int) -> Training:
        from accelerate import Accelerator
        from accelerate.local_sgd import LocalSGD

        worker = Worker(config, [rank])
        accelerator = Accelerator(cpu=True)
        worker.model, worker.optimizer = accelerator.prepare(worker.model, worker.optimizer)
        block = LocalSGD(
            accelerator=accelerator, model=worker.model, local_sgd_steps=period, enabled=True
        )
        local = block.__enter__()
        return Training(
            worker,
            after=local.step,
            agrees=lambda steps: steps % period == 0,
            finish=lambda: block.__exit__(None, None, None),
        )

    return make
