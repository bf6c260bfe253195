"""A fleet: thousands of replicas with different speeds and links that fail and return."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from postlocal.planning.cluster import Cluster, Link
from postlocal.planning.step_time import StepTime, steady
from postlocal.topology import nodes


@dataclass(frozen=True)
class Failures:
    """How often hosts fail, how long they are away, and how long restarts take.

    Args:
        apart: mean seconds between two failures of one host, at random times; infinite: none.
        away: seconds until a lost host is back.
        restart: seconds to load the last checkpoint, for a job that cannot continue without the
            host.
        saving: seconds that such a job stops to write a checkpoint.

    Raises:
        ValueError: if ``apart`` is not above 0, or another argument is negative.

    Example:
        >>> day = 86_400.0
        >>> round(Failures(apart=30 * day, saving=10.0).interval(hosts=1000))
        228
    """

    apart: float = math.inf
    away: float = 1800.0
    restart: float = 120.0
    saving: float = 10.0

    def __post_init__(self) -> None:
        if not self.apart > 0:
            raise ValueError(f"apart must be above 0 seconds, got {self.apart}")
        for name in ("away", "restart", "saving"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0 seconds, got {getattr(self, name)}")

    def interval(self, hosts: int) -> float:
        """Seconds between checkpoints that lose least time: ``sqrt(2 C M)`` (Young, CACM 1974)."""
        return math.sqrt(2 * self.saving * self.apart / hosts)


@dataclass(frozen=True, init=False)
class Fleet:
    """Many replicas on hosts. The replicas of a host share an uplink and fail together.

    Args:
        replicas: how many, at least 1.
        links: the uplinks of the hosts: one link, or pairs of a share of the hosts and their link.
        speeds: distribution of each replica's factor on the job's step time, drawn once a run;
            its mean is usually 1.
        failures: failures of hosts.
        node_size: replicas of a host.
        node_link: the link between the replicas of a host.

    Raises:
        ValueError: if ``node_size`` does not divide the replicas, or shares are not above 0 or do
            not sum to 1.

    Example:
        >>> slow, fast = Link(10e6), Link(1e9)
        >>> homes = Fleet(1000, [(0.1, slow), (0.9, fast)])
        >>> homes.hosts, homes.uplinks(np.random.default_rng(0)).count(slow)
        (1000, 100)
    """

    replicas: int
    links: tuple[tuple[float, Link], ...]
    speeds: StepTime
    failures: Failures
    node_size: int
    node_link: Link

    def __init__(
        self,
        replicas: int,
        links: Link | Sequence[tuple[float, Link]],
        speeds: StepTime | None = None,
        failures: Failures | None = None,
        node_size: int = 1,
        node_link: Link | None = None,
    ) -> None:
        shared = ((1.0, links),) if isinstance(links, Link) else tuple(links)
        shares = [share for share, _ in shared]
        if not (all(share > 0 for share in shares) and math.isclose(sum(shares), 1)):
            raise ValueError(f"shares of links must be above 0 and sum to 1, got {shares}")
        if node_size < 1 or replicas < 1 or replicas % node_size:
            raise ValueError(
                f"replicas must be a multiple of the node size {node_size}, got {replicas}"
            )
        object.__setattr__(self, "replicas", replicas)
        object.__setattr__(self, "links", shared)
        object.__setattr__(self, "speeds", speeds or steady(1.0))
        object.__setattr__(self, "failures", failures or Failures())
        object.__setattr__(self, "node_size", node_size)
        object.__setattr__(self, "node_link", node_link or Link(math.inf))

    @property
    def hosts(self) -> int:
        """Number of hosts."""
        return self.replicas // self.node_size

    def factors(self, source: np.random.Generator) -> NDArray[np.float64]:
        """The speed factor of each replica, of shape ``(hosts, node_size)``.

        Raises:
            ValueError: if one is not above 0.
        """
        drawn = self.speeds.draw(1, (self.hosts, self.node_size), source)
        if not drawn.min() > 0:
            raise ValueError(f"speeds must be above 0, got {drawn.min():.3g} from {self.speeds}")
        return drawn

    def uplinks(self, source: np.random.Generator) -> list[Link]:
        """The link of each host: of each class its share, rounded to hosts."""
        ends = [round(self.hosts * share) for share in accumulate(share for share, _ in self.links)]
        kinds = np.searchsorted(ends, np.arange(self.hosts), side="right")
        return [self.links[kind][1] for kind in source.permutation(kinds)]

    def cluster(self, hosts: int, uplink: Link) -> Cluster:
        """A cluster of a number of its hosts, all with one uplink."""
        links = {"node": self.node_link, "world": uplink}
        return Cluster(hosts * self.node_size, links, nodes(self.node_size))

    def slowest(self) -> Link:
        """The least bandwidth and the greatest latency of all links."""
        return slowest([link for _, link in self.links])


def slowest(links: Sequence[Link]) -> Link:
    """The link that limits an exchange over all of these: least bandwidth, greatest latency.

    Example:
        >>> slowest([Link(1e9, 0.001), Link(1e7), Link(1e8)])
        Link(bandwidth=10000000.0, latency=0.001)
    """
    return Link(min(link.bandwidth for link in links), max(link.latency for link in links))
