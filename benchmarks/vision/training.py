"""Training a classifier of images with many workers, as post-local SGD's paper does.

Workers are threads of this process. Where the strategy averages gradients, they do so here, with
the arithmetic of DDP: `postlocal` leaves gradients to torch's DDP, which needs processes.
"""

import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from benchmarks.convergence.campaign import ddp_bytes, run_threads, source, train_locally
from benchmarks.convergence.pool import Tick
from benchmarks.vision.images import FOLDER, Images, Share, load
from benchmarks.vision.resnet import ResNet
from postlocal import Strategy
from postlocal.comm.group import Group
from postlocal.schedule import every_step, post_local

_PART = 1000  # images scored at a time


@dataclass(frozen=True)
class Score:
    """The result of one run.

    Attributes:
        key: all that decides the result.
        source: digest of the package's source that it was run with.
        accuracy: top-1 on the test images, in percent.
        train_accuracy: the same on the training images, as they are.
        loss: on the test images, in nats an image.
        payload_bytes: sent by a worker.
        ddp_bytes: what plain fp32 DDP sends in as many steps.
        seconds: of training.
    """

    key: str
    source: str
    accuracy: float
    train_accuracy: float
    loss: float
    payload_bytes: int
    ddp_bytes: int
    seconds: float


@dataclass(frozen=True)
class Classifying:
    """A run, before it is trained.

    Args:
        strategy: of the workers.
        workers: number of them.
        lr: of the optimizer when it is greatest.
        epochs: how often each image is used.
        batch_size: images a step for each worker.
        train_images: how many of the training images are used.
        channels: of the model's first stage.
        seed: of initial parameters, order and augmentation.
        folder: where the images are.
    """

    strategy: Strategy
    workers: int
    lr: float
    epochs: int = 24
    batch_size: int = 64
    train_images: int = 12_000
    channels: int = 16
    seed: int = 0
    folder: Path = FOLDER

    @property
    def key(self) -> str:
        known = [f"{f.name}={getattr(self, f.name)}" for f in fields(self)[1:-1]]
        return " ".join([*known, str(self.strategy)])

    @property
    def steps_an_epoch(self) -> int:
        """Whole batches of all workers."""
        return self.train_images // (self.workers * self.batch_size)

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_an_epoch

    @property
    def first_drop(self) -> int:
        """The first step with a lower learning rate: half of the run."""
        return self.steps // 2

    def lr_at(self, step: int) -> float:
        """Up from one worker's share of it in the first epoch; a tenth after 1/2, and 3/4."""
        warmup = self.steps_an_epoch
        if step < warmup:
            start = self.lr / self.workers
            return start + (self.lr - start) * step / warmup
        drops = (step >= self.first_drop) + (step >= self.steps * 3 // 4)
        return float(self.lr * 0.1**drops)

    def train(self, tick: Tick) -> Score:
        start = time.perf_counter()
        model, payload_bytes = train(self, tick)
        seconds = time.perf_counter() - start
        accuracy, loss = judge(model, load(self.folder, "t10k"))
        used = load(self.folder, "train").first(self.train_images)
        return Score(
            key=self.key,
            source=source(),
            accuracy=accuracy,
            train_accuracy=judge(model, used)[0],
            loss=loss,
            payload_bytes=payload_bytes,
            ddp_bytes=ddp_bytes(model, self.workers, self.steps),
            seconds=seconds,
        )


class Worker:
    """A model, its optimizer, and its share of the images.

    Args:
        task: model, batch, learning rates and seed.
        rank: which share.
    """

    def __init__(self, task: Classifying, rank: int) -> None:
        torch.manual_seed(task.seed)
        self._task = task
        self.model = ResNet(task.channels).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = make_optimizer(self.model)
        images = load(task.folder, "train").first(task.train_images)
        self._share = Share(images, rank, task.workers, task.batch_size, task.seed)

    def backward(self, step: int) -> None:
        """Gradients of the mean loss over its part of the batch of a step."""
        images, labels = self._share.batch(step)
        functional.cross_entropy(self.model(images), labels).backward()  # type: ignore[no-untyped-call]

    def update(self, step: int) -> None:
        """A step of the optimizer."""
        for group in self.optimizer.param_groups:
            group["lr"] = self._task.lr_at(step)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self, step: int) -> None:
        """Both, with gradients of its own."""
        self.backward(step)
        self.update(step)


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum 0.9, and weight decay of what is not a bias or a norm."""
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups: list[dict[str, Any]] = [{"params": weights, "weight_decay": 1e-4}, {"params": others}]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, foreach=True)


def train(task: Classifying, tick: Tick) -> tuple[ResNet, int]:
    """Rank 0's model after all agreed, and the bytes a worker sent.

    BatchNorm takes the statistics of each worker's own batch. Those that it keeps for tests are
    rank 0's while gradients are averaged, as DDP broadcasts them, and means over workers after.
    """
    # All are made in one thread: threads share torch's generator.
    workers = [Worker(task, rank) for rank in range(task.workers)]
    synchronous, strategy = split_schedule(task)
    local = range(synchronous, task.steps)

    def work(group: Group, turn: Lock, tick: Tick) -> int:
        worker = workers[group.rank]
        train_synchronously(worker, range(synchronous), group, turn, tick)
        sent = ddp_bytes(worker.model, task.workers, synchronous)
        return sent + (train_locally(worker, local, strategy, group, turn, tick) if local else 0)

    # The limit holds on a busy machine, too.
    return workers[0].model, run_threads(task.workers, work, tick, timeout=3600.0)


def train_synchronously(worker: Worker, steps: range, group: Group, turn: Lock, tick: Tick) -> None:
    """Steps in each of which gradients are averaged."""
    for step in steps:
        with turn:
            worker.backward(step)
        average_gradients(worker.model, group)
        with turn:
            worker.update(step)
        tick()


def split_schedule(task: Classifying) -> tuple[int, Strategy]:
    """The number of synchronous steps that a run begins with, and the strategy after them."""
    match task.strategy.schedule:
        case every_step():
            return task.steps, task.strategy
        case post_local(warmup, then):
            return min(warmup, task.steps), replace(task.strategy, schedule=then)
        case _:
            return 0, task.strategy


def average_gradients(model: nn.Module, group: Group) -> None:
    """The mean of all workers' gradients, in place of each one's own."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients]) / group.size
    group.all_reduce(flat).wait()
    parts = torch.split(flat, [gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view(gradient.shape))


@torch.no_grad()
def judge(model: nn.Module, images: Images) -> tuple[float, float]:
    """Top-1 accuracy in percent and mean loss in nats, with the statistics that BatchNorm kept."""
    model.eval()
    scores = torch.cat([model(part) for part in torch.split(images.pixels, _PART)])
    model.train()
    right = (scores.argmax(1) == images.labels).double().mean()
    return 100 * float(right), float(functional.cross_entropy(scores, images.labels))
