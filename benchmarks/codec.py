"""Codecs: time to encode and decode, as a multiple of one copy of the values in the same round.

    python -m benchmarks.codec

Each round takes every case once, in an order that changes; figures are medians and quartiles over
rounds of ratios within a round.
"""

import importlib.metadata
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor

from benchmarks.measure import as_text, ratios, rotated
from benchmarks.options import Record
from benchmarks.report import markdown_table, write_record
from postlocal.codec import (
    Codec,
    affine,
    cast,
    exact,
    fp4,
    fp8,
    int4,
    int8,
    kernels,
    random_k,
    sign,
    top_k,
)

CODECS: dict[str, Codec] = {
    "exact": exact(),
    "cast, bf16": cast(torch.bfloat16),
    "int8": int8(),
    "int8, stochastic": int8(stochastic=True),
    "int4": int4(),
    "sign": sign(),
    "fp8": fp8(),
    "fp4": fp4(),
    "affine, 512": affine(512),
    "top 64 of 4096, 2 bits": top_k(),
    "random 64 of 4096": random_k(),
}
WARMUP = 2  # rounds


@dataclass(frozen=True)
class Case:
    """Two halves of a round trip, and bytes a value in between; or why there are none."""

    encode: Callable[[], object]
    decode: Callable[[], object]
    bytes_a_value: float


def ours(values: Tensor, out: Tensor) -> Iterator[tuple[str, Case]]:
    """Every codec, by each kind of kernel that it has."""
    for name, codec in CODECS.items():
        payload = torch.empty(codec.nbytes(len(values)), dtype=torch.uint8)
        modes: list[kernels.Mode] = ["eager"]
        if getattr(codec, "compiled", False):
            kernels.use("compiled")
            kernels.warm_up(codec)
            modes = ["compiled", "eager"]
        for mode in modes:
            case = _coded(codec, mode, values, payload, out)
            yield (f"{name}, {mode}" if len(modes) > 1 else name), case


def _coded(codec: Codec, mode: kernels.Mode, values: Tensor, payload: Tensor, out: Tensor) -> Case:
    def encode() -> None:
        kernels.use(mode)
        codec.encode(values, payload)

    def decode() -> None:
        kernels.use(mode)
        codec.decode(payload, out)

    return Case(encode, decode, len(payload) / len(values))


