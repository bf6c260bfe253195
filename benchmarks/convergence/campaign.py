"""Runs that train a language model under different strategies, and differ in nothing else."""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Protocol

import torch
from torch import nn

import postlocal
from benchmarks.cache import Cache
from benchmarks.convergence.pool import Run, Tick, train_all
from benchmarks.training import Worker, held_out_loss
from postlocal import Strategy, strategies, virtual
from postlocal.comm.group import Group
from postlocal.train import TrainConfig
from postlocal.train.data import open_data
from postlocal.wire import fp32


@dataclass(frozen=True)
class Result:
    """The result of one run.

    Attributes:
        key: everything that decides the result; see `key_of`.
        source: digest of the package's source that it was run with.
        loss: held out, in nats a byte, of the agreed parameters.
        payload_bytes: sent by a worker, as its meter counts.
        ddp_bytes: what plain fp32 DDP sends in as many steps.
        tokens: of all workers.
        seconds: of training.
    """

    key: str
    source: str
    loss: float
    payload_bytes: int
    ddp_bytes: int
    tokens: int
    seconds: float


def key_of(config: TrainConfig, strategy: Strategy) -> str:
    """A run's name in the cache: its settings and the strategy in full."""
    fields = (
        "model", "workers", "steps", "batch_size", "sequence_length", "lr", "lr_warmup",
        "weight_decay", "clip", "eval_sequences", "seed",
    )  # fmt: skip
    settings = " ".join(f"{name}={getattr(config, name)}" for name in fields)
    return f"{settings} {strategy}"


def train(config: TrainConfig, strategy: Strategy, tick: Tick) -> Result:
    """One run, with all workers in this process, and the loss at its end."""
    start = time.perf_counter()
    trained = train_control if strategy == strategies.ddp() else train_replicas
    model, payload_bytes = trained(config, strategy, tick)
    seconds = time.perf_counter() - start
    windows, _ = open_data(config, 0, config.workers)
    return Result(
        key=key_of(config, strategy),
        source=source(),
        loss=held_out_loss(model, windows, config.eval_sequences),
        payload_bytes=payload_bytes,
        ddp_bytes=ddp_bytes(model, config.workers, config.steps),
        tokens=config.steps * config.workers * config.batch_size * config.sequence_length,
        seconds=seconds,
    )


def train_control(config: TrainConfig, strategy: Strategy, tick: Tick) -> tuple[nn.Module, int]:
    """What DDP computes: one model on the batches of all workers. Bytes are those DDP sends."""
    worker = Worker(config, shares=range(config.workers))
    for step in range(config.steps):
        worker.step(step)
        tick()
    return worker.model, ddp_bytes(worker.model, config.workers, config.steps)


def train_replicas(config: TrainConfig, strategy: Strategy, tick: Tick) -> tuple[nn.Module, int]:
    """Workers as threads under a strategy; rank 0's model after all agreed, and its bytes."""
    # All are made in one thread: threads share torch's generator.
    workers = [Worker(config, shares=[rank]) for rank in range(config.workers)]

    def work(group: Group, turn: Lock, tick: Tick) -> int:
        return train_locally(workers[group.rank], range(config.steps), strategy, group, turn, tick)

    return workers[0].model, run_threads(config.workers, work, tick, timeout=600.0)


def run_threads(
    workers: int, work: Callable[[Group, Lock, Tick], int], tick: Tick, timeout: float
) -> int:
    """Run workers as threads, and return the bytes that rank 0 sent.

    Args:
        workers: number of them.
        work: trains one worker and returns the bytes it sent. It holds the lock while it computes,
            because threads that alternate at every operation lose most of a core to waiting.
        tick: called once a step, by rank 0 alone.
        timeout: seconds that a worker waits for the others.
    """
    turn = Lock()
    sent = virtual.run(
        workers,
        lambda group: work(group, turn, tick if group.rank == 0 else lambda: None),
        timeout=timeout,
    )
    return sent[0]


class Stepping(Protocol):
    """A worker that takes steps by itself.

    Attributes:
        model: what it trains.
        optimizer: with what.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def step(self, step: int) -> None:
        """A step of training, with its own gradients."""
        ...


def train_locally(
    worker: Stepping, steps: range, strategy: Strategy, group: Group, turn: Lock, tick: Tick
) -> int:
    """Steps under a strategy that leaves gradients alone; returns the bytes a worker sent.

    Replicas start from rank 0's parameters and buffers, which `attach` broadcasts.
    """
    sync = postlocal.attach(worker.model, worker.optimizer, strategy, process_group=group)
    for step in steps:
        with turn:
            worker.step(step)
        sync.step()
        tick()
    sync.finish()
    sync.close()
    return sync.meter.total_bytes


def ddp_bytes(model: nn.Module, workers: int, steps: int) -> int:
    """What a worker sends in so many steps of plain fp32 DDP."""
    numel = sum(parameter.numel() for parameter in model.parameters())
    return steps * fp32().payload_bytes(numel, workers)


def source() -> str:
    """Digest of the package's source."""
    digest = hashlib.blake2b(digest_size=8)
    folder = Path(postlocal.__file__).parent
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"{file.relative_to(folder)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Training:
    """A run, before it is trained.

    Args:
        config: of the run.
        strategy: DDP is what the control computes; others are trained as replicas.
    """

    config: TrainConfig
    strategy: Strategy

    @property
    def key(self) -> str:
        return key_of(self.config, self.strategy)

    @property
    def steps(self) -> int:
        return self.config.steps

    def train(self, tick: Tick) -> Result:
        return train(self.config, self.strategy, tick)


@dataclass(frozen=True)
class Campaign:
    """Runs of several settings that differ in nothing else, each with several seeds.

    Args:
        config: of all runs but for the seed.
        settings: strategies by name.
        seeds: of each setting.
    """

    config: TrainConfig
    settings: Mapping[str, Strategy]
    seeds: Sequence[int]

    @property
    def tasks(self) -> dict[Run, Training]:
        """Every setting with the first seed, then with the next."""
        return {
            (name, seed): Training(self.config.model_copy(update={"seed": seed}), strategy)
            for seed in self.seeds
            for name, strategy in self.settings.items()
        }

    def train(self, cache: Cache[Result], jobs: int, resume: bool) -> dict[Run, Result]:
        """Train all, or with ``resume`` what the cache does not hold, ``jobs`` runs at a time."""
        return train_all(self.tasks, cache, jobs, resume)
