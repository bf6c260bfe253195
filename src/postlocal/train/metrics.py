"""Output of a training run: metrics and a summary."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from postlocal.meter import SyncRecord

METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
PLOT = "loss.png"


@dataclass(frozen=True)
class Metrics:
    """The log of a run: one JSON object a line, each with ``kind`` and ``step``.

    Kinds and their fields. Bytes are the payload that one worker sent since the start; seconds are
    those of training since the start:

    - ``step``: ``loss`` (nats a byte, of rank 0, mean since the last line), ``lr``, ``tokens``
      (of all workers, from the start), ``tokens_per_second``, ``payload_bytes``,
      ``ddp_payload_bytes`` (what plain fp32 DDP would have sent), ``train_seconds``,
      ``wait_seconds``.
    - ``sync`` (``step`` is that of its start): ``level``, ``fragment`` (its number; null for all
      parameters at once), ``applied`` (step after which it was applied), ``payload_bytes`` (of this
      synchronization, by purpose), ``wait_seconds`` (of this one), ``drift`` (root mean square
      distance of replicas from their mean, relative to its norm; null if unknown), ``excluded``
      (ranks left out).
    - ``eval``: ``val_loss`` (nats a byte, on agreed parameters), ``payload_bytes``,
      ``train_seconds``.

    Args:
        folder: of the run.
    """

    folder: Path

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / METRICS

    def start(self, step: int) -> None:
        """Start, or continue after ``step``; later lines of an interrupted run are dropped."""
        kept = [entry for entry in self.read() if entry["step"] <= step] if step else []
        self.path.write_text("".join(json.dumps(entry) + "\n" for entry in kept))

    def add(self, kind: str, step: int, **fields: Any) -> None:
        """Append one line."""
        with self.path.open("a") as file:
            file.write(json.dumps({"kind": kind, "step": step, **fields}) + "\n")

    def add_sync(self, record: SyncRecord) -> None:
        """Append the line of a synchronization."""
        fields = asdict(record)
        fields["drift"] = record.drift if record.drift < float("inf") else None
        self.add("sync", fields.pop("step"), **fields)

    def read(self) -> list[dict[str, Any]]:
        """All lines, without a last one that is incomplete after a crash."""
        return list(self._entries()) if self.path.exists() else []

    def seconds_to(self, loss: float) -> float | None:
        """Seconds of training until the held-out loss was first this low; None: never.

        Between two evaluations the loss is interpolated linearly over time.
        """
        before = None
        for entry in self.read():
            if entry["kind"] != "eval":
                continue
            now = entry["train_seconds"], entry["val_loss"]
            if now[1] <= loss:
                return _crossing(before or now, now, loss)
            before = now
        return None

    def _entries(self) -> Iterator[dict[str, Any]]:
        for line in self.path.read_text().splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                return


@dataclass
class Summary:
    """The results of a run.

    Attributes:
        strategy: its name.
        strategy_details: the strategy with its arguments, as text.
        workers: number of workers.
        model: name of the model's size.
        parameters: number of parameters.
        steps: optimizer steps.
        tokens: bytes of text that all workers trained on.
        seed: of data and initialization.
        train_seconds: seconds of training, without evaluation and checkpoints.
        wait_seconds: the part of them in which rank 0 waited for communication.
        payload_bytes: bytes that one worker sent.
        payload_bytes_by_purpose: the same, by purpose.
        ddp_payload_bytes: bytes that plain fp32 DDP would have sent in as many steps.
        syncs: number of synchronizations.
        final_val_loss: nats a byte on held-out text, at the end.
        replicas_equal: whether all workers' parameters were equal to the bit at the end.
        versions: versions of postlocal, torch and numpy.
        link: bit/s of the emulated link of each worker; None: there was none.
    """

    strategy: str
    strategy_details: str
    workers: int
    model: str
    parameters: int
    steps: int
    tokens: int
    seed: int
    train_seconds: float
    wait_seconds: float
    payload_bytes: int
    ddp_payload_bytes: int
    syncs: int
    final_val_loss: float
    replicas_equal: bool
    payload_bytes_by_purpose: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    link: float | None = None

    def write(self, folder: Path) -> None:
        """Write it as ``summary.json``, completely or not at all."""
        write_whole(folder / SUMMARY, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Summary":
        """Read it back."""
        return cls(**json.loads((folder / SUMMARY).read_text()))


def write_whole(path: Path, text: str) -> None:
    """Write a file of text, completely or not at all."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text)
    aside.rename(path)


def _crossing(before: tuple[float, float], now: tuple[float, float], loss: float) -> float:
    """When a line between two evaluations, ``(seconds, loss)`` each, reaches a loss."""
    share = (before[1] - loss) / (before[1] - now[1]) if before[1] > now[1] else 1.0
    return before[0] + share * (now[0] - before[0])
