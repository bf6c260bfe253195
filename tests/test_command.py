"""The command as a user runs it: real processes, signals, restarts and files."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import pytest
from safetensors import safe_open

from postlocal import strategies
from postlocal.cli import main
from postlocal.expressions import AXES
from tests.calling import calling

POSTLOCAL = (sys.executable, "-m", "postlocal")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")
STEPS = 120
TRAIN = sys.modules["postlocal.cli.train"]  # the name in the package is the command


@contextmanager
def running(*command: str) -> Iterator[subprocess.Popen[str]]:
    """A command in a session of its own, of which nothing is left afterwards."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        for pid in [*descendants(process.pid), process.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.communicate()


def descendants(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [below for child in children for below in [*descendants(int(child)), int(child)]]


def run(*command: str) -> tuple[int, str]:
    with running(*command) as process:
        output, _ = process.communicate(timeout=100)
        return process.returncode, output


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def arguments(out: Path, data: Path, *more: str) -> list[str]:
    return [
        "train", "--data", str(data), "--out", str(out), "--steps", str(STEPS),
        "--batch-size", "2", "--sequence-length", "32", "--eval-sequences", "16",
        "--checkpoint-every", "20", "--strategy", "diloco", "--period", "8", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text with some structure, made up."""
    path = tmp_path_factory.mktemp("data") / "numbers.txt"
    path.write_text("\n".join(f"{n} times {n} is {n * n}" for n in range(3000)))
    return path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A run with nothing in its way, compared with DDP."""
    out = tmp_path_factory.mktemp("undisturbed")
    code, output = run(*POSTLOCAL, *arguments(out, data, "--workers", "2", "--compare", "ddp"))
    assert code == 0, output
    assert "diloco sent" in output
    assert "times less than ddp" in output
    return out


def weights(out: Path) -> dict[str, list[float]]:
    with safe_open(out / "model.safetensors", framework="np") as file:
        return {name: file.get_tensor(name).tolist() for name in file.keys()}  # noqa: SIM118


def newest(out: Path) -> int:
    steps = [int(path.name[5:]) for path in out.glob("checkpoints/step-*")]
    return max(steps, default=0)


def test_a_run_leaves_what_is_documented(undisturbed: Path) -> None:
    summary = json.loads((undisturbed / "summary.json").read_text())
    control = json.loads((undisturbed / "compare" / "ddp" / "summary.json").read_text())
    assert summary["strategy"] == "diloco"
    assert summary["workers"] == 2
    assert summary["steps"] == control["steps"] == STEPS
    assert summary["tokens"] == STEPS * 2 * 2 * 32
    assert summary["replicas_equal"]
    assert control["replicas_equal"]
    assert summary["syncs"] == STEPS // 8
    assert summary["ddp_payload_bytes"] == STEPS * summary["parameters"] * 4
    assert 15.5 < summary["ddp_payload_bytes"] / summary["payload_bytes"] <= 16
    assert control["payload_bytes_by_purpose"]["gradients"] == control["ddp_payload_bytes"]
    assert summary["train_seconds"] > summary["wait_seconds"] > 0
    assert summary["final_val_loss"] < 4
    assert set(summary["versions"]) == {"postlocal", "torch", "numpy"}
    assert (undisturbed / "loss.png").stat().st_size > 10_000


def test_metrics_have_the_documented_fields(undisturbed: Path) -> None:
    lines = (undisturbed / "metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    kinds = {kind: [e for e in entries if e["kind"] == kind] for kind in ("step", "sync", "eval")}
    assert [entry["step"] for entry in kinds["sync"]] == list(range(8, STEPS + 1, 8))
    assert all(0 < entry["drift"] < 1 for entry in kinds["sync"])
    assert kinds["step"][-1]["step"] == STEPS
    assert {"loss", "lr", "tokens", "payload_bytes", "wait_seconds"} <= set(kinds["step"][0])
    assert kinds["eval"][-1]["val_loss"] < kinds["eval"][0]["val_loss"]


def test_sample_writes_text_with_the_weights(undisturbed: Path) -> None:
    code, output = run(
        *POSTLOCAL, "sample", str(undisturbed), "--prompt", "12 times", "--length", "20"
    )
    assert code == 0
    assert output.startswith("12 times")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_resumed_run_ends_bit_identical(
    undisturbed: Path, data: Path, tmp_path: Path, number: signal.Signals
) -> None:
    command = [*POSTLOCAL, *arguments(tmp_path, data, "--workers", "2")]
    with running(*command) as process:
        wait_for(lambda: newest(tmp_path) >= 20)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in output
    assert f"checkpoint in {tmp_path}" in output
    stopped = newest(tmp_path)
    assert stopped < STEPS
    # The first form gives no setting, the second all of them again.
    again = ["train", "--out", str(tmp_path)] if number == signal.SIGINT else command[3:]
    code, output = run(*POSTLOCAL, *again, "--resume")
    assert code == 0, output
    assert f"resumed after step {stopped} " in output
    assert weights(tmp_path) == weights(undisturbed)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == sorted(steps)


STREAMING = (
    "--workers", "2", "--strategy", "streaming_diloco(fragments=2, delay=5)", "--wire", "int4",
)  # fmt: skip


def test_a_run_stopped_with_fragments_under_way_resumes_to_the_same_bits(
    data: Path, tmp_path: Path
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    code, output = run(*POSTLOCAL, *arguments(whole, data, *STREAMING))
    assert code == 0, output
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["replicas_equal"]
    assert summary["ddp_payload_bytes"] > 50 * summary["payload_bytes"]
    command = [*POSTLOCAL, *arguments(stopped, data, *STREAMING)]
    with running(*command) as process:
        wait_for(lambda: newest(stopped) >= 20)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert newest(stopped) < STEPS
    code, output = run(*command, "--resume")
    assert code == 0, output
    assert weights(stopped) == weights(whole)


def test_a_killed_worker_costs_the_steps_since_the_last_checkpoint(
    undisturbed: Path, data: Path, tmp_path: Path
) -> None:
    command = [*POSTLOCAL, *arguments(tmp_path, data, "--workers", "2")]
    with running(*command) as process:
        wait_for(lambda: newest(tmp_path) >= 20)
        os.kill(descendants(process.pid)[-1], signal.SIGKILL)
        output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "Traceback" not in output
    code, output = run(*command, "--resume")
    assert code == 0, output
    assert weights(tmp_path) == weights(undisturbed)


def test_under_torchrun_a_killed_worker_is_replaced_without_a_hand(
    undisturbed: Path, data: Path, tmp_path: Path
) -> None:
    torchrun = [*TORCHRUN, "--nproc-per-node", "2", "--max-restarts", "1", "-m", "postlocal"]
    with running(*torchrun, *arguments(tmp_path, data)) as process:
        wait_for(lambda: newest(tmp_path) >= 20)
        os.kill(descendants(process.pid)[-1], signal.SIGKILL)
        output, _ = process.communicate(timeout=90)
    assert process.returncode == 0, output
    assert "resumed after step" in output
    assert weights(tmp_path) == weights(undisturbed)


def command_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str
) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["postlocal", *words])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert isinstance(exit_.value.code, int)
    return exit_.value.code, capsys.readouterr().err


BAD = {
    "period of zero": (["--period", "0"], "period must be at least 1 step, got 0"),
    "foreign parameter": (
        ["--strategy", "ddp", "--period", "3"],
        "period must not be given to ddp",
    ),
    "old flag": (["--mix", "0.5"], "as in --strategy 'streaming_diloco(mix=...)'"),
    "unknown flag": (["--foo"], "No such option: --foo"),
    "flag of all strategies": (["--guard", "x"], "as in --strategy 'diloco(guard=...)'"),
    "no number": (["--steps", "x"], "Invalid value for '--steps'"),
    "missing data": (["--data", "/nowhere"], "data must be files, folders or globs that exist"),
    "folder below a file": (["--out", "/dev/null/x"], "out must be a folder that can be written"),
    "fragments of fragments": (
        ["--strategy", "streaming_diloco(fragments=5)"],
        "got 5 fragments of 4 layers",
    ),
    "less than a batch": (["--batch-size", "1000000"], "fewer than batch size 1000000 each"),
    "unknown level": (
        ["--strategy", "hierarchical({'rack': 4})"],
        "level must be one that the topology has",
    ),
    "no folder": (["--out", ""], "out must name a folder, got ''"),
    "both": (["--resume", "--overwrite"], "resume and overwrite must not be given together"),
    "nothing to resume": (["--resume"], "out must hold a run to resume"),
    "compared with itself": (["--compare", "post_local_sgd"], "compare must differ from the run"),
    "nodes that do not fit": (["--node-size", "3"], "node size must divide the world size 4"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: str,
) -> None:
    words, message = BAD[name]
    code, error = command_line(
        capsys, monkeypatch, "train", "--out", str(tmp_path), "--steps", "2", *words
    )
    assert code == 2
    assert error.count("\n") == 1
    assert error.startswith("postlocal: error: ")
    assert message in error


@pytest.mark.parametrize(
    ("words", "message", "place"),
    [
        (["--strategy", "dilco"], "strategy: there is no strategy dilco: did you", "dilco"),
        (["--strategy", "diloco(period=0)"], "period must be at least 1 step, got 0", "0"),
        (["--strategy", "diloco(perod=3)"], "did you mean period? It takes", "perod=3"),
        (["--compare", "local_sgd(wire=int5)"], "compare: there is no wire int5", "int5"),
        (
            ["--strategy", "streaming_diloco(delay=4)", "--period", "4"],
            "strategy: delay must be shorter than a round",
            "4",
        ),
        (["--wire", "int1"], "wire: there is no wire int1: did you mean", "int1"),
    ],
)
def test_a_bad_expression_is_shown_with_its_place_and_exit_code_2(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    words: list[str],
    message: str,
    place: str,
) -> None:
    code, error = command_line(capsys, monkeypatch, "train", "--out", str(tmp_path), *words)
    assert code == 2
    said, shown, carets = error.splitlines()
    assert said.startswith("postlocal: error: ")
    assert message in said
    assert shown[carets.index("^") : carets.rindex("^") + 1] == place


def test_the_strategies_are_listed_with_their_arguments_and_sources(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = calling("strategies")(capsys, monkeypatch)
    assert code == 0
    assert all(f"{name}(" in out for name in strategies.NAMED)
    assert "diloco(period=100, outer_lr=0.7, outer_momentum=0.9)\n" in out
    assert "(Douillard et al., arXiv 2311.08105)\n  Take it between regions or homes" in out
    code, out, _ = calling("strategies", "diloco")(capsys, monkeypatch)
    assert code == 0
    assert "  outer_lr: outer learning rate.\n" in out
    assert "  outer: average, nesterov, scheduled, slow_momentum\n" in out
    code, _, error = calling("strategies", "sgd")(capsys, monkeypatch)
    assert (code, "name must be a strategy (ddp, " in error) == (2, True)


@pytest.mark.parametrize("axis", AXES)
def test_the_values_of_an_axis_are_listed_with_their_arguments(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, axis: str
) -> None:
    code, out, _ = calling("strategies", axis)(capsys, monkeypatch)
    assert code == 0
    names = set(AXES[axis].names) - {"from_mesh"}  # a mesh has no expression
    assert set(re.findall(r"^(?:codec\.)?(\w+)\(", out, re.MULTILINE)) == names


def test_a_value_of_an_axis_is_explained(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = calling("strategies", "wire")(capsys, monkeypatch)
    assert "int4(block=256)\n  4 bits a value and one scale a block, with error feedback.\n" in out
    code, out, _ = calling("strategies", "clip")(capsys, monkeypatch)
    assert (code, out.startswith("Guard:\nclip(max_norm, inner=non_finite())\n")) == (0, True)
    assert "  max_norm: greatest Euclidean norm" in out
    code, out, _ = calling("strategies", "int4")(capsys, monkeypatch)
    assert "Wire:\nint4(block=256)\n" in out
    assert "\nCodec:\ncodec.int4(block=256, stochastic=False)\n" in out
    code, out, _ = calling("strategies")(capsys, monkeypatch)
    assert "`postlocal strategies AXIS` lists" in out.splitlines()[-1]
    code, _, error = calling("strategies", "int5")(capsys, monkeypatch)
    assert (code, "got 'int5': did you mean int" in error) == (2, True)


def test_empty_data_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "empty").touch()
    words = ["train", "--data", str(tmp_path / "empty"), "--out", str(tmp_path / "out")]
    code, error = command_line(capsys, monkeypatch, *words)
    assert (code, error) == (2, "postlocal: error: data must hold text, got 1 empty files\n")


def test_an_earlier_run_is_not_overwritten_unasked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, undisturbed: Path
) -> None:
    code, error = command_line(capsys, monkeypatch, "train", "--out", str(undisturbed))
    assert code == 2
    assert "out must not hold an earlier run" in error
    assert weights(undisturbed)


def test_settings_that_are_not_those_of_the_run_are_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, undisturbed: Path
) -> None:
    words = ["train", "--resume", "--out", str(undisturbed)]
    code, error = command_line(capsys, monkeypatch, *words, "--model", "small", "--lr", "1")
    assert code == 2
    assert error.count("\n") == 1
    assert "got lr: 0.003 kept, 1.0 given; model: tiny kept, small given" in error


def test_a_checkpoint_of_another_model_is_one_line(
    undisturbed: Path, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed, tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()  # of a run from before settings were kept
    command = [*POSTLOCAL, *arguments(tmp_path / "run", data, "--workers", "2", "--resume")]
    code, output = run(*command, "--model", "small")
    assert code == 2
    assert "has no config.json: all settings are taken as given here" in " ".join(output.split())
    assert "is of another model: 'embedding.weight' is (256, 128)" in output
    assert "Traceback" not in output


def test_sample_without_weights_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code, error = command_line(capsys, monkeypatch, "sample", str(tmp_path))
    assert code == 2
    assert "has no model.safetensors" in error
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    code, error = command_line(capsys, monkeypatch, "sample", str(tmp_path))
    assert code == 2
    assert "cannot be read" in error


def test_without_a_command_there_is_the_help_and_no_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, error = calling()(capsys, monkeypatch)
    assert code == 2
    assert "Usage: " in out + error
    assert "error" not in out + error


def test_the_first_lines_are_there_before_workers_start(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started: list[int] = []

    def launch(workers: int, arguments: list[str]) -> int:
        started.append(workers)
        return 0

    monkeypatch.setattr(TRAIN, "launch", launch)
    words = ["train", "--workers", "3", "--out", str(tmp_path), "--period", "64"]
    code, out, _ = calling(*words)(capsys, monkeypatch)
    assert (code, started) == (0, [3])
    assert out.splitlines()[0].endswith("100 steps, 3 workers")
    assert "Python's standard library" in out
    assert "post_local_sgd(warmup=30, period=64, " in out
    assert str(tmp_path) in out


def test_version_and_help() -> None:
    code, output = run(*POSTLOCAL, "train", "--help")
    assert code == 0
    assert "--outer-momentum" in output
    assert "These may change" in " ".join(output.split())
    assert run(*POSTLOCAL, "--version") == (0, f"{version('postlocal')}\n")
