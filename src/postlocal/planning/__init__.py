"""Predictions of time, bytes and memory of training on a given network.

The plan runs a strategy's own schedule, sends and applies fragments by `postlocal.sync.timeline`,
and takes bytes from the messages that wires report. Rounds and bytes are therefore those of a real
run. Only seconds are modelled; `docs/plan.md` derives them.

Example:
    >>> from postlocal import strategies
    >>> from postlocal.planning import Cluster, Job, Link, plan
    >>> homes = Cluster(workers=4, links={"world": Link(bandwidth=100e6, latency=0.05)})
    >>> job = Job(parameters=100_000_000, step=1.0, steps=5000)
    >>> for strategy in (strategies.ddp(), strategies.diloco(500), strategies.sparse_loco()):
    ...     planned = plan(strategy, job, homes)
    ...     print(planned.name, f"{planned.share_computing:.1%}")
    ddp 2.1%
    diloco 91.2%
    sparse_loco 97.5%
"""

from postlocal.planning.cluster import Cluster, Link, LinksError
from postlocal.planning.figure import draw
from postlocal.planning.fleet import Failures, Fleet
from postlocal.planning.job import Job
from postlocal.planning.measure import measure_links
from postlocal.planning.plan import Memory, Plan, plan
from postlocal.planning.replica_clocks import Spent
from postlocal.planning.scaling import draw_sweep, sweep
from postlocal.planning.search import bandwidth_for, best
from postlocal.planning.simulation import Simulated, simulate
from postlocal.planning.step_time import StepTime, exponential_tail, normal, quantiles, steady

__all__ = [
    "Cluster",
    "Failures",
    "Fleet",
    "Job",
    "Link",
    "LinksError",
    "Memory",
    "Plan",
    "Simulated",
    "Spent",
    "StepTime",
    "bandwidth_for",
    "best",
    "draw",
    "draw_sweep",
    "exponential_tail",
    "measure_links",
    "normal",
    "plan",
    "quantiles",
    "simulate",
    "steady",
    "sweep",
]
