"""A rank that fails ends with the exit code of its failure, whatever is still under way.

A thread of torch or of ours that comes back to Python while the interpreter is being taken down
aborts the process ("terminate called without an active exception"), and a process group that is
taken down waits for its collectives. So what is under way is waited for before, for a while.

torch's gloo threads come back to Python after a collective is complete: each collective of a
backward pass holds the Python context of that pass, and the thread drops it last. A destroyed group
joins its threads, unless something still holds the group. `torch.distributed.nn.functional` holds
it for good where it is imported after the group was made, as the first DistributedDataParallel
does. It is imported here, so that a program that imports this package first destroys its groups.
"""

import atexit
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import RLock

import torch.distributed as dist

if dist.is_available() and not dist.is_initialized():
    import torch.distributed.nn.functional  # noqa: F401

_PATIENCE_SECONDS = 5.0  # how long a rank that ends waits for collectives of others
_GRACE_SECONDS = 0.2  # how long a thread takes to let go of what it has completed
_TASKS = Path("/proc/self/task")  # threads of this process, where the system shows them
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
    if _watched or (dist.is_available() and dist.is_initialized()) or _has_torch_threads():
        time.sleep(_GRACE_SECONDS)


def _has_torch_threads() -> bool:
    """Whether threads of torch are alive, as those of a destroyed group that a model still holds.

    Where the system does not show threads: whether a launcher started the process.
    """
    if not _TASKS.is_dir():
        return "RANK" in os.environ
    try:
        names = [(task / "comm").read_text() for task in _TASKS.iterdir()]
    except OSError:  # one ended meanwhile
        return True
    return any(name.startswith("pt_") for name in names)


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
