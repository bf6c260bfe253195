"""The cost of one exchange of tensors: messages that the wire reports, and seconds on links."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from postlocal.planning.cluster import Cluster
from postlocal.planning.job import Job, Tensors
from postlocal.strategies import Strategy
from postlocal.topology import WORLD
from postlocal.wire import Leg, Wire, fp32, ring_bytes, sent_bytes

_FIRST_BUCKET, _BUCKET = 2**20, 25 * 2**20  # bytes, of DistributedDataParallel


@dataclass(frozen=True)
class Cost:
    """The cost of one exchange, for the rank that sends the most.

    Attributes:
        payload_bytes: bytes that it sends.
        seconds: from the first byte to the last, if nothing else uses the link.
    """

    payload_bytes: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        """Of two exchanges, one after the other."""
        return Cost(self.payload_bytes + other.payload_bytes, self.seconds + other.seconds)


def of_tensors(wire: Wire, tensors: Tensors, cluster: Cluster, level: str) -> Cost:
    """The cost of the mean of tensors over the groups of a level, by a wire.

    Args:
        wire: the wire that sends values.
        tensors: the tensors that are averaged.
        cluster: the cluster.
        level: the level.

    Raises:
        ValueError: if the cluster lacks the level, or a link that it needs.

    Example:
        >>> import torch
        >>> from postlocal.planning.cluster import Link
        >>> two = Cluster(2, {"world": Link(bandwidth=8e6)})
        >>> of_tensors(fp32(), {"weight": torch.zeros(1000)}, two, "world")
        Cost(payload_bytes=4000, seconds=0.004)
    """
    if cluster.size(level) == 1 or not tensors:
        return Cost()
    legs = wire.messages(tensors, cluster.groups, cluster.narrowest(level))
    return Cost(sent_bytes(legs), sum(seconds(leg, cluster) for leg in legs))


def of_gradients(wire: Wire, tensors: Tensors, cluster: Cluster, level: str) -> Cost:
    """The cost of the mean of gradients over the groups of a level, as in `postlocal.sync.ddp`.

    fp32 gradients use torch's ring all-reduce, which enters and leaves each host once.
    """
    size = cluster.size(level)
    if wire != fp32() or size == 1:
        return of_tensors(wire, tensors, cluster, level)
    payload = sum(ring_bytes(t.numel(), size, t.dtype) for t in tensors.values())
    return Cost(payload, seconds(Leg(payload, size, "ring", level=level), cluster))


def seconds(leg: Leg, cluster: Cluster) -> float:
    """Seconds from the first byte of a leg to the last, if nothing else uses the link.

    Ranks of a host share its link, and messages within the host do not use it. In an exchange all
    ranks of a host send over the link; in a ring, or from and to one rank, one of them does.

    Example:
        >>> from postlocal.planning.cluster import Link
        >>> four = Cluster(4, {"world": Link(bandwidth=8e6, latency=0.5)})
        >>> seconds(Leg(3000, peers=4), four), seconds(Leg(3000, peers=4, pattern="ring"), four)
        (0.503, 3.003)
    """
    level = cluster.narrowest(leg.level)
    others = leg.peers - 1
    if leg.pattern == "ring":
        return cluster.link(level).seconds(leg.busiest, 2 * others)
    # The same share of each host's ranks takes part as of all ranks.
    host = max(1, cluster.host(level) * leg.peers // cluster.size(level))
    crossing = (leg.peers - host) / others * (host if leg.pattern == "exchange" else 1)
    return cluster.link(level).seconds(leg.busiest * crossing, 1)


class Costs:
    """The cost of each exchange of a strategy on a cluster, computed once.

    Args:
        strategy: the strategy.
        job: the job, whose tensors are sent.
        cluster: the cluster.
    """

    def __init__(self, strategy: Strategy, job: Job, cluster: Cluster) -> None:
        self._strategy = strategy
        self._job = job
        self._cluster = cluster
        self._parts = job.split(strategy.fragments)
        self._known: dict[Hashable, Cost] = {}

    def gradients(self, level: str) -> Cost:
        """Gradients of a step: bytes, and the seconds that do not overlap the backward pass."""
        return self._once(("gradients", level), self._gradients, level)

    def fragment(self, number: int) -> Cost:
        """A fragment; with the last one, the state of the optimizer if it is averaged."""
        key = tuple((tensor.shape, tensor.dtype) for tensor in self._parts[number].values())
        sent = self._once(("fragment", key), self._fragment, number)
        if number == len(self._parts) - 1:
            sent += self._once(("optimizer", WORLD), self._optimizer_state, WORLD)
        return sent

    def narrow(self, level: str) -> Cost:
        """A plain average at a level below the world."""
        return self._once(("narrow", level), self._narrow, level)

    def _once(self, key: Hashable, look: Callable[..., Cost], what: object) -> Cost:
        if key not in self._known:
            self._known[key] = look(what)
        return self._known[key]

    def _gradients(self, level: str) -> Cost:
        job, wire = self._job, self._strategy.gradient_wire
        sent = of_gradients(wire, job.tensors, self._cluster, level)
        if not wire.by_bucket:
            return sent
        backward = job.gradient_overlap * job.step_time.mean
        return Cost(
            sent.payload_bytes, exposed(sent.seconds, buckets(job.parameter_bytes), backward)
        )

    def _fragment(self, number: int) -> Cost:
        return of_tensors(self._strategy.wire, self._parts[number], self._cluster, WORLD)

    def _narrow(self, level: str) -> Cost:
        plain = of_tensors(fp32(), self._job.tensors, self._cluster, level)
        return plain + self._optimizer_state(level)

    def _optimizer_state(self, level: str) -> Cost:
        if self._strategy.optimizer_state != "average":
            return Cost()
        return of_tensors(fp32(), self._job.optimizer_tensors, self._cluster, level)


def buckets(nbytes: int) -> list[float]:
    """Shares of the gradients in each bucket of DistributedDataParallel, in the order of sending.

    The first bucket has 1 MiB and the others 25 MiB, which are its defaults.

    Example:
        >>> buckets(2**22)
        [0.25, 0.75]
    """
    ends = [*range(_FIRST_BUCKET, nbytes, _BUCKET), nbytes]
    return [(end - start) / nbytes for start, end in pairwise([0, *ends])]


def exposed(seconds: float, shares: Sequence[float], backward: float) -> float:
    """Seconds of a reduction that do not overlap the backward pass.

    A bucket is sent when its gradients are complete and the bucket before it has been reduced, so
    the last one overlaps nothing.

    Args:
        seconds: of all buckets together.
        shares: of the gradients in each bucket.
        backward: seconds of the backward pass, in which gradients become ready.

    Example:
        >>> exposed(1.0, [0.5, 0.5], backward=8.0), exposed(1.0, [1.0], backward=8.0)
        (0.5, 1.0)
    """
    ready = sent = 0.0
    for share in shares:
        ready += share * backward
        sent = max(sent, ready) + share * seconds
    return sent - backward
