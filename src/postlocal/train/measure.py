"""Measurements for the planner, in the world that a launcher prepared."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from postlocal.comm import group
from postlocal.comm.group import Group
from postlocal.comm.groups import LevelGroups
from postlocal.planning import Link, measure_links
from postlocal.train.config import TrainConfig
from postlocal.train.model import SIZES, VOCABULARY, Transformer
from postlocal.train.run import cross_entropy, make_optimizer
from postlocal.train.world import joined

_FIRST = 2  # steps that allocate memory and are not counted


@dataclass(frozen=True)
class Measured:
    """The measurements, the same on all ranks.

    Attributes:
        workers: number of ranks.
        links: level -> link.
        step_seconds: times of some steps of all ranks.
        parameters: number of parameters of the model.
    """

    workers: int
    links: Mapping[str, Link]
    step_seconds: tuple[float, ...]
    parameters: int


def measure(config: TrainConfig, steps: int = 10) -> Measured:
    """Measure links, and steps of the trainer's model, in the launcher's world.

    Args:
        config: settings of the model, its batches and the nodes.
        steps: number of timed steps on each rank.

    Raises:
        PeerError: if a rank is lost.
    """
    with joined(config.timeout) as device:
        return measure_in(group.resolve(None, None), device, config, steps)


def measure_in(
    everyone: Group, device: torch.device, config: TrainConfig, steps: int = 10
) -> Measured:
    """The same among the ranks of a group; collective."""
    groups = LevelGroups(everyone, config.make_topology())
    links = measure_links(groups, device)
    model = Transformer(SIZES[config.model]).to(device)
    seconds = everyone.all_gather_object(_step_seconds(model, device, config, steps))
    return Measured(
        workers=everyone.size,
        links=links,
        step_seconds=tuple(each for theirs in seconds for each in theirs),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def _step_seconds(
    model: Transformer, device: torch.device, config: TrainConfig, steps: int
) -> list[float]:
    optimizer = make_optimizer(model, config)
    shape = (config.batch_size, config.sequence_length + 1)
    text = torch.randint(VOCABULARY, shape, device=device)
    seconds = []
    for _ in range(_FIRST + steps):
        start = time.perf_counter()
        loss = cross_entropy(model, text[:, :-1], text[:, 1:])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        float(loss.detach())  # wait for the accelerator
        seconds.append(time.perf_counter() - start)
    return seconds[_FIRST:]
