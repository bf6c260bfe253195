"""The clock of each replica of a fleet, and what its time is spent on."""

from dataclasses import asdict, astuple, dataclass

import numpy as np
from numpy.typing import NDArray

from postlocal.planning.step_time import Seconds


@dataclass
class Spent:
    """Replica-seconds by cause, or shares of them.

    Attributes:
        computing: steps that count in the model.
        stragglers: waiting for slower replicas.
        links: waiting for an exchange to end.
        stopped: all stand still: a checkpoint, or the way back to the last one.
        lost: what was done, and has to be done again or never came into the model.
        away: lost hosts until they take part again.
    """

    computing: float = 0.0
    stragglers: float = 0.0
    links: float = 0.0
    stopped: float = 0.0
    lost: float = 0.0
    away: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return float(sum(self.values()))

    def values(self) -> tuple[float, ...]:
        """In the order above."""
        return astuple(self)

    def over(self, whole: float) -> "Spent":
        """Each as a share of the whole.

        Example:
            >>> Spent(computing=30.0, lost=10.0).over(40.0).lost
            0.25
        """
        return Spent(**{cause: seconds / whole for cause, seconds in asdict(self).items()})


class ReplicaClocks:
    """Replicas' own clocks, and what their time was spent on since it was last safe.

    What a host has done counts once it is safe: in a checkpoint, or in the anchor.

    Args:
        shape: hosts, and replicas in each.

    Attributes:
        clock: each replica's, of that shape.
        spent: what is safe.
        steps: replicas' steps that are safe.

    Example:
        >>> clocks = ReplicaClocks((2, 1))
        >>> clocks.compute(1, np.array([[1.0], [3.0]]))
        >>> clocks.wait(3.0, "stragglers")
        >>> clocks.secure(np.array([True, True]), now=3.0)
        >>> clocks.spent.computing, clocks.spent.stragglers, clocks.steps
        (4.0, 2.0, 2)
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        self.clock = np.zeros(shape)
        self.spent = Spent()
        self.steps = 0
        self._since = np.zeros(shape)  # each replica's clock when all was last safe
        self._taken = 0
        self._unsafe = {cause: np.zeros(shape) for cause in asdict(self.spent)}

    def compute(self, steps: int, seconds: Seconds) -> None:
        """Every replica takes steps, in its own time."""
        self._taken += steps
        self.clock += seconds
        self._unsafe["computing"] += seconds

    def wait(self, until: float | Seconds, cause: str) -> None:
        """Those who are earlier wait for a time."""
        later = np.maximum(self.clock, until)
        self._unsafe[cause] += later - self.clock
        self.clock = later

    def secure(self, members: NDArray[np.bool_], now: float) -> None:
        """What the members have done is safe; the others are as if they began here."""
        self.steps += self._taken * int(members.sum()) * self.clock.shape[1]
        self._taken = 0
        for cause, seconds in self._unsafe.items():
            self.book(cause, float(seconds[members].sum()))
            seconds[:] = 0.0
        self.clock[~members] = now
        self._since = self.clock.copy()

    def begin_again(self, now: float) -> None:
        """What was done since it was last safe is done from here on, by all at once."""
        self.clock += now - self._since
        self._since[:] = now

    def unsafe(self, hosts: NDArray[np.bool_] | int, now: float) -> float:
        """Replica-seconds of hosts since all was last safe."""
        return float(np.maximum(0.0, now - self._since[hosts]).sum())

    def book(self, cause: str, seconds: float) -> None:
        """Replica-seconds that are known for good."""
        setattr(self.spent, cause, getattr(self.spent, cause) + seconds)
