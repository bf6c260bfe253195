"""What one exchange of tensors costs: the wire's own bytes, and seconds on a cluster's links."""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from postlocal.planning.cluster import Cluster
from postlocal.planning.job import Job, Tensors
from postlocal.strategies import Strategy
from postlocal.topology import WORLD
from postlocal.wire import ChunkWire, Gathered, Wire, fp32, powersgd, relayed, travels_as

_FIRST_BUCKET, _BUCKET = 2**20, 25 * 2**20  # bytes, of DistributedDataParallel


@dataclass(frozen=True)
class Exchange:
    """One exchange, as the rank that sends the most sees it.

    Attributes:
        payload_bytes: bytes it sends.
        seconds: from the first byte to the last, with nothing else on the link.
    """

    payload_bytes: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Exchange") -> "Exchange":
        """One after the other."""
        return Exchange(self.payload_bytes + other.payload_bytes, self.seconds + other.seconds)


def of_tensors(wire: Wire, tensors: Tensors, cluster: Cluster, level: str) -> Exchange:
    """The mean of tensors over the groups of a level, by a wire.

    Args:
        wire: how values travel.
        tensors: what travels.
        cluster: its links.
        level: with whom.

    Raises:
        ValueError: if the cluster lacks the level, or a link that is needed.

    Example:
        >>> import torch
        >>> from postlocal.planning.cluster import Link
        >>> two = Cluster(2, {"world": Link(bandwidth=8e6)})
        >>> of_tensors(fp32(), {"weight": torch.zeros(1000)}, two, "world")
        Exchange(payload_bytes=4000, seconds=0.004)
    """
    if cluster.size(level) == 1 or not tensors:
        return Exchange()
    level = cluster.narrowest(level)
    payload = wire.open(cluster.groups, level).payload_bytes(tensors)
    if isinstance(wire, relayed):
        return Exchange(payload, _relayed_seconds(wire, tensors, cluster, level))
    return Exchange(payload, _seconds(wire, payload, cluster, level))


def of_gradients(wire: Wire, tensors: Tensors, cluster: Cluster, level: str) -> Exchange:
    """The mean of gradients over the groups of a level, as `postlocal.sync.ddp` takes it.

    fp32 gradients take torch's ring all-reduce, which enters and leaves each host once.
    """
    size = cluster.size(level)
    if wire != fp32() or size == 1:
        return of_tensors(wire, tensors, cluster, level)
    level = cluster.narrowest(level)
    payload = sum(
        2 * (size - 1) * math.ceil(tensor.numel() / size) * tensor.itemsize
        for tensor in tensors.values()
    )
    return Exchange(payload, cluster.link(level).seconds(payload, 2 * (size - 1)))


class Costs:
    """What each exchange of a strategy costs on a cluster, looked up once.

    Args:
        strategy: how.
        job: what travels.
        cluster: over which links.
    """

    def __init__(self, strategy: Strategy, job: Job, cluster: Cluster) -> None:
        self._strategy = strategy
        self._job = job
        self._cluster = cluster
        self._parts = job.split(strategy.fragments)
        self._known: dict[Hashable, Exchange] = {}

    def gradients(self, level: str) -> Exchange:
        """Of the gradients of a step: its bytes, and the seconds that nothing hides."""
        return self._once(("gradients", level), self._gradients, level)

    def fragment(self, number: int) -> Exchange:
        """Of a fragment, and of the optimizer's state where it goes with it."""
        key = tuple((tensor.shape, tensor.dtype) for tensor in self._parts[number].values())
        sent = self._once(("fragment", key), self._fragment, number)
        if number == len(self._parts) - 1:
            sent += self._once(("optimizer", WORLD), self._optimizer_state, WORLD)
        return sent

    def narrow(self, level: str) -> Exchange:
        """Of the plain averages at levels below the world's."""
        return self._once(("narrow", level), self._narrow, level)

    def _once(self, key: Hashable, look: Callable[..., Exchange], what: object) -> Exchange:
        if key not in self._known:
            self._known[key] = look(what)
        return self._known[key]

    def _gradients(self, level: str) -> Exchange:
        job, wire = self._job, self._strategy.gradient_wire
        sent = of_gradients(wire, job.tensors, self._cluster, level)
        if not hides(wire):
            return sent
        backward = job.gradient_overlap * job.step_time.mean
        return Exchange(
            sent.payload_bytes, exposed(sent.seconds, buckets(job.parameter_bytes), backward)
        )

    def _fragment(self, number: int) -> Exchange:
        return of_tensors(self._strategy.wire, self._parts[number], self._cluster, WORLD)

    def _narrow(self, level: str) -> Exchange:
        plain = of_tensors(fp32(), self._job.tensors, self._cluster, level)
        return plain + self._optimizer_state(level)

    def _optimizer_state(self, level: str) -> Exchange:
        if self._strategy.optimizer_state != "average":
            return Exchange()
        return of_tensors(fp32(), self._job.optimizer_tensors, self._cluster, level)


