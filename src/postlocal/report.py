"""What a training run leaves for people to look at: metrics, a summary and a plot."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from postlocal.meter import SyncRecord

METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
PLOT = "loss.png"


@dataclass(frozen=True)
class Metrics:
    """The log of a run: one JSON object a line, each with ``kind`` and ``step``.

    Kinds and their fields (bytes are payload that one worker sent since the start, seconds are of
    training only, from the start):

    - ``step``: ``loss`` (nats a byte, of rank 0, mean since the last line), ``lr``, ``tokens``
      (of all workers, from the start), ``tokens_per_second``, ``payload_bytes``,
      ``ddp_payload_bytes`` (what plain fp32 DDP would have sent), ``train_seconds``,
      ``wait_seconds``.
    - ``sync`` (``step`` is that of its launch): ``level``, ``fragment`` (its number; null for all
      parameters at once), ``landed`` (step after which it was applied), ``payload_bytes`` (of this
      synchronization, by purpose), ``wait_seconds`` (of this one), ``drift`` (root mean square
      distance of replicas from their mean, relative to its norm; null if unknown), ``excluded``
      (ranks left out).
    - ``eval``: ``val_loss`` (nats a byte, on agreed parameters), ``payload_bytes``,
      ``train_seconds``.

    Args:
        folder: the run's.
    """

    folder: Path

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / METRICS

    def start(self, step: int) -> None:
        """Begin, or go on after ``step``: what an interrupted run logged later is dropped."""
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
        """All lines; a last one that was cut off by a crash is left out."""
        return list(self._entries()) if self.path.exists() else []

    def _entries(self) -> Iterator[dict[str, Any]]:
        for line in self.path.read_text().splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                return


@dataclass
class Summary:
    """What came out of a run.

    Attributes:
        strategy: its name.
        strategy_details: all of it, as text.
        workers: number of workers.
        model: name of the model's size.
        parameters: number of parameters.
        steps: optimizer steps.
        tokens: bytes of text that all workers trained on.
        seed: of data and initialization.
        train_seconds: seconds of training, without evaluation and checkpoints.
        wait_seconds: those of them in which rank 0 stood still for communication.
        payload_bytes: bytes that one worker sent.
        payload_bytes_by_purpose: the same, by purpose.
        ddp_payload_bytes: bytes that plain fp32 DDP would have sent in as many steps.
        syncs: number of synchronizations.
        final_val_loss: nats a byte on held-out text, at the end.
        replicas_equal: whether all workers' parameters were the same to the bit at the end.
        versions: of the software.
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

    def write(self, folder: Path) -> None:
        """Write it as ``summary.json``, whole or not at all."""
        aside = folder / f".{SUMMARY}.partial"
        aside.write_text(json.dumps(asdict(self), indent=1) + "\n")
        aside.rename(folder / SUMMARY)

    @classmethod
    def read(cls, folder: Path) -> "Summary":
        """Read it back."""
        return cls(**json.loads((folder / SUMMARY).read_text()))


def plot(runs: Mapping[str, Path], to: Path) -> None:
    """Draw loss over training time and over bytes sent.

    Args:
        runs: label -> folder of a run.
        to: the PNG file.
    """
    mpl.use("Agg", force=False)
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    by_time, by_bytes = figure.subplots(1, 2, sharey=True)
    for index, (label, folder) in enumerate(runs.items()):
        entries = Metrics(folder).read()
        steps = [entry for entry in entries if entry["kind"] == "step"]
        evals = [entry for entry in entries if entry["kind"] == "eval"]
        for axes, across, unit in ((by_time, "train_seconds", 1), (by_bytes, "payload_bytes", 1e6)):
            _line(axes, steps, across, unit, "loss", color=f"C{index}", alpha=0.35, linewidth=1)
            _line(
                axes, evals, across, unit, "val_loss",
                color=f"C{index}", marker="o", markersize=4, label=label,
            )  # fmt: skip
    by_time.set(xlabel="training time (s)", ylabel="loss (nats a byte)")
    by_bytes.set(xlabel="bytes sent by a worker (MB)")
    by_bytes.set_xscale("symlog", linthresh=1)
    for axes in (by_time, by_bytes):
        axes.grid(alpha=0.3)
    by_time.legend(title="held-out loss; training loss behind it")
    figure.savefig(to, dpi=120)


def _line(
    axes: Any, entries: Sequence[Mapping[str, Any]], across: str, unit: float, up: str, **style: Any
) -> None:
    horizontal = [entry[across] / unit for entry in entries]
    axes.plot(horizontal, [entry[up] for entry in entries], **style)
