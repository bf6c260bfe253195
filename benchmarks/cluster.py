"""Several hosts on one machine, joined by links of limited rate.

    python -m benchmarks.cluster --hosts 4 --rate 100mbit -- python -m postlocal train --steps 100
    python -m benchmarks.cluster --hosts 4 --rate 100mbit --check

A host is a network namespace with an address of its own. A pair of virtual interfaces joins it to a
switch, which is a bridge in one more namespace; each end of the pair has its rate. So no byte
leaves the machine, and hosts share its cores, memory and disk. Needs root and iproute2.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import IO, Annotated, Any

import typer

from benchmarks.hosts import Host, Rate, bits, delayed
from benchmarks.network import Namespace, ended_by_signals, missing

_PORT = 29400


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


def torchrun(
    hosts: Sequence[Host],
    command: Sequence[str],
    ranks_a_host: int = 1,
    outputs: Sequence[IO[str] | None] | None = None,
) -> list[subprocess.Popen[str]]:
    """Start ``torchrun`` on every host; they meet at host 0, whose ranks are the first.

    Args:
        hosts: where.
        command: what each rank runs; ``python`` is this one.
        ranks_a_host: number of ranks on each.
        outputs: a file for each host's output.
    """
    return [
        host.run(
            sys.executable, "-m", "torch.distributed.run",
            "--nnodes", str(len(hosts)), "--nproc-per-node", str(ranks_a_host),
            "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts[0].address}:{_PORT}",
            "--rdzv-conf", f"is_host={int(host is hosts[0])}",
            # All hosts have the machine's name, so that they can be told apart by address only.
            "--local-addr", host.address,
            "--no-python", *command,
            environment=rank_environment(), output=output,
        )
        for host, output in zip(hosts, outputs or [None] * len(hosts), strict=True)
    ]  # fmt: skip


def rank_environment() -> dict[str, str]:
    """Variables of what runs on hosts."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    # Nobody resolves names there, and each connection says so.
    quiet = {"TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")}
    return {"OMP_NUM_THREADS": "1", **os.environ, **quiet, "PATH": path}


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


def run(
    hosts: Sequence[Host], command: Sequence[str], ranks_a_host: int, grace: float
) -> list[int | None]:
    """Exit codes of ``torchrun`` on every host, as `follow` gives them."""
    return follow(hosts, lambda outputs: torchrun(hosts, command, ranks_a_host, outputs), grace)


def follow(
    hosts: Sequence[Host],
    start: Callable[[list[IO[str] | None]], list[subprocess.Popen[str]]],
    grace: float,
) -> list[int | None]:
    """Exit codes of a process on every host, as `wait` gives them.

    What host 0 says is shown at once, and the last that others said if they fail.

    Args:
        hosts: where.
        start: starts them, given a file for each one's output.
        grace: seconds for others after one has failed.
    """
    with ExitStack() as files:
        others = [files.enter_context(tempfile.TemporaryFile("w+")) for _ in hosts[1:]]
        codes = wait(start([None, *others]), grace)
        for host, code, output in zip(hosts[1:], codes[1:], others, strict=True):
            if code != 0:
                output.seek(0)
                end = "went on" if code is None else f"ended with {code}"
                print(f"host {host.index} {end}:", "".join(output.readlines()[-20:]), sep="\n")
    return codes


def table(hosts: Sequence[Host]) -> str:
    """What went up and down each host's link."""
    lines = ["| host | address | MB up | MB down |", "|---|---|---|---|"]
    for host in hosts:
        sent = host.traffic()
        megabytes = f"{sent.up / 1e6:.2f} | {sent.down / 1e6:.2f}"
        lines.append(f"| {host.index} | {host.address} | {megabytes} |")
    return "\n".join(lines)


def _checked(rate: str | None) -> str | None:
    try:
        bits(rate or "1bit")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return rate


def _rate(text: str) -> Any:
    return typer.Option(help=text, callback=_checked)


def main(
    command: Annotated[
        list[str] | None, typer.Argument(help="What each rank runs, after --.")
    ] = None,
    hosts: Annotated[int, typer.Option(help="Number of hosts.")] = 4,
    ranks: Annotated[int, typer.Option(help="Ranks on each host.")] = 1,
    rate: Annotated[str, _rate("Of each host's link, up and down.")] = "100mbit",
    up: Annotated[str | None, _rate("Up, where that is another rate.")] = None,
    inside: Annotated[str | None, _rate("Between ranks of a host, where limited.")] = None,
    latency: Annotated[float, typer.Option(help="Milliseconds from host to host.")] = 0,
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
    with cluster(hosts, up or rate, rate, inside, latency / 1000) as made:
        codes = run(made, command, ranks, grace)
        print(table(made))
    raise typer.Exit(int(any(code != 0 for code in codes)))


if __name__ == "__main__":
    typer.run(main)
