"""A rank that trains as a method, and says after each step whether replicas should be equal."""

import hashlib
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from benchmarks.time_to_loss.methods import METHODS
from torch import nn

from postlocal.train import make_config

History = list[tuple[bool, str]]
"""After each step, and at the end: whether replicas agree, and a digest of parameters."""


def digest(model: nn.Module) -> str:
    hashed = hashlib.sha256()
    for parameter in model.parameters():
        hashed.update(parameter.detach().numpy().tobytes())
    return hashed.hexdigest()


def train(rank: int, name: str, world: int) -> History:
    method = METHODS[name]
    steps = method.settling + 2 * method.period
    config = make_config(model="tiny", steps=steps, batch_size=1, sequence_length=32, workers=world)
    training = method.make(config, rank)

    def state(agrees: bool) -> tuple[bool, str]:
        with training.agreed() if agrees else nullcontext():
            return agrees, digest(training.worker.model)

    history = []
    for step in range(steps):
        training.step(step)
        history.append(state(training.agrees(step + 1)))
    training.finish()
    history.append(state(True))
    training.close()
    return history


def train_as_launched(rank: int, name: str, world: int) -> History:
    """On a rank that has not what torchrun tells it."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "OMP_NUM_THREADS": 1}
    os.environ.update({key: str(value) for key, value in told.items()})
    return train(rank, name, world)


def main(out: Path, names: list[str]) -> None:
    """On a replica group of one rank, as one method after the other."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = (int(os.environ[key]) for key in ("REPLICA_GROUP_ID", "NUM_REPLICA_GROUPS"))
    histories = {name: train(rank, name, world) for name in names}
    (out / f"{rank}.json").write_text(json.dumps(histories))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
