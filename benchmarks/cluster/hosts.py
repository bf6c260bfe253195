"""Hosts of an emulated cluster, and their links."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import IO

from benchmarks.cluster import delay
from benchmarks.cluster.network import Namespace, Traffic, traffic

DEVICE = "eth0"
_BURST_SECONDS = 0.004
_PACKET = 1514
_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}

Rate = str | None
"""Such as ``"100mbit"``, in bit, kbit, mbit or gbit a second; None: as fast as the machine is."""


def bits(rate: str) -> float:
    """Bits a second.

    Raises:
        ValueError: if it is no rate.

    Example:
        >>> bits("2.5gbit")
        2500000000.0
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg]?)bit", rate)
    if match is None or not float(match[1]):
        raise ValueError(f"rate must be above 0 in bit, kbit, mbit or gbit, got {rate!r}")
    return float(match[1]) * _UNITS[match[2]]


class Host:
    """A host of a cluster; `cluster` makes them.

    Args:
        index: its number, from 0.
        switch: the namespace that its link ends in.
        up: rate at which it sends.
        down: rate at which it receives.
        inside: rate of its own loopback interface, which its ranks talk to each other through.

    Attributes:
        index: its number.
        address: its IPv4 address, which only hosts of this cluster can reach.
        port: name of the interface that its link ends in.
    """

    def __init__(self, index: int, switch: Namespace, up: Rate, down: Rate, inside: Rate) -> None:
        self.index = index
        self.address = f"10.0.0.{101 + index}"  # torchrun sorts hosts by address, as text
        self._switch = switch
        self.port = f"port{index}"
        self._started: list[subprocess.Popen[str]] = []
        self._namespace = Namespace()
        self._join(up, down)
        if inside is not None:
            self._namespace.limit("lo", bits(inside), burst=max(2**18, _burst(inside)))

    def _join(self, up: Rate, down: Rate) -> None:
        own, switch = self._namespace.command, self._switch.command
        switch(
            "ip", "link", "add", self.port, "type", "veth",
            "peer", "name", DEVICE, "netns", self._namespace.path,
        )  # fmt: skip
        switch("ip", "link", "set", self.port, "addrgenmode", "none", "up")
        own("ip", "link", "set", DEVICE, "addrgenmode", "none", "up")
        own("ip", "address", "add", f"{self.address}/24", "dev", DEVICE)
        if up is not None:
            self._namespace.limit(DEVICE, bits(up), _burst(up))
        if down is not None:
            self._switch.limit(self.port, bits(down), _burst(down))

    def entered(self) -> AbstractContextManager[None]:
        """Move this thread to the host for the ``with`` block, with what it starts and opens."""
        return self._namespace.entered()

    def run(
        self,
        *command: str,
        environment: Mapping[str, str] | None = None,
        output: IO[str] | None = None,
    ) -> subprocess.Popen[str]:
        """Start a process on this host, which is killed with all that it started at the end.

        Args:
            command: program and arguments.
            environment: variables on top of this process's own. torch is told the interface.
            output: a file for its output and errors; None: where ours go.
        """
        told = {"GLOO_SOCKET_IFNAME": DEVICE, "TP_SOCKET_IFNAME": DEVICE}
        with self.entered():
            process = subprocess.Popen(  # noqa: S603
                command,
                env={**os.environ, **told, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=None if output is None else subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def cut(self) -> None:
        """Cut its link: what is sent is lost, without a notice to either side."""
        self._switch.command("ip", "link", "set", self.port, "down")

    def restore(self) -> None:
        """Restore its link."""
        self._switch.command("ip", "link", "set", self.port, "up")

    def traffic(self) -> Traffic:
        """Bytes and packets of its link so far; its ranks do not use it among themselves."""
        with self.entered():
            return traffic(DEVICE)

    def processes(self) -> list[int]:
        """Processes on this host."""
        return self._namespace.processes()

    def close(self) -> None:
        """Kill what runs on it, and remove it."""
        try:
            self._namespace.kill()
        finally:
            self._namespace.close()
        for process in self._started:
            process.wait()


def _burst(rate: str) -> int:
    """Bytes that may go at once: a few milliseconds' worth, and a packet at the least."""
    return max(2 * _PACKET, int(bits(rate) * _BURST_SECONDS / 8))


@contextmanager
def delayed(switch: Namespace, ports: Sequence[str], seconds: float) -> Iterator[list[str]]:
    """Delay all frames between ports and the interfaces that they are joined to.

    Args:
        switch: the namespace of the ports.
        ports: names of interfaces.
        seconds: how much longer, each way.

    Returns:
        Names of the interfaces to use in their place.
    """
    ways = []
    for index in range(len(ports)):
        near, far = f"near{index}", f"far{index}"
        switch.command("ip", "link", "add", near, "type", "veth", "peer", "name", far)
        for end in (near, far):
            switch.command("ip", "link", "set", end, "addrgenmode", "none", "up")
        ways.append((near, far))
    pairs = [name for port, (near, _) in zip(ports, ways, strict=True) for name in (port, near)]
    with switch.entered():
        relay = subprocess.Popen(  # noqa: S603
            [sys.executable, delay.__file__, str(seconds), *pairs],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
    with relay:  # closes its input at the end, which is its end too
        assert relay.stdout is not None
        if not relay.stdout.readline():
            raise RuntimeError("frames are not carried: what went wrong is above")
        yield [far for _, far in ways]
