"""Check postlocal on one accelerator, or on the CPU, and print a table.

    PYTHONPATH=src python tools/device_check.py --out device_check.json
    PYTHONPATH=src python tools/device_check.py --device cpu --only "two ranks"

Needs torch, numpy and postlocal's sources; nothing has to be installed. It ends within ``--limit``
seconds. Each group of checks runs in processes of its own, so that one that crashes or hangs costs
its own result only. Results on the device are compared with those on the CPU: by bits where the
arithmetic is the same, else by the stated bound on ``|device - cpu| / |cpu|``, of all parameters.

The exit code is 1 if a check failed or was not run, and 2 if there is no such device.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the same bits in each run
os.environ.setdefault("POSTLOCAL_KERNELS", "eager")  # set it to "compiled" to check compiled ones

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import postlocal
from postlocal import Strategy, checkpoint, codec, strategies, wire

NOT_CHECKED = (
    "NCCL between ranks: it refuses two ranks on one device",
    "several devices, several hosts, and the speed of links between them",
    "sharded parameters (FSDP2), GradScaler and autocast",
    "time: the device may be shared, and the models are small",
)
EXACT, LOSSY = 1e-4, 5e-2
"""Bounds on the relative distance from the CPU: matrix products add in another order, and where
codes are rounded, a value next to a boundary may get the other code."""

_FAILURES = 3  # crashes one after the other, after which a group is given up
_STEPS = 12


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    group: str
    check: str
    outcome: Literal["ok", "failed", "skipped", "not run"]
    detail: str
    seconds: float = 0.0


Check = Callable[[torch.device], str]
"""Does one check on a device and says what it found.

Raises:
    AssertionError: if that is wrong.
    Skipped: if this device cannot be checked for it.
"""


class Skipped(Exception):
    """Why there is nothing to check on a device."""


@dataclass(frozen=True)
class Setting:
    """Ranks that run checks one after the other; no backend: a rank alone."""

    name: str
    world: int
    backend: str | None
    checks: Mapping[str, Check]


# Codecs

CODECS: Mapping[str, codec.Codec] = {
    "int8": codec.int8(),
    "int4": codec.int4(),
    "affine": codec.affine(512),
    "fp8": codec.fp8(),
    "fp4": codec.fp4(),
    "sign": codec.sign(),
    "top_k": codec.top_k(),
    "random_k": codec.random_k(),
}
SIZES = (1, 4096, 300_001)


def check_codec(made: codec.Codec, device: torch.device) -> str:
    """Payloads, decoded values and accumulated values against those of the CPU."""
    found = [
        compare_codec(made, numel, dtype, device)
        for numel in SIZES
        for dtype in (torch.float32, torch.bfloat16)
    ]
    payloads = sum(payload for payload, _, _ in found)
    exact = sum(bits for _, bits, _ in found)
    worst = max(distance for _, _, distance in found)
    said = f"payloads {payloads}/{len(found)} and values {exact}/{len(found)} equal to the bit"
    assert worst <= 1e-5, f"{said}; values differ by {worst:.1e}, bound 1e-5"
    return said if exact == len(found) else f"{said}, values within {worst:.1e} (bound 1e-5)"


def compare_codec(
    made: codec.Codec, numel: int, dtype: torch.dtype, device: torch.device
) -> tuple[bool, bool, float]:
    """Whether payloads are equal, whether values are, and how far values are apart."""
    values = torch.randn(numel, generator=torch.Generator().manual_seed(numel)).to(dtype)
    size = made.nbytes(numel, dtype)
    payloads, results = [], []
    for where in (torch.device("cpu"), device):
        payload = torch.zeros(size, dtype=torch.uint8, device=where)
        made.encode(values.to(where), payload)
        payloads.append(payload.cpu())
    for where in (torch.device("cpu"), device):  # both read the payload of the CPU
        decoded = torch.zeros(numel, dtype=dtype, device=where)
        made.decode(payloads[0].to(where), decoded)
        summed = values.to(where, copy=True)
        made.accumulate(payloads[0].to(where), summed, 0.3)
        results.append(torch.cat([decoded, summed]).cpu())
    same = torch.equal(payloads[0], payloads[1])
    return same, torch.equal(results[0], results[1]), relative([results[1]], [results[0]])


# Training

STRATEGIES: Mapping[str, Callable[[], Strategy]] = {
    "ddp": strategies.ddp,
    "local_sgd": lambda: strategies.local_sgd(4),
    "post_local_sgd": lambda: strategies.post_local_sgd(3, 4, gradients="rank"),
    "hierarchical": lambda: strategies.hierarchical({"node": 2, "world": 4}),
    "slowmo": lambda: strategies.slowmo(4),
    "diloco": lambda: strategies.diloco(4),
    "streaming_diloco": lambda: strategies.streaming_diloco(4, fragments=2, delay=2),
    "sparse_loco": lambda: strategies.sparse_loco(4),
    "edit": lambda: strategies.edit(4),
    "qsr": lambda: strategies.qsr(0.1, base=4),
}
_ROUNDED = ("streaming_diloco", "sparse_loco")


def mlp(width: int = 256) -> nn.Module:
    """The model of all checks but those of memory, the same on every rank."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 16)
    )


