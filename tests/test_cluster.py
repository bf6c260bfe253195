"""Training on several hosts, which are namespaces of this machine, with torchrun on each."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmarks.cluster import cluster, network, torchrun, wait
from benchmarks.cluster.hosts import Host, bits

pytestmark = [
    pytest.mark.cluster,
    # The other method ends this process where it stands, and leaves those on the hosts.
    pytest.mark.timeout(300, method="signal"),
    pytest.mark.skipif(network.missing() is not None, reason=str(network.missing())),
]

HEADERS = 66  # Ethernet, IP and TCP


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120  # processes import torch on a machine that does more
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def namespace_of(pid: int) -> int:
    return os.stat(f"/proc/{pid}/ns/net").st_ino


def holders(namespace: int) -> Iterator[Path]:
    """What keeps a namespace alive: processes in it, and files open anywhere."""
    for link in [*Path("/proc").glob("[0-9]*/ns/net"), *Path("/proc").glob("[0-9]*/fd/*")]:
        try:
            if link.stat().st_ino == namespace and str(link.readlink()).startswith("net:"):
                yield link
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            continue


DAEMON = ("sh", "-c", "setsid sleep 1000 & exec sleep 1000")


def children() -> str:
    return Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text()


def test_nothing_is_left_when_the_body_raises() -> None:
    before = children()
    with pytest.raises(KeyError), cluster(hosts=2, latency=0.01) as hosts:
        process = hosts[0].run(*DAEMON)
        wait_for(lambda: len(hosts[0].processes()) == 2)
        namespace = namespace_of(process.pid)
        assert list(holders(namespace))
        raise KeyError
    assert children() == before
    assert process.returncode == -signal.SIGKILL
    assert not list(holders(namespace))


SCRIPT = """
import time
from benchmarks.cluster import cluster
with cluster(hosts=1) as (host,):
    print(host.run("sleep", "1000").pid, flush=True)
    time.sleep(1000)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_nothing_is_left_after_a_signal(number: signal.Signals) -> None:
    command = [sys.executable, "-c", SCRIPT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        namespace = namespace_of(int(process.stdout.readline()))
        process.send_signal(number)
    assert process.returncode == 128 + number
    assert not list(holders(namespace))


def connection(sender: Host, receiver: Host) -> tuple[socket.socket, socket.socket]:
    with receiver.entered(), socket.create_server((receiver.address, 0)) as server:
        with sender.entered():
            up = socket.create_connection(server.getsockname(), timeout=20)
        down, _ = server.accept()
    down.settimeout(20)
    return up, down


def seconds_to_send(sender: Host, receiver: Host, count: int) -> float:
    up, down = connection(sender, receiver)
    with up, down:
        start = time.monotonic()
        sending = threading.Thread(target=up.sendall, args=(bytes(count),))
        sending.start()
        left = count
        while left:
            left -= len(down.recv(left))
        seconds = time.monotonic() - start
        sending.join()
    return seconds


def assert_seconds(measure: Callable[[], float], least: float, below: float) -> None:
    """None of up to 50 measurements is too short, and one is not too long.

    A busy machine makes some of them long, but not all.
    """
    for _ in range(50):
        seconds = measure()
        assert seconds >= least
        if seconds < below:
            return
    raise AssertionError(f"it never took less than {below} s")


def test_each_direction_has_its_rate() -> None:
    count = 1_000_000
    there, back = (8 * count / rate for rate in (20e6, 40e6))
    with cluster(hosts=2, up=["20mbit", None], down="40mbit") as (first, second):
        assert_seconds(lambda: seconds_to_send(first, second, count), 0.9 * there, 2 * there)
        assert_seconds(lambda: seconds_to_send(second, first, count), 0.9 * back, 2 * back)


def test_what_a_link_carried_is_counted_each_way() -> None:
    count = 1_000_000
    with cluster(hosts=2, up=["20mbit", None], down="40mbit") as (first, second):
        before = first.traffic()
        seconds_to_send(first, second, count)
        there = first.traffic() - before
        seconds_to_send(second, first, count)
        back = first.traffic() - before
    assert count < there.up < 1.1 * count
    assert there.down < 0.1 * count
    assert count < back.down < 1.1 * count


def test_latency_is_from_host_to_host_and_leaves_the_rate() -> None:
    with cluster(hosts=2, up="100mbit", down="100mbit", latency=0.02) as (first, second):
        up, down = connection(first, second)
        with up, down:
            assert_seconds(lambda: seconds_for_a_round_trip(up, down), 0.04, 0.05)
        assert_seconds(lambda: seconds_to_send(first, second, 5_000_000), 0.4, 0.8)


def seconds_for_a_round_trip(one: socket.socket, other: socket.socket) -> float:
    start = time.monotonic()
    for sender, receiver in ((one, other), (other, one)):
        sender.sendall(b"x")
        receiver.recv(1)
    return time.monotonic() - start


def test_a_link_that_was_cut_loses_what_is_sent_until_it_is_restored() -> None:
    with cluster(hosts=2) as (first, second):
        up, down = connection(first, second)
        with up, down:
            second.cut()
            up.sendall(b"lost at first")
            down.settimeout(0.3)
            with pytest.raises(TimeoutError):
                down.recv(1)
            second.restore()
            down.settimeout(20)
            assert down.recv(100) == b"lost at first"


BAD: list[tuple[dict[str, Any], str]] = [
    ({"latency": -1.0}, "latency must be 0 to 10 s, got -1.0"),
    ({"hosts": 0}, "hosts must be 1 to 100, got 0"),
    ({"up": "100"}, "rate must be above 0 in bit, kbit, mbit or gbit, got '100'"),
    ({"down": "0mbit"}, "rate must be above 0 .* got '0mbit'"),
    ({"inside": "fast"}, "rate must be above 0 .* got 'fast'"),
    ({"down": ["1mbit"]}, "down must be one rate, or one for each of 4 hosts"),
]


@pytest.mark.parametrize(("bad", "message"), BAD)
def test_a_bad_argument_is_named(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message), cluster(**bad):
        raise AssertionError("it was taken")


def test_rates_are_in_bits_a_second() -> None:
    assert [bits(rate) for rate in ("8bit", "1.5kbit", "100mbit", "10gbit")] == [8, 1500, 1e8, 1e10]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text with some structure, made up."""
    path = tmp_path_factory.mktemp("data") / "numbers.txt"
    path.write_text("\n".join(f"{n} times {n} is {n * n}" for n in range(3000)))
    return path


def trainer(out: Path, data: Path, *more: str) -> list[str]:
    return [
        "python", "-m", "postlocal", "train", "--data", str(data), "--out", str(out),
        "--batch-size", "2", "--sequence-length", "32", "--eval-sequences", "16",
        "--checkpoint-every", "100000",
        "--strategy", "streaming_diloco(period=4, fragments=2)", *more,
    ]  # fmt: skip


def test_replicas_on_two_hosts_end_equal_and_their_links_carried_what_the_meter_counted(
    data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = trainer(out, data, "--steps", "60", "--wire", "fp32")
    with cluster(hosts=2) as hosts, (tmp_path / "output").open("w+") as output:
        codes = wait(torchrun(hosts, command, outputs=[output] * 2), grace=30)
        # The last host has nothing to broadcast when training starts, and no store to answer for.
        sent = hosts[-1].traffic()
        assert not hosts[0].processes()
    assert codes == [0, 0], (tmp_path / "output").read_text()
    summary = json.loads((out / "summary.json").read_text())
    assert summary["replicas_equal"]
    ratio = (sent.up - HEADERS * sent.packets_up) / summary["payload_bytes"]
    assert 1 <= ratio < 1.02  # 1.002 was seen


def test_when_a_link_is_cut_every_rank_ends_in_time_and_names_those_behind_it(
    data: Path, tmp_path: Path
) -> None:
    metrics = tmp_path / "out" / "metrics.jsonl"
    command = trainer(tmp_path / "out", data, "--steps", "100000", "--timeout", "10")
    with cluster(hosts=2) as hosts, (tmp_path / "output").open("w+") as output:
        agents = torchrun(hosts, command, 2, [output] * 2)
        wait_for(lambda: metrics.exists() and '"sync"' in metrics.read_text())
        hosts[1].cut()
        # At a host that cannot reach the first, torchrun itself waits until TCP gives up.
        wait_for(lambda: hosts[1].processes() == [agents[1].pid])
        wait_for(lambda: not hosts[0].processes())
    said = (tmp_path / "output").read_text()
    assert agents[0].returncode == 1, said
    for rank in (0, 1):
        line = re.search(rf"rank {rank}: error: .*", said)
        assert line is not None, said
        assert re.search(r"of rank [23]|: rank [23] \(last seen", line[0]), said
        assert not re.search(r"of rank [01]|rank [01] \(last seen", line[0]), said
    for rank in (2, 3):
        assert re.search(rf"rank {rank}: error: .*out of reach", said), said
