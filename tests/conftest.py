"""Fixtures of the whole suite."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.launcher import run_ranks


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def ranks() -> Callable[..., list[Any]]:
    """``ranks(world, function, *args)``: what ``function(rank, *args)`` returns on each rank."""
    return run_ranks
