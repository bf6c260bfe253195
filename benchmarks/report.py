"""Tables, drawings, and the dated record of a benchmark."""

import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure

_PACKAGES = ("accelerate", "hivemind", "torchft")  # the packages of the extra `peers`
RECORDS = Path(__file__).parent / "records"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown.

    Example:
        >>> print(markdown_table(["codec", "bits"], [["int8", "8"]]))
        | codec | bits |
        |---|---|
        | int8 | 8 |
    """
    lines = [_row(header), "|---" * len(header) + "|", *map(_row, rows)]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


@contextmanager
def drawing(to: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches, which is saved at the end of the ``with`` block."""
    mpl.use("Agg", force=False)
    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure
    to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(to, dpi=110)


def machine() -> dict[str, Any]:
    """Hardware and versions, for a record."""
    cpu = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "peers": _peers(),
        "backend": "gloo over loopback, 1 thread a rank",
        "kernels": os.environ.get("POSTLOCAL_KERNELS", "auto"),
        "command": shlex.join(["python", "-m", _module(), *sys.argv[1:]]),
    }


def _peers() -> str:
    known = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    found = [f"{name} {known[name]}" for name in _PACKAGES if name in known]
    return ", ".join(found) or "none installed"


def _module() -> str:
    file = Path(sys.argv[0])
    return "benchmarks." + (file.parent.name if file.stem == "__main__" else file.stem)


def write_record(
    name: str,
    title: str,
    content: dict[str, Any],
    text: str,
    draw: Callable[[Path], None] | None = None,
) -> None:
    """Write ``records/DATE-name.json`` and ``.md``, and ``.png`` where there is a drawing.

    Args:
        name: of the files, behind the date.
        title: heading of the ``.md``.
        content: all figures, as plain values; the machine is added.
        text: tables of the ``.md``, behind the machine.
        draw: draws into the file that it is given.
    """
    about = machine()
    RECORDS.mkdir(exist_ok=True)
    path = RECORDS / f"{about['date']}-{name}"
    path.with_suffix(".json").write_text(json.dumps({"machine": about, **content}, indent=1) + "\n")
    facts = "\n".join(f"- {key.replace('_', ' ')}: {value}" for key, value in about.items())
    path.with_suffix(".md").write_text(f"# {title}\n\n{facts}\n\n{text}")
    if draw is not None:
        draw(path.with_suffix(".png"))
    print(f"Record: {path.with_suffix('.md')}")
