"""Codecs: sizes as predicted, errors as bounded, and defined results for bad values."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from postlocal import virtual, wire
from postlocal.codec import (
    Codec,
    affine,
    cast,
    exact,
    fp4,
    fp8,
    int4,
    int8,
    random_k,
    sign,
    top_k,
)
from postlocal.comm.group import Group
from postlocal.wire import mean_, quantised

CODECS: dict[str, Codec] = {
    "exact": exact(),
    "bf16": cast(torch.bfloat16),
    "fp16": cast(torch.float16),
    "int8": int8(block=16),
    "int8, stochastic": int8(block=16, stochastic=True),
    "int4": int4(block=16),
    "int4, stochastic": int4(block=16, stochastic=True),
    "affine by channel": affine(16),
    "affine": affine(),
    "sign": sign(block=16),
    "fp8": fp8(block=16),
    "fp4": fp4(block=16),
    "fp4, stochastic": fp4(block=16, stochastic=True),
    "top_k": top_k(k=4, chunk=16),
    "top_k of 8 bits": top_k(k=4, chunk=16, bits=8),
    "top_k, exact": top_k(k=4, chunk=16, bits=32),
    "random_k": random_k(k=4, chunk=16),
    "random_k of 3 bits": random_k(k=4, chunk=16, bits=3),
}
SPARSE = [name for name in CODECS if "_k" in name]
BLOCKWISE = [name for name in CODECS if CODECS[name].block == 16 and name not in SPARSE]
# Decoding gives values that encode to the same again; a bin's middle is in another bin's range.
IDEMPOTENT = [
    name
    for name in CODECS
    if "stochastic" not in name and name not in ("top_k", "top_k of 8 bits", "random_k of 3 bits")
]
EVERY = pytest.mark.parametrize("name", CODECS)
SIZES = [0, 1, 3, 7, 8, 15, 16, 17, 65_536, 65_537, 300_001]

floats = st.floats(-1e4, 1e4, width=32)
any_floats = st.floats(width=32)


def in_blocks(values: Tensor, block: int) -> Tensor:
    """Blocks of values, shape ``(blocks, block)``, zeros at the end."""
    return torch.nn.functional.pad(values, (0, -len(values) % block)).view(-1, block)


def spread(of_blocks: Tensor, block: int, numel: int) -> Tensor:
    """What each element's block has, shape ``(numel,)``."""
    return of_blocks.repeat_interleave(block)[:numel]


def step(name: str, values: Tensor) -> Tensor:
    """The greatest error that a codec may make of values, shape ``(n,)``, element by element."""
    if not len(values) or name == "exact":
        return torch.zeros_like(values)
    size = values.abs()
    block = len(values) if name == "affine" else 16
    blocks = in_blocks(values, block)
    greatest = spread(blocks.abs().amax(1), block, len(values))
    kind, _, way = name.partition(", ")
    whole = 1.0 if way == "stochastic" else 0.5
    if kind.startswith("affine"):
        ranges = blocks.amax(1).clamp(min=0) - blocks.amin(1).clamp(max=0)
        # Half a step, and another half where the zero point is rounded at the edge of the range.
        bound = spread(ranges, block, len(values)) / 255
    elif way == "stochastic" and kind == "fp4":
        bound = torch.maximum(size, greatest / 64)
    else:
        bound = {
            "bf16": size * 2.0**-8,
            "fp16": size * 2.0**-11 + 2.0**-24,
            "int8": greatest / 127 * whole,
            "int4": greatest / 7 * whole,
            "sign": size + greatest,
            "fp8": torch.maximum(size * 2.0**-4, greatest / 448 * 2.0**-10),
            "fp4": torch.maximum(size / 3, greatest / 128),
        }.get(kind, greatest)
    return bound * (1 + 1e-5) + 1e-38


def encoded(codec: Codec, values: Tensor, filling: int = 0) -> Tensor:
    numbytes = codec.nbytes(len(values), values.dtype)
    payload = torch.full((numbytes,), filling, dtype=torch.uint8)
    codec.encode(values, payload)
    return payload


def through(codec: Codec, values: Tensor) -> Tensor:
    decoded = torch.full_like(values, -7.0)
    codec.decode(encoded(codec, values), decoded)
    return decoded


