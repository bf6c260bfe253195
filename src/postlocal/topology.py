"""Topologies: named levels, each a partition of the world into groups of ranks.

A topology is a frozen recipe; `postlocal.attach` makes the process groups, all of them, before
training starts. Two levels always exist: ``"rank"`` is a rank alone, ``"world"`` is all ranks.

Example:
    >>> from postlocal import topology
    >>> topology.nodes(size=4).partition(8)
    {'node': ((0, 1, 2, 3), (4, 5, 6, 7)), 'world': ((0, 1, 2, 3, 4, 5, 6, 7),)}
"""

import logging
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch.distributed.device_mesh import DeviceMesh

from postlocal.checks import count, made, optional, pairs, settle, shown, text, whole

RANK = "rank"
WORLD = "world"

Partition = tuple[tuple[int, ...], ...]

logger = logging.getLogger("postlocal")


class Topology(Protocol):
    """A recipe for the levels of a world."""

    def partition(self, size: int) -> dict[str, Partition]:
        """Level -> disjoint groups of the ranks 0 to ``size - 1``.

        Levels go from the narrowest to ``"world"``, and each is nested in the next.

        Raises:
            ValueError: if the recipe does not fit a world of ``size`` ranks.
        """
        ...


@dataclass(frozen=True, init=False)
class nested:
    """Levels of equal, contiguous blocks of ranks, each a multiple of the one before.

    Args:
        sizes: level -> number of ranks in one of its groups, from the narrowest to the widest.

    Raises:
        TypeError: if ``sizes`` is no mapping of strings to whole numbers.
        ValueError: if a level is named ``"rank"`` or ``"world"``, or sizes are not nested.

    Example:
        >>> nested({"node": 2, "rack": 4}).partition(8)["rack"]
        ((0, 1, 2, 3), (4, 5, 6, 7))
    """

    sizes: tuple[tuple[str, int], ...]

    def __init__(self, sizes: Mapping[str, int]) -> None:
        known = []
        before = 1
        for level, given in pairs("sizes", sizes, '{"node": 8}'):
            size = whole(f"sizes[{text('each level of sizes', level)!r}]", given)
            if level in (RANK, WORLD):
                raise ValueError(f"sizes must name other levels: {level!r} is always there")
            if size < 1 or size % before:
                raise ValueError(
                    f"sizes[{level!r}] must be a positive multiple of the level below it "
                    f"({before}), got {size}"
                )
            known.append((level, size))
            before = size
        object.__setattr__(self, "sizes", tuple(known))

    def partition(self, size: int) -> dict[str, Partition]:
        levels = {level: _blocks(size, level, block) for level, block in self.sizes}
        return levels | {WORLD: (tuple(range(size)),)}


def world() -> nested:
    """No level but ``"rank"`` and ``"world"``.

    Example:
        >>> world().partition(2)
        {'world': ((0, 1),)}
    """
    return nested({})


@dataclass(frozen=True)
class nodes:
    """The level ``"node"``: ranks of one machine, on CPU as on accelerators.

    Args:
        size: ranks a node; None: the launcher's number (``LOCAL_WORLD_SIZE``, which torchrun sets).

    Raises:
        TypeError: if ``size`` is no whole number.
        ValueError: if ``size`` is below 1; by `partition` if it is unknown or does not divide the
            world.

    Example:
        >>> nodes(size=2).partition(4)["node"]
        ((0, 1), (2, 3))
    """

    size: int | None = None

    def __post_init__(self) -> None:
        settle(self, size=optional(partial(count, unit="rank a node")))

    def partition(self, size: int) -> dict[str, Partition]:
        return nested({"node": self.size or _local_world_size(size)}).partition(size)


@dataclass(frozen=True)
class _Groups:
    """Levels whose groups are given, rank by rank."""

    levels: tuple[tuple[str, Partition], ...]

    def partition(self, size: int) -> dict[str, Partition]:
        for level, groups in self.levels:
            covered = sum(map(len, groups))
            if covered != size:
                raise ValueError(f"level {level!r} has {covered} ranks, the world has {size}")
        return dict(self.levels) | {WORLD: (tuple(range(size)),)}


