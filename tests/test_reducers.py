"""Wires in use: what all reducers have in common, and the state that each keeps."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from postlocal import codec, virtual, wire
from postlocal.checkpoint.packing import pack, unpack
from postlocal.comm.group import Group
from postlocal.comm.groups import LevelGroups
from postlocal.topology import WORLD, Partition
from postlocal.wire import Reducer, Staging, Wire, mean_, sent_bytes

Ranks = Callable[..., list[Any]]

WIRES: dict[str, Wire] = {
    "fp32": wire.fp32(),
    "bf16": wire.bf16(),
    "int8": wire.quantised(codec.int8()),
    "int8 with feedback": wire.error_feedback(wire.quantised(codec.int8()), decay=0.9),
    "bf16 with feedback": wire.error_feedback(wire.bf16()),
    "sign": wire.named("sign"),
    "fp4": wire.named("fp4"),
    "top_k": wire.error_feedback(wire.gathered(codec.top_k(k=4, chunk=32)), decay=0.95),
    "random_k": wire.random_k(k=4, chunk=32),
    "quantised top_k": wire.quantised(codec.top_k(k=4, chunk=32, bits=32)),
    "gathered int8": wire.gathered(codec.int8()),
    "powersgd": wire.powersgd(rank=2),
    "two levels fp32": wire.two_level(wire.fp32()),
    "two levels int4": wire.two_level(wire.named("int4")),
    "two levels powersgd": wire.two_level(wire.powersgd(rank=1), level="pair"),
}
EXACT: dict[str, Wire] = {
    "fp32": wire.fp32(),
    "coded": wire.error_feedback(wire.quantised(codec.exact())),
    "gathered": wire.error_feedback(wire.gathered(codec.exact()), decay=0.5),
    "all of top_k": wire.gathered(codec.top_k(k=32, chunk=32, bits=32)),
    "all of random_k": wire.gathered(codec.random_k(k=1, chunk=1)),
    "full rank": wire.powersgd(rank=64, min_compression=1e-6),
    "two levels": wire.two_level(wire.fp32()),
    "two levels pairs": wire.two_level(wire.quantised(codec.exact()), level="pair"),
    "two levels alone": wire.two_level(wire.fp32(), level="rank"),
    "two levels by one": wire.two_level(wire.fp32(), level="world"),
    "two levels twice": wire.two_level(wire.two_level(wire.fp32(), level="node"), level="pair"),
}
SHAPES = {"norm": (7,), "scale": (), "none": (0, 3), "weight": (64, 33), "conv": (5, 4, 3, 2)}


def make(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()
    }
    tensors["conv"] = tensors["conv"].to(memory_format=torch.channels_last)
    tensors["gaps"] = torch.randn(6, 8, generator=generator).to(dtype)[:, ::2]
    tensors["turned"] = torch.randn(6, 8, generator=generator).to(dtype).t()
    return tensors


@dataclass(frozen=True)
class uneven:
    """Pairs, and nodes of four; the last ones may be smaller."""

    def partition(self, size: int) -> dict[str, Partition]:
        return {"pair": runs(size, 2), "node": runs(size, 4), WORLD: runs(size, size)}


def runs(size: int, length: int) -> Partition:
    return tuple(tuple(range(start, min(start + length, size))) for start in range(0, size, length))


def opened(recipe: Wire, group: Group) -> Reducer:
    return recipe.open(LevelGroups(group, uneven()), WORLD)


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", WIRES)
@pytest.mark.parametrize("workers", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_all_ranks_end_with_identical_bits_in_the_memory_they_had(
    name: str, workers: int, dtype: torch.dtype
) -> None:
    def work(group: Group) -> list[dict[str, Tensor]]:
        reducer = opened(WIRES[name], group)
        rounds = []
        for step in range(3):
            tensors = make(10 * step + group.rank, dtype)
            places = [(t.data_ptr(), t.stride()) for t in tensors.values()]
            reducer.mean_(tensors)
            assert places == [(t.data_ptr(), t.stride()) for t in tensors.values()]
            rounds.append(tensors)
        return rounds

    results = virtual.run(workers, work)
    for rounds in results:
        assert all(equal(*pair) for pair in zip(rounds, results[0], strict=True))


@pytest.mark.parametrize("name", WIRES)
@pytest.mark.parametrize("workers", [1, 2, 3, 4, 5])
def test_bytes_are_as_predicted(name: str, workers: int) -> None:
    def work(group: Group) -> None:
        groups = LevelGroups(group, uneven())
        reducer = WIRES[name].open(groups, WORLD)
        for step in range(2):
            tensors = make(step)
            predicted = sent_bytes(WIRES[name].messages(tensors, groups, WORLD))
            assert reducer.mean_(tensors) == predicted
            assert (predicted > 0) == (workers > 1)

    virtual.run(workers, work)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("workers", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_loses_nothing_gives_the_plain_mean(
    name: str, workers: int, dtype: torch.dtype
) -> None:
    def work(group: Group) -> dict[str, Tensor]:
        reducer = opened(EXACT[name], group)
        reducer.mean_(make(7, dtype))  # the second mean must not depend on what the first one left
        tensors = make(group.rank, dtype)
        reducer.mean_(tensors)
        return tensors

    results = virtual.run(workers, work)
    inputs = [make(rank, dtype) for rank in range(workers)]
    narrow = torch.finfo(dtype).eps > 2**-23 or "k" in name.split("_")
    tolerance = 2.0**-7 if narrow else 1e-5
    for key, mean in results[0].items():
        expected = torch.stack([tensors[key].double() for tensors in inputs]).mean(0)
        assert torch.allclose(mean.double(), expected, atol=tolerance, rtol=tolerance), key


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("workers", [1, 3, 5])
def test_weights_are_divided_out(name: str, workers: int) -> None:
    total = workers * (workers + 1) / 2

    def work(group: Group) -> Tensor:
        weight = group.rank + 1.0
        mine = torch.randn(16, 8, generator=torch.Generator().manual_seed(group.rank)) * weight
        opened(EXACT[name], group).mean_({"weight": mine}, lambda: total)
        return mine

    results = virtual.run(workers, work)
    parts = [
        torch.randn(16, 8, generator=torch.Generator().manual_seed(rank)) * (rank + 1)
        for rank in range(workers)
    ]
    for result in results:
        assert torch.allclose(result, torch.stack(parts).sum(0) / total, atol=1e-5)


@pytest.mark.parametrize("name", WIRES)
@pytest.mark.parametrize("workers", [1, 3])
def test_a_state_taken_in_the_middle_goes_on_bit_for_bit(name: str, workers: int) -> None:
    def work(group: Group) -> None:
        reducer = opened(WIRES[name], group)
        for step in range(3):
            reducer.mean_(make(10 * step + group.rank))
        restored = opened(WIRES[name], group)
        restored.load_state_dict(unpack(*pack(reducer.state_dict())))
        for step in range(3, 6):
            one, other = make(10 * step + group.rank), make(10 * step + group.rank)
            reducer.mean_(one)
            restored.mean_(other)
            assert equal(one, other)
        assert pack(reducer.state_dict())[0] == pack(restored.state_dict())[0]

    virtual.run(workers, work)


@pytest.mark.parametrize("name", WIRES)
def test_tensors_may_come_in_parts_that_change(name: str) -> None:
    def work(group: Group) -> Tensor:
        reducer = opened(WIRES[name], group)
        everything = make(group.rank)
        reducer.mean_(everything)
        for step in range(2):
            some = make(step + group.rank)
            names = list(some)[:: 1 - 2 * step]
            reducer.mean_({each: some[each] for each in names[:3]})
            reducer.mean_({each: some[each] for each in names[3:]})
        return some["weight"]

    results = virtual.run(3, work)
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_state_of_another_model_is_refused() -> None:
    def work(group: Group) -> None:
        reducer = opened(WIRES["int8 with feedback"], group)
        reducer.load_state_dict({"residuals": {"weight": torch.zeros(3)}})
        with pytest.raises(ValueError, match=r"shape \(3,\) for 'weight', the tensor has \(4,\)"):
            reducer.mean_({"weight": torch.zeros(4)})

    virtual.run(2, work)


WITH_RESIDUALS: dict[str, Wire] = {
    "int8": wire.int8(block=8),
    "top_k": wire.error_feedback(wire.gathered(codec.top_k(k=2, chunk=16))),
    "powersgd": wire.powersgd(rank=1, min_compression=1.0),
}


@pytest.mark.parametrize("name", WITH_RESIDUALS)
@pytest.mark.parametrize("resumed", [False, True])
def test_dropped_residuals_are_not_sent(name: str, resumed: bool) -> None:
    """Rank 0 drops the residual of one of two tensors, and takes part with zeros afterwards."""

    def work(group: Group) -> dict[str, Tensor]:
        reducer = opened(WITH_RESIDUALS[name], group)
        for step in range(2):
            generator = torch.Generator().manual_seed(step)
            tensors = {
                key: torch.randn(16, 16, generator=generator) * (group.rank == 0) for key in "ab"
            }
            reducer.mean_(tensors)
        if group.rank == 0:
            reducer.drop_residuals(["a"])
        if resumed:
            state = unpack(*pack(reducer.state_dict()))
            reducer = opened(WITH_RESIDUALS[name], group)
            reducer.load_state_dict(state)
        tensors = {key: torch.zeros(16, 16) for key in "ab"}
        reducer.mean_(tensors)
        return tensors

    sent = virtual.run(2, work)[0]
    # Chunks of "a" and "b" are cut in the middle: rank 0 owns "a", and rank 1 "b".
    assert bool(sent["b"].abs().sum() > 0)
    assert bool(sent["a"].abs().sum() > 0) == (name == "int8")


def test_what_is_lost_of_a_mean_is_not_dropped() -> None:
    recipe = wire.int4(block=8)

    def work(group: Group, *, drops: bool) -> Tensor:
        reducer = opened(recipe, group)
        mine = torch.randn(64, generator=torch.Generator().manual_seed(0))
        reducer.mean_({"weight": mine})
        if drops:
            reducer.drop_residuals()
        nothing = torch.zeros(64)
        reducer.mean_({"weight": nothing}, weights={"weight": 0.0})
        return nothing

    kept = virtual.run(2, lambda group: work(group, drops=False))
    dropped = virtual.run(2, lambda group: work(group, drops=True))
    assert bool(kept[0].abs().sum() > 0)
    assert torch.equal(kept[0], dropped[0])


def test_a_node_keeps_the_residuals_that_one_of_its_replicas_drops() -> None:
    recipe = wire.two_level(wire.named("int4"), level="pair")

    def work(group: Group) -> bool:
        reducer = opened(recipe, group)
        reducer.mean_(make(group.rank))
        before, _ = pack(reducer.state_dict())
        reducer.drop_residuals(["weight"])
        return bool(before == pack(reducer.state_dict())[0])

    # The last one is a node by itself.
    assert virtual.run(5, work) == [True, True, True, True, False]


@pytest.mark.parametrize(
    ("make_wire", "message"),
    [
        (lambda: wire.error_feedback(wire.fp32()), "must be a wire that loses something"),
        (
            lambda: wire.error_feedback(wire.error_feedback(wire.bf16())),
            "must be a stateless wire",
        ),
        (
            lambda: wire.error_feedback(wire.powersgd()),
            "must be a stateless wire",
        ),
        (
            lambda: wire.error_feedback(wire.two_level(wire.bf16())),
            "wrap the wire within",
        ),
        (lambda: wire.powersgd(rank=0), "rank must be at least 1 column, got 0"),
        (lambda: wire.powersgd(min_compression=0.0), "must be above 0, got 0.0"),
        (lambda: wire.error_feedback(wire.bf16(), decay=0.0), "above 0 and at most 1, got 0.0"),
        (lambda: wire.error_feedback(wire.bf16(), decay=1.1), "above 0 and at most 1, got 1.1"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(
    make_wire: Callable[[], Wire], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_wire()


COMPENSATED: dict[str, Wire] = {
    "bf16": wire.bf16(),
    "int8": wire.quantised(codec.int8()),
    "int4": wire.quantised(codec.int4()),
    "fp4": wire.quantised(codec.fp4()),
    "sign": wire.quantised(codec.sign()),
    "top_k": wire.gathered(codec.top_k(k=2, chunk=16)),
    "random_k": wire.gathered(codec.random_k(k=2, chunk=16)),
    "quantised top_k": wire.quantised(codec.top_k(k=2, chunk=16)),
}
ROUNDS = 60


def far_off(recipe: Wire) -> float:
    """How far the mean of many rounds of one vector a rank is from their mean, relative to it."""

    def work(group: Group) -> Tensor:
        reducer = opened(recipe, group)
        mine = torch.randn(16, 8, generator=torch.Generator().manual_seed(group.rank))
        total = torch.zeros(16, 8)
        for _ in range(ROUNDS):
            travelling = mine.clone()
            reducer.mean_({"weight": travelling})
            total.add_(travelling)
        return total / ROUNDS

    mean = torch.stack(
        [torch.randn(16, 8, generator=torch.Generator().manual_seed(rank)) for rank in range(3)]
    ).mean(0)
    return float((virtual.run(3, work)[0] - mean).norm() / mean.norm())


@pytest.mark.parametrize("name", COMPENSATED)
def test_feedback_makes_the_sum_of_many_rounds_exact(name: str) -> None:
    recipe = COMPENSATED[name]
    without, with_feedback = far_off(recipe), far_off(wire.error_feedback(recipe))
    assert with_feedback < 20 / ROUNDS * without
    if name in ("sign", "top_k", "quantised top_k"):
        assert without > 0.2


@dataclass(frozen=True)
class halves(wire.ChunkWire):
    """A user's own wire: values go to all ranks as fp16."""

    lossy = True

    def legs(self, numel: int, rank: int, size: int, dtype: torch.dtype) -> list[wire.Leg]:
        return [wire.Leg((size - 1) * 2 * numel, size)]

    def limit(self, size: int, numel: int) -> int:
        return 64

    def staged(self, chunk: wire.Chunk, size: int) -> wire.Staged:
        return wire.Staged(2 * size * chunk.numel, 0)

    def start(
        self, chunk: wire.Chunk, group: Group, divisor: wire.Divisor, staging: Staging
    ) -> wire.Exchange:
        return Halves(chunk.pieces(), group, divisor)


