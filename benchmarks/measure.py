"""Ranks, paired rounds, and counters of the machine, for all benchmarks that time something."""

import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.cluster.network import traffic


def run_ranks(world: int, function: Callable[..., Any], *args: Any) -> Any:
    """Call ``function(rank, *args)`` on gloo ranks over loopback; returns what rank 0 returned."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    processes = [
        context.Process(target=_rank, args=(rank, world, port, sender, function, args))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    try:
        while not receiver.poll(0.5):
            if any(process.exitcode for process in processes):
                raise RuntimeError("a rank failed; its traceback is above")
        return receiver.recv()
    finally:
        for process in processes:
            process.join(30)
            process.kill()


def _rank(
    rank: int, world: int, port: int, sender: Any, function: Callable[..., Any], args: Any
) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world), GLOO_SOCKET_IFNAME="lo",
    )  # fmt: skip
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    result = function(rank, *args)
    if rank == 0:
        sender.send(result)
    dist.barrier()
    dist.destroy_process_group()


def paired(
    cases: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds that each case takes, once a round, all ranks starting together."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for index in range(warmup + rounds):
        for name in rotated(list(cases), index):
            dist.barrier()
            start = time.perf_counter()
            cases[name]()
            dist.barrier()
            if index >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def rotated(names: Sequence[str], index: int) -> Sequence[str]:
    """The order of a round: another case begins each, so that none always follows the same one.

    Example:
        >>> rotated(["a", "b", "c"], 4)
        ['b', 'c', 'a']
    """
    start = index % len(names)
    return [*names[start:], *names[:start]]


def slowest(seconds: float) -> float:
    """The greatest of all ranks' figures, on every rank."""
    figure = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(figure, dist.ReduceOp.MAX)
    return float(figure)


def ratios(seconds: Mapping[str, list[float]], case: str, base: str) -> dict[str, float]:
    """Median and quartiles of one case's time over another's, round by round."""
    values = [a / b for a, b in zip(seconds[case], seconds[base], strict=True)]
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "lower": low, "upper": high}


def as_text(ratio: Mapping[str, float]) -> str:
    """A ratio for a table: median (quartiles)."""
    return f"{ratio['median']:.2f} ({ratio['lower']:.2f}..{ratio['upper']:.2f})"


def loopback_traffic() -> tuple[int, int]:
    """Bytes and packets sent so far through the loopback interface, frames included."""
    counters = traffic("lo")
    return counters.up, counters.packets_up


def bytes_of(case: Callable[[], object], times: int = 3) -> float:
    """Bytes a rank sends through the interface in one call, measured over a few."""
    dist.barrier()
    before, _ = loopback_traffic()
    for _ in range(times):
        case()
    dist.barrier()
    return (loopback_traffic()[0] - before) / times / dist.get_world_size()


def extra_memory(case: Callable[[], object]) -> int:
    """Bytes of resident memory that one call needs beyond what the process holds before it."""
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    case()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"there is no {field} in /proc/self/status")