@settings(deadline=None, max_examples=60)
@EVERY
@given(values=st.lists(floats, min_size=1, max_size=70))
def test_errors_are_within_a_step(name: str, values: list[float]) -> None:
    original = torch.tensor(values)
    error = (through(CODECS[name], original) - original).abs()
    assert bool((error <= step(name, original)).all())


@settings(deadline=None, max_examples=40)
@EVERY
@given(values=st.lists(any_floats, max_size=70))
def test_the_same_values_give_the_same_bytes(name: str, values: list[float]) -> None:
    original = torch.tensor(values)
    first, second = (encoded(CODECS[name], original, filling) for filling in (0, 255))
    assert torch.equal(first, second)


@settings(deadline=None, max_examples=40)
@EVERY
@given(
    values=st.lists(floats, min_size=1, max_size=70),
    alpha=st.floats(-3, 3, width=32),
)
def test_accumulating_adds_what_decoding_gives(
    name: str, values: list[float], alpha: float
) -> None:
    codec, original = CODECS[name], torch.tensor(values)
    payload = encoded(codec, original)
    sums = torch.linspace(-1, 1, len(values))
    expected = sums + alpha * through(codec, original)
    codec.accumulate(payload, sums, alpha)
    assert torch.allclose(sums, expected, rtol=1e-5, atol=1e-6 * float(original.abs().max() + 1))


@pytest.mark.parametrize("name", IDEMPOTENT)
def test_what_was_decoded_encodes_to_itself(name: str) -> None:
    once = through(CODECS[name], torch.randn(1000, generator=torch.Generator().manual_seed(3)))
    if name == "random_k":  # other values are kept the second time: those of value 0 stay
        kept = once != 0
        again = through(CODECS[name], once)
        assert torch.equal(again[again != 0], once[again != 0])
        assert bool((again[~kept] == 0).all())
    else:
        assert torch.allclose(through(CODECS[name], once), once, rtol=1e-5)


@EVERY
def test_zeros_stay_zeros(name: str) -> None:
    assert torch.equal(through(CODECS[name], torch.zeros(40)), torch.zeros(40))


@pytest.mark.parametrize("name", BLOCKWISE)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_block_with_a_value_that_is_not_finite_becomes_nan(name: str, bad: float) -> None:
    values = torch.ones(52)
    values[20] = values[50] = bad
    decoded = through(CODECS[name], values)
    finite = torch.ones(52, dtype=torch.bool)
    finite[16:32] = finite[48:] = False
    assert torch.equal(decoded.isfinite(), finite)
    assert torch.equal(decoded.isnan(), ~finite)


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_kept_of_a_chunk_that_is_not_finite_becomes_nan(name: str, bad: float) -> None:
    values = torch.ones(52)
    values[20] = values[50] = bad
    decoded = through(CODECS[name], values)
    assert [int(part.isnan().sum()) for part in torch.split(decoded, 16)] == [0, 4, 0, 1]
    assert bool((decoded[16:32].isnan() | (decoded[16:32] == 0)).all())


@settings(deadline=None, max_examples=40)
@pytest.mark.parametrize("name", [*BLOCKWISE, *SPARSE])
@given(values=st.lists(any_floats, min_size=1, max_size=50))
def test_any_values_decode_to_finite_ones_or_nan(name: str, values: list[float]) -> None:
    original = torch.tensor(values)
    decoded = through(CODECS[name], original)
    finite = in_blocks(original, 16).isfinite().all(dim=1)
    limit = torch.finfo(torch.float32).max / 2  # ranges of twice as much are beyond fp32
    finite &= in_blocks(original, 16).abs().amax(dim=1) <= limit
    assert bool(decoded[spread(finite, 16, len(values))].isfinite().all())
    assert not bool(decoded.isinf().any())


@EVERY
@pytest.mark.parametrize("value", [1e-44, -3e-40, 2.0**-126, 1e-37])
def test_subnormal_values_decode_to_finite_ones(name: str, value: float) -> None:
    values = torch.full((20,), value)
    decoded = through(CODECS[name], values)
    assert bool(decoded.isfinite().all())
    assert bool(((decoded - values).abs() <= step(name, values)).all())


