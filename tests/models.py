"""Models, data and loops that the distributed tests share."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import postlocal
from postlocal.strategies import Strategy


def mlp(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def convnet(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 4)
    )


Batch = tuple[Tensor, Tensor]


def batches(rank: int, steps: int, shape: tuple[int, ...] = (8,)) -> Iterator[Batch]:
    for step in range(steps):
        generator = torch.Generator().manual_seed(1000 * step + rank)
        x = torch.randn(5, *shape, generator=generator)
        yield x, torch.randint(0, 4, (5,), generator=generator)


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def momentum(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)


def adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": sgd,
    "momentum": momentum,
    "adamw": adamw,
}


def stacked(replicas: list[nn.Module], index: int) -> Tensor:
    """One parameter of all replicas, shape ``(replicas, ...)``."""
    return torch.stack([values(replica)[index] for replica in replicas])


def values(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def train_step(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> None:
    nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()


def train_plain(rank: int, steps: int, make: str) -> list[Tensor]:
    """Plain DDP."""
    model = DistributedDataParallel(mlp())
    optimizer = OPTIMIZERS[make](model)
    for x, y in batches(rank, steps):
        train_step(model, optimizer, x, y)
    return values(model)


def train(
    rank: int,
    strategy: Strategy,
    steps: int,
    make: str = "sgd",
    wrap: bool = True,
    finish: bool = False,
    **options: Any,
) -> list[list[Tensor]]:
    """Under a strategy; the parameters after every step."""
    model = DistributedDataParallel(mlp()) if wrap else mlp()
    optimizer = OPTIMIZERS[make](model)
    sync = postlocal.attach(model, optimizer, strategy, **options)
    history = []
    for x, y in batches(rank, steps):
        train_step(model, optimizer, x, y)
        sync.step()
        history.append(values(model))
    if finish:
        sync.finish()
        history.append(values(model))
    sync.close()
    return history


def listen() -> list[str]:
    """What is logged from here on, as it comes."""
    said: list[str] = []

    class Listen(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logging.getLogger("postlocal").addHandler(Listen())
    return said


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def distance(left: list[Tensor], right: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True))
