"""The end of a process, when threads of torch may still come back to Python."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from postlocal.comm import exiting

_PROGRAM = """
import atexit, sys, time
ends = []
atexit.register(lambda: print(f"{time.monotonic() - ends[0]:.3f}"))  # the last to run
import postlocal
import torch
import torch.distributed as dist
from pathlib import Path
from torch import nn
from torch.nn.parallel import DistributedDataParallel

def train():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = DistributedDataParallel(nn.Linear(2, 2))
    model(torch.ones(1, 2)).sum().backward()
    return model

def groups():
    tasks = Path("/proc/self/task").iterdir()
    return sum((task / "comm").read_text().startswith("pt_gloo") for task in tasks)

train()
before = groups()
dist.destroy_process_group()
print(before > 0, groups())
model = train()
dist.destroy_process_group()
print(groups() > 0)
ends.append(time.monotonic())
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are not shown here")
def test_a_destroyed_group_has_no_threads_and_the_end_waits_for_those_that_a_model_holds() -> None:
    """DDP is first used after the group is made, when torch would hold the group for good."""
    command = [sys.executable, "-c", _PROGRAM]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    *said, waited = ran.stdout.splitlines()
    assert said == ["True 0", "True"]
    assert float(waited) >= 0.2


def test_the_end_is_at_once_where_no_thread_of_torch_is_alive(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    naps: list[float] = []
    monkeypatch.setattr(exiting, "_watched", set())
    monkeypatch.setattr(exiting, "_under_way", [])
    monkeypatch.setattr(exiting, "_TASKS", tmp_path)
    monkeypatch.setattr(time, "sleep", naps.append)
    exiting._wait()
    assert naps == []
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "comm").write_text("pt_gloo_runloop\n")
    exiting._wait()
    assert len(naps) == 1


@pytest.mark.parametrize("launched", [True, False])
def test_a_launched_process_waits_where_the_system_shows_no_threads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, launched: bool
) -> None:
    monkeypatch.setattr(exiting, "_TASKS", tmp_path / "none")
    monkeypatch.delenv("RANK", raising=False)
    if launched:
        monkeypatch.setenv("RANK", "0")
    assert exiting._has_torch_threads() is launched
