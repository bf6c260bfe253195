"""A rank that fails ends with the exit code of its failure, whatever is still under way.

A thread of torch or of ours that comes back to Python while the interpreter is being taken down
aborts the process ("terminate called without an active exception"), and a process group that is
taken down waits for its collectives. So what is under way is waited for before, for a while.
"""

import atexit
import logging
import os
import sys
import time
from collections.abc import Callable
from threading import RLock

import torch.distributed as dist

_PATIENCE_SECONDS = 5.0  # how long a rank that ends waits for collectives of others
_GRACE_SECONDS = 0.2  # how long a thread takes to let go of what it has completed
_under_way: list[Callable[[], bool]] = []
_changing = RLock()  # threads of torch and of ours watch too
_watched: set[str] = set()


def watch(done: Callable[[], bool]) -> None:
    """Have the end of the process wait until ``done`` gives True."""
    _watched.add("collectives")
    drop_done()
    with _changing:
        _under_way.append(done)


def drop_done() -> None:
    """Let go of what is done, and of the tensors that it holds."""
    with _changing:
        _under_way[:] = [done for done in _under_way if not done()]


def note_failure() -> None:
    """Tell that a collective failed: others may be failing on threads of torch."""
    _watched.add("a failure")


def _wait() -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not all(done() for done in _under_way):
        if time.monotonic() > deadline:
            _leave()
            return
        time.sleep(0.01)
    if _watched or (dist.is_available() and dist.is_initialized()):
        time.sleep(_GRACE_SECONDS)


def _leave() -> None:
    """End at once where the exit code is known: nobody comes to what is under way."""
    error = getattr(sys, "last_value", None)  # set where an error ends the program
    if error is None:
        return
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(130 if isinstance(error, KeyboardInterrupt) else 1)


atexit.register(_wait)
