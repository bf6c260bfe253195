"""What one exchange of tensors costs: the wire's own legs, and seconds on a cluster's links."""

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
    """What an exchange costs, as the rank that sends the most sees it.

    Attributes:
        payload_bytes: bytes it sends.
        seconds: from the first byte to the last, with nothing else on the link.
    """

    payload_bytes: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        """Of two exchanges, one after the other."""
        return Cost(self.payload_bytes + other.payload_bytes, self.seconds + other.seconds)


def of_tensors(wire: Wire, tensors: Tensors, cluster: Cluster, level: str) -> Cost:
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
        Cost(payload_bytes=4000, seconds=0.004)
    """
    if cluster.size(level) == 1 or not tensors:
        return Cost()
    legs = wire.messages(tensors, cluster.groups, cluster.narrowest(level))
    return Cost(sent_bytes(legs), sum(seconds(leg, cluster) for leg in legs))


def of_gradients(wire: Wire, tensors: Tensors, cluster: Cluster, level: str) -> Cost:
    """The mean of gradients over the groups of a level, as `postlocal.sync.ddp` takes it.

    fp32 gradients take torch's ring all-reduce, which enters and leaves each host once.
    """
    size = cluster.size(level)
    if wire != fp32() or size == 1:
        return of_tensors(wire, tensors, cluster, level)
    payload = sum(ring_bytes(t.numel(), size, t.dtype) for t in tensors.values())
    return Cost(payload, seconds(Leg(payload, size, "ring", level=level), cluster))


def seconds(leg: Leg, cluster: Cluster) -> float:
    """From the first byte of a leg to the last, with nothing else on the link.

    Ranks of a host share its link, and what they send each other does not cross it: all of them
    send and receive in an exchange, one of them along a ring or from and to one rank.

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
    # Of each host's ranks as many take part as of all ranks.
    host = max(1, cluster.host(level) * leg.peers // cluster.size(level))
    crossing = (leg.peers - host) / others * (host if leg.pattern == "exchange" else 1)
    return cluster.link(level).seconds(leg.busiest * crossing, 1)


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
        self._known: dict[Hashable, Cost] = {}

    def gradients(self, level: str) -> Cost:
        """Of the gradients of a step: its bytes, and the seconds that nothing hides."""
        return self._once(("gradients", level), self._gradients, level)

    def fragment(self, number: int) -> Cost:
        """Of a fragment, and of the optimizer's state where it goes with it."""
        key = tuple((tensor.shape, tensor.dtype) for tensor in self._parts[number].values())
        sent = self._once(("fragment", key), self._fragment, number)
        if number == len(self._parts) - 1:
            sent += self._once(("optimizer", WORLD), self._optimizer_state, WORLD)
        return sent

    def narrow(self, level: str) -> Cost:
        """Of the plain averages at levels below the world's."""
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
