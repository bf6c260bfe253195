"""The clock of each replica of a fleet, and how its time is spent."""

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
        stopped: all wait, for a checkpoint or a restart.
        lost: steps that are repeated, or never count in the model.
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
    """Clocks of replicas, and how their time was spent since the last safe state.

    The work of a host counts once it is safe: in a checkpoint, or in the anchor.

    Args:
        shape: hosts, and replicas in each.

    Attributes:
        clock: the clock of each replica, of that shape.
        spent: time spent, as far as it is safe.
        steps: number of replicas' steps that are safe.

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
        """Every replica takes steps, each in its own time."""
        self._taken += steps
        self.clock += seconds
        self._unsafe["computing"] += seconds

    def wait(self, until: float | Seconds, cause: str) -> None:
        """Replicas that are earlier wait until a time."""
        later = np.maximum(self.clock, until)
        self._unsafe[cause] += later - self.clock
        self.clock = later

    def secure(self, members: NDArray[np.bool_], now: float) -> None:
        """Note that the work of members is safe; the others start from here."""
        self.steps += self._taken * int(members.sum()) * self.clock.shape[1]
        self._taken = 0
        for cause, seconds in self._unsafe.items():
            self.book(cause, float(seconds[members].sum()))
            seconds[:] = 0.0
        self.clock[~members] = now
        self._since = self.clock.copy()

    def begin_again(self, now: float) -> None:
        """Move the work since the last safe state to after ``now``, where all repeat it."""
        self.clock += now - self._since
        self._since[:] = now

    def unsafe(self, hosts: NDArray[np.bool_] | int, now: float) -> float:
        """Replica-seconds of hosts since the last safe state."""
        return float(np.maximum(0.0, now - self._since[hosts]).sum())

    def book(self, cause: str, seconds: float) -> None:
        """Add replica-seconds to a cause."""
        setattr(self.spent, cause, getattr(self.spent, cause) + seconds)