class Halves:
    """Halves under way to all ranks."""

    def __init__(self, pieces: list[Tensor], group: Group, divisor: wire.Divisor) -> None:
        self._pieces = pieces
        self._divisor = divisor
        own = [piece.half() for piece in pieces]
        self._received = [[torch.empty_like(half) for half in own] for _ in range(group.size)]
        self._received[group.rank] = own
        self._work = group.all_to_all([own] * group.size, self._received)

    def reduce(self) -> None:
        self._work.wait()
        for piece, *received in zip(self._pieces, *self._received, strict=True):
            piece.copy_(torch.stack(received).float().sum(0) / self._divisor())

    def wait(self) -> None:
        return None


@dataclass(frozen=True)
class careless(halves):
    """One that claims to send residuals, and leaves them out."""

    takes_residuals = True


@dataclass(frozen=True)
class careful(halves):
    """One that sends them."""

    takes_residuals = True

    def start(
        self, chunk: wire.Chunk, group: Group, divisor: wire.Divisor, staging: Staging
    ) -> wire.Exchange:
        values, half = wire.CompensatedValues(chunk), codec.cast(torch.float16)
        payload = torch.empty(half.nbytes(chunk.numel, chunk.dtype), dtype=torch.uint8)
        values.encode(slice(0, chunk.numel), payload, half)
        half.decode(payload, values.values)
        return Halves([values.values], group, divisor)


