"""Many training runs on a few cores, each kept on disk once it is done."""

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from multiprocessing.sharedctypes import Synchronized
from typing import Protocol, TypeVar

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.cache import Cache, Keyed, Outcome

Tick = Callable[[], None]
"""Called once a step."""

Run = tuple[str, int]
"""Name of a setting, and seed."""

Outcome_co = TypeVar("Outcome_co", bound=Keyed, covariant=True)


class Task(Protocol[Outcome_co]):
    """A run, before it is trained; it is sent to another process."""

    @property
    def key(self) -> str:
        """The key of the result."""
        ...

    @property
    def steps(self) -> int:
        """Number of calls of ``tick``."""
        ...

    def train(self, tick: Tick) -> Outcome_co:
        """Train to the end."""
        ...


def train_all(
    tasks: Mapping[Run, Task[Outcome]], cache: Cache[Outcome], jobs: int, resume: bool
) -> dict[Run, Outcome]:
    """Train all, or with ``resume`` what the cache does not hold, ``jobs`` runs at a time."""
    known = cache.read() if resume else {}
    for result in _in_processes([t for t in tasks.values() if t.key not in known], jobs):
        cache.add(result)
        known[result.key] = result
    return {run: known[task.key] for run, task in tasks.items()}


def _in_processes(tasks: Sequence[Task[Outcome]], jobs: int) -> Iterator[Outcome]:
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    pool = ProcessPoolExecutor(jobs, context, _prepare_process, (counter,))
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("steps"), TimeRemainingColumn(),
    )  # fmt: skip
    try:
        with Progress(*columns, speed_estimate_period=300) as progress:
            bar = progress.add_task(f"{len(tasks)} runs", total=sum(task.steps for task in tasks))
            pending: set[Future[Outcome]] = {pool.submit(_train, task) for task in tasks}
            while pending:
                done, pending = wait(pending, timeout=0.5, return_when="FIRST_COMPLETED")
                progress.update(bar, completed=counter.value)
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


def _train(task: Task[Outcome]) -> Outcome:
    return task.train(_count_step)
