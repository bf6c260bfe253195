"""Several hosts on one machine, joined by links of limited rate.

    python -m benchmarks.cluster --hosts 4 --rate 100mbit -- python -m postlocal train --steps 100
    python -m benchmarks.cluster --hosts 4 --rate 100mbit --check

A host is a network namespace with an address of its own. A pair of virtual interfaces joins it to a
switch, which is a bridge in one more namespace; each end of the pair has its rate. So no byte
leaves the machine, and hosts share its cores, memory and disk. Needs root and iproute2.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path
from typing import IO, Annotated

import typer

from benchmarks.network import Namespace, Traffic, ended_by_signals, missing, traffic

DEVICE = "eth0"
_BURST_SECONDS = 0.004
_PACKET = 1514
_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}
_PORT = 29400

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
        switch: the namespace with the bridge ``switch`` that it is joined to.
        up: rate at which it sends.
        down: rate at which it receives.
        inside: rate of its own loopback interface, which its ranks talk to each other through.

    Attributes:
        index: its number.
        address: its IPv4 address, which only hosts of this cluster can reach.
    """

    def __init__(self, index: int, switch: Namespace, up: Rate, down: Rate, inside: Rate) -> None:
        self.index = index
        self.address = f"10.0.0.{101 + index}"  # torchrun sorts hosts by address, as text
        self._switch = switch
        self._port = f"port{index}"
        self._started: list[subprocess.Popen[str]] = []
        self._namespace = Namespace()
        self._join(up, down)
        if inside is not None:
            self._namespace.limit("lo", bits(inside), burst=max(2**18, _burst(inside)))

    def _join(self, up: Rate, down: Rate) -> None:
        own, switch = self._namespace.command, self._switch.command
        switch(
            "ip", "link", "add", self._port, "type", "veth",
            "peer", "name", DEVICE, "netns", self._namespace.path,
        )  # fmt: skip
        switch("ip", "link", "set", self._port, "master", "switch", "addrgenmode", "none", "up")
        own("ip", "link", "set", DEVICE, "addrgenmode", "none", "up")
        own("ip", "address", "add", f"{self.address}/24", "dev", DEVICE)
        if up is not None:
            self._namespace.limit(DEVICE, bits(up), _burst(up))
        if down is not None:
            self._switch.limit(self._port, bits(down), _burst(down))

    def entered(self) -> AbstractContextManager[None]:
        """Have this thread on the host in the ``with`` block, with what it starts and opens."""
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
        """Take its link away: what is sent is lost, and nobody is told."""
        self._switch.command("ip", "link", "set", self._port, "down")

    def restore(self) -> None:
        """Bring its link back."""
        self._switch.command("ip", "link", "set", self._port, "up")

    def traffic(self) -> Traffic:
        """What went through its link so far; its ranks among themselves do not use it."""
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


@contextmanager
def cluster(
    hosts: int = 4,
    up: Rate | Sequence[Rate] = "100mbit",
    down: Rate | Sequence[Rate] = "100mbit",
    inside: Rate = None,
) -> Iterator[list[Host]]:
    """Hosts that are there in the ``with`` block; call it in the main thread.

    At the end all processes on them are killed and the hosts removed, also after a failure, SIGINT,
    SIGTERM or SIGHUP.

    Args:
        hosts: number of hosts, up to 100.
        up: rate at which each sends, or one rate a host.
        down: rate at which each receives, or one rate a host.
        inside: rate of each host's own loopback interface.

    Raises:
        ValueError: for a number or a rate that cannot be.
        RuntimeError: where there are no namespaces; see `network.missing`.
    """
    if not 1 <= hosts <= 100:
        raise ValueError(f"hosts must be 1 to 100, got {hosts}")
    rates = zip(_each("up", up, hosts), _each("down", down, hosts), strict=True)
    with ended_by_signals(), ExitStack() as ends:
        switch = ends.enter_context(closing(Namespace()))
        switch.command("ip", "link", "add", "switch", "type", "bridge", "mcast_snooping", "0")
        switch.command("ip", "link", "set", "switch", "addrgenmode", "none", "up")
        yield [
            ends.enter_context(closing(Host(index, switch, *pair, inside)))
            for index, pair in enumerate(rates)
        ]


