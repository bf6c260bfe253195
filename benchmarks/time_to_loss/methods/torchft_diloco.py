"""torchft's ``DiLoCo``, in one piece or streaming, set up as `torchft_manager` says.

The outer optimizer is SGD with Nesterov momentum, as in ``examples/diloco``, but with the learning
rate and momentum that ours are given: with 0.7 and 0.9, which are there, the loss falls more slowly
at short periods. The example hands over the module itself; 0.2.0 takes a list of fragments. As in
``local_sgd_integ_test``, each fragment has an outer optimizer of its own. Nothing is quantized:
that needs Triton, and is left out without a word where it is missing.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim import SGD

from benchmarks.time_to_loss.methods.method import Training
from benchmarks.time_to_loss.methods.torchft_manager import managed
from benchmarks.training import Worker
from postlocal.train import TrainConfig
from postlocal.train.model import Transformer

if TYPE_CHECKING:
    from torchft.local_sgd import DiLoCo


def diloco(
    period: int, outer_lr: float, outer_momentum: float, fragments: int = 1, delay: int = 0
) -> Callable[[TrainConfig, int], Training]:
    """A maker of training with an outer optimizer.

    Args:
        period: steps between two synchronizations of a parameter.
        outer_lr: learning rate of the outer optimizer.
        outer_momentum: its momentum.
        fragments: number of parts that are synchronized on their own, one after the other.
        delay: steps from sending a fragment to waiting for it.
    """

    def make(config: TrainConfig, rank: int) -> Training:
        from torchft.local_sgd import DiLoCo

        worker = Worker(config, [rank])
        parts = _split(worker.model, fragments)
        blocks = ExitStack()
        manager = blocks.enter_context(managed(worker.model, rank))
        outer = DiLoCo(
            manager,
            parts,
            worker.optimizer,
            [
                SGD(part.parameters(), lr=outer_lr, momentum=outer_momentum, nesterov=True)
                for part in parts
            ],
            sync_every=period,
            fragment_sync_delay=delay,
        )
        blocks.enter_context(outer)
        return Training(
            worker,
            agreed=lambda: _anchors(outer, worker.model),
            agrees=lambda steps: fragments > 1 or steps % period == 0,
            close=blocks.close,
        )

    return make


def _split(model: nn.Module, count: int) -> Sequence[nn.Module]:
    """Parts of a model, of about as many layers each."""
    if count == 1:
        return [model]
    assert isinstance(model, Transformer)
    layers = [model.embedding, *model.blocks, model.norm, model.head]
    bounds = [len(layers) * part // count for part in range(count + 1)]
    return [nn.ModuleList(layers[a:b]) for a, b in pairwise(bounds)]


@contextmanager
def _anchors(outer: "DiLoCo", model: nn.Module) -> Iterator[None]:
    """Have a model hold what the replicas agreed on last, in the ``with`` block."""
    local = [parameter.detach().clone() for parameter in model.parameters()]
    outer._restore_parameters()
    yield
    with torch.no_grad():
        for parameter, kept in zip(model.parameters(), local, strict=True):
            parameter.copy_(kept)
