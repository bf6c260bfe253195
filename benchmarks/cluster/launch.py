"""``torchrun`` on every host of a cluster, and its exit codes."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from benchmarks.cluster.hosts import Host

_PORT = 29400


def torchrun(
    hosts: Sequence[Host],
    command: Sequence[str],
    ranks_a_host: int = 1,
    outputs: Sequence[IO[str] | None] | None = None,
) -> list[subprocess.Popen[str]]:
    """Start ``torchrun`` on every host; they meet at host 0, whose ranks are the first.

    Args:
        hosts: where.
        command: what each rank runs; ``python`` is this one.
        ranks_a_host: number of ranks on each.
        outputs: a file for each host's output.
    """
    return [
        host.run(
            sys.executable, "-m", "torch.distributed.run",
            "--nnodes", str(len(hosts)), "--nproc-per-node", str(ranks_a_host),
            "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts[0].address}:{_PORT}",
            "--rdzv-conf", f"is_host={int(host is hosts[0])}",
            # All hosts have the machine's name, so that they can be told apart by address only.
            "--local-addr", host.address,
            "--no-python", *command,
            environment=rank_environment(), output=output,
        )
        for host, output in zip(hosts, outputs or [None] * len(hosts), strict=True)
    ]  # fmt: skip


def rank_environment() -> dict[str, str]:
    """Variables of what runs on hosts."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    # Nobody resolves names there, and each connection says so.
    quiet = {"TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")}
    return {"OMP_NUM_THREADS": "1", **os.environ, **quiet, "PATH": path}


def wait(processes: Sequence[subprocess.Popen[str]], grace: float) -> list[int | None]:
    """Exit codes of all, or None for those that go on ``grace`` seconds after one has failed."""
    deadline = None
    while any(process.poll() is None for process in processes):
        if deadline is None and any(process.returncode for process in processes):
            deadline = time.monotonic() + grace
        if deadline is not None and time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return [process.returncode for process in processes]


def run(
    hosts: Sequence[Host], command: Sequence[str], ranks_a_host: int, grace: float
) -> list[int | None]:
    """Exit codes of ``torchrun`` on every host, as `follow` gives them."""
    return follow(hosts, lambda outputs: torchrun(hosts, command, ranks_a_host, outputs), grace)


def follow(
    hosts: Sequence[Host],
    start: Callable[[list[IO[str] | None]], list[subprocess.Popen[str]]],
    grace: float,
) -> list[int | None]:
    """Exit codes of a process on every host, as `wait` gives them.

    What host 0 says is shown at once, and the last that others said if they fail.

    Args:
        hosts: where.
        start: starts them, given a file for each one's output.
        grace: seconds for others after one has failed.
    """
    with ExitStack() as files:
        others = [files.enter_context(tempfile.TemporaryFile("w+")) for _ in hosts[1:]]
        codes = wait(start([None, *others]), grace)
        for host, code, output in zip(hosts[1:], codes[1:], others, strict=True):
            if code != 0:
                output.seek(0)
                end = "went on" if code is None else f"ended with {code}"
                print(f"host {host.index} {end}:", "".join(output.readlines()[-20:]), sep="\n")
    return codes
