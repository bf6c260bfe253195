"""The tools for developers: what they check is there, and the check of a device runs on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tools import device_check, torch_versions

ROOT = Path(__file__).parents[1]
NOT_NEEDED = ("hypothesis", "matplotlib", "pydantic", "rich", "safetensors", "simpy", "typer")


def test_the_core_tests_are_there() -> None:
    assert [name for name in torch_versions.CORE if not (ROOT / name).exists()] == []


def test_what_the_core_tests_need_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert {line.partition("==")[0] for line in lines} >= set(torch_versions.NEEDS)


def test_a_version_that_pip_does_not_find_is_a_row_with_what_pip_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(version: str, folder: Path, commands: torch_versions.Commands) -> Path:
        raise torch_versions.Failed("installing torch: No matching distribution")

    monkeypatch.setattr(torch_versions, "install", refuse)
    outcome = torch_versions.try_version("9.9.9", tmp_path, [], limit=1.0)
    assert not outcome.passed
    assert "| 9.9.9 | not installed: installing torch: No matching" in outcome.row()


def test_a_command_ends_when_its_time_is_up(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("")
    commands = torch_versions.Commands(log, limit=1.5)
    with pytest.raises(torch_versions.Failed, match=r"sleeping: not done after 2 s; began"):
        commands.run("sleeping", ["sh", "-c", "echo began; sleep 60"])


def without_libraries(folder: Path) -> dict[str, str]:
    """An environment whose processes find torch and numpy, and no other library of ours."""
    blocked = "".join(f"sys.modules[{name!r}] = None\n" for name in NOT_NEEDED)
    (folder / "sitecustomize.py").write_text(f"import sys\n{blocked}")
    return os.environ | {"PYTHONPATH": f"{folder}:{ROOT / 'src'}"}


@pytest.mark.parametrize(
    ("only", "count"),
    [("alone: codec sign", 1), ("alone: memory of d", 2), ("two ranks, gloo: resume of d", 2)],
)
def test_the_check_of_a_device_runs_on_the_cpu(tmp_path: Path, only: str, count: int) -> None:
    out = tmp_path / "found.json"
    command = [sys.executable, str(ROOT / "tools" / "device_check.py"), "--device", "cpu"]
    done = subprocess.run(
        [*command, "--only", only, "--out", str(out)],
        env=without_libraries(tmp_path), capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    found = json.loads(out.read_text())
    outcomes = {check["outcome"] for check in found["checks"]}
    assert len(found["checks"]) == count, done.stderr
    assert outcomes == ({"skipped"} if "memory" in only else {"ok"}), done.stdout
    assert done.returncode == ("memory" in only)
    assert "NCCL between ranks" in done.stdout
    assert found["not checked"]


def test_a_device_that_does_not_exist_is_refused_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["device_check.py", "--device", "nope"])
    with pytest.raises(SystemExit, match="2"):
        device_check.main()
    assert "argument --device: there is no device 'nope'" in capsys.readouterr().err


def test_a_check_that_fails_is_shown_with_its_reason() -> None:
    def wrong(device: object) -> str:
        raise AssertionError("apart by 1.0\nand more")

    import torch

    outcome, detail = device_check.attempt(wrong, torch.device("cpu"))
    assert (outcome, detail) == ("failed", "AssertionError: apart by 1.0")


def test_a_rank_that_dies_fails_its_check_and_no_other(tmp_path: Path) -> None:
    setting = device_check.Setting("two", 2, "gloo", {})
    line = json.dumps({"check": "first", "outcome": "ok", "detail": "", "seconds": 0.0})
    for rank, lines in enumerate([[line, line.replace("first", "second")], [line]]):
        (tmp_path / f"rank-{rank}.jsonl").write_text("\n".join(lines))
    (tmp_path / "rank-1.log").write_text("Segmentation fault\n")
    assert [result.check for result in device_check.read_results(setting, tmp_path)] == ["first"]
    assert device_check.last_line(tmp_path) == "Segmentation fault"
