"""Fixtures of tests and doctests."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist


@pytest.fixture(autouse=True)
def no_process_group_is_left() -> Iterator[None]:
    """A doctest that fails halfway does not fail those after it."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
