"""Progress of a training run: a bar on a terminal, short lines elsewhere."""

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from postlocal.meter import human_bytes
from postlocal.train.metrics import Summary

_BAR = 40  # columns


class ProgressDisplay:
    """Progress of one run; a context manager.

    Args:
        console: where to print.
        label: name of the run.
        steps: number of steps of the run.
        shown: whether to print; only rank 0 does.
    """

    def __init__(self, console: Console, label: str, steps: int, shown: bool) -> None:
        self._console = console
        self._label = label
        self._steps = steps
        self._shown = shown
        self._fields: dict[str, str] = {}
        self._first = self._done = 0
        self._began = time.monotonic()
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4)

    def __enter__(self) -> "ProgressDisplay":
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

    def start(self, step: int) -> None:
        """Show that ``step`` steps were done before, and measure time from here."""
        self._first = self._done = step
        self._began = time.monotonic()

    def advance(self, step: int) -> None:
        """Show that ``step`` steps are done."""
        self._done = step

    def step(self, step: int, entry: Mapping[str, Any]) -> None:
        """Show the fields of a ``step`` line of the metrics."""
        sent, ddp = entry["payload_bytes"], entry["ddp_payload_bytes"]
        self._fields["loss"] = f"loss {entry['loss']:.3f}"
        self._fields["sent"] = f"{human_bytes(sent / max(step, 1))}/step"
        self._fields["share"] = f"{_share(sent, ddp)} of DDP's"
        self._fields["wait"] = f"waiting {_share(entry['wait_seconds'], entry['train_seconds'])}"
        if not ddp:  # a worker alone sends nothing
            self._fields = {"loss": self._fields["loss"]}
        if not self._console.is_terminal:
            shown = ("loss", "held-out", "sent")
            self.note("  ".join(self._head() + self._present(*shown) + self._left()))

    def evaluated(self, loss: float) -> None:
        """Show the newest loss on held-out text."""
        self._fields["held-out"] = f"held-out {loss:.3f}"

    def note(self, text: str) -> None:
        """Print a permanent line."""
        if self._shown:
            self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def _head(self) -> list[str]:
        return [self._label, f"{self._done:>{len(str(self._steps))}}/{self._steps}"]

    def _present(self, *names: str) -> list[str]:
        return [self._fields[name] for name in names if name in self._fields]

    def _left(self) -> list[str]:
        """Time left, at the rate so far, with evaluations and checkpoints."""
        taken, left = self._done - self._first, self._steps - self._done
        if not taken or not left:
            return []
        return [f"{human_time((time.monotonic() - self._began) / taken * left)} left"]

    def _render(self) -> Group:
        line = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=self._steps, completed=self._done, width=_BAR)
        label, count = self._head()
        line.add_row(Text(label, style="bold"), bar, count, *self._left())
        names = ("loss", "held-out", "sent", "share", "wait")
        return Group(line, Text("  ".join(self._present(*names))))


def human_time(seconds: float) -> str:
    """Hours, minutes and seconds.

    Example:
        >>> human_time(80), human_time(7325.2)
        ('1:20', '2:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def results(runs: Mapping[str, Summary]) -> Table:
    """The final table, with a column for each run.

    Args:
        runs: label -> results.
    """
    table = Table("", *(Column(escape(label), overflow="fold") for label in runs))
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
        return f"A single worker sends nothing: held-out loss {run.final_val_loss:.4f}."
    ratio = other.payload_bytes / run.payload_bytes
    return (
        f"{run.strategy} sent {human_bytes(run.payload_bytes)} a worker, {ratio:.1f} times less "
        f"than {other.strategy} ({human_bytes(other.payload_bytes)}), and ended at a held-out loss "
        f"of {run.final_val_loss:.4f} against {other.final_val_loss:.4f} "
        f"({100 * (run.final_val_loss / other.final_val_loss - 1):+.1f} %) after the same "
        f"{run.tokens:,} tokens."
    )


def race(run: Summary, other: Summary, loss: float, seconds: float, others: float) -> str:
    """One sentence that compares the times at which two runs reached a loss.

    Args:
        run: results of one run.
        other: results of the other.
        loss: a held-out loss that both reached.
        seconds: training time of ``run`` until then.
        others: training time of ``other`` until then.
    """
    faster, times = (
        ("sooner", others / seconds) if seconds < others else ("later", seconds / others)
    )
    over = f" over an emulated link of {human_rate(run.link)} a worker" if run.link else ""
    return (
        f"{other.strategy} reached a held-out loss of {loss:.3f} after {_seconds(others)}, "
        f"{run.strategy} after {_seconds(seconds)}: {times:.1f} times {faster}{over} "
        f"({_whose(run, other)})."
    )


def _whose(run: Summary, other: Summary) -> str:
    """The name of the loss at which two runs are compared: the higher of the final ones."""
    last = run if run.final_val_loss >= other.final_val_loss else other
    return f"the final loss of {last.strategy}, the higher of the two"


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


def _seconds(seconds: float) -> str:
    """Whole seconds, or two digits of fewer than ten."""
    return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:#.2g} s"


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"