def batches(first: int, last: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's data of some steps."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    for step in range(first, last):
        generator = torch.Generator().manual_seed(1000 * step + rank)
        x = torch.randn(8, 64, generator=generator)
        yield x.to(device), torch.randint(0, 16, (8,), generator=generator).to(device)


def attached(
    strategy: Strategy, device: torch.device, width: int = 256
) -> tuple[nn.Module, torch.optim.Optimizer, postlocal.Sync]:
    """A model on a device, under a strategy; wrapped in DDP where there are process groups."""
    model = mlp(width).to(device)
    if dist.is_initialized():
        ids = None if device.type == "cpu" else [device.index or 0]
        model = DistributedDataParallel(model, device_ids=ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return model, optimizer, postlocal.attach(model, optimizer, strategy)


def go_on(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    sync: postlocal.Sync,
    last: int,
    device: torch.device,
) -> None:
    """Train until a step."""
    for x, y in batches(sync.steps, last, device):
        nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        sync.step()


def train(strategy: Strategy, device: torch.device) -> list[Tensor]:
    """The parameters after a run, on the CPU."""
    model, optimizer, sync = attached(strategy, device)
    go_on(model, optimizer, sync, _STEPS, device)
    sync.finish()
    sync.close()
    return values(model)


def values(model: nn.Module) -> list[Tensor]:
    """A copy of the parameters, on the CPU."""
    return [parameter.detach().cpu().clone() for parameter in model.parameters()]


def check_training(strategy: Strategy, bound: float, device: torch.device) -> str:
    """Ranks end equal to the bit, and near to where they end on the CPU."""
    found = train(strategy, device)
    assert replicas_are_equal(found), "ranks ended with different parameters"
    far = relative(found, train(strategy, torch.device("cpu")))
    said = f"ranks equal to the bit; from the CPU {far:.1e} (bound {bound:.0e})"
    assert far <= bound, said
    return said


def replicas_are_equal(parameters: list[Tensor]) -> bool:
    """Whether all ranks hold the same bits."""
    if not dist.is_initialized():
        return True
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, [parameter.numpy().tobytes() for parameter in parameters])
    return all(other == everyones[0] for other in everyones)


def check_twice(strategy: Strategy, device: torch.device) -> str:
    """Two runs end with the same bits: what is sent beside the backward pass is not mixed up."""
    first, second = train(strategy, device), train(strategy, device)
    assert all(map(torch.equal, first, second)), f"apart by {relative(second, first):.1e}"
    return "two runs equal to the bit"


def check_resume(strategy: Strategy, device: torch.device) -> str:
    """A run that was saved within a round and resumed ends as one that was not."""
    with shared_folder() as folder:
        model, optimizer, sync = attached(strategy, device)
        go_on(model, optimizer, sync, 6, device)
        checkpoint.save(folder, sync)
        go_on(model, optimizer, sync, _STEPS, device)
        expected = values(model)
        sync.close()
        model, optimizer, sync = attached(strategy, device)
        assert checkpoint.restore(folder, sync) is not None, "found no checkpoint"
        go_on(model, optimizer, sync, _STEPS, device)
        sync.close()
        found = values(model)
    far = relative(found, expected)
    assert all(map(torch.equal, found, expected)), f"apart by {far:.1e}"
    return "saved after step 6 of 12, resumed: equal to the bit"


def check_memory(strategy: Strategy, device: torch.device) -> str:
    """Peak memory of a round, as multiples of the parameters."""
    if device.type != "cuda":
        raise Skipped("memory is measured on CUDA devices only")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    model, optimizer, sync = attached(strategy, device, width=4096)
    go_on(model, optimizer, sync, 8, device)
    sync.close()
    size = sum(parameter.nbytes for parameter in model.parameters())
    peak = torch.cuda.max_memory_allocated(device) - before
    return f"peak {peak / size:.2f} x the parameters ({size / 2**20:.0f} MiB), AdamW's 4 x included"


@contextmanager
def shared_folder() -> Iterator[Path]:
    """A folder for all ranks, which rank 0 makes."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    with tempfile.TemporaryDirectory() as made:
        place: list[Any] = [made]
        if dist.is_initialized():
            dist.broadcast_object_list(place, src=0)
        yield Path(place[0])
        if dist.is_initialized():
            everyones: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyones, rank)  # nobody needs it any more


def relative(found: list[Tensor], expected: list[Tensor]) -> float:
    """``|found - expected| / |expected|``, over all tensors."""
    apart = sum(
        float((a.double() - b.double()).square().sum())
        for a, b in zip(found, expected, strict=True)
    )
    size = sum(float(tensor.double().square().sum()) for tensor in expected)
    return float(np.sqrt(apart / size)) if size else float(apart > 0)


# What is checked where


def settings(device: torch.device) -> list[Setting]:
    """All groups of checks for a device."""
    own = "nccl" if device.type == "cuda" else dist.get_default_backend_for_device(device)
    training = {
        f"strategy {name}": partial(check_training, make(), LOSSY if name in _ROUNDED else EXACT)
        for name, make in STRATEGIES.items()
    }
    gradients = {
        f"DDP over {name}": partial(
            check_training,
            Strategy(schedule=strategies.ddp().schedule, gradient_wire=make()),
            EXACT if name == "fp32" else LOSSY,
        )
        for name, make in wire.NAMED.items()
    }
    streaming = strategies.streaming_diloco(4, fragments=2, delay=2)
    beside = {"streaming beside the backward pass": partial(check_twice, streaming)}
    resumes = {
        f"resume of {name}": partial(check_resume, STRATEGIES[name]())
        for name in ("ddp", "diloco", "streaming_diloco")
    }
    alone = (
        {f"codec {name}": partial(check_codec, made) for name, made in CODECS.items()}
        | training
        | resumes
        | {f"memory of {name}": partial(check_memory, make()) for name, make in STRATEGIES.items()}
    )
    return [
        Setting("alone", 1, None, alone),
        Setting(f"one rank, {own}", 1, own, training | gradients),
        Setting("two ranks, gloo", 2, "gloo", training | gradients | beside | resumes),
    ]


# Processes


@dataclass(frozen=True)
class Launch:
    """What a rank is told: where it runs, and what it checks."""

    setting: str
    checks: list[str]
    device: str
    folder: str
    rank: int


def run_setting(setting: Setting, device: torch.device, deadline: float) -> Iterator[Result]:
    """Run the checks of a group; after one that fails on several ranks, the rest in new processes.

    Results come as soon as all ranks have them.
    """
    pending, failures = list(setting.checks), 0
    while pending:
        if failures == _FAILURES or time.monotonic() > deadline:
            why = "the time is up" if failures < _FAILURES else f"{failures} failed before it"
            yield from (Result(setting.name, name, "not run", why) for name in pending)
            return
        done: list[Result] = []
        for result in launch(setting, pending, device, deadline):
            done.append(result)
            yield result
        pending = pending[len(done) :]
        failures = failures + 1 if len(done) == 1 else 1


def failed(results: Iterable[Result]) -> bool:
    """Whether one of them failed."""
    return any(result.outcome == "failed" for result in results)


def launch(
    setting: Setting, checks: list[str], device: torch.device, deadline: float
) -> Iterator[Result]:
    """Run ranks until all have ended, or the time is up; gives results as they come.

    Ranks that end without saying why fail the check that they were at.
    """
    with tempfile.TemporaryDirectory() as made:
        folder, shown = Path(made), 0
        processes = [
            start(Launch(setting.name, checks, str(device), made, rank))
            for rank in range(setting.world)
        ]
        try:
            running = True
            while running and time.monotonic() < deadline:
                time.sleep(0.2)
                running = any(process.poll() is None for process in processes)
                results = read_results(setting, folder)
                yield from results[shown:]
                shown = len(results)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        codes = [process.returncode for process in processes]
        if not running and any(codes) and shown < len(checks) and not failed(results[-1:]):
            why = f"exit codes {codes}: {last_line(folder)}"
            yield Result(setting.name, checks[shown], "failed", why)


def start(told: Launch) -> "subprocess.Popen[bytes]":
    """Start a rank; what it prints goes to a file."""
    command = [sys.executable, __file__, "--rank", json.dumps(asdict(told))]
    with (Path(told.folder) / f"rank-{told.rank}.log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)  # noqa: S603


def last_line(folder: Path) -> str:
    """The last line that a rank printed."""
    lines = [
        line.strip()
        for log in sorted(folder.glob("rank-*.log"))
        for line in log.read_text(errors="replace").splitlines()
        if line.strip()
    ]
    return lines[-1][:200] if lines else "nothing printed"


def read_results(setting: Setting, folder: Path) -> list[Result]:
    """The results of checks that all ranks ended, and of one that a rank failed."""
    everyones: list[list[Result]] = []
    for rank in range(setting.world):
        path = folder / f"rank-{rank}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        everyones.append([Result(setting.name, **json.loads(line)) for line in lines])
    found: list[Result] = []
    for index in range(max(map(len, everyones))):
        ranks = [results[index] for results in everyones if index < len(results)]
        wrong = [result for result in ranks if result.outcome == "failed"]
        if not wrong and len(ranks) < setting.world:
            return found
        found.append((wrong or ranks)[0])
    return found


def run_rank(told: Launch) -> int:
    """Run checks on one rank, and write what each found; the first failure ends it."""
    device = torch.device(told.device)
    torch.set_num_threads(1)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    setting = next(one for one in settings(device) if one.name == told.setting)
    if setting.backend is not None:
        join(setting, told, device)
    with (Path(told.folder) / f"rank-{told.rank}.jsonl").open("w") as file:
        for name in told.checks:
            began = time.monotonic()
            outcome, detail = attempt(setting.checks[name], device)
            took = time.monotonic() - began
            line = {"check": name, "outcome": outcome, "detail": detail, "seconds": took}
            file.write(json.dumps(line) + "\n")
            file.flush()
            if outcome == "failed" and setting.world > 1:
                return 1  # the others may be elsewhere in it
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


def join(setting: Setting, told: Launch, device: torch.device) -> None:
    """Make the default process group."""
    if Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        setting.backend,
        store=dist.FileStore(f"{told.folder}/store", setting.world),  # type: ignore[attr-defined]
        rank=told.rank,
        world_size=setting.world,
        timeout=timedelta(seconds=20),
        device_id=device if setting.backend == "nccl" else None,
    )


def attempt(check: Check, device: torch.device) -> tuple[str, str]:
    """Run a check; its outcome, and what it says."""
    try:
        return "ok", check(device)
    except Skipped as reason:
        return "skipped", str(reason)
    except Exception as error:  # whatever it is, it is what the table has to show
        lines = str(error).strip().splitlines() or [""]
        return "failed", f"{type(error).__name__}: {lines[0][:300]}"


# What is shown


def describe(device: torch.device) -> dict[str, str]:
    """Where this runs."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": f"{device} ({name})",
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "postlocal": postlocal.__version__,
        "python": platform.python_version(),
        "kernels": os.environ["POSTLOCAL_KERNELS"],
    }


