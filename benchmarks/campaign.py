"""Many training runs on a few cores, each kept on disk once it is done."""

import hashlib
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from threading import Lock

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

import postlocal
from benchmarks.training import Worker, held_out_loss
from postlocal import Strategy, strategies, virtual
from postlocal.group import Group
from postlocal.train import TrainConfig
from postlocal.train.run import open_data
from postlocal.wire import fp32

Tick = Callable[[], None]
"""Called once a step."""

Run = tuple[str, int]
"""Name of a setting, and seed."""


@dataclass(frozen=True)
class Result:
    """What one run came to.

    Attributes:
        key: all that decides the result; see `key_of`.
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
    return f"{settings} {strategy.fingerprint}"


def train(config: TrainConfig, strategy: Strategy, tick: Tick) -> Result:
    """One run, with all workers in this process, and the loss at its end."""
    start = time.perf_counter()
    trained = train_control if strategy == strategies.ddp() else train_replicas
    model, payload_bytes = trained(config, strategy, tick)
    seconds = time.perf_counter() - start
    windows, _ = open_data(config, 0, config.workers)
    return Result(
        key=key_of(config, strategy),
        source=_source(),
        loss=held_out_loss(model, windows, config.eval_sequences),
        payload_bytes=payload_bytes,
        ddp_bytes=_ddp_bytes(config, model),
        tokens=config.steps * config.workers * config.batch_size * config.sequence_length,
        seconds=seconds,
    )


def train_control(config: TrainConfig, strategy: Strategy, tick: Tick) -> tuple[nn.Module, int]:
    """What DDP computes: one model on the batches of all workers. Bytes are those DDP sends."""
    worker = Worker(config, shares=range(config.workers))
    for step in range(config.steps):
        worker.step(step)
        tick()
    return worker.model, _ddp_bytes(config, worker.model)


def train_replicas(config: TrainConfig, strategy: Strategy, tick: Tick) -> tuple[nn.Module, int]:
    """Workers as threads under a strategy; rank 0's model after all agreed, and its bytes."""
    # All are made in one thread: threads share torch's generator.
    workers = [Worker(config, shares=[rank]) for rank in range(config.workers)]

    # One at a time: threads that take turns at every operation lose most of a core to waiting.
    turn = Lock()

    def work(group: Group) -> int:
        worker = workers[group.rank]
        sync = postlocal.attach(worker.model, worker.optimizer, strategy, process_group=group)
        for step in range(config.steps):
            with turn:
                worker.step(step)
            sync.step()
            if group.rank == 0:
                tick()
        sync.finish()
        sync.close()
        return sync.meter.total_bytes

    sent = virtual.run(config.workers, work, timeout=600.0)
    return workers[0].model, sent[0]


def _ddp_bytes(config: TrainConfig, model: nn.Module) -> int:
    numel = sum(parameter.numel() for parameter in model.parameters())
    return config.steps * fp32().payload_bytes(numel, config.workers)


def _source() -> str:
    digest = hashlib.blake2b(digest_size=8)
    folder = Path(postlocal.__file__).parent
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"{file.relative_to(folder)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Cache:
    """Results on disk, one JSON object a line; of several with one key the last one counts.

    Args:
        path: the file.
    """

    path: Path

    def read(self) -> dict[str, Result]:
        """Results by key."""
        if not self.path.exists():
            return {}
        rows = [Result(**json.loads(line)) for line in self.path.read_text().splitlines()]
        return {row.key: row for row in rows}

    def add(self, result: Result) -> None:
        """Append a result."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(result)) + "\n")


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
    def runs(self) -> list[Run]:
        """Every setting with the first seed, then with the next."""
        return [(name, seed) for seed in self.seeds for name in self.settings]

    def config_of(self, run: Run) -> TrainConfig:
        """The configuration with the run's seed."""
        return self.config.model_copy(update={"seed": run[1]})

    def key(self, run: Run) -> str:
        """The run's key in the cache."""
        return key_of(self.config_of(run), self.settings[run[0]])

    def train(self, cache: Cache, jobs: int, resume: bool) -> dict[Run, Result]:
        """Train all, or with ``resume`` what the cache does not hold, ``jobs`` runs at a time."""
        known = cache.read() if resume else {}
        missing = [run for run in self.runs if self.key(run) not in known]
        for result in self._in_processes(missing, jobs):
            cache.add(result)
            known[result.key] = result
        return {run: known[self.key(run)] for run in self.runs}

    def _in_processes(self, runs: Sequence[Run], jobs: int) -> Iterator[Result]:
        context = multiprocessing.get_context("spawn")
        counter = context.Value("q", 0)
        pool = ProcessPoolExecutor(jobs, context, _prepare_process, (counter,))
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("steps"), TimeRemainingColumn(),
        )  # fmt: skip
        try:
            with Progress(*columns, speed_estimate_period=300) as progress:
                task = progress.add_task(f"{len(runs)} runs", total=len(runs) * self.config.steps)
                pending: set[Future[Result]] = {
                    pool.submit(_run, self.config_of(run), self.settings[run[0]]) for run in runs
                }
                while pending:
                    done, pending = wait(pending, timeout=0.5, return_when="FIRST_COMPLETED")
                    progress.update(task, completed=counter.value)
                    yield from (future.result() for future in done)
        finally:
            pool.shutdown(cancel_futures=True)


_steps_taken: "Synchronized[int]"
"""Of all processes of a pool; each is given it when it starts."""


def _prepare_process(counter: "Synchronized[int]") -> None:
    global _steps_taken
    _steps_taken = counter
    torch.set_num_threads(1)


def _count_step() -> None:
    with _steps_taken.get_lock():
        _steps_taken.value += 1


def _run(config: TrainConfig, strategy: Strategy) -> Result:
    return train(config, strategy, _count_step)