def test_feedback_over_a_users_wire_that_takes_residuals_makes_sums_exact() -> None:
    assert far_off(wire.error_feedback(careful())) < 20 / ROUNDS * far_off(careful())
    assert far_off(careful()) == far_off(halves())


def test_feedback_over_a_users_wire_that_would_drop_residuals_is_refused() -> None:
    with pytest.raises(ValueError, match=r"takes residuals, got halves\(\): .*CompensatedValues"):
        wire.error_feedback(halves())
    with pytest.raises(ValueError, match=r"wire must be a wire that takes residuals"):
        virtual.run(2, lambda group: mean_([torch.ones(2)], group, halves(), None, [torch.ones(2)]))


def test_a_users_wire_that_drops_residuals_after_all_is_refused_at_its_first_mean() -> None:
    with pytest.raises(RuntimeError, match=r"careless\(\) has takes_residuals = True, but"):
        far_off(wire.error_feedback(careless()))


def test_low_rank_means_are_exact_over_many_rounds() -> None:
    assert far_off(wire.powersgd(rank=1, min_compression=1.0)) < 0.2


@pytest.mark.parametrize("recipe", [wire.named("int8"), wire.named("top_k"), wire.powersgd(1, 1.0)])
def test_a_value_that_is_not_finite_spoils_no_later_mean(recipe: Wire) -> None:
    def work(group: Group) -> Tensor:
        reducer = opened(recipe, group)
        bad = torch.full((8, 16), math.inf if group.rank else 1.0)
        reducer.mean_({"weight": bad})
        assert not bad.isfinite().all()
        mine = torch.ones(8, 16)
        for _ in range(3):
            mine.fill_(1.0)
            reducer.mean_({"weight": mine})
        return mine

    assert all(bool(mine.isfinite().all()) for mine in virtual.run(2, work))


