"""torchft's ``LocalSGD``, set up as `torchft_manager` says.

Its ``sync`` is called once more at the end where a run has no whole number of rounds, which the
examples leave out: replicas that differ would be evaluated.
"""

from collections.abc import Callable
from contextlib import ExitStack

from benchmarks.time_to_loss.methods.method import Training
from benchmarks.time_to_loss.methods.torchft_manager import managed
from benchmarks.training import Worker
from postlocal.train import TrainConfig


def local_sgd(period: int) -> Callable[[TrainConfig, int], Training]:
    """A maker of training that averages parameters once a period."""

    def make(config: TrainConfig, rank: int) -> Training:
        from torchft.local_sgd import LocalSGD

        worker = Worker(config, [rank])
        blocks = ExitStack()
        manager = blocks.enter_context(managed(worker.model, rank))
        local = LocalSGD(manager, worker.model, worker.optimizer, sync_every=period)
        blocks.enter_context(local)

        def finish() -> None:
            if config.steps % period:
                local.sync()

        return Training(
            worker,
            agrees=lambda steps: steps % period == 0,
            finish=finish,
            close=blocks.close,
        )

    return make
