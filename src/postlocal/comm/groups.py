"""This rank's process group at each level of a topology, and which ranks share a machine."""

import os
import socket
from collections.abc import Iterator, Mapping

import torch.distributed as dist

from postlocal.comm.group import Alone, Group
from postlocal.topology import RANK, Partition, Topology, leaders, ranks_of_a_node, unknown_level


class LevelGroups:
    """This rank's group at each level of a topology, all made at once.

    Args:
        base: the world's group.
        topology: the recipe.
        given: groups that are there already, by level; no new ones are made for these levels.

    Raises:
        ValueError: if the recipe does not fit the world.
    """

    def __init__(
        self, base: Group, topology: Topology, given: Mapping[str, Group] | None = None
    ) -> None:
        self._base = base
        self._topology = topology
        self._groups: dict[str, Group] = {RANK: Alone()}
        self._leaders: dict[str, LevelGroups] = {}
        self._beside: list[LevelGroups] = []
        self._made: list[Group] = []
        given = given or {}
        for level, partition in topology.partition(base.size).items():
            self._groups[level] = given.get(level) or self._make(partition)

    def __getitem__(self, level: str) -> Group:
        if level not in self._groups:
            raise ValueError(unknown_level(level, self._groups))
        return self._groups[level]

    def _make(self, partition: Partition) -> Group:
        self._made.append(self._base.subgroup(partition))
        return self._made[-1]

    def beside(self, given: Mapping[str, Group] | None = None) -> "LevelGroups":
        """Other groups at the same levels, closed with these; collective.

        Args:
            given: as that of the class.
        """
        self._beside.append(LevelGroups(self._base, self._topology, given))
        return self._beside[-1]

    def close(self) -> None:
        """Give up all groups that were made here, as `Group.close` does."""
        self._base.close(list(self._all_made()))

    def _all_made(self) -> Iterator[Group]:
        yield from self._made
        for groups in (*self._leaders.values(), *self._beside):
            yield from groups._all_made()

    @property
    def levels(self) -> tuple[str, ...]:
        """Names of all levels, from ``"rank"`` to ``"world"``."""
        return tuple(self._groups)

    def leaders(self, level: str) -> "LevelGroups":
        """The groups of `leaders` of the groups of a level; collective the first time.

        Raises:
            ValueError: if the level is unknown.
        """
        if level not in self._leaders:
            self._leaders[level] = LevelGroups(self._base, leaders(self._topology, level))
        return self._leaders[level]


def by_node(group: Group) -> Partition:
    """The ranks of a group by machine, found out together; nodes may differ in size.

    Two ranks share a machine if the launcher says so (``GROUP_RANK``, or the same
    ``LOCAL_WORLD_SIZE`` on all ranks, as torchrun sets), or else if its name is the same.

    Args:
        group: who asks; collective.

    Raises:
        ValueError: on every rank, if a launcher's number is none on one of them.

    Example:
        >>> by_node(Alone())
        ((0,),)
    """
    rank = dist.get_rank() if dist.is_initialized() else group.rank
    said = (os.environ.get("GROUP_RANK"), os.environ.get("LOCAL_WORLD_SIZE"), rank)
    everyones = group.all_gather_object((*said, socket.gethostname()))
    # Where nodes differ in size, a rank and the size of its node do not tell which node it is.
    alike = len({size for _, size, _, _ in everyones}) == 1
    members: dict[str, list[int]] = {}
    for member, (node, size, number, host) in enumerate(everyones):
        if node is not None:
            name = f"node {node}"
        elif size is not None and alike:
            name = f"node {number // ranks_of_a_node(size)}"
        else:
            name = host
        members.setdefault(name, []).append(member)
    return tuple(tuple(ranks) for ranks in members.values())
