"""Runs a function on several gloo ranks, each a process, and kills them all when time is up.

A fork server imports torch once (and torch._dynamo, which DDP imports late, and torch's distributed
optimizers, which warn when they are imported); ranks fork from it, so
that a test costs little more than what it does. No thread and no process group is ever in it.
"""

import multiprocessing
import os
import pickle
import socket
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    ["postlocal", "torch._dynamo", "torch.distributed.optim", "tests.models"]
)

_LINGER_SECONDS = 5.0


class RankError(AssertionError):
    """A rank raised; carries the rank's own traceback."""


def run_ranks(
    world: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 60.0,
    local_world_size: int | None = None,
    expect_dead: tuple[int, ...] = (),
    join: bool = True,
    **keywords: Any,
) -> list[Any]:
    """Call ``function(rank, *args, **keywords)`` on ``world`` ranks and return what they returned.

    Ranks that returned live on for a moment, or until all have. Ranks in ``expect_dead`` may end
    without an answer; they give None. With ``join=False`` they are not made a process group.
    """
    bound = partial(function, **keywords)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store" if join else None
        pipes, processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_rank_main,
                args=(theirs, rank, world, store, local_world_size or world, bound, args),
                daemon=True,
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            return _collect(pipes, time.monotonic() + timeout, expect_dead)
        finally:
            for process in processes:
                process.kill()
                process.join()


def free_port() -> int:
    """A port on loopback that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _collect(pipes: list[Connection], deadline: float, expect_dead: tuple[int, ...]) -> list[Any]:
    results: dict[int, Any] = {}
    errors: dict[int, str] = {}
    open_pipes = dict(enumerate(pipes))
    while open_pipes:
        ready = wait(list(open_pipes.values()), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(f"ranks {sorted(open_pipes)} did not end in time; errors: {errors}")
        for rank, pipe in list(open_pipes.items()):
            if pipe not in ready:
                continue
            del open_pipes[rank]
            try:
                ok, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                ok, value = rank in expect_dead, None if rank in expect_dead else "died"
            if ok:
                results[rank] = value
            else:
                errors[rank] = value
    if errors:
        raise RankError("\n".join(f"rank {rank}: {text}" for rank, text in sorted(errors.items())))
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(
    pipe: Connection,
    rank: int,
    world: int,
    store: Path | None,
    local_world_size: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import FileStore

    os.environ["LOCAL_WORLD_SIZE"] = str(local_world_size)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    try:
        if store is not None:
            dist.init_process_group(
                "gloo",
                store=FileStore(str(store), world),
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=30),
            )
        # Plain pickle: the one of multiprocessing would share memory with a rank that ends.
        pipe.send_bytes(pickle.dumps((True, function(rank, *args))))
        # Whoever ended at once would fail peers that are still joining a group with it.
        pipe.poll(_LINGER_SECONDS)
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
