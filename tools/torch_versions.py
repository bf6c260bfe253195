"""Run the core tests on several versions of torch, each in an environment of its own.

    python tools/torch_versions.py                              # all versions of VERSIONS
    python tools/torch_versions.py --versions 2.11.0 --folder /tmp/torches

One version after the other, at low priority: an environment is made, torch and what the tests need
are installed from the package index, the tests of CORE run on the sources beside this file, and a
table says what passed. What pip or pytest printed is in ``FOLDER/VERSION.log``. An environment is
5 GB large where the index has only builds for accelerators; those run on the CPU. In a folder that
is given, environments stay and are used again; without one they are removed, one by one.

The exit code is 1 if a version could not be installed, or a test failed.
"""

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("2.11.0", "2.12.1", "2.13.0", "2.14.1")
NEEDS = (
    "hypothesis", "numpy", "pydantic", "pytest", "pytest-timeout", "rich", "safetensors", "simpy",
    "typer",
)  # fmt: skip
CORE = (
    "tests/test_wire.py",
    "tests/test_gradients.py",
    "tests/test_averagers.py",
    "tests/test_hooks.py",
    "tests/test_attached.py",
    "tests/test_sync.py",
    "tests/test_streaming.py",
    "tests/test_checkpoint.py",
)
"""Attach, synchronizations, wires, hooks, averagers, checkpoints, DDP and streaming."""

_LOOK_SECONDS = 1.0
_TELL_SECONDS = 30.0


@dataclass(frozen=True)
class Outcome:
    """What came of one version; `problem` says why there were no tests."""

    version: str
    tests: str = ""
    seconds: float = 0.0
    problem: str = ""
    passed: bool = False

    def row(self) -> str:
        """A row of the table."""
        day = datetime.now(UTC).date()
        said = self.problem or self.tests
        return f"| {self.version} | {said} | {self.seconds:.0f} s | {day} |"


class Failed(Exception):
    """A command did not succeed; says which, and the last line that it printed."""


@dataclass(frozen=True)
class Commands:
    """Runs commands at low priority, with a limit, and says how far they are."""

    log: Path
    limit: float

    def run(self, what: str, command: Sequence[str | Path], **variables: str) -> str:
        """Run a command.

        Args:
            what: what it does, for messages.
            command: the words.
            variables: added to the environment.

        Returns:
            The last line that it printed.

        Raises:
            Failed: if its exit code is not 0, or it takes longer than the limit.
        """
        began = told = time.monotonic()
        print(f"{what} (at most {self.limit:.0f} s)", flush=True)
        with self.log.open("a") as log:
            process = subprocess.Popen(  # noqa: S603
                [*_low_priority(), *map(str, command)],
                cwd=ROOT, env=os.environ | variables, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            while process.poll() is None:
                time.sleep(_LOOK_SECONDS)
                now = time.monotonic()
                if now - began > self.limit:
                    _end(process)
                    raise Failed(f"{what}: not done after {self.limit:.0f} s; {self.last()}")
                if now - told > _TELL_SECONDS:
                    told = now
                    print(f"  {now - began:.0f} s: {self.last()}", flush=True)
        if process.returncode:
            raise Failed(f"{what}: {self.last()}")
        return self.last()

    def last(self) -> str:
        """The last line in the log."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1].strip("= ") if lines else "nothing printed"


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--versions", nargs="+", default=VERSIONS, help="versions of torch")
    parser.add_argument("--folder", type=Path, help="where environments and logs are kept")
    parser.add_argument("--tests", nargs="+", default=CORE, help="test files, or tests")
    parser.add_argument(
        "--limit", type=float, default=1200.0, help="seconds that one command may take"
    )
    asked = parser.parse_args()
    outcomes = []
    with _folder(asked.folder) as folder:
        for version in asked.versions:
            outcomes.append(try_version(version, folder, asked.tests, asked.limit))
            if asked.folder is None:
                shutil.rmtree(folder / version, ignore_errors=True)
    print("\n| torch | core tests | took | on |\n|---|---|---|---|")
    for outcome in outcomes:
        print(outcome.row())
    return 0 if all(outcome.passed for outcome in outcomes) else 1


def try_version(version: str, folder: Path, tests: Sequence[str], limit: float) -> Outcome:
    """Install one version and run tests on it.

    Args:
        version: of torch.
        folder: gets the environment and the log.
        tests: arguments for pytest.
        limit: seconds that each command may take.
    """
    commands = Commands(folder / f"{version}.log", limit)
    commands.log.write_text("")
    try:
        python = install(version, folder / version, commands)
    except Failed as failure:
        return Outcome(version, problem=f"not installed: {failure}")
    command: list[str | Path] = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    began = time.monotonic()
    try:
        said = commands.run(f"torch {version}: tests", command, PYTHONPATH=str(ROOT / "src"))
        passed = True
    except Failed as failure:
        said, passed = str(failure), False
    counts = re.findall(r"\d+ (?:passed|failed|errors?|skipped|xfailed|xpassed)", said)
    return Outcome(version, ", ".join(counts) or said, time.monotonic() - began, passed=passed)


def install(version: str, folder: Path, commands: Commands) -> Path:
    """Make an environment, unless it is there; gives its Python.

    Raises:
        Failed: with what pip said.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    pip: list[str | Path] = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
    ]
    if not _has(python, version):
        commands.run(f"torch {version}: installing torch", [*pip, f"torch=={version}"])
    # Versions that the tests were written with, but for torch.
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(line for line in lines if not line.startswith("torch==")))
    commands.run(f"torch {version}: installing the rest", [*pip, "-c", constraints, *NEEDS])
    return python


def _has(python: Path, version: str) -> bool:
    asked = "from importlib.metadata import version; print(version('torch'))"
    done = subprocess.run(  # noqa: S603
        [python, "-c", asked], capture_output=True, text=True, check=False, timeout=60
    )
    return done.stdout.strip().partition("+")[0] == version


@contextlib.contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given is None:
        with tempfile.TemporaryDirectory(prefix="torch-versions-") as made:
            yield Path(made)
    else:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()


def _low_priority() -> list[str]:
    nice = shutil.which("nice")
    return [] if nice is None else [nice, "-n", "10"]


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a command and the processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()


if __name__ == "__main__":
    sys.exit(main())