def show(result: Result) -> str:
    """A row of the table."""
    seconds = f"{result.seconds:.1f} s"
    return f"| {result.group} | {result.check} | {result.outcome} | {result.detail} | {seconds} |"


def device_of(text: str) -> torch.device:
    """A device by name."""
    try:
        return torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"there is no device {text!r}") from None


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--device", type=device_of, default="cuda:0", help="such as cuda:0 or cpu")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--limit", type=float, default=230.0, help="seconds that it may take")
    parser.add_argument(
        "--only", default="", help="run only checks whose group and name have this text"
    )
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.rank:
        return run_rank(Launch(**json.loads(asked.rank)))
    device = asked.device
    if device.type == "cuda" and not torch.cuda.is_available():
        print("there is no CUDA device: pass --device cpu to try the checks on the CPU")
        return 2
    return run_all(device, asked.only, asked.limit, asked.out)


def run_all(device: torch.device, only: str, limit: float, out: Path | None) -> int:
    """Run all checks that were asked for, and show them as they end."""
    began = time.monotonic()
    place = describe(device)
    print(", ".join(f"{name} {value}" for name, value in place.items()))
    print("\n| where | check | outcome | found | took |\n|---|---|---|---|---|", flush=True)
    results = []
    for setting in settings(device):
        chosen = {k: v for k, v in setting.checks.items() if only in f"{setting.name}: {k}"}
        part = Setting(setting.name, setting.world, setting.backend, chosen)
        for result in run_setting(part, device, began + limit):
            results.append(result)
            print(show(result), flush=True)
    outcomes = Counter(result.outcome for result in results)
    took = time.monotonic() - began
    counts = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())
    print(f"\n{counts or 'no check has such a name'}; in {took:.0f} s")
    print("Not checked:", *NOT_CHECKED, sep="\n- ")
    if out is not None:
        found = [asdict(result) for result in results]
        whole = {**place, "seconds": took, "checks": found, "not checked": NOT_CHECKED}
        out.write_text(json.dumps(whole, indent=2) + "\n")
    return 0 if outcomes["ok"] and not outcomes["failed"] and not outcomes["not run"] else 1


if __name__ == "__main__":
    sys.exit(main())
