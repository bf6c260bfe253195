"""The ranks of a training run: joining them, and starting them where nobody did."""

import logging
import os
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store
from torch.distributed import distributed_c10d
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def launched() -> bool:
    """Whether a launcher such as torchrun started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def restarted() -> bool:
    """Whether torchrun started the workers anew after one of them failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def launch(workers: int, arguments: Sequence[str]) -> int:
    """Start workers on this machine with torchrun's elastic agent, and wait for them.

    Args:
        workers: number of processes.
        arguments: of the ``postlocal`` command that each runs.

    Returns:
        The exit code: that of the first worker that failed, 128 and the signal's number after a
        signal, else 0.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    # The agent reports a worker's failure with a traceback of its own; workers say it in a line.
    for name in ("agent.server.api", "multiprocessing.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=workers,
        run_id=uuid.uuid4().hex,
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
    """Join the process group that the launcher prepared, if any; gives this rank's device.

    Args:
        timeout: seconds that a collective waits for a missing rank.
    """
    device = _device()
    if not launched():
        yield device
        return
    dist.init_process_group(
        dist.get_default_backend_for_device(device), timeout=timedelta(seconds=timeout)
    )
    try:
        yield device
    finally:
        dist.destroy_process_group()


def store() -> Store | None:
    """A connection of its own to the store that ranks met at; None for a rank alone."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    connection: Store = distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
    return connection


def _device() -> torch.device:
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count()
    torch.accelerator.set_device_index(index)
    return torch.device(torch.accelerator.current_accelerator().type, index)  # type: ignore[union-attr]
