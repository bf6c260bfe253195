"""The page of records."""

from pathlib import Path

from benchmarks.page import newest, render
from benchmarks.report import RECORDS


def record(folder: Path, name: str, text: str, plot: bool = False) -> None:
    (folder / f"{name}.md").write_text(text)
    if plot:
        (folder / f"{name}.png").touch()


def test_the_newest_record_of_each_name_is_shown(tmp_path: Path) -> None:
    record(tmp_path, "2026-01-02-speed", "# Speed\n\nold\n")
    record(tmp_path, "2026-02-01-speed", "# Speed\n\nnew\n")
    record(tmp_path, "2026-01-01-loss", "# Loss\n\nlow\n")
    record(tmp_path, "notes", "# Notes\n")
    assert [path.stem for path in newest(tmp_path)] == ["2026-01-01-loss", "2026-02-01-speed"]


def test_headings_are_lowered_and_plots_are_found_from_the_page(tmp_path: Path) -> None:
    folder = tmp_path / "records"
    folder.mkdir()
    record(folder, "2026-01-01-loss", "# Loss\n\n## Low\n", plot=True)
    text = render(folder, tmp_path / "docs" / "page.md")
    assert "\n## Loss\n\n![Loss](../records/2026-01-01-loss.png)\n\n### Low\n" in text


def test_commands_are_code_so_that_hyphens_and_asterisks_stay(tmp_path: Path) -> None:
    record(tmp_path, "2026-01-01-loss", "# Loss\n\n- command: python -m x --settings 'a-*,b-*'\n")
    assert "\n- command: `python -m x --settings 'a-*,b-*'`\n" in render(
        tmp_path, tmp_path / "page.md"
    )


def test_there_is_a_record_with_its_command_for_every_section() -> None:
    for path in newest(RECORDS):
        assert "- command: python -m benchmarks." in path.read_text(), path
