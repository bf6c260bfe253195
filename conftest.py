"""Fixtures of tests and doctests."""

import time
from collections.abc import Iterator

import pytest
import torch.distributed as dist


@pytest.fixture(autouse=True)
def no_process_group_is_left() -> Iterator[None]:
    """The process group of a doctest ends with it, also where it fails.

    Its models are gone by then: one that outlives its group ends gloo's thread while it holds the
    interpreter's lock, which that thread may still wait for to drop a hook's callback.
    """
    yield
    if dist.is_initialized():
        time.sleep(0.05)  # for that thread
        dist.destroy_process_group()