def torchs(values: Tensor, out: Tensor) -> Iterator[tuple[str, Case]]:
    """Torch's quantisers, which make codes of 8 bits."""
    kept: list[Tensor] = [values]
    rows = values[: len(values) // 512 * 512].view(-1, 512)

    def per_tensor() -> None:
        low, high = (float(extreme) for extreme in values.aminmax())
        scale = max(high, -low) / 127
        kept[0] = torch.quantize_per_tensor(values, scale, 0, torch.qint8)

    def per_channel() -> None:
        scales = rows.abs().amax(dim=1).div_(127).double()
        zeros = torch.zeros(len(rows), dtype=torch.int64)
        kept[0] = torch.quantize_per_channel(rows, scales, zeros, 0, torch.qint8)

    def decode() -> None:
        out[: kept[0].numel()].copy_(kept[0].dequantize().view(-1))

    yield "torch, quantize_per_tensor", Case(per_tensor, decode, 1)
    yield "torch, quantize_per_channel of 512", Case(per_channel, decode, 1 + 16 / 512)


def hiveminds(values: Tensor, out: Tensor) -> Iterator[tuple[str, Case | str]]:
    """Those of hivemind; or the reason why each cannot be run."""
    names = ("Float16Compression", "Uniform8BitQuantization", "Quantile8BitQuantization",
             "BlockwiseQuantization")  # fmt: skip
    try:
        compression = __import__("hivemind.compression", fromlist=["compression"])
        version = importlib.metadata.version("hivemind")
    except ImportError:
        for name in names:
            yield f"hivemind, {name}", "not installed"
        return
    for name in names:
        label = f"hivemind {version}, {name}"
        try:
            info = compression.CompressionInfo.from_tensor(values)
            case = _hivemind(getattr(compression, name)(), info, values, out)
            case.decode()  # with numpy 2.4 that of its 8-bit codecs fails
            yield label, case
        except ImportError as error:
            yield label, f"not installed: {error.name}"
        except TypeError as error:
            yield label, f"fails: {error}"


def _hivemind(codec: Any, info: Any, values: Tensor, out: Tensor) -> Case:
    kept = [codec.compress(values, info)]

    def encode() -> None:
        kept[0] = codec.compress(values, info)

    def decode() -> None:
        out.copy_(codec.extract(kept[0]))

    return Case(encode, decode, kept[0].ByteSize() / len(values))


def paired(
    cases: dict[str, Case], values: Tensor, out: Tensor, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds of a copy, of encoding and of decoding, one after the other, once a round."""
    seconds: dict[str, dict[str, list[float]]] = {
        name: {"copy": [], "encode": [], "decode": []} for name in cases
    }

    def copy() -> None:
        out.copy_(values)

    for index in range(WARMUP + rounds):
        for name in rotated(list(cases), index):
            steps = (copy, cases[name].encode, cases[name].decode)
            for step, times in zip(steps, seconds[name].values(), strict=True):
                start = time.perf_counter()
                step()
                if index >= WARMUP:
                    times.append(time.perf_counter() - start)
    return seconds


def measure(numel: int, threads: int, rounds: int) -> dict[str, Any]:
    """Ratios to a copy of every case, or why there are none."""
    torch.set_num_threads(threads)
    values = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    out = torch.empty_like(values)
    found = dict([*ours(values, out), *torchs(values, out), *hiveminds(values, out)])
    cases = {name: case for name, case in found.items() if isinstance(case, Case)}
    seconds = paired(cases, values, out, rounds)
    return {
        name: _row(case, seconds[name]) if isinstance(case, Case) else {"skipped": case}
        for name, case in found.items()
    }


def _row(case: Case, seconds: dict[str, list[float]]) -> dict[str, Any]:
    both = [a + b for a, b in zip(seconds["encode"], seconds["decode"], strict=True)]
    times = {**seconds, "both": both}
    return {
        "bytes_a_value": case.bytes_a_value,
        **{step: ratios(times, step, "copy") for step in ("encode", "decode", "both")},
        "seconds": seconds,
    }


def _table(numel: int, threads: int, rows: dict[str, Any]) -> str:
    parts = [
        f"## {threads} thread{'s' if threads > 1 else ''}, {numel / 1e6:g} M values of fp32",
        "Time over that of one copy; median and quartiles of ratios within a round.",
        markdown_table(
            ["codec", "bytes a value", "encode", "decode", "both"],
            [_cells(name, row) for name, row in rows.items()],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _cells(name: str, row: dict[str, Any]) -> list[str]:
    if "skipped" in row:
        return [name, row["skipped"], "", "", ""]
    times = [as_text(row[step]) for step in ("encode", "decode", "both")]
    return [name, f"{row['bytes_a_value']:.3f}", *times]


def main(
    threads: Annotated[list[int] | None, typer.Option(help="number of threads; repeatable")] = None,
    numel: Annotated[int, typer.Option(min=2**17, help="number of values")] = 10_000_000,
    rounds: Annotated[int, typer.Option(min=4, help="number of rounds")] = 40,
    record: Record = True,
) -> None:
    """Measure codecs against a copy, beside torch's quantisers and hivemind's."""
    console = Console()
    content: dict[str, Any] = {}
    texts = []
    for count in threads or [1]:
        with console.status(f"{count} threads"):
            rows = measure(numel, count, rounds)
        content[f"{count} threads"] = rows
        texts.append(_table(numel, count, rows))
        console.print(texts[-1], markup=False, soft_wrap=True)
    if record:
        write_record("codec", "Codecs", content, "\n".join(texts))


if __name__ == "__main__":
    typer.run(main)
