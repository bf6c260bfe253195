"""Training as `postlocal train` does it, in pieces that benchmarks put together."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from postlocal.train import TrainConfig
from postlocal.train.data import Batch, Windows, open_data
from postlocal.train.model import SIZES, Transformer
from postlocal.train.run import cross_entropy, make_optimizer


class Worker:
    """A model, its optimizer, and the shares of the data that it trains on.

    Args:
        config: model, batch, learning rates and seed.
        shares: numbers of its shares; a batch has a part of each.
        distributed: whether to wrap the model in DistributedDataParallel.
    """

    def __init__(
        self, config: TrainConfig, shares: Sequence[int], distributed: bool = False
    ) -> None:
        torch.manual_seed(config.seed)
        self._config = config
        self.model: nn.Module = Transformer(SIZES[config.model])
        if distributed:
            self.model = DistributedDataParallel(self.model)
        self.optimizer = make_optimizer(self.model, config)
        self._shares = [open_data(config, share, config.workers)[1] for share in shares]

    def step(self, step: int) -> None:
        """Forward, backward, and a step of the optimizer, on the batch of a step."""
        for group in self.optimizer.param_groups:
            group["lr"] = self._config.lr_at(step)
        cross_entropy(self.model, *self._batch(step)).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), self._config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _batch(self, step: int) -> Batch:
        inputs, targets = zip(*(share.batch(step) for share in self._shares), strict=True)
        return torch.cat(inputs), torch.cat(targets)


@torch.no_grad()
def held_out_loss(
    model: nn.Module, windows: Windows, count: int, part: int = 0, parts: int = 1
) -> float:
    """Mean loss in nats a byte over evenly spaced held-out windows, the same for every model.

    Args:
        model: what is asked.
        windows: of the data.
        count: how many, at most.
        part: of ``parts`` into which they are dealt; the mean is over this one.
        parts: number of parts.
    """
    held_out = windows.held_out
    chosen = held_out[np.linspace(0, len(held_out) - 1, min(count, len(held_out))).astype(int)]
    chosen = chosen[part::parts]
    losses: list[Tensor] = []
    for some in np.array_split(chosen, max(1, len(chosen) // 32)):
        inputs, targets = windows.batch(some)
        losses.append(cross_entropy(model, inputs, targets).double() * len(some))
    return float(sum(losses)) / len(chosen)
