"""The ranks of a training run: joining them, and starting them without a launcher."""

import hashlib
import logging
import os
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.rendezvous import rendezvous

from postlocal.comm.agreement import ranks_named
from postlocal.errors import PeerError
from postlocal.torch_versions import PrefixStore, Store, default_store, own_connection

_RUN = "postlocal-"  # prefix of the ids of runs that `launch` starts


def launched() -> bool:
    """Whether a launcher such as torchrun started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def restarted() -> bool:
    """Whether torchrun restarted the workers after one of them failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def announced() -> bool:
    """Whether `launch` started this process: the command has already printed what is run."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "").startswith(_RUN)


def launch(workers: int, arguments: Sequence[str]) -> int:
    """Start workers on this machine with torchrun's elastic agent, and wait for them.

    Args:
        workers: number of processes.
        arguments: arguments of the ``postlocal`` command that each runs.

    Returns:
        The exit code: that of the first worker that failed, 128 and the signal's number after a
        signal, else 0.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    # The agent would print a traceback for a failed worker, whose own message is one line.
    for name in ("agent.server.api", "multiprocessing.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=workers,
        run_id=_RUN + uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(),
    )
    try:
        elastic_launch(config, sys.executable)("-m", "postlocal", *arguments)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code >= 0 else 128 - code
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


@contextmanager
def joined(timeout: float) -> Iterator[torch.device]:
    """Join the process group that the launcher prepared, if any; yields this rank's device.

    Args:
        timeout: seconds that a collective waits for a missing rank.
    """
    device = _device()
    if not launched():
        yield device
        return
    backend = dist.get_default_backend_for_device(device)
    met, rank, world = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))
    dist.init_process_group(
        backend,
        store=PrefixStore(_name_of_start(met, rank, world, timeout), met),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout),
    )
    try:
        yield device
    finally:
        dist.destroy_process_group()


def _name_of_start(met: Store, rank: int, world: int, timeout: float) -> str:
    """A name that all workers of this start agree on, and no earlier start had.

    torchrun's store outlives the workers. After a restart it still has the addresses of dead
    workers, and a worker that reads these cannot connect. Each worker therefore writes a random
    word. Rank 0 publishes the list of words, and each worker acknowledges a list with its own word.
    Rank 0 accepts a list that all have acknowledged, so it has no word of an earlier start.
    """
    word = uuid.uuid4().hex[:12]
    met.set(f"word/{rank}", word)
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if rank == 0 and (words := _read(met, "word", world)):
            met.set("words", ",".join(words))
        published = met.get("words").decode() if met.check(["words"]) else ""
        if word in published.split(","):
            met.set(f"seen/{rank}", published)
            if rank == 0 and set(_read(met, "seen", world)) == {published}:
                met.set(f"start/{published}", "1")
            if met.check([f"start/{published}"]):
                return hashlib.blake2b(published.encode(), digest_size=8).hexdigest()
        time.sleep(0.02)
    missing = [r for r in range(world) if not met.check([f"word/{r}"])]
    raise PeerError(
        f"not all {world} workers started within {timeout:g} s; missing: {ranks_named(missing)}",
        ranks=missing,
    )


def _read(met: Store, what: str, world: int) -> list[str]:
    """The values that ranks wrote; empty until all have."""
    keys = [f"{what}/{rank}" for rank in range(world)]
    return [met.get(key).decode() for key in keys] if met.check(keys) else []


def store() -> Store | None:
    """A separate connection to the store of the ranks; None for a single rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return own_connection(default_store())


def _device() -> torch.device:
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count()
    torch.accelerator.set_device_index(index)
    return torch.device(torch.accelerator.current_accelerator().type, index)  # type: ignore[union-attr]
