"""A loopback interface of our own, that can be slow and that nobody else uses."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

NAMESPACES = Path("/run/netns")
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)

Limit = Callable[[float], None]
"""Takes the rate in bits a second that all traffic through the interface shares."""


def missing() -> str | None:
    """Why there can be no interface of our own here; None if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [command for command in ("ip", "tc") if shutil.which(command) is None]
    if absent:
        return f"{' and '.join(absent)} not found: install iproute2"
    return None


@contextmanager
def own_loopback() -> Iterator[Limit]:
    """Move this thread, and the processes it starts from here on, to a new network namespace.

    It holds nothing but a loopback interface, of unlimited rate until the function that the
    ``with`` statement gives is called. The namespace is removed at the end, also after a failure.

    Raises:
        RuntimeError: where there are no namespaces; see `missing`.
    """
    if reason := missing():
        raise RuntimeError(reason)
    name = f"postlocal-{os.getpid()}"
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    _command("ip", "netns", "add", name)
    try:
        _command("ip", "-n", name, "link", "set", "lo", "up")
        own = os.open(NAMESPACES / name, os.O_RDONLY)
        _enter(own)
        os.close(own)
        yield _limit
    finally:
        _enter(home)
        os.close(home)
        _command("ip", "netns", "del", name)


def _limit(bits_a_second: float) -> None:
    rate = f"{bits_a_second:.0f}bit"
    _command(
        "tc", "qdisc", "replace", "dev", "lo", "root", "tbf", "rate", rate, "burst", "256kb",
        "latency", "400ms",
    )  # fmt: skip


def _enter(namespace: int) -> None:
    if _libc.setns(namespace, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns failed")


def _command(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)  # noqa: S603
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
