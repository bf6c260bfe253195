"""What a training run shows while it goes on: a live panel on a terminal, plain lines elsewhere."""

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from postlocal.meter import human_bytes
from postlocal.report import Summary

_HEADINGS = ("loss", "held-out loss", "tokens/s", "sent/step", "of DDP's", "waiting", "drift")


class View:
    """Progress of one run; to be used in a ``with`` block.

    Args:
        console: where to print.
        label: name of the run.
        steps: number of steps of the run.
        shown: whether to print at all; only rank 0 does.
    """

    def __init__(self, console: Console, label: str, steps: int, shown: bool) -> None:
        self._console = console
        self._label = label
        self._steps = steps
        self._shown = shown
        self._latest = dict.fromkeys(_HEADINGS, "-")
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task(label, total=steps)
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4)

    def __enter__(self) -> "View":
        if self._shown and self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live.is_started:
            self._live.stop()

    def advance(self, step: int) -> None:
        """Show that ``step`` steps are done."""
        self._progress.update(self._task, completed=step)

    def step(self, step: int, entry: Mapping[str, Any]) -> None:
        """Show the fields of a ``step`` line of the metrics."""
        seconds = max(entry["train_seconds"], 1e-9)
        sent, ddp = entry["payload_bytes"], entry["ddp_payload_bytes"]
        self._latest["loss"] = f"{entry['loss']:.3f}"
        self._latest["tokens/s"] = f"{entry['tokens_per_second']:,.0f}"
        self._latest["sent/step"] = human_bytes(sent / max(step, 1))
        self._latest["of DDP's"] = f"{100 * sent / ddp:.1f} %" if ddp else "-"
        self._latest["waiting"] = f"{100 * entry['wait_seconds'] / seconds:.1f} %"
        self._line(step)

    def sync(self, drift: float) -> None:
        """Show the drift of the latest synchronization."""
        self._latest["drift"] = f"{drift:.4f}"

    def evaluated(self, loss: float) -> None:
        """Show the latest loss on held-out text."""
        self._latest["held-out loss"] = f"{loss:.3f}"

    def note(self, text: str) -> None:
        """Print a line that stays."""
        if self._shown:
            self._console.print(text, highlight=False, soft_wrap=True)

    def _line(self, step: int) -> None:
        if not self._console.is_terminal:
            fields = ", ".join(f"{name} {value}" for name, value in self._latest.items())
            self.note(f"{self._label} {step}/{self._steps}: {fields}")

    def _render(self) -> Group:
        table = Table(*_HEADINGS, expand=True)
        table.add_row(*self._latest.values())
        return Group(self._progress, table)


def results(runs: Mapping[str, Summary]) -> Table:
    """The closing table: a column a run.

    Args:
        runs: label -> what came out.
    """
    table = Table("", *runs)
    if any(run.link for run in runs.values()):
        table.add_row("emulated link of a worker", *(human_rate(run.link) for run in runs.values()))
    rows: dict[str, Callable[[Summary], str]] = {
        "held-out loss (nats a byte)": lambda run: f"{run.final_val_loss:.4f}",
        "sent by a worker": lambda run: human_bytes(run.payload_bytes),
        "of fp32 DDP's": lambda run: _share(run.payload_bytes, run.ddp_payload_bytes),
        "training time": lambda run: f"{run.train_seconds:.1f} s",
        "waiting": lambda run: _share(run.wait_seconds, run.train_seconds),
        "synchronizations": lambda run: str(run.syncs),
        "replicas equal": lambda run: "yes" if run.replicas_equal else "NO",
    }
    for name, cell in rows.items():
        table.add_row(name, *map(cell, runs.values()))
    return table


def verdict(run: Summary, other: Summary) -> str:
    """One sentence that compares bytes and final losses of a run with those of another one."""
    if not run.payload_bytes:
        return f"One worker has nobody to send to: held-out loss {run.final_val_loss:.4f}."
    ratio = other.payload_bytes / run.payload_bytes
    return (
        f"{run.strategy} sent {human_bytes(run.payload_bytes)} a worker, {ratio:.1f} times less "
        f"than {other.strategy} ({human_bytes(other.payload_bytes)}), and ended at a held-out loss "
        f"of {run.final_val_loss:.4f} against {other.final_val_loss:.4f} "
        f"({100 * (run.final_val_loss / other.final_val_loss - 1):+.1f} %) after the same "
        f"{run.tokens:,} tokens."
    )


def race(run: Summary, other: Summary, loss: float, seconds: float, others: float) -> str:
    """One sentence that compares when two runs came to a loss.

    Args:
        run: what came out of the one.
        other: what came out of the other.
        loss: a held-out loss that both reached.
        seconds: of training until the one was there.
        others: of training until the other was there.
    """
    faster, times = (
        ("sooner", others / seconds) if seconds < others else ("later", seconds / others)
    )
    over = f" over an emulated link of {human_rate(run.link)} a worker" if run.link else ""
    return (
        f"{other.strategy} was at a held-out loss of {loss:.3f} after {others:.0f} s, "
        f"{run.strategy} after {seconds:.0f} s: {times:.1f} times {faster}{over} "
        f"({_whose(run, other)})."
    )


def _whose(run: Summary, other: Summary) -> str:
    """Which loss it is that two runs are compared at: the worse of those that they ended at."""
    last = run if run.final_val_loss >= other.final_val_loss else other
    return f"the loss that {last.strategy} ended at, the higher of the two"


def human_rate(rate: float | None) -> str:
    """A rate in bit/s with three digits and a unit.

    Example:
        >>> human_rate(40e6), human_rate(None)
        ('40 Mbit/s', '-')
    """
    if rate is None:
        return "-"
    for unit in ("", "k", "M"):
        if rate < 1000:
            return f"{rate:.3g} {unit}bit/s"
        rate /= 1000
    return f"{rate:.3g} Gbit/s"


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"
