"""Hosts that are a replica group of torchft each, and find each other through its lighthouse.

As ``README.md`` and ``examples`` of torchft (0.2.0) start replica groups.
"""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from benchmarks.cluster import Host, follow, rank_environment

_LIGHTHOUSE_PORT = 29510
_STORE_PORT = 29600


def _environment() -> dict[str, str]:
    # It says what it does ten times a second.
    return {"RUST_LOG": "warn", **rank_environment()}


@contextmanager
def lighthouse(host: Host, replicas: int) -> Iterator[str]:
    """Address of a lighthouse that is there in the ``with`` block.

    Args:
        host: where it runs.
        replicas: how many it waits for.
    """
    process = host.run(
        str(Path(sys.executable).parent / "torchft_lighthouse"),
        "--bind", f"[::]:{_LIGHTHOUSE_PORT}", "--min_replicas", str(replicas),
        "--quorum_tick_ms", "100", "--join_timeout_ms", "10000",
        environment=_environment(),
    )  # fmt: skip
    try:
        yield f"http://{host.address}:{_LIGHTHOUSE_PORT}"
    finally:
        process.kill()
        process.wait()


def start_replica_groups(
    hosts: Sequence[Host],
    command: Sequence[str],
    address: str,
    outputs: Sequence[IO[str] | None] | None = None,
) -> list[subprocess.Popen[str]]:
    """Start a ``torchrun`` of one rank on every host, each a replica group.

    Args:
        hosts: where.
        command: what each rank runs; ``python`` is this one.
        address: of the lighthouse.
        outputs: a file for each host's output.
    """
    groups = {"NUM_REPLICA_GROUPS": str(len(hosts)), "TORCHFT_LIGHTHOUSE": address}
    return [
        host.run(
            sys.executable, "-m", "torch.distributed.run",
            "--nnodes", "1", "--nproc-per-node", "1",
            # A group's store is where others find it, so that it listens at the host's address.
            "--master-addr", host.address, "--master-port", str(_STORE_PORT),
            "--no-python", *command,
            environment={**_environment(), **groups, "REPLICA_GROUP_ID": str(index)},
            output=output,
        )
        for index, (host, output) in enumerate(
            zip(hosts, outputs or [None] * len(hosts), strict=True)
        )
    ]  # fmt: skip


def run_replica_groups(
    hosts: Sequence[Host], command: Sequence[str], grace: float
) -> list[int | None]:
    """Exit codes of ``torchrun`` on every host, as `cluster.follow` gives them."""
    with lighthouse(hosts[0], len(hosts)) as address:
        return follow(
            hosts, lambda outputs: start_replica_groups(hosts, command, address, outputs), grace
        )
