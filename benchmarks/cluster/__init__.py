"""Several hosts on one machine, joined by links of limited rate.

A host is a network namespace with an address of its own. A pair of virtual interfaces joins it to a
switch, which is a bridge in one more namespace; each end of the pair has its rate. So no byte
leaves the machine, and hosts share its cores, memory and disk. Needs root and iproute2.
"""

from benchmarks.cluster.emulation import cluster
from benchmarks.cluster.hosts import Host, Rate, bits
from benchmarks.cluster.launch import follow, rank_environment, run, torchrun, wait

__all__ = [
    "Host",
    "Rate",
    "bits",
    "cluster",
    "follow",
    "rank_environment",
    "run",
    "torchrun",
    "wait",
]
