"""Runs a function on several gloo ranks, each a process, and kills them all when time is up.

A fork server imports torch once (and torch._dynamo, which DDP imports late, and torch's distributed
optimizers, which warn when they are imported), then the test modules that were collected, and hides
all of it from the garbage collector. Ranks fork from it, so that a test costs little more than what
it does: a rank imports nothing, and `attach`, which looks through all objects for a module that
reduces gradients, finds only those of the test. No thread and no process group is ever in it.
"""

import gc
import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest

context = multiprocessing.get_context("forkserver")

_PRELOADED = ("postlocal", "torch._dynamo", "torch.distributed.optim", "tests.models")
_preloaded = False


def _preload() -> None:
    global _preloaded
    if not _preloaded:
        collected = sorted(name for name in sys.modules if name.startswith("tests.test_"))
        context.set_forkserver_preload([*_PRELOADED, *collected, "tests.frozen"])
        _preloaded = True


class RankError(AssertionError):
    """A rank raised; carries the rank's own traceback."""


def run_ranks(
    world: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 60.0,
    local_world_size: int | None = None,
    expect_dead: tuple[int, ...] = (),
    leaving: tuple[int, ...] = (),
    join: bool = True,
    **keywords: Any,
) -> list[Any]:
    """Call ``function(rank, *args, **keywords)`` on ``world`` ranks and return what they returned.

    Ranks that returned live on until all have, so that a rank that is to be missing returns at
    once; those in ``leaving`` end when they returned. Ranks in ``expect_dead`` may end without an
    answer; they give None. With ``join=False`` they are not made a process group.
    """
    _preload()
    bound = partial(function, **keywords)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store" if join else None
        pipes, processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_rank_main,
                args=(theirs, rank, world, store, local_world_size or world, bound, args),
                kwargs={"leaving": rank in leaving},
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


Cases = Mapping[Any, tuple[Any, ...]]
"""For each case a function and its arguments; it is called with the rank before them."""


class Table:
    """What cases of one launch came to; `run_table` makes it.

    Args:
        found: for each case whether it ended well on each rank, and its value or the traceback.
    """

    def __init__(self, found: dict[Any, list[tuple[bool, Any]]]) -> None:
        self._found = found

    def __getitem__(self, case: Any) -> list[Any]:
        """What the ranks returned in a case.

        Raises:
            RankError: with the tracebacks of the ranks that raised in it.
        """
        found = self._found[case]
        errors = [f"rank {rank}: {text}" for rank, (ok, text) in enumerate(found) if not ok]
        if errors:
            raise RankError("\n".join(errors))
        return [value for _, value in found]


def run_table(world: int, cases: Cases, *, local_world_size: int | None = None) -> Table:
    """Call several functions one after the other on the ranks of one launch.

    Each call has a process group, a store and random numbers of its own. A case that fails hides
    no other one. What a function leaves in its process beyond that, later cases meet: a test of
    threads, memory or the end of a process has a launch of its own.

    Args:
        world: the number of ranks.
        cases: what to call.
        local_world_size: ranks of a node.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = run_ranks(
            world, _go_through, list(cases.values()), Path(folder), world,
            timeout=60.0 + len(cases), local_world_size=local_world_size, join=False,
        )  # fmt: skip
    return Table({case: [pickle.loads(of[at]) for of in found] for at, case in enumerate(cases)})


def in_one_launch(world: int, cases: Cases, *, local_world_size: int | None = None) -> Any:
    """A fixture that gives the `Table` of cases, which the first test that asks for it launches."""
    return pytest.fixture(scope="module")(
        lambda: run_table(world, cases, local_world_size=local_world_size)
    )


def _go_through(rank: int, cases: list[tuple[Any, ...]], folder: Path, world: int) -> list[bytes]:
    """What each case came to, pickled: what one case returned does not keep its tensors alive."""
    import torch

    seed = torch.random.get_rng_state()
    found = []
    for index, (function, *args) in enumerate(cases):
        torch.random.set_rng_state(seed)
        try:
            _join(folder / str(index), rank, world)
            found.append(pickle.dumps((True, function(rank, *args))))
            _meet()
        except BaseException:
            found[index:] = [pickle.dumps((False, traceback.format_exc()))]
        _part()
    return found


def _join(store: Path, rank: int, world: int) -> None:
    import torch.distributed as dist
    from torch._C._distributed_c10d import FileStore

    dist.init_process_group(
        "gloo",
        store=FileStore(str(store), world),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=30),
    )


def _meet() -> None:
    """Nobody parts while others still need it."""
    import torch.distributed as dist

    if dist.is_initialized():
        with suppress(RuntimeError):  # where a case failed on another rank, which says so
            dist.barrier()


def _part() -> None:
    import torch.distributed as dist

    time.sleep(0.01)  # gloo's thread drops callbacks of hooks, for which it needs the interpreter
    gc.collect()  # the next case finds no models of this one
    if dist.is_initialized():
        dist.destroy_process_group()


def say(event: str) -> None:
    """Tell all ranks of this launch that something has happened."""
    _events().set(event, "")


def said(event: str) -> bool:
    """Whether a rank has told that it happened."""
    happened: bool = _events().check([event])
    return happened


def await_event(event: str, seconds: float = 20.0) -> None:
    """Wait until a rank tells that it happened; instead of sleeping for as long as that may take.

    Raises:
        AssertionError: if nobody does in time.
    """
    deadline = time.monotonic() + seconds
    while not said(event):
        assert time.monotonic() < deadline, f"in {seconds} seconds no rank came to: {event}"
        time.sleep(0.002)


def free_port() -> int:
    """A port on loopback that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _events() -> Any:
    from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

    return PrefixStore("events", _get_default_store())


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
    *,
    leaving: bool,
) -> None:
    import torch

    os.environ["LOCAL_WORLD_SIZE"] = str(local_world_size)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    try:
        if store is not None:
            _join(store, rank, world)
        # Plain pickle: the one of multiprocessing would share memory with a rank that ends.
        pipe.send_bytes(pickle.dumps((True, function(rank, *args))))
        if not leaving:
            pipe.poll(None)  # until this process is killed, or the one that launched it has ended
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
