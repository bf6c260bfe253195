"""Strategies of postlocal, by the one line that a user adds."""

from collections.abc import Callable

import postlocal
from benchmarks.time_to_loss.methods.method import Training
from benchmarks.training import Worker
from postlocal import Strategy
from postlocal.train import TrainConfig


def ours(strategy: Strategy) -> Callable[[TrainConfig, int], Training]:
    """A maker of training under a strategy."""

    def make(config: TrainConfig, rank: int) -> Training:
        worker = Worker(config, [rank], distributed=True)
        sync = postlocal.attach(worker.model, worker.optimizer, strategy)
        return Training(
            worker,
            after=sync.step,
            agreed=sync.agreed_parameters,
            agrees=lambda steps: strategy.streams or sync.agreed,
            finish=sync.finish,
            close=sync.close,
        )

    return make
