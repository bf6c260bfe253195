"""The page of the documentation that shows the newest record of each benchmark.

    python -m benchmarks.page docs/records.md

The documentation's build calls it, so that the page is never older than the records.
"""

import os
import re
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.report import RECORDS

_INTRODUCTION = """\
# Records

What was measured last, benchmark by benchmark, as the commands wrote it down. What each measures
and how it is read: [benchmarks](benchmarks.md). Older records, and all of them with every figure as
JSON, are in the folder `benchmarks/records` of the repository.
"""


def newest(records: Path) -> list[Path]:
    """The newest record of each name, in the order of names.

    Args:
        records: a folder of files ``DATE-name.md``.
    """
    dated = sorted(path for path in records.glob("*.md") if _NAMED.fullmatch(path.name))
    return sorted({_name(path): path for path in dated}.values(), key=_name)


_NAMED = re.compile(r"\d{4}-\d\d-\d\d-(.+)\.md")


def _name(path: Path) -> str:
    found = _NAMED.fullmatch(path.name)
    assert found is not None
    return found[1]


def section(record: Path, page: Path) -> str:
    """A record one heading lower, with its plot, for a page that lies elsewhere.

    Its command is code, so that Markdown leaves hyphens and asterisks in it alone.
    """
    text = re.sub(r"^#", "##", record.read_text(), flags=re.MULTILINE)
    text = re.sub(r"^- command: (.+)$", r"- command: `\1`", text, flags=re.MULTILINE)
    plot = record.with_suffix(".png")
    if plot.exists():
        there = Path(os.path.relpath(plot, page.parent)).as_posix()
        heading, _, rest = text.partition("\n")
        return f"{heading}\n\n![{heading.strip('# ')}]({there})\n{rest}"
    return text


def render(records: Path, page: Path) -> str:
    """The page in Markdown."""
    sections = [section(record, page).strip() for record in newest(records)]
    return "\n\n".join([_INTRODUCTION.strip(), *sections]) + "\n"


def main(
    page: Annotated[Path, typer.Argument(help="The file to write.")],
    records: Annotated[Path, typer.Option(help="Folder of the records.")] = RECORDS,
) -> None:
    """Write the page."""
    page.write_text(render(records, page))


if __name__ == "__main__":
    typer.run(main)