def buckets(nbytes: int) -> list[float]:
    """Shares of the gradients in each bucket of DistributedDataParallel, in the order of sending.

    The first one takes 1 MiB and the others 25, which are its defaults.

    Example:
        >>> buckets(2**22)
        [0.25, 0.75]
    """
    ends = [*range(_FIRST_BUCKET, nbytes, _BUCKET), nbytes]
    return [(end - start) / nbytes for start, end in pairwise([0, *ends])]


def exposed(seconds: float, shares: Sequence[float], backward: float) -> float:
    """Seconds of a reduction that the backward pass does not hide.

    A bucket is sent once its gradients are there and the one before it is through, so that nothing
    hides the last one.

    Args:
        seconds: of all buckets together.
        shares: of the gradients in each bucket.
        backward: seconds of the pass in which they become ready.

    Example:
        >>> exposed(1.0, [0.5, 0.5], backward=8.0), exposed(1.0, [1.0], backward=8.0)
        (0.5, 1.0)
    """
    ready = sent = 0.0
    for share in shares:
        ready += share * backward
        sent = max(sent, ready) + share * seconds
    return sent - backward


def hides(gradient_wire: Wire) -> bool:
    """Whether gradients travel beside the backward pass; else they wait for its end."""
    return isinstance(gradient_wire, ChunkWire)


def remembers(wire: Wire) -> bool:
    """Whether a wire keeps what it lost of each value, in fp32.

    Example:
        >>> from postlocal.wire import error_feedback, int8
        >>> remembers(error_feedback(int8())), remembers(int8())
        (True, False)
    """
    between = getattr(wire, "between", None)
    return remembers(between) if between is not None else not isinstance(wire, ChunkWire)


def _seconds(wire: Wire, payload: int, cluster: Cluster, level: str) -> float:
    size, host = cluster.size(level), cluster.host(level)
    if isinstance(wire, powersgd):  # two ring all-reduces of factors, and what is no matrix
        return cluster.link(level).seconds(payload, 4 * (size - 1) + 2)
    # Each rank sends to each other one at the same time; ranks of a host share its link, and what
    # they send each other does not cross it.
    crossing = host * (size - host) / (size - 1)
    legs = 1 if isinstance(getattr(wire, "inner", wire), Gathered) else 2
    return cluster.link(level).seconds(payload * crossing, legs)


def _relayed_seconds(wire: relayed, tensors: Tensors, cluster: Cluster, level: str) -> float:
    """Sums come to the first rank of each node, means go between these, and back to all."""
    inside = min(wire.level, level, key=cluster.groups.levels.index)
    size = cluster.size(inside)
    hosts = math.ceil(cluster.size(level) / size)
    seconds = 0.0
    if size > 1:
        wide = sum(t.numel() * travels_as(t.dtype).itemsize for t in tensors.values())
        first = 2 * (size - 1) / size * wide + (size - 1) * wide
        seconds = cluster.link(inside).seconds(first, 3)
    if hosts > 1:
        leaders = Cluster(hosts, {WORLD: cluster.link(level)})
        seconds += of_tensors(wire.between, tensors, leaders, WORLD).seconds
    return seconds
