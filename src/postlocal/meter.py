"""The cost of communication: bytes sent by purpose, seconds waited, and drift, sync by sync."""

import math
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from threading import Lock
from typing import Any, Literal

from postlocal.checks import count

Purpose = Literal["gradients", "parameters", "buffers", "optimizer", "control"]


@dataclass
class SyncRecord:
    """One synchronization.

    Attributes:
        step: optimizer steps taken before it was started.
        level: level at which ranks synchronized.
        fragment: number of the fragment, from 0; None for all parameters at once.
        applied: optimizer steps taken before its result was applied; None until then.
        payload_bytes: bytes this rank sent, by purpose.
        wait_seconds: seconds that training waited.
        drift: root mean square distance of replicas from their mean, relative to the norm of the
            mean. NaN if no replica was finite.
        excluded: ranks of the level's group whose contribution was left out of the mean.
    """

    step: int
    level: str
    fragment: int | None = None
    applied: int | None = None
    payload_bytes: dict[str, int] = field(default_factory=dict)
    wait_seconds: float = 0.0
    drift: float = math.nan
    excluded: tuple[int, ...] = ()

    def __str__(self) -> str:
        which = "" if self.fragment is None else f", fragment {self.fragment}"
        drift = "" if math.isnan(self.drift) else f", drift {self.drift:.3g}"
        left_out = f", left out: rank {_listed(self.excluded)}" if self.excluded else ""
        sent = human_bytes(sum(self.payload_bytes.values()))
        return (
            f"step {self.step}, {self.level}{which}: {sent} sent, "
            f"waited {human_seconds(self.wait_seconds)}{drift}{left_out}"
        )

    def state_dict(self) -> dict[str, Any]:
        """All of it, as plain values."""
        return asdict(self)


class Meter:
    """Counts what this rank sends and how long it waits; several threads may count at a time.

    Payload is the data that an algorithm sends, without the headers of protocols below it.

    Args:
        history: number of latest records kept in `records`, at least 0.

    Attributes:
        payload_bytes: bytes sent since the start, by purpose: ``gradients``, ``parameters``,
            ``buffers``, ``optimizer`` (its state) and ``control``.
        wait_seconds: seconds that training waited for communication.
        syncs: number of synchronizations.
        excluded: number of contributions left out of a mean.
        records: the latest synchronizations, in the order in which they ended.

    Raises:
        TypeError: if ``history`` is no whole number.
        ValueError: if it is negative.

    Example:
        >>> meter = Meter()
        >>> record = SyncRecord(step=16, level="world")
        >>> with meter.waiting(record):
        ...     meter.count("parameters", 4096, record)
        >>> meter.close(record)
        >>> meter.total_bytes, record.payload_bytes["parameters"], meter.syncs
        (4096, 4096, 1)
        >>> print(meter)
        1 synchronization, 4.1 kB sent, waited 0 s
        >>> print(record)
        step 16, world: 4.1 kB sent, waited 0 s
    """

    def __init__(self, history: int = 1000) -> None:
        history = count("history", history, "record", least=0)
        self.payload_bytes: Counter[str] = Counter()
        self.wait_seconds = 0.0
        self.syncs = 0
        self.excluded = 0
        self.records: deque[SyncRecord] = deque(maxlen=history)
        self._lock = Lock()

    def __str__(self) -> str:
        plural = "" if self.syncs == 1 else "s"
        left_out = f", contributions left out: {self.excluded:,}" if self.excluded else ""
        return (
            f"{self.syncs:,} synchronization{plural}, {human_bytes(self.total_bytes)} sent, "
            f"waited {human_seconds(self.wait_seconds)}{left_out}"
        )

    def __repr__(self) -> str:
        return f"<Meter: {self}>"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state, _lock=Lock())

    @property
    def total_bytes(self) -> int:
        """Bytes sent since the start, for every purpose."""
        return sum(self.payload_bytes.values())

    def count(self, purpose: Purpose, payload_bytes: int, record: SyncRecord | None = None) -> None:
        """Add bytes sent, to the total and to a synchronization's record."""
        with self._lock:
            self.payload_bytes[purpose] += payload_bytes
            if record is not None:
                before = record.payload_bytes.get(purpose, 0)
                record.payload_bytes[purpose] = before + payload_bytes

    def wait(self, seconds: float, record: SyncRecord | None = None) -> None:
        """Add seconds that training waited."""
        with self._lock:
            self.wait_seconds += seconds
            if record is not None:
                record.wait_seconds += seconds

    @contextmanager
    def waiting(self, record: SyncRecord | None = None) -> Iterator[None]:
        """Add the time that the ``with`` block takes, unless it fails."""
        start = time.perf_counter()
        yield
        self.wait(time.perf_counter() - start, record)

    def close(self, record: SyncRecord) -> None:
        """Keep the record of a synchronization that has ended."""
        self.syncs += 1
        self.excluded += len(record.excluded)
        self.records.append(record)

    def state_dict(self) -> dict[str, Any]:
        """The totals, as plain values; `records` are not part of it."""
        return {
            "payload_bytes": dict(self.payload_bytes),
            "wait_seconds": self.wait_seconds,
            "syncs": self.syncs,
            "excluded": self.excluded,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        self.payload_bytes = Counter(state["payload_bytes"])
        self.wait_seconds = state["wait_seconds"]
        self.syncs = state["syncs"]
        self.excluded = state["excluded"]


def human_bytes(count: float) -> str:
    """A number of bytes with three digits and a unit.

    Example:
        >>> human_bytes(1234567)
        '1.23 MB'
    """
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 999.5:  # from here on, three digits round to 1e+03
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} PB"


def human_seconds(seconds: float) -> str:
    """Seconds with two digits, to the millisecond; whole ones from 10 on.

    Example:
        >>> human_seconds(0.2134), human_seconds(9876.5)
        ('0.21 s', '9,876 s')
    """
    if seconds >= 9.95:
        return f"{seconds:,.0f} s"
    return f"{round(seconds, 3):.2g} s"


def _listed(ranks: tuple[int, ...]) -> str:
    return ", ".join(map(str, ranks))