def _each(name: str, rate: Rate | Sequence[Rate], hosts: int) -> list[Rate]:
    rates = [rate] * hosts if rate is None or isinstance(rate, str) else list(rate)
    if len(rates) != hosts:
        raise ValueError(f"{name} must be one rate, or one for each of {hosts} hosts, got {rate}")
    for one in rates:
        if one is not None:
            bits(one)
    return rates


def _burst(rate: str) -> int:
    """Bytes that may go at once: a few milliseconds' worth, and a packet at the least."""
    return max(2 * _PACKET, int(bits(rate) * _BURST_SECONDS / 8))


def torchrun(
    hosts: Sequence[Host],
    command: Sequence[str],
    ranks_a_host: int = 1,
    outputs: Sequence[IO[str] | None] | None = None,
    store_timeout: int = 60,
) -> list[subprocess.Popen[str]]:
    """Start ``torchrun`` on every host; they meet at host 0, whose ranks are the first.

    Args:
        hosts: where.
        command: what each rank runs; ``python`` is this one.
        ranks_a_host: number of ranks on each.
        outputs: a file for each host's output.
        store_timeout: seconds after which a host gives up that cannot reach host 0.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    # Nobody resolves names there, and each connection says so.
    quiet = {"TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")}
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **quiet, "PATH": path}
    return [
        host.run(
            sys.executable, "-m", "torch.distributed.run",
            "--nnodes", str(len(hosts)), "--nproc-per-node", str(ranks_a_host),
            "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts[0].address}:{_PORT}",
            "--rdzv-conf", f"is_host={int(host is hosts[0])},read_timeout={store_timeout}",
            # All hosts have the machine's name, so that they can be told apart by address only.
            "--local-addr", host.address,
            "--no-python", *command,
            environment=environment, output=output,
        )
        for host, output in zip(hosts, outputs or [None] * len(hosts), strict=True)
    ]  # fmt: skip


def wait(processes: Sequence[subprocess.Popen[str]], grace: float) -> list[int | None]:
    """Exit codes of all, or None for those that go on ``grace`` seconds after one has failed."""
    deadline = None
    while any(process.poll() is None for process in processes):
        if deadline is None and any(process.returncode for process in processes):
            deadline = time.monotonic() + grace
        if deadline is not None and time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return [process.returncode for process in processes]


def table(hosts: Sequence[Host]) -> str:
    """What went up and down each host's link."""
    lines = ["| host | address | MB up | MB down |", "|---|---|---|---|"]
    for host in hosts:
        sent = host.traffic()
        megabytes = f"{sent.up / 1e6:.2f} | {sent.down / 1e6:.2f}"
        lines.append(f"| {host.index} | {host.address} | {megabytes} |")
    return "\n".join(lines)


def main(
    command: Annotated[
        list[str] | None, typer.Argument(help="What each rank runs, after --.")
    ] = None,
    hosts: Annotated[int, typer.Option(help="Number of hosts.")] = 4,
    ranks: Annotated[int, typer.Option(help="Ranks on each host.")] = 1,
    rate: Annotated[str, typer.Option(help="Of each host's link, up and down.")] = "100mbit",
    up: Annotated[str | None, typer.Option(help="Up, where that is another rate.")] = None,
    inside: Annotated[
        str | None, typer.Option(help="Between ranks of a host.", show_default="unlimited")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Time an all-reduce against the rate instead.")
    ] = False,
    grace: Annotated[float, typer.Option(help="Seconds for others after a host failed.")] = 90,
) -> None:
    """Run a command under torchrun on every host of an emulated cluster."""
    if reason := missing():
        raise typer.BadParameter(reason)
    if check:
        slower = min(bits(up or rate), bits(rate))
        command = ["python", "-m", "benchmarks.all_reduce", f"{slower:.0f}"]
    if not command:
        raise typer.BadParameter("give a command, such as -- python -m postlocal train")
    with cluster(hosts, up or rate, rate, inside) as made, ExitStack() as files:
        others = [files.enter_context(tempfile.TemporaryFile("w+")) for _ in made[1:]]
        codes = wait(torchrun(made, command, ranks, [None, *others]), grace)
        for host, code, output in zip(made[1:], codes[1:], others, strict=True):
            if code != 0:
                output.seek(0)
                print(f"host {host.index} ended with {code}:", *output.readlines()[-20:], sep="\n")
        print(table(made))
    failed = next((code for code in codes if code != 0), 0)
    raise typer.Exit(1 if failed is None else failed)


if __name__ == "__main__":
    typer.run(main)
