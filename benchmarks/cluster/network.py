"""Network namespaces whose interfaces have limited rates and carry no other traffic.

They have no names: one ends with the last process in it and the last handle on it, so nothing is
left behind, however this process ends.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

_CLONE_NEWNET = 0x40000000
_LOOPBACK_BURST = 256 * 1024  # its packets have up to 64 KiB
_libc = ctypes.CDLL(None, use_errno=True)

Limit = Callable[[float], None]
"""Takes the rate in bits a second that all traffic through the interface shares."""


def missing() -> str | None:
    """Why no namespace can be made here; None if one can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [command for command in ("ip", "tc") if shutil.which(command) is None]
    if absent:
        return f"{' and '.join(absent)} not found: install iproute2"
    return None


class Namespace:
    """A new network namespace; it holds a loopback interface, which is up.

    Raises:
        RuntimeError: where there are no namespaces; see `missing`.
    """

    def __init__(self) -> None:
        if reason := missing():
            raise RuntimeError(reason)
        home = _open()
        try:
            _check(_libc.unshare(_CLONE_NEWNET), "unshare")
            self._handle = _open()
            _enter(home)
        finally:
            os.close(home)
        self.command("ip", "link", "set", "lo", "up")

    @property
    def path(self) -> str:
        """What ``ip`` can be given as a name, while this process lives."""
        return f"/proc/{os.getpid()}/fd/{self._handle}"

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Move this thread into it for the block, with all processes that it starts."""
        home = _open()
        _enter(self._handle)
        try:
            yield
        finally:
            _enter(home)
            os.close(home)

    def command(self, *words: str) -> None:
        """Run a command in it.

        Raises:
            RuntimeError: with the command and its errors, if it fails.
        """
        with self.entered():
            done = subprocess.run(words, capture_output=True, text=True)  # noqa: S603
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")

    def limit(self, device: str, bits_a_second: float, burst: int) -> None:
        """Limit what leaves through an interface; ``burst`` bytes may go at once."""
        self.command(
            "tc", "qdisc", "replace", "dev", device, "root", "tbf", "rate",
            f"{bits_a_second:.0f}bit", "burst", f"{burst}b", "latency", "400ms",
        )  # fmt: skip

    def processes(self) -> list[int]:
        """Other processes in it, whoever started them."""
        own = os.fstat(self._handle).st_ino
        pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        return [pid for pid in pids if pid != os.getpid() and _namespace_of(pid) == own]

    def kill(self, patience: float = 10.0) -> None:
        """Kill all other processes in it, and wait until they are gone.

        Raises:
            RuntimeError: naming those that are there after ``patience`` seconds.
        """
        deadline = time.monotonic() + patience
        while pids := self.processes():
            if time.monotonic() > deadline:
                raise RuntimeError(f"processes {pids} do not end")
            for pid in pids:
                _kill(pid)
            time.sleep(0.01)

    def close(self) -> None:
        """Close the handle on it."""
        os.close(self._handle)


@contextmanager
def own_loopback() -> Iterator[Limit]:
    """Move this thread, and the processes it starts from here on, to a new network namespace.

    It holds nothing but a loopback interface, of unlimited rate until the function that the
    ``with`` statement gives is called. The namespace is removed at the end, also after a failure.

    Raises:
        RuntimeError: where there are no namespaces; see `missing`.
    """
    own = Namespace()
    try:
        with own.entered():
            yield lambda bits_a_second: own.limit("lo", bits_a_second, _LOOPBACK_BURST)
    finally:
        own.close()


@dataclass(frozen=True)
class Traffic:
    """What went through an interface so far, frames included.

    Packets are those that the kernel handed over, each with one header of 66 bytes: an interface
    that is not hardware is given more at once than fits a packet on a wire.

    Attributes:
        up: bytes sent.
        down: bytes received.
        packets_up: packets sent.
        packets_down: packets received.
    """

    up: int
    down: int
    packets_up: int
    packets_down: int

    def __sub__(self, earlier: "Traffic") -> "Traffic":
        return Traffic(
            self.up - earlier.up,
            self.down - earlier.down,
            self.packets_up - earlier.packets_up,
            self.packets_down - earlier.packets_down,
        )


def traffic(device: str) -> Traffic:
    """The counters of an interface in this thread's namespace."""
    for line in Path("/proc/thread-self/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == device:
            fields = [int(field) for field in counters.split()]
            return Traffic(fields[8], fields[0], fields[9], fields[1])
    raise RuntimeError(f"there is no interface {device} in /proc/thread-self/net/dev")


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise SystemExit in the block, so that it frees what it holds."""
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, _exit) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _open() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY)


def _enter(namespace: int) -> None:
    _check(_libc.setns(namespace, _CLONE_NEWNET), "setns")


def _check(result: int, what: str) -> None:
    if result:
        raise OSError(ctypes.get_errno(), f"{what} failed")


def _namespace_of(pid: int) -> int | None:
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino
    except (FileNotFoundError, PermissionError):  # it has ended, or was never ours
        return None


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