@EVERY
@pytest.mark.parametrize("numel", SIZES)
def test_the_payload_has_the_size_that_was_predicted(name: str, numel: int) -> None:
    codec = CODECS[name]
    payload = torch.zeros(codec.nbytes(numel) + 8, dtype=torch.uint8)
    payload[codec.nbytes(numel) :] = 77
    values = torch.randn(numel)
    codec.encode(values, payload)
    assert payload[codec.nbytes(numel) :].tolist() == [77] * 8
    assert codec.nbytes(numel) % 4 == 0
    decoded = torch.empty(numel)
    codec.decode(payload[: codec.nbytes(numel)], decoded)
    assert bool(((decoded - values).abs() <= step(name, values)).all())


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_values_of_other_dtypes_are_taken_as_fp32(name: str, dtype: torch.dtype) -> None:
    codec = CODECS[name]
    values = torch.randn(101, generator=torch.Generator().manual_seed(4)).to(dtype)
    expected = through(codec, values.float())
    decoded = through(codec, values)
    assert decoded.dtype == dtype
    assert torch.allclose(decoded.float(), expected, rtol=0.01)
    codec.accumulate(encoded(codec, values), decoded, alpha=-1.0)
    assert float(decoded.abs().max()) < 0.01


def test_values_beyond_fp32_count_as_infinite() -> None:
    assert bool(
        through(int8(block=16), torch.full((16,), 1e200, dtype=torch.float64)).isnan().all()
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: int8(0), "block must be at least 1 element, got 0"),
        (lambda: affine(0), "channel must be at least 1 element, got 0"),
        (lambda: fp8(-1), "block must be at least 1 element, got -1"),
        (lambda: int4(15), "block must be a multiple of 2, so that codes fill whole bytes, got 15"),
        (lambda: fp4(3), "block must be a multiple of 2, so that codes fill whole bytes, got 3"),
        (lambda: sign(12), "block must be a multiple of 8, so that codes fill whole bytes, got 12"),
        (lambda: top_k(0), r"k must be from 1 to chunk \(4096\) elements, got 0"),
        (lambda: random_k(9, 8), r"k must be from 1 to chunk \(8\) elements, got 9"),
        (lambda: top_k(bits=1), "bits must be from 2 to 8, or 32 for exact values, got 1"),
        (lambda: random_k(bits=16), "bits must be from 2 to 8, or 32 for exact values, got 16"),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], Codec], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("make", [int8, int4, fp4])
@pytest.mark.parametrize("value", [0.0037, 0.011, 0.3, -0.77])
def test_stochastic_rounding_keeps_the_expectation(
    make: Callable[..., Codec], value: float
) -> None:
    codec = make(stochastic=True)
    values = torch.full((2**20,), value)
    values[::256] = 1.0  # the greatest of each block
    decoded = through(codec, values)
    rest = decoded.view(-1, 256)[:, 1:].double()
    error = float((rest.mean() - value).abs())
    assert float(rest.std()) > 0
    assert error < 5 * float(rest.std()) / 1000 + 2.0**-16 * abs(value)


def test_neighbours_are_rounded_independently() -> None:
    values = torch.full((2**18,), 0.5 / 127)
    values[::256] = 1.0
    up = (through(int8(stochastic=True), values) > 0).view(-1, 256)[:, 1:].double()
    for lagged in (up[:, 1:] * up[:, :-1], up[1:] * up[:-1]):
        assert abs(float(lagged.mean()) - 0.25) < 0.005


def test_integers_of_4_bits_lie_in_halves() -> None:
    payload = encoded(int4(block=4), torch.tensor([7.0, -7.0, 0.0, 3.0]))
    assert payload[4:6].tolist() == [0x0F, 0x31]  # 7 + 8 and 0; -7 + 8 and 3


