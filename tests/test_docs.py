"""What the pages of the documentation show, and that their scripts run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts)


def fenced(text: str) -> list[str]:
    """The blocks of code of a page."""
    return re.findall(r"^```[^\n]*\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_examples_stand_in_fences(page: Path) -> None:
    text = page.read_text()
    prompts = text.count("\n>>> ")
    assert sum(f"\n{block}".count("\n>>> ") for block in fenced(text)) == prompts


def test_the_front_page_leads_to_every_other_page() -> None:
    shown = {DOCS / "index.md"}
    waiting = [DOCS / "index.md"]
    while waiting:
        page = waiting.pop()
        for tree in re.findall(r"```{toctree}\n(.*?)```", page.read_text(), flags=re.DOTALL):
            names = [line for line in tree.split() if not line.startswith(":")]
            found = {page.parent / f"{name}.md" for name in names} & set(PAGES)
            waiting += found - shown
            shown |= found
    assert set(PAGES) == shown


def test_the_script_of_the_quick_start_runs_under_torchrun(tmp_path: Path) -> None:
    text = (DOCS / "quickstart.md").read_text()
    (script,) = [block for block in fenced(text) if "init_process_group" in block]
    (tmp_path / "train.py").write_text(script)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--standalone", "--nproc-per-node", "2", "train.py"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    kind = r"100 steps, 10 synchronizations, \S+ kB sent, waited \S+ s"
    assert re.fullmatch(kind, done.stdout.strip())
    assert re.search(kind, text)
