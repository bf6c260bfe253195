"""Measured bandwidth and latency of links."""

import time
from statistics import median

import torch

from postlocal.comm.group import Group
from postlocal.comm.groups import LevelGroups
from postlocal.planning.cluster import Link
from postlocal.topology import WORLD

_LARGE = 2**22  # fp32 values: 16 MiB


def measure_links(
    groups: LevelGroups,
    device: torch.device | None = None,
    numel: int = _LARGE,
    rounds: int = 5,
) -> dict[str, Link]:
    """Time all-reduces at each level, all groups of a level at the same time; collective.

    The time of one value is 2 (W - 1) latencies. The additional time of many values gives the
    bandwidth, as of a ring. Both are medians, of the slowest group.

    Args:
        groups: the groups.
        device: the device of the tensors; None: the CPU.
        numel: fp32 values of a large all-reduce.
        rounds: number of all-reduces of each size, after one that is not counted.

    Returns:
        Links by level, the same on all ranks. A level whose groups have one rank has no link.

    Raises:
        PeerError: if a rank does not take part.

    Example:
        >>> from postlocal import topology, virtual
        >>> def work(group):
        ...     return list(measure_links(LevelGroups(group, topology.nodes(size=1)), numel=2**10))
        >>> virtual.run(2, work)
        [['world'], ['world']]
    """
    links = {}
    for level in groups.levels[1:]:
        group = groups[level]
        mine = [(_seconds(group, n, rounds, device)) for n in (numel, 1)] if group.size > 1 else []
        # Groups may differ in size, so that some ranks are alone where others are not.
        said = groups[WORLD].all_gather_object((mine, group.size))
        (large, small), size = max((each for each in said if each[0]), default=([0.0, 0.0], 1))
        if size > 1:
            messages = 2 * (size - 1)
            payload = 4 * numel * messages / size
            # If both take the same time, the bandwidth is unknown.
            links[level] = Link(8 * payload / max(large - small, 1e-9), small / messages)
    return links


def _seconds(group: Group, numel: int, rounds: int, device: torch.device | None) -> float:
    """Median time of an all-reduce, of the slowest rank in each round."""
    values = torch.zeros(numel, device=device)
    times = []
    for _ in range(rounds + 1):
        group.all_reduce(torch.zeros(1, device=device)).wait()  # start together
        start = time.perf_counter()
        group.all_reduce(values).wait()
        float(values[0])  # wait for the accelerator
        times.append(time.perf_counter() - start)
    slowest = (max(together) for together in zip(*group.all_gather_object(times), strict=True))
    return float(median(list(slowest)[1:]))