@pytest.mark.parametrize("kept", [1, 10, 64])
def test_top_k_keeps_the_greatest(kept: int) -> None:
    codec = top_k(k=kept, bits=32)
    values = torch.randn(3 * 4096 + 1000, generator=torch.Generator().manual_seed(5))
    expected = torch.zeros_like(values)
    for part, target in zip(torch.split(values, 4096), torch.split(expected, 4096), strict=True):
        places = part.abs().topk(max(1, kept * len(part) // 4096)).indices
        target[places] = part[places]
    assert torch.equal(through(codec, values), expected)


def test_top_k_of_2_bits_takes_120_bytes_a_chunk() -> None:
    assert top_k().nbytes(4096) == 8 + 96 + 16  # two numbers, 64 places of 12 bits, 64 codes of 2
    assert top_k().nbytes(4096 + 64) == 120 + 8 + 4


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_levels_are_the_middles_of_equal_bins(bits: int) -> None:
    values = torch.randn(4096, generator=torch.Generator().manual_seed(6))
    decoded = through(top_k(bits=bits), values)
    kept = decoded != 0
    sizes = values[kept].abs()
    width = float(sizes.max() - sizes.min()) / 2 ** (bits - 1)
    assert int(kept.sum()) == 64
    assert bool(((decoded - values)[kept].abs() <= width / 2 * 1.0001).all())


def test_random_k_keeps_every_place_as_often() -> None:
    counts = torch.zeros(100)
    generator = torch.Generator().manual_seed(7)
    for _ in range(50):
        values = torch.rand(100 * 200, generator=generator) + 1
        counts += (through(random_k(k=10, chunk=100), values) != 0).view(200, 100).sum(0)
    assert int(counts.sum()) == 50 * 200 * 10
    assert bool(((counts - 1000).abs() < 5 * 1000**0.5).all())


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("workers", [2, 3, 4])
@pytest.mark.parametrize("numel", [1, 5, 33, 70_000])
def test_residuals_hold_what_is_not_sent(name: str, workers: int, numel: int) -> None:
    """The mean of contribution + old residual is what comes, plus the mean of new residuals."""
    recipe = quantised(CODECS[name])

    def work(group: Group) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(group.rank)
        values = torch.randn(numel, generator=generator)
        residual = torch.randn(numel, generator=generator)
        owed = values + residual
        mean_([values], group, recipe, residuals=[residual])
        return owed, values, residual

    results = virtual.run(workers, work)
    owed = torch.stack([owed.double() for owed, _, _ in results]).mean(0)
    kept = torch.stack([residual.double() for _, _, residual in results]).mean(0)
    for _, sent, _ in results:
        assert torch.equal(sent, results[0][1])
        assert torch.allclose(sent.double() + kept, owed, atol=1e-6)


def test_residuals_of_many_tensors_go_with_them() -> None:
    shapes = [(40_000,), (3, 5), (64, 33), ()]
    recipe = quantised(int8(block=8))

    def work(group: Group) -> list[tuple[Tensor, Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(group.rank)
        tensors = [torch.randn(shape, generator=generator) for shape in shapes]
        tensors[2] = tensors[2].t()
        residuals = [torch.zeros_like(tensor) for tensor in tensors]
        before = [tensor.clone() for tensor in tensors]
        mean_(tensors, group, recipe, residuals=residuals)
        return list(zip(before, tensors, residuals, strict=True))

    for triples in zip(*virtual.run(2, work), strict=True):
        owed = torch.stack([before for before, _, _ in triples]).mean(0)
        kept = torch.stack([residual for _, _, residual in triples]).mean(0)
        assert torch.allclose(triples[0][1] + kept, owed, atol=1e-6)


def test_error_feedback_makes_the_mean_of_many_rounds_exact() -> None:
    recipe = quantised(int8(block=64))

    def work(group: Group) -> tuple[Tensor, Tensor]:
        value = torch.randn(64, generator=torch.Generator().manual_seed(group.rank))
        residual = torch.zeros(64)
        with_feedback, without = torch.zeros(64), torch.zeros(64)
        for _ in range(50):
            for total, kept in ((with_feedback, [residual]), (without, None)):
                travelling = value.clone()
                mean_([travelling], group, recipe, residuals=kept)
                total.add_(travelling / 50)
        exact_mean = value.clone()
        mean_([exact_mean], group, wire.fp32())
        return (with_feedback - exact_mean).abs().max(), (without - exact_mean).abs().max()

    for with_feedback, without in virtual.run(3, work):
        assert float(with_feedback) < 0.1 * float(without)


def test_casts_keep_infinities_and_bound_what_is_finite() -> None:
    values = torch.tensor([torch.inf, -torch.inf, 1e30, -1e30, 1.0])
    codec, decoded = cast(torch.float16), torch.empty(5)
    payload = torch.zeros(codec.nbytes(5), dtype=torch.uint8)
    codec.encode(values, payload)
    codec.decode(payload, decoded)
    assert decoded.tolist() == [torch.inf, -torch.inf, 65504.0, -65504.0, 1.0]
