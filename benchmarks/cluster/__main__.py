"""Run a command under ``torchrun`` on every host of an emulated cluster.

python -m benchmarks.cluster --hosts 4 --rate 100mbit -- python -m postlocal train --steps 100
python -m benchmarks.cluster --hosts 4 --rate 100mbit --check
"""

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from benchmarks.cluster import Host, bits, cluster, run
from benchmarks.cluster.network import missing
from benchmarks.options import checked_rate
from benchmarks.report import markdown_table


def table(hosts: Sequence[Host]) -> str:
    """Megabytes that each host's link carried, in Markdown."""
    sent = [(host, host.traffic()) for host in hosts]
    return markdown_table(
        ["host", "address", "MB up", "MB down"],
        [
            [str(host.index), host.address, f"{link.up / 1e6:.2f}", f"{link.down / 1e6:.2f}"]
            for host, link in sent
        ],
    )


def _rate(text: str) -> Any:
    return typer.Option(help=text, callback=checked_rate)


def main(
    command: Annotated[
        list[str] | None, typer.Argument(help="command of each rank, after --")
    ] = None,
    hosts: Annotated[int, typer.Option(help="number of hosts")] = 4,
    ranks: Annotated[int, typer.Option(help="ranks on each host")] = 1,
    rate: Annotated[str, _rate("rate of each host's link, up and down")] = "100mbit",
    up: Annotated[str | None, _rate("rate up, if it differs")] = None,
    inside: Annotated[
        str | None, _rate("rate between ranks of one host; unlimited by default")
    ] = None,
    latency: Annotated[float, typer.Option(help="latency between hosts, in milliseconds")] = 0,
    check: Annotated[
        bool, typer.Option("--check", help="time an all-reduce against the rate instead")
    ] = False,
    grace: Annotated[
        float, typer.Option(help="seconds to wait for other hosts after one has failed")
    ] = 90,
) -> None:
    """Run a command under torchrun on every host of an emulated cluster."""
    if reason := missing():
        raise typer.BadParameter(reason)
    if check:
        slower = min(bits(up or rate), bits(rate))
        command = ["python", "-m", "benchmarks.cluster.all_reduce", f"{slower:.0f}"]
    if not command:
        raise typer.BadParameter("give a command, such as -- python -m postlocal train")
    with cluster(hosts, up or rate, rate, inside, latency / 1000) as made:
        codes = run(made, command, ranks, grace)
        print(table(made))
    raise typer.Exit(int(any(code != 0 for code in codes)))


if __name__ == "__main__":
    typer.run(main)
