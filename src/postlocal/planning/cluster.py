"""A described cluster: its ranks and links."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from postlocal.comm.group import OnPaper
from postlocal.comm.groups import LevelGroups
from postlocal.topology import RANK, WORLD, Topology, world


class LinksError(ValueError):
    """Links that do not suit the levels.

    Attributes:
        problem: what is wrong, for messages that name an option instead.
    """

    def __init__(self, problem: str) -> None:
        super().__init__(f"links {problem}")
        self.problem = problem


@dataclass(frozen=True)
class Link:
    """The link that joins the groups of one level.

    Args:
        bandwidth: bit/s that each **host** of the level can send, and can receive. A host is a
            group of the level below, such as a node, whose ranks share the link. Without such a
            level it is a rank.
        latency: seconds that an empty message takes, one way.

    Raises:
        ValueError: if ``bandwidth`` is not above 0, or ``latency`` negative.

    Example:
        >>> Link(bandwidth=1e9, latency=0.25).seconds(payload_bytes=125_000_000, messages=2)
        1.5
    """

    bandwidth: float
    latency: float = 0.0

    def __post_init__(self) -> None:
        if not self.bandwidth > 0:
            raise ValueError(f"bandwidth must be above 0 bit/s, got {self.bandwidth}")
        if not self.latency >= 0:
            raise ValueError(f"latency must be at least 0 seconds, got {self.latency}")

    def seconds(self, payload_bytes: float, messages: int) -> float:
        """Seconds for bytes that one host sends in a number of messages, one after the other."""
        return 8 * payload_bytes / self.bandwidth + messages * self.latency


@dataclass(frozen=True, init=False)
class Cluster:
    """Ranks, their levels, and a link for each level.

    Args:
        workers: number of ranks, at least 1.
        links: level -> link. Only the levels at which a strategy communicates are needed.
        topology: the levels between ``"rank"`` and ``"world"``; None: there are none.

    Raises:
        ValueError: if ``workers`` is below 1, the topology does not fit that many ranks, or
            ``links`` has a level that the topology lacks.

    Example:
        >>> from postlocal import topology
        >>> links = {"node": Link(400e9), "world": Link(1e9, latency=0.02)}
        >>> cluster = Cluster(16, links, topology.nodes(size=8))
        >>> cluster.size("node"), cluster.host("world"), cluster.host("node")
        (8, 8, 1)
    """

    workers: int
    links: tuple[tuple[str, Link], ...]
    topology: Topology

    def __init__(
        self, workers: int, links: Mapping[str, Link], topology: Topology | None = None
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        object.__setattr__(self, "workers", workers)
        object.__setattr__(self, "links", tuple(links.items()))
        object.__setattr__(self, "topology", topology or world())
        for level in links:
            if level == RANK or level not in self.groups.levels:
                known = ", ".join(self.groups.levels[1:])
                raise LinksError(f"must be of levels of the topology ({known}), got {level!r}")

    @cached_property
    def groups(self) -> LevelGroups:
        """The groups of rank 0, without communication."""
        return LevelGroups(OnPaper(self.workers), self.topology)

    def link(self, level: str) -> Link:
        """The link of a level.

        Raises:
            ValueError: if the level has none.
        """
        links = dict(self.links)
        if level not in links:
            raise LinksError(
                f"must have every level that is communicated at, got none for {level!r}: "
                f"the levels given are {', '.join(links) or 'none'}"
            )
        return links[level]

    def size(self, level: str) -> int:
        """Number of ranks in the largest group of a level."""
        return self.groups[level].size

    def host(self, level: str) -> int:
        """Number of ranks that share a level's link: a group of the level below."""
        levels = self.groups.levels
        return self.size(levels[max(0, levels.index(level) - 1)])

    def narrowest(self, level: str) -> str:
        """The narrowest level with groups of the same size, whose link is used."""
        levels = self.groups.levels
        return next(each for each in levels if self.size(each) == self.size(level))

    def with_bandwidth(self, bandwidth: float, level: str = WORLD) -> "Cluster":
        """The same cluster with another bandwidth at a level, in bit/s."""
        links = dict(self.links) | {level: Link(bandwidth, self.link(level).latency)}
        return Cluster(self.workers, links, self.topology)