MUCH: dict[str, list[Callable[[], Tensor]]] = {
    "four large": [lambda: torch.zeros(2**22 + 3) for _ in range(4)],
    "fp64": [lambda: torch.zeros(2**22 + 3, dtype=torch.float64) for _ in range(3)],
    "gaps": [lambda: torch.zeros(2**12, 2**12)[:, ::2], lambda: torch.zeros(3, 2**23)[:, ::2]],
}


class Watched(Staging):
    """Staging that notes the most memory that it had, in use and free."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._used: dict[int, int] = {}

    def allocate(self, numel: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        taken = super().allocate(numel, like, dtype)
        if taken.numel():
            self._used[taken.data_ptr()] = taken.untyped_storage().nbytes()
        free = sum(buffer.nbytes for buffer in self._free)
        self.most = max(self.most, free + sum(self._used.values()))
        return taken

    def free(self, *buffers: Tensor) -> None:
        for buffer in buffers:
            self._used.pop(buffer.data_ptr(), None)
        super().free(*buffers)


BOUNDED = {
    "bf16": wire.bf16(),
    "int4": wire.named("int4"),
    "gathered": wire.gathered(codec.exact()),
    "fp32": wire.fp32(),
}


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize("kind", MUCH)
def test_staging_is_bounded(name: str, kind: str) -> None:
    def work(group: Group) -> int:
        staging = Watched()
        reducer = BOUNDED[name].open(LevelGroups(group, uneven()), WORLD, staging)
        reducer.mean_({str(index): make_one() for index, make_one in enumerate(MUCH[kind])})
        return staging.most

    for most in virtual.run(2, work):
        assert 0 < most <= 64 * 2**20


@pytest.mark.parametrize("name", BOUNDED)
def test_staging_is_bounded_whatever_sizes_came_before(name: str) -> None:
    sizes = [*range(2**17, 2**22, 2**18), *range(2**22, 2**17, -(2**19))]

    def work(group: Group) -> int:
        staging = Watched()
        reducer = BOUNDED[name].open(LevelGroups(group, uneven()), WORLD, staging)
        for index, size in enumerate(sizes):
            small = torch.zeros(size // 7, 3)[:, 1:]
            reducer.mean_({f"{index}": torch.zeros(size).bfloat16(), f"{index} small": small})
        return staging.most

    for most in virtual.run(2, work):
        assert 0 < most <= 64 * 2**20


def test_a_small_request_leaves_a_large_buffer_to_a_large_one() -> None:
    staging, like = Staging(), torch.zeros(())
    large, small = staging.allocate(1000, like), staging.allocate(10, like)
    staging.free(large, small)
    assert staging.allocate(5, like).data_ptr() == small.data_ptr()
    assert staging.allocate(400, like, torch.float64).data_ptr() == large.data_ptr()


def test_a_buffer_that_is_too_small_is_dropped() -> None:
    staging, like = Staging(), torch.zeros(())
    for numel in range(1, 50):
        staging.free(staging.allocate(numel, like))
    assert [buffer.numel() for buffer in staging._free] == [49]


@pytest.mark.parametrize("name", ["fp32", "int8 with feedback", "top_k", "powersgd"])
def test_tensors_with_gaps_are_cut_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire.exact, "limit", lambda self, size, numel: 50)
    monkeypatch.setattr(wire.quantised, "limit", lambda self, size, numel: 50)

    def work(group: Group) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        full = torch.randn(3, 40, 8, generator=generator)
        tensors = {
            "lead": torch.randn(33, generator=generator),
            "gaps": full[:, :, ::2],
            "turned": full.clone().permute(2, 0, 1)[::3],
            "wide": torch.randn(1, 300, generator=generator)[:, ::2],
        }
        before = {each: tensor.clone() for each, tensor in tensors.items()}
        opened(WIRES[name], group).mean_(tensors)
        return before, tensors

    for before, after in virtual.run(2, work):
        for each, tensor in after.items():
            tolerance = {"fp32": 0.0, "top_k": math.inf}.get(name, 0.03)
            assert torch.allclose(tensor, before[each], atol=tolerance, rtol=0)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_leaders_alone_send_between_nodes(workers: int) -> None:
    recipe = wire.two_level(wire.bf16(), level="pair")

    def work(group: Group) -> tuple[int, int]:
        groups, tensors = LevelGroups(group, uneven()), {"weight": torch.zeros(1200)}
        legs = recipe.messages(tensors, groups, WORLD)
        return sent_bytes(legs), recipe.open(groups, WORLD).mean_(tensors)

    between = wire.bf16().payload_bytes(1200, -(-workers // 2))
    # In a node of two, a leader sends half of what it has to be summed, and then the mean. The
    # others send all that they have, and their weight.
    leader = 600 * 4 + between + 1200 * 4
    expected = {
        1: [0], 2: [4800, 4800], 5: [leader, 4804, leader, 4804, between]
    }[workers]  # fmt: skip
    assert virtual.run(workers, work) == [(sent, sent) for sent in expected]


def test_a_mean_within_a_node_is_exact() -> None:
    recipe = wire.two_level(wire.quantised(codec.sign()), level="node")

    def work(group: Group) -> Tensor:
        mine = torch.tensor([1.0, 2.0, 3.0]) * (group.rank + 1)
        recipe.open(LevelGroups(group, uneven()), "pair").mean_({"weight": mine})
        return mine

    results = virtual.run(4, work)
    assert torch.equal(results[0], torch.tensor([1.0, 2.0, 3.0]) * 1.5)
    assert torch.equal(results[3], torch.tensor([1.0, 2.0, 3.0]) * 3.5)


@pytest.mark.parametrize("workers", [2, 3, 4, 5, 6, 7])
def test_identical_replicas_stay_as_they_are_within_one_node(workers: int) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))

    def work(group: Group) -> Tensor:
        mine = values.clone()
        reducer = wire.two_level(wire.named("int4"), level="world").open(
            LevelGroups(group, uneven()), WORLD
        )
        reducer.mean_({"weight": mine})
        return mine

    assert all(torch.equal(mine, values) for mine in virtual.run(workers, work))


def test_a_level_that_is_missing_is_named() -> None:
    def work(group: Group) -> None:
        with pytest.raises(ValueError, match=r"\(rank, pair, node, world\), got 'rack'"):
            opened(wire.two_level(wire.bf16(), level="rack"), group)

    virtual.run(2, work)


@pytest.mark.parametrize("name", wire.NAMED)
def test_named_wires_are_of_equal_value_each_time(name: str) -> None:
    assert wire.named(name) == wire.NAMED[name]() == getattr(wire, name)()
    assert wire.named(name).lossy == (name != "fp32")


def test_an_unknown_name_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ValueError, match=r"wire must be one of fp32, bf16, .*, got 'int2'"):
        wire.named("int2")


def over_processes(rank: int, name: str) -> tuple[list[dict[str, Tensor]], bool]:
    from postlocal.comm.group import resolve

    groups = LevelGroups(resolve(None, None), uneven())
    reducer = WIRES[name].open(groups, WORLD)
    rounds, predicted = [], True
    for step in range(3):
        tensors = make(10 * step + rank)
        expected = sent_bytes(WIRES[name].messages(tensors, groups, WORLD))
        predicted = predicted and reducer.mean_(tensors) == expected
        rounds.append(tensors)
    return rounds, predicted


@pytest.mark.parametrize(
    ("world", "name"),
    [(2, "top_k"), (3, "int8 with feedback"), (3, "powersgd"), (4, "two levels int4")],
)
def test_processes_end_with_identical_bits_too(ranks: Ranks, world: int, name: str) -> None:
    results = ranks(world, over_processes, name)
    for rounds, predicted in results:
        assert predicted
        assert all(equal(*pair) for pair in zip(rounds, results[0][0], strict=True))
