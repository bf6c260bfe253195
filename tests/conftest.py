"""Fixtures of the whole suite."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, settings
from torch._C._distributed_c10d import HashStore

from tests.launcher import run_ranks

# The bits are the same, and nothing waits for a compiler; `test_kernels` compiles.
os.environ["POSTLOCAL_KERNELS"] = "eager"

# How long an example takes says how busy the machine is.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


# Files that take longest, in the order in which they begin: the shorter ones fill up the time of
# the process that ends first.
_LONGEST = ("command", "cluster", "time_to_loss", "simulate", "plan", "attached", "tools", "train")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest."""
    order = {f"test_{name}.py": number for number, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def ranks() -> Callable[..., list[Any]]:
    """``ranks(world, function, *args)``: what ``function(rank, *args)`` returns on each rank."""
    return run_ranks


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process only."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
