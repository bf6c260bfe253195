"""What a caller may save along: it comes back as it was, or its place is named."""

import datetime
import random
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import postlocal
from postlocal import checkpoint, strategies
from postlocal.checkpoint.packing import pack, unpack
from tests.models import mlp, sgd

Ranks = Callable[..., list[Any]]


class Point(NamedTuple):
    x: int
    y: int


def clock() -> postlocal.Sync:
    model = mlp()
    return postlocal.attach(model, sgd(model), strategies.diloco(4))


def through(value: Any) -> Any:
    return unpack(*pack(value, "extra"))


def test_random_numbers_go_on_as_they_would_have(tmp_path: Path) -> None:
    generator = np.random.default_rng(5)
    sync = clock()
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "generator": generator.bit_generator.state,
        "torch": torch.get_rng_state(),
    }
    checkpoint.save(tmp_path, sync, states)

    def draw() -> list[float]:
        drawn = [random.random(), np.random.rand(), generator.random(), float(torch.rand(()))]
        return [float(number) for number in drawn]

    expected = draw()
    draw()
    restored = checkpoint.restore(tmp_path, sync)
    assert restored is not None
    random.setstate(restored.extra["python"])
    np.random.set_state(restored.extra["numpy"])
    generator.bit_generator.state = restored.extra["generator"]
    torch.set_rng_state(restored.extra["torch"])
    assert draw() == expected


ARRAYS = {
    "floats": np.array([[1.5, np.nan], [-0.0, np.inf]]),
    "unsigned": np.array([0, 2**64 - 1], dtype=np.uint64),
    "booleans": np.array([True, False]),
    "complex": np.array([1 + 2j]),
    "half": np.array([0.5], dtype=np.float16),
    "of no dimension": np.array(3),
    "empty": np.zeros((0, 2), dtype=np.int16),
    "reversed": np.arange(4)[::-1],
    "transposed": np.arange(6).reshape(2, 3).T,
    "read-only": np.broadcast_to(np.float32(1), (2,)),
    "of the other endianness": np.array([1, 258], dtype=">i4"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_come_back(name: str) -> None:
    back = through(ARRAYS[name])
    assert type(back) is np.ndarray
    assert back.shape == ARRAYS[name].shape
    assert back.dtype == ARRAYS[name].dtype.newbyteorder("=")
    assert np.array_equal(back, ARRAYS[name], equal_nan=back.dtype.kind in "fc")


def test_numbers_of_numpy_come_back_as_such(tmp_path: Path) -> None:
    numbers = [np.float32(0.1), np.float64(0.1), np.int64(-1), np.bool_(True), np.uint8(3)]
    sync = clock()
    checkpoint.save(tmp_path, sync, {"numbers": numbers, "text": np.str_("a")})
    restored = checkpoint.restore(tmp_path, sync)
    assert restored is not None
    assert restored.extra["numbers"] == numbers
    assert [type(n) for n in restored.extra["numbers"]] == [type(n) for n in numbers]
    assert restored.extra["text"] == "a"


PLAIN = {
    "bytes": b"\x00\xff",
    "a path": Path("data") / "x.txt",
    "a set": {1, "a"},
    "a complex number": 1 - 2j,
    "an integer of 128 bits": 2**127 + 1,
    "keys of several kinds": {0: "a", "0": "b", (1, None): "c", 2.5: "d", b"k": "e"},
    "an ordered dict": OrderedDict(b=1, a=2),
    "a named tuple": Point(1, 2),
    "a size": torch.Size([2, 3]),
    "infinity": float("inf"),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_values_come_back_equal(name: str) -> None:
    assert through(PLAIN[name]) == PLAIN[name]


def test_views_and_conjugates_come_back_as_plain_tensors() -> None:
    tensors = [torch.tensor([1 + 2j]).conj(), torch.arange(6.0).view(2, 3).t(), torch.ones(3)[1:]]
    for tensor, back in zip(tensors, through(tensors), strict=True):
        assert torch.equal(tensor, back)


BAD: dict[str, tuple[Any, str]] = {
    "an object": ({"rng": [0, object()]}, r"extra\['rng'\]\[1\] must be .*, got object: dicts,"),
    "an array of objects": ({"a": np.array([None])}, r"extra\['a'\] .* got ndarray of object"),
    "dates": ({"a": np.array(["2020"], "M8[D]")}, r"extra\['a'\] .* of datetime64"),
    "a masked array": ({"a": np.ma.array([1])}, r"extra\['a'\] .* got MaskedArray of int64"),
    "a date": ({1: datetime.datetime(2020, 1, 1)}, r"extra\[1\] .* got datetime"),
    "a generator of torch": ({"g": torch.Generator()}, r"store its .get_state\(\)"),
    "a generator of numpy": ({"g": np.random.default_rng()}, r"store its .bit_generator.state"),
    "a module": ({"m": nn.Linear(1, 1)}, r"store its .state_dict\(\)"),
    "a sparse tensor": ({"t": torch.eye(2).to_sparse()}, r"extra\['t'\] .* one that is sparse"),
    "a tensor without memory": ({"t": torch.ones(1, device="meta")}, "without memory"),
    "a tensor as key": ({"t": {torch.ones(1): 1}}, r"the key extra\['t'\]\[tensor"),
    "no dict": ([1], "extra must be a dict, got list"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_stored_is_named_and_nothing_written(tmp_path: Path, name: str) -> None:
    extra, words = BAD[name]
    with pytest.raises(TypeError, match=words) as error:
        checkpoint.save(tmp_path, clock(), extra)
    assert len(str(error.value)) < 300
    assert list(tmp_path.iterdir()) == []


def test_what_holds_itself_is_refused(tmp_path: Path) -> None:
    extra: dict[str, Any] = {}
    extra["self"] = extra
    with pytest.raises(ValueError, match="extra must not contain itself"):
        checkpoint.save(tmp_path, clock(), extra)


def save_odd_extra(rank: int, folder: Path) -> str:
    sync = clock()
    with pytest.raises((TypeError, postlocal.DisagreementError)) as error:
        checkpoint.save(folder, sync, {"a": object() if rank == 1 else 1})
    path = checkpoint.save(folder, sync, {"a": rank})
    sync.close()
    return f"{path.name} {error.value}"


def test_what_one_rank_cannot_store_is_an_error_on_all(ranks: Ranks, tmp_path: Path) -> None:
    first, second = ranks(2, save_odd_extra, tmp_path)
    words = "extra['a'] must be one of what a checkpoint can hold, got object"
    assert f"another rank cannot go on: TypeError: {words}" in first
    assert words in second
    assert first.startswith("step-00000000 ")
