"""What communication costs: bytes sent by purpose, seconds waited, and drift, sync by sync."""

import math
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from threading import Lock
from typing import Any, Literal

Purpose = Literal["gradients", "parameters", "buffers", "optimizer", "control"]


@dataclass
class SyncRecord:
    """One synchronization.

    Attributes:
        step: optimizer steps taken before it was launched.
        level: with whom.
        fragment: number of the fragment, from 0; None for all parameters at once.
        landed: optimizer steps taken before its result was applied; None until then.
        payload_bytes: bytes this rank sent, by purpose.
        wait_seconds: seconds that training stood still.
        drift: how far replicas were apart: root mean square distance from their mean, relative
            to the norm of the mean. NaN where no replica was finite.
        excluded: ranks of the level's group whose contribution was left out of the mean.
    """

    step: int
    level: str
    fragment: int | None = None
    landed: int | None = None
    payload_bytes: dict[str, int] = field(default_factory=dict)
    wait_seconds: float = 0.0
    drift: float = math.nan
    excluded: tuple[int, ...] = ()

    def state_dict(self) -> dict[str, Any]:
        """All of it, as plain values."""
        return asdict(self)


class Meter:
    """Counts what this rank sends and how long it waits; several threads may count at a time.

    Payload is what an algorithm sends, without the framing of any protocol below it.

    Args:
        history: number of latest records kept in `records`.

    Attributes:
        payload_bytes: bytes sent since the start, by purpose: ``gradients``, ``parameters``,
            ``buffers``, ``optimizer`` (its state) and ``control``.
        wait_seconds: seconds that training stood still for communication.
        syncs: number of synchronizations.
        excluded: number of contributions left out of a mean.
        records: the latest synchronizations, in the order in which they ended.

    Example:
        >>> meter = Meter()
        >>> record = SyncRecord(step=16, level="world")
        >>> with meter.waiting(record):
        ...     meter.count("parameters", 4096, record)
        >>> meter.close(record)
        >>> meter.total_bytes, record.payload_bytes["parameters"], meter.syncs
        (4096, 4096, 1)
    """

    def __init__(self, history: int = 1000) -> None:
        self.payload_bytes: Counter[str] = Counter()
        self.wait_seconds = 0.0
        self.syncs = 0
        self.excluded = 0
        self.records: deque[SyncRecord] = deque(maxlen=history)
        self._lock = Lock()

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
        """Add seconds that training stood still."""
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
        """The totals, as plain values; `records` start anew after a resume."""
        return {
            "payload_bytes": dict(self.payload_bytes),
            "wait_seconds": self.wait_seconds,
            "syncs": self.syncs,
            "excluded": self.excluded,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting from a saved state."""
        self.payload_bytes = Counter(state["payload_bytes"])
        self.wait_seconds = state["wait_seconds"]
        self.syncs = state["syncs"]
        self.excluded = state["excluded"]
