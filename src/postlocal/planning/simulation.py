"""A simulation of a whole fleet, event by event: `plan` for replicas that differ.

Events and bytes are those of the planner. Times are drawn, and hosts fail and return;
`docs/scale.md` has the rules.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from postlocal.planning.fleet import Fleet
from postlocal.planning.fleet_run import FleetRun
from postlocal.planning.job import Job
from postlocal.planning.plan import Plan, plan
from postlocal.planning.replica_clocks import Spent
from postlocal.strategies import Strategy

_PATIENCE = 10  # times as long as planned, after which a run is abandoned


@dataclass(frozen=True)
class Simulated:
    """The result of a simulation.

    Attributes:
        name: of the strategy.
        replicas: of the fleet.
        seconds: simulated seconds.
        finished: whether the run ended; a run that always fails is abandoned.
        steps: steps of replicas that count in the model.
        efficiency: these steps a second, over the steps of all replicas if each trained alone and
            never failed.
        shares: shares of the replicas' time, by cause; their sum is 1.
        failures: number of failures of hosts.
        planned: the plan of as many equal replicas that never fail, all with the slowest link.
    """

    name: str
    replicas: int
    seconds: float
    finished: bool
    steps: int
    efficiency: float
    shares: Spent
    failures: int
    planned: Plan

    @property
    def steps_a_second(self) -> float:
        """Steps of replicas that count in the model, a second."""
        return self.steps / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """All fields and derived values, as plain values."""
        derived = {"steps_a_second": self.steps_a_second, "planned": self.planned.to_dict()}
        return asdict(self) | derived


def simulate(strategy: Strategy, job: Job, fleet: Fleet, seed: int = 0) -> Simulated:
    """Simulate a run of a fleet.

    The same seed gives the same run. Without failures, with equal replicas, one link and steady
    steps it takes as long as `postlocal.planning.plan` predicts.

    Args:
        strategy: one of `postlocal.strategies`, or any other.
        job: the job; a replica's step takes its ``step`` times the replica's own factor.
        fleet: the fleet.
        seed: seed of all random numbers.

    Raises:
        ValueError: if the strategy names another level than ``"node"``, or its fragments do not
            match the model.

    Example:
        >>> from postlocal import strategies
        >>> from postlocal.planning import Failures, Fleet, Job, Link, simulate
        >>> homes = Fleet(100, Link(1e9), failures=Failures(apart=86_400.0, away=3600.0))
        >>> job = Job(parameters=10**8, step=1.0, steps=5000)
        >>> for strategy in (strategies.ddp(), strategies.diloco(period=100)):
        ...     done = simulate(strategy, job, homes)
        ...     print(f"{done.name} {done.efficiency:.0%}, {done.failures} failures")
        ddp 10%, 54 failures
        diloco 91%, 6 failures
    """
    planned = plan(strategy, job, fleet.cluster(fleet.hosts, fleet.slowest()))
    run = FleetRun(strategy, job, fleet, np.random.default_rng(seed))
    seconds, finished = run.follow(_PATIENCE * planned.steps * planned.seconds_a_step)
    alone = fleet.replicas * seconds / job.step_time.mean
    return Simulated(
        name=strategy.name,
        replicas=fleet.replicas,
        seconds=seconds,
        finished=finished,
        steps=run.clocks.steps,
        efficiency=run.clocks.steps / alone,
        shares=run.clocks.spent.over(fleet.replicas * seconds),
        failures=run.membership.failures,
        planned=planned,
    )
