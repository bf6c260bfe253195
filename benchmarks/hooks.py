"""Communication hooks and averagers: torch's beside ours, in one run.

    python -m benchmarks.hooks

Each round takes one step with every case, in an order that changes; figures are medians over
rounds of ratios within a round.
"""

from collections.abc import Callable
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import (
    default_hooks as torch_default,
)
from torch.distributed.algorithms.ddp_comm_hooks import (
    powerSGD_hook as torch_powersgd,
)
from torch.distributed.algorithms.model_averaging import utils as torch_utils
from torch.nn.parallel import DistributedDataParallel

from benchmarks.measure import (
    as_text,
    bytes_of,
    extra_memory,
    paired,
    ratios,
    run_ranks,
)
from benchmarks.options import Record, Worlds
from benchmarks.report import markdown_table, write_record
from benchmarks.shapes import fifty_million
from postlocal.ddp_comm_hooks import default, powerSGD, quantization
from postlocal.model_averaging import utils

Step = Callable[[], object]


def four_million() -> nn.Module:
    """4.2 M parameters in 17 matrices and as many vectors."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(16):
        layers += [nn.Linear(512, 512), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(512, 10))


def _plain(model: DistributedDataParallel) -> None:
    """No hook at all."""


def _registers() -> dict[str, Callable[[DistributedDataParallel], None]]:
    def powersgd(package: Any, rank: int, hook: str) -> Callable[[DistributedDataParallel], None]:
        def register(model: DistributedDataParallel) -> None:
            state = package.PowerSGDState(None, rank, start_powerSGD_iter=2)
            model.register_comm_hook(state, getattr(package, hook))

        return register

    def plain_hook(function: Any) -> Callable[[DistributedDataParallel], None]:
        return lambda model: model.register_comm_hook(dist.group.WORLD, function)

    def blockwise(model: DistributedDataParallel) -> None:
        state = quantization.QuantizationState(None)
        model.register_comm_hook(state, quantization.quantization_blockwise_hook)

    return {
        "DDP, no hook": _plain,
        "allreduce, torch": plain_hook(torch_default.allreduce_hook),
        "allreduce, postlocal": plain_hook(default.allreduce_hook),
        "fp16, torch": plain_hook(torch_default.fp16_compress_hook),
        "fp16, postlocal": plain_hook(default.fp16_compress_hook),
        "bf16, postlocal": plain_hook(default.bf16_compress_hook),
        # Torch's fails with several buckets: it orders collectives differently on each rank.
        "PowerSGD 1, torch": powersgd(torch_powersgd, 1, "powerSGD_hook"),
        "PowerSGD 1, postlocal": powersgd(powerSGD, 1, "powerSGD_hook"),
        "PowerSGD 4, torch": powersgd(torch_powersgd, 4, "powerSGD_hook"),
        "PowerSGD 4, postlocal": powersgd(powerSGD, 4, "powerSGD_hook"),
        "batched PowerSGD 1, postlocal": powersgd(powerSGD, 1, "batched_powerSGD_hook"),
        "8 bit a tensor, postlocal": plain_hook(quantization.quantization_pertensor_hook),
        "8 bit a channel, postlocal": plain_hook(quantization.quantization_perchannel_hook),
        "8 bit a block + feedback, postlocal": blockwise,
    }


def _step(model: DistributedDataParallel, x: Tensor) -> Step:
    def step() -> None:
        model.zero_grad()
        model(x).square().mean().backward()

    return step


def measure_hooks(rank: int, rounds: int) -> dict[str, Any]:
    """Times, bytes and memory of one step with each hook."""
    x = torch.randn(16, 512, generator=torch.Generator().manual_seed(rank))
    cases: dict[str, Step] = {}
    memory: dict[str, int] = {}
    for name, register in _registers().items():
        cap = 100 if "PowerSGD" in name else None  # one bucket, or DDP's default
        model = DistributedDataParallel(four_million(), bucket_cap_mb=cap)
        register(model)
        step = cases[name] = _step(model, x)
        memory[name] = extra_memory(lambda step=step: [step() for _ in range(5)])  # type: ignore[misc]
    seconds = paired(cases, rounds)
    sent = {name: bytes_of(case) for name, case in cases.items()}
    return {
        name: {
            "time_over_ddp": ratios(seconds, name, "DDP, no hook"),
            "time_over_torch": _over_torch(seconds, name),
            "bytes_a_step": sent[name],
            "extra_memory": memory[name],
            "seconds": seconds[name],
        }
        for name in cases
    }


def _over_torch(seconds: dict[str, list[float]], name: str) -> dict[str, float] | None:
    peer = name.replace("postlocal", "torch")
    return ratios(seconds, name, peer) if peer in seconds and peer != name else None


def measure_averaging(rank: int, rounds: int) -> dict[str, Any]:
    """Averaging of 50 M parameters against one all-reduce of a flat buffer of that size."""
    torch.manual_seed(rank)
    ours, theirs = list(fifty_million().parameters()), list(fifty_million().parameters())
    for parameter in theirs:
        parameter.grad = parameter.detach()  # torch leaves out those without one
    flat = torch.randn(sum(parameter.numel() for parameter in ours))
    group = dist.group.WORLD
    assert group is not None
    cases: dict[str, Step] = {
        "raw all_reduce": lambda: dist.all_reduce(flat),
        "postlocal": lambda: utils.average_parameters_or_parameter_groups(ours, group),
        "torch": lambda: torch_utils.average_parameters_or_parameter_groups(theirs, group),
    }
    memory = {name: extra_memory(case) for name, case in cases.items()}
    seconds = paired(cases, rounds)
    return {
        name: {
            "time_over_raw": ratios(seconds, name, "raw all_reduce"),
            "bytes": bytes_of(cases[name], times=1),
            "extra_memory": memory[name],
            "seconds": seconds[name],
        }
        for name in cases
    }


def _table(world: int, hooks: dict[str, Any], averaging: dict[str, Any]) -> str:
    parts = [
        f"## {world} ranks",
        "A step of a model of 4.2 M parameters; median and quartiles of ratios within a round.",
        markdown_table(
            ["hook", "time / DDP's", "time / torch's", "MB a rank a step", "MiB more"],
            [
                [
                    name,
                    as_text(row["time_over_ddp"]),
                    as_text(row["time_over_torch"]) if row["time_over_torch"] else "",
                    f"{row['bytes_a_step'] / 1e6:.2f}",
                    f"{row['extra_memory'] / 2**20:.0f}",
                ]
                for name, row in hooks.items()
            ],
        ),
        "Averaging of 50 M parameters in fp32, in tensors of a GPT.",
        markdown_table(
            ["averaging", "time / raw all_reduce", "MB a rank", "MiB more"],
            [
                [
                    name,
                    as_text(row["time_over_raw"]),
                    f"{row['bytes'] / 1e6:.0f}",
                    f"{row['extra_memory'] / 2**20:.0f}",
                ]
                for name, row in averaging.items()
            ],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def main(
    world: Worlds = None,
    rounds: Annotated[
        int, typer.Option(min=4, help="rounds of hooks; half as many of averaging")
    ] = 80,
    record: Record = True,
) -> None:
    """Measure torch's hooks and averagers beside ours."""
    console = Console()
    content: dict[str, Any] = {}
    texts = []
    for size in world or [2, 4]:
        with console.status(f"{size} ranks: hooks"):
            hooks = run_ranks(size, measure_hooks, rounds)
        with console.status(f"{size} ranks: averaging"):
            averaging = run_ranks(size, measure_averaging, max(4, rounds // 2))
        content[f"{size} ranks"] = {"hooks": hooks, "averaging": averaging}
        texts.append(_table(size, hooks, averaging))
        console.print(texts[-1], markup=False)
    if record:
        write_record("hooks", "Hooks and averagers", content, "\n".join(texts))


if __name__ == "__main__":
    typer.run(main)
