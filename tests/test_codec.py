"""Codecs: sizes as predicted, errors as bounded, and defined results for bad values."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from postlocal import virtual, wire
from postlocal.codec import Codec, affine, cast, exact, int8
from postlocal.group import Group
from postlocal.wire import mean_, quantised

CODECS: dict[str, Codec] = {
    "exact": exact(),
    "bf16": cast(torch.bfloat16),
    "fp16": cast(torch.float16),
    "int8": int8(block=16),
    "affine by channel": affine(16),
    "affine": affine(),
}

floats = st.floats(-1e4, 1e4, width=32)


def step(name: str, values: Tensor) -> Tensor:
    """The greatest error that a codec may make of values, shape ``(n,)``, element by element."""
    if name == "exact":
        return torch.zeros_like(values)
    if name in ("bf16", "fp16"):
        tiny = 2.0**-24 if name == "fp16" else 1e-40
        return values.abs() * {"bf16": 2.0**-8, "fp16": 2.0**-11}[name] + tiny
    block = len(values) if name == "affine" else 16
    blocks = torch.nn.functional.pad(values, (0, -len(values) % block)).view(-1, block)
    if name == "int8":
        sizes = blocks.abs().amax(1) / 127
    else:
        sizes = (blocks.amax(1).clamp(min=0) - blocks.amin(1).clamp(max=0)) / 255
    # Half a step, and another half where the zero point is rounded at the edge of the range.
    return (sizes * (1.0 + 1e-5)).repeat_interleave(block)[: len(values)] + 1e-38


def through(codec: Codec, values: Tensor) -> Tensor:
    payload = torch.zeros(codec.nbytes(len(values), values.dtype), dtype=torch.uint8)
    decoded = torch.full_like(values, -7.0)
    codec.encode(values, payload)
    codec.decode(payload, decoded)
    return decoded


@settings(deadline=None, max_examples=60)
@pytest.mark.parametrize("name", CODECS)
@given(values=st.lists(floats, min_size=1, max_size=70))
def test_errors_are_within_a_step(name: str, values: list[float]) -> None:
    original = torch.tensor(values)
    error = (through(CODECS[name], original) - original).abs()
    assert bool((error <= step(name, original)).all())


@pytest.mark.parametrize("name", CODECS)
def test_zeros_stay_zeros(name: str) -> None:
    assert torch.equal(through(CODECS[name], torch.zeros(40)), torch.zeros(40))


@pytest.mark.parametrize("name", ["int8", "affine by channel"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_block_with_a_value_that_is_not_finite_becomes_nan(name: str, bad: float) -> None:
    values = torch.ones(48)
    values[20] = bad
    decoded = through(CODECS[name], values)
    assert bool(decoded[16:32].isnan().all())
    assert bool(decoded[:16].isfinite().all())
    assert bool(decoded[32:].isfinite().all())


@pytest.mark.parametrize("name", CODECS)
def test_subnormal_values_decode_to_finite_ones(name: str) -> None:
    values = torch.full((20,), 1e-44)
    decoded = through(CODECS[name], values)
    assert bool(decoded.isfinite().all())
    assert float(decoded.abs().max()) < 1e-6


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("numel", [1, 3, 16, 17, 65_536, 65_537, 200_001])
def test_the_payload_has_the_size_that_was_predicted(name: str, numel: int) -> None:
    codec = CODECS[name]
    payload = torch.zeros(codec.nbytes(numel) + 8, dtype=torch.uint8)
    payload[codec.nbytes(numel) :] = 77
    values = torch.randn(numel)
    codec.encode(values, payload)
    assert payload[codec.nbytes(numel) :].tolist() == [77] * 8
    decoded = torch.empty(numel)
    codec.decode(payload[: codec.nbytes(numel)], decoded)
    assert bool(((decoded - values).abs() <= step(name, values)).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_values_of_other_dtypes_are_taken(dtype: torch.dtype) -> None:
    values = torch.randn(100).to(dtype)
    decoded = through(int8(block=32), values)
    assert decoded.dtype == dtype
    assert float((decoded.double() - values.double()).abs().max()) < 0.05


@pytest.mark.parametrize("make", [int8, affine])
def test_a_block_of_nothing_is_refused(make: Callable[[int], Codec]) -> None:
    with pytest.raises(ValueError, match="block must be at least 1 element, got 0"):
        make(0)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("workers", [2, 3, 4])
@pytest.mark.parametrize("numel", [1, 5, 33, 70_000])
def test_residuals_hold_what_is_not_sent(name: str, workers: int, numel: int) -> None:
    """The mean of contribution + old residual is what comes, plus the mean of new residuals."""
    carrier = quantised(CODECS[name])

    def work(group: Group) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(group.rank)
        values = torch.randn(numel, generator=generator)
        residual = torch.randn(numel, generator=generator)
        owed = values + residual
        mean_([values], group, carrier, residuals=[residual])
        return owed, values, residual

    results = virtual.run(workers, work)
    owed = torch.stack([owed.double() for owed, _, _ in results]).mean(0)
    kept = torch.stack([residual.double() for _, _, residual in results]).mean(0)
    for _, sent, _ in results:
        assert torch.equal(sent, results[0][1])
        assert torch.allclose(sent.double() + kept, owed, atol=1e-6)


def test_residuals_of_many_tensors_go_with_them() -> None:
    shapes = [(40_000,), (3, 5), (64, 33), ()]
    carrier = quantised(int8(block=8))

    def work(group: Group) -> list[tuple[Tensor, Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(group.rank)
        tensors = [torch.randn(shape, generator=generator) for shape in shapes]
        tensors[2] = tensors[2].t()
        residuals = [torch.zeros_like(tensor) for tensor in tensors]
        before = [tensor.clone() for tensor in tensors]
        mean_(tensors, group, carrier, residuals=residuals)
        return list(zip(before, tensors, residuals, strict=True))

    for triples in zip(*virtual.run(2, work), strict=True):
        owed = torch.stack([before for before, _, _ in triples]).mean(0)
        kept = torch.stack([residual for _, _, residual in triples]).mean(0)
        assert torch.allclose(triples[0][1] + kept, owed, atol=1e-6)


def test_error_feedback_makes_the_mean_of_many_rounds_exact() -> None:
    carrier = quantised(int8(block=64))

    def work(group: Group) -> tuple[Tensor, Tensor]:
        value = torch.randn(64, generator=torch.Generator().manual_seed(group.rank))
        residual = torch.zeros(64)
        with_feedback, without = torch.zeros(64), torch.zeros(64)
        for _ in range(50):
            for total, kept in ((with_feedback, [residual]), (without, None)):
                travelling = value.clone()
                mean_([travelling], group, carrier, residuals=kept)
                total.add_(travelling / 50)
        exact_mean = value.clone()
        mean_([exact_mean], group, wire.fp32())
        return (with_feedback - exact_mean).abs().max(), (without - exact_mean).abs().max()

    for with_feedback, without in virtual.run(3, work):
        assert float(with_feedback) < 0.1 * float(without)
