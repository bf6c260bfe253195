"""The records of benchmarks: every one is cited, and every command can be run."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from benchmarks.report import RECORDS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
KEPT = sorted(RECORDS.glob("*.md"))
CITED = {
    name
    for page in PAGES
    if "_build" not in page.parts
    for name in re.findall(r"benchmarks/records/([\w.-]+)", page.read_text())
}


@pytest.mark.parametrize("record", KEPT, ids=lambda record: record.stem)
def test_a_page_cites_every_record(record: Path) -> None:
    assert record.name in CITED


def test_every_cited_record_is_there() -> None:
    assert {name for name in CITED if not (RECORDS / name).exists()} == set()


def test_figures_and_plots_belong_to_a_record() -> None:
    assert {file.stem for file in RECORDS.iterdir()} == {record.stem for record in KEPT}
    for record in KEPT:
        assert record.with_suffix(".json").exists()


@pytest.mark.parametrize("record", KEPT, ids=lambda record: record.stem)
def test_the_command_of_a_record_names_a_benchmark(record: Path) -> None:
    found = re.search(r"^- command: python -m (benchmarks\.\w+)", record.read_text(), re.MULTILINE)
    assert found is not None
    assert find_spec(found[1]) is not None
