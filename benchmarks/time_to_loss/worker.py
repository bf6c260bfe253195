"""One rank of a launch: trains with one method after the other, and writes a report of each.

Started on every host by `benchmarks.time_to_loss`.
"""

import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer

from benchmarks.cluster.hosts import DEVICE
from benchmarks.cluster.network import traffic
from benchmarks.measure import rotated
from benchmarks.time_to_loss.methods import Method, named
from benchmarks.training import held_out_loss
from postlocal.sync.supported_wrappers import unwrap
from postlocal.train import TrainConfig
from postlocal.train.data import open_data


@dataclass
class Report:
    """Time, bytes and losses of one rank.

    Attributes:
        method: its name.
        round: number of the round of timed steps; 0 for a whole run.
        seconds: of training and communication, evaluation left out.
        steps: in that time.
        bytes_up: sent through the interface in that time, frames included.
        losses: steps taken, seconds so far, and this rank's part of the held-out loss.
    """

    method: str
    round: int
    seconds: float
    steps: int
    bytes_up: int
    losses: list[tuple[int, float, float]] = field(default_factory=list)


class Clock:
    """Seconds while the clock runs, and bytes sent in them."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.bytes_up = 0
        self.start()

    def start(self) -> None:
        """Start, or go on after a stop."""
        self._traffic, self._time = traffic(DEVICE), time.perf_counter()

    def stop(self) -> None:
        """Stop, and add what has passed since the start."""
        self.seconds += time.perf_counter() - self._time
        self.bytes_up += (traffic(DEVICE) - self._traffic).up


def stretch_of(method: Method) -> int:
    """Steps of a method that are timed: whole periods, a quarter if it communicates in each."""
    least = method.stretch // 4 if method.period == 1 else method.stretch
    return method.period * -(-least // method.period)


def time_stretch(name: str, index: int, config: TrainConfig, rank: int) -> Report:
    """Time some steps, after those that a method needs until its costs repeat."""
    method = named(name)
    training = method.make(config, rank)
    first, steps = method.settling, stretch_of(method)
    for step in range(first):
        training.step(step)
    clock = Clock()
    for step in range(first, first + steps):
        training.step(step)
    clock.stop()
    training.close()
    return Report(name, index, clock.seconds, steps, clock.bytes_up)


def run_whole(name: str, config: TrainConfig, rank: int, evaluations: int) -> Report:
    """Train to the end, and evaluate on the way when replicas agree."""
    method = named(name)
    config = config.model_copy(update={"steps": round(config.steps * method.length)})
    training = method.make(config, rank)
    windows, _ = open_data(config, rank, config.workers)

    def evaluate() -> float:
        with training.agreed():
            model = unwrap(training.worker.model)
            return held_out_loss(model, windows, config.eval_sequences, rank, config.workers)

    losses: list[tuple[int, float, float]] = []
    interval = config.steps / evaluations
    due = interval
    clock = Clock()
    for step in range(config.steps):
        training.step(step)
        steps = step + 1
        if steps == config.steps:
            training.finish()
        if (steps >= due and training.agrees(steps)) or steps == config.steps:
            clock.stop()
            losses.append((steps, clock.seconds, evaluate()))
            due += interval
            clock.start()
    clock.stop()
    training.close()
    return Report(name, 0, clock.seconds, config.steps, clock.bytes_up, losses)


def main(
    names: Annotated[str, typer.Option(help="names of methods, as a JSON list")],
    config: Annotated[str, typer.Option(help="TrainConfig, as JSON")],
    out: Annotated[Path, typer.Option(help="folder of the reports")],
    rounds: Annotated[int, typer.Option(help="rounds of timed steps; 0: whole runs")] = 0,
    evaluations: Annotated[int, typer.Option(help="evaluations of a whole run")] = 20,
) -> None:
    """Train with each method in turn."""
    torch.set_num_threads(1)
    apart = "REPLICA_GROUP_ID" in os.environ
    dist.init_process_group("gloo")
    rank = int(os.environ["REPLICA_GROUP_ID"]) if apart else dist.get_rank()
    settings = TrainConfig.model_validate_json(config)
    chosen = json.loads(names)
    with (out / f"{rank}.jsonl").open("w") as file:
        if rounds:
            reports = (
                time_stretch(name, index, settings, rank)
                for index in range(rounds)
                for name in rotated(chosen, index)
            )
        else:
            reports = (run_whole(name, settings, rank, evaluations) for name in chosen)
        for report in reports:
            file.write(json.dumps(asdict(report)) + "\n")
            file.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
