"""Which hosts of a simulated fleet take part, which are lost, and which have returned."""

from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import simpy

from postlocal.planning.cluster import Link
from postlocal.planning.fleet import Fleet, slowest
from postlocal.planning.job import Job

Waiting = Generator[simpy.Event, Any, None]
"""A process, or a part of one, that waits for events of SimPy."""


class Membership:
    """Hosts that fail and return.

    Args:
        fleet: the fleet.
        job: the job, whose parameters returning hosts fetch.
        environment: of the simulation.
        making: random numbers for the assignment of links.
        failing: random numbers for failures.

    Attributes:
        members: for each host, whether it takes part.
        failures: number of failures.
        returned: hosts that have returned and wait to be admitted.
        arrival: event of the next host's return.
    """

    def __init__(
        self,
        fleet: Fleet,
        job: Job,
        environment: simpy.Environment,
        making: np.random.Generator,
        failing: np.random.Generator,
    ) -> None:
        self.members = np.ones(fleet.hosts, dtype=bool)
        self.failures = 0
        self.returned: set[int] = set()
        self.arrival = environment.event()
        self._fleet = fleet
        self._bytes = job.parameter_bytes
        self._environment = environment
        self._failing = failing
        self._links = fleet.uplinks(making)
        self._lost_at = np.zeros(fleet.hosts)
        self._absent: set[int] = set()
        self._taking_part: tuple[int, Link] | None = None

    @property
    def any_left(self) -> bool:
        """Whether any host takes part, or waits to be admitted."""
        return bool(self.members.any() or self.returned)

    def fail(self, tell: Callable[[int], None]) -> Waiting:
        """Let hosts fail at random times, and report those that took part."""
        failures = self._fleet.failures
        while True:
            apart = failures.apart / self._fleet.hosts
            yield self._environment.timeout(self._failing.exponential(apart))
            host = int(self._failing.integers(self._fleet.hosts))
            if host in self._absent:
                continue
            self.failures += 1
            self._absent.add(host)
            self.returned.discard(host)
            self._environment.process(self._return(host))
            if self.members[host]:
                tell(host)

    def drop(self, host: int) -> None:
        """Note that a host no longer takes part."""
        self.members[host] = False
        self._lost_at[host] = self._environment.now
        self._taking_part = None

    def admit(self) -> float:
        """Let returned hosts take part; returns the total of seconds that they were away."""
        back = sorted(self.returned)
        self.returned.clear()
        if back:
            self.members[back] = True
            self._taking_part = None
        return float((self._environment.now - self._lost_at[back]).sum())

    def away(self, now: float) -> float:
        """Total of seconds that the hosts that do not take part have been away."""
        return float((now - self._lost_at[~self.members]).sum())

    def taking_part(self) -> tuple[int, Link]:
        """Number of hosts that take part, and the slowest of their links."""
        if self._taking_part is None:
            present = {self._links[host] for host in np.flatnonzero(self.members)}
            self._taking_part = int(self.members.sum()), slowest(list(present))
        return self._taking_part

    def _return(self, host: int) -> Waiting:
        fetching = self._links[host].seconds(self._bytes, 1)
        yield self._environment.timeout(self._fleet.failures.away + fetching)
        self._absent.discard(host)
        self.returned.add(host)
        self.arrival.succeed()
        self.arrival = self._environment.event()