@dataclass(frozen=True, init=False)
class from_mesh(_Groups):
    """The levels of a device mesh: each dimension but the outermost names a level.

    A level holds the ranks of its own dimension and of all inner ones; the outermost dimension
    is ``"world"``. Ranks count within the mesh.

    Args:
        mesh: a mesh with named dimensions, outermost first.

    Raises:
        TypeError: if ``mesh`` is no device mesh.
        ValueError: if the dimensions of the mesh have no names, or an inner one is named
            ``"rank"`` or ``"world"``.

    Example:
        >>> import torch.distributed as dist
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> sizes = (1, 1)  # on 4 ranks of two machines (2, 2), for {"node": ((0, 1), (2, 3)), ...}
        >>> mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("machines", "node"))
        >>> from_mesh(mesh).partition(1)
        {'node': ((0,),), 'world': ((0,),)}
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        if not isinstance(mesh, DeviceMesh):
            raise TypeError(
                f"mesh must be a torch.distributed.device_mesh.DeviceMesh, got {shown(mesh)}"
            )
        names = mesh.mesh_dim_names
        if not names:
            raise ValueError("mesh must have named dimensions: pass mesh_dim_names")
        for name in names[1:]:
            if name in (RANK, WORLD):
                raise ValueError(
                    f"mesh must name its inner dimensions other than {RANK!r} and {WORLD!r}, which "
                    f"are always there, got {names}"
                )
        ranks = mesh.mesh
        index = {rank: position for position, rank in enumerate(sorted(ranks.flatten().tolist()))}
        levels = []
        for dimension in reversed(range(1, ranks.ndim)):
            groups = ranks.flatten(start_dim=dimension).flatten(end_dim=-2).tolist()
            partition = tuple(tuple(index[rank] for rank in group) for group in groups)
            levels.append((names[dimension], partition))
        object.__setattr__(self, "levels", tuple(levels))


@dataclass(frozen=True)
class leaders:
    """The first rank of each group of a level; all other ranks are alone at every level.

    Args:
        topology: the levels of all ranks.
        level: the level whose groups each have a leader.

    Raises:
        TypeError: if ``topology`` is no topology, or ``level`` no string.
        ValueError: by `partition`, if the topology lacks the level.

    Example:
        >>> leaders(nodes(size=2), "node").partition(4)["world"]
        ((0, 2), (1,), (3,))
    """

    topology: Topology
    level: str

    def __post_init__(self) -> None:
        settle(self, topology=is_topology, level=text)

    def partition(self, size: int) -> dict[str, Partition]:
        levels = self.topology.partition(size)
        alone = tuple((rank,) for rank in range(size))
        if self.level not in (RANK, *levels):
            raise ValueError(unknown_level(self.level, (RANK, *levels)))
        led = levels.get(self.level, alone)
        return {level: _lead(led, groups) for level, groups in levels.items()}


def default(levels: Collection[str], machines: Partition, rank: int = 0) -> Topology:
    """The levels of a run without a given topology.

    ``"node"`` is a machine, if a strategy needs that level. If there is only one machine, each rank
    counts as a node of its own, which rank 0 logs: with a single node, all ranks would communicate
    at every step.

    Args:
        levels: those that the strategy names.
        machines: ranks by machine; see `postlocal.comm.groups.by_node`.
        rank: the rank that calls.

    Example:
        >>> default({"node", "world"}, machines=((0, 1), (2,))).partition(3)
        {'node': ((0, 1), (2,)), 'world': ((0, 1, 2),)}
        >>> default({"world"}, machines=((0, 1), (2,))).partition(3)
        {'world': ((0, 1, 2),)}
    """
    if "node" not in levels:
        return world()
    if len(machines) > 1:
        return _Groups((("node", machines),))
    ranks = len(machines[0])
    if ranks > 1 and rank == 0:
        logger.warning(
            "all %d ranks share one machine, and no topology was given: each rank is a node of "
            "its own; for larger nodes pass topology=topology.nodes(size=...)", ranks,
        )  # fmt: skip
    return nodes(size=1)


def unknown_level(level: str, known: Iterable[str]) -> str:
    """The message for a level that a schedule names and a topology lacks."""
    example = "topology.nodes()" if level == "node" else f"topology.nested({{{level!r}: size}})"
    return (
        f"level must be one that the topology has ({', '.join(known)}), got {level!r}: pass a "
        f"topology with it, such as topology={example}"
    )


def is_topology(name: str, value: Any) -> Any:
    """The rule for an argument that takes a topology.

    Raises:
        TypeError: if it lacks a method of `Topology`, or is a class or function that makes one.
    """
    return made(name, value, ("partition",), "topology.nodes()")


def _lead(narrow: Partition, wide: Partition) -> Partition:
    firsts = {group[0] for group in narrow}
    met = (tuple(rank for rank in group if rank in firsts) for group in wide)
    others = ((rank,) for group in narrow for rank in group[1:])
    return (*filter(None, met), *others)


def _blocks(size: int, level: str, block: int) -> Partition:
    if size == 1:
        return ((0,),)  # one process, for debugging, accepts the topology of the real run
    if size % block:
        raise ValueError(f"{level} size must divide the world size {size}, got {block}")
    return tuple(tuple(range(start, start + block)) for start in range(0, size, block))


def _local_world_size(size: int) -> int:
    known = os.environ.get("LOCAL_WORLD_SIZE")
    if known is None and size > 1:
        raise ValueError(
            "nodes() needs a size: LOCAL_WORLD_SIZE is not set; launch with torchrun, or pass "
            "nodes(size=...)"
        )
    return ranks_of_a_node(known or "1")


def ranks_of_a_node(said: str) -> int:
    """The number that a launcher set in ``LOCAL_WORLD_SIZE``.

    Raises:
        ValueError: if it is no whole number of at least 1.
    """
    if not said.isdecimal() or int(said) < 1:
        raise ValueError(
            f"LOCAL_WORLD_SIZE must be a whole number of at least 1, got {said!r}: it is what the "
            "launcher sets for each rank"
        )
    return int(said)
