"""The hosts, the switch between them, and the end of both."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager

from benchmarks.cluster.hosts import Host, Rate, bits, delayed
from benchmarks.cluster.network import Namespace, ended_by_signals


@contextmanager
def cluster(
    hosts: int = 4,
    up: Rate | Sequence[Rate] = "100mbit",
    down: Rate | Sequence[Rate] = "100mbit",
    inside: Rate = None,
    latency: float = 0.0,
) -> Iterator[list[Host]]:
    """Hosts that are there in the ``with`` block; call it in the main thread.

    At the end all processes on them are killed and the hosts removed, also after a failure, SIGINT,
    SIGTERM or SIGHUP.

    Args:
        hosts: number of hosts, up to 100.
        up: rate at which each sends, or one rate a host.
        down: rate at which each receives, or one rate a host.
        inside: rate of each host's own loopback interface.
        latency: seconds from one host to another.

    Raises:
        ValueError: for a number or a rate that cannot be.
        RuntimeError: where there are no namespaces; see `network.missing`.
    """
    if not 1 <= hosts <= 100:
        raise ValueError(f"hosts must be 1 to 100, got {hosts}")
    if not 0 <= latency <= 10:
        raise ValueError(f"latency must be 0 to 10 s, got {latency}")
    rates = zip(_each("up", up, hosts), _each("down", down, hosts), strict=True)
    _each("inside", inside, 1)
    with ended_by_signals(), ExitStack() as ends:
        switch = ends.enter_context(closing(Namespace()))
        made = [
            ends.enter_context(closing(Host(index, switch, *pair, inside)))
            for index, pair in enumerate(rates)
        ]
        ports = [host.port for host in made]
        if latency:
            ports = ends.enter_context(delayed(switch, ports, latency / 2))
        switch.command("ip", "link", "add", "switch", "type", "bridge", "mcast_snooping", "0")
        for port in ports:
            switch.command("ip", "link", "set", port, "master", "switch")
        switch.command("ip", "link", "set", "switch", "addrgenmode", "none", "up")
        yield made


def _each(name: str, rate: Rate | Sequence[Rate], hosts: int) -> list[Rate]:
    rates = [rate] * hosts if rate is None or isinstance(rate, str) else list(rate)
    if len(rates) != hosts:
        raise ValueError(f"{name} must be one rate, or one for each of {hosts} hosts, got {rate}")
    for one in rates:
        if one is not None:
            bits(one)
    return rates
