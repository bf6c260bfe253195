"""Fragments hold every parameter once, in whole layers, and are sent once a round."""

from collections import OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from postlocal import fragments
from postlocal.fragments import Fragments, modules, streaming, whole
from postlocal.sync.parameters import Replica
from postlocal.train.model import Size, Transformer

ORDERS = st.sampled_from(["strided", "sequential"])


class Tied(nn.Module):
    """A language model whose head is its embedding, in a body as transformers have it."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.head = nn.Linear(8, 64, bias=False)
        blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(layers)
        )
        self.body = nn.ModuleDict(
            {"tokens": nn.Embedding(64, 8), "blocks": blocks, "norm": nn.LayerNorm(8)}
        )
        self.head.weight = self.body["tokens"].weight  # type: ignore[assignment]


class ResNet(nn.Module):
    """A stem, three stages of two blocks each, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.stage1 = nn.Sequential(self._block(4, 4), self._block(4, 4))
        self.stage2 = nn.Sequential(self._block(4, 8), self._block(8, 8))
        self.stage3 = nn.Sequential(self._block(8, 16), self._block(16, 16))
        self.head = nn.Linear(16, 10)

    def _block(self, given: int, made: int) -> nn.Module:
        block = nn.Module()
        block.conv = nn.Conv2d(given, made, 3)
        block.norm = nn.BatchNorm2d(made)
        return block


def transformer(layers: int = 4) -> nn.Module:
    return Transformer(Size(layers=layers, width=8, heads=2))


def perceptron(widths: list[int]) -> nn.Module:
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Linear(width, 3), nn.ReLU()]
    return nn.Sequential(*layers)


def sizes_of(model: nn.Module) -> dict[str, int]:
    return {name: parameter.nbytes for name, parameter in Replica(model).parameters.items()}


def split(cut: Fragments, model: nn.Module) -> tuple[tuple[str, ...], ...]:
    return cut.split(model, sizes_of(model))


def layers_of(names: tuple[str, ...]) -> list[str]:
    """The layers of the trainer's transformer that names are of, each once."""
    return list(OrderedDict.fromkeys(n.split(".")[1] for n in names if n.startswith("blocks.")))


MODELS = {
    "transformer": transformer(),
    "tied": Tied(),
    "resnet": ResNet(),
    "perceptron": perceptron([5, 7, 9]),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("order", ["strided", "sequential"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_parameter_is_in_exactly_one_fragment(name: str, order: Any, count: int) -> None:
    sizes = sizes_of(MODELS[name])
    parts = streaming(count, order).split(MODELS[name], sizes)
    assert len(parts) == count
    assert sorted(n for part in parts for n in part) == sorted(sizes)
    assert all(part == tuple(n for n in sizes if n in part) for part in parts)
    assert parts == streaming(count, order).split(MODELS[name], sizes)


@given(widths=st.lists(st.integers(1, 200), min_size=1, max_size=12), order=ORDERS, data=st.data())
def test_any_perceptron_is_cut_into_whole_layers(
    widths: list[int], order: Any, data: st.DataObject
) -> None:
    model = perceptron(widths)
    count = data.draw(st.integers(1, len(widths)))
    parts = split(streaming(count, order), model)
    assert sorted(n for part in parts for n in part) == sorted(sizes_of(model))
    assert all(parts)
    homes = [{n.split(".")[0] for n in part} for part in parts]
    assert sum(map(len, homes)) == len(set().union(*homes))


@given(widths=st.lists(st.integers(1, 200), min_size=1, max_size=12), data=st.data())
def test_sequential_fragments_are_runs_of_about_equal_bytes(
    widths: list[int], data: st.DataObject
) -> None:
    model = perceptron(widths)
    sizes = sizes_of(model)
    count = data.draw(st.integers(1, len(widths)))
    parts = split(streaming(count, "sequential"), model)
    assert [n for part in parts for n in part] == list(sizes)
    largest = max(sum(sizes[n] for n in names) for names in modules(model, sizes))
    heaviest = max(sum(sizes[n] for n in part) for part in parts)
    assert heaviest <= sum(sizes.values()) / count + largest


def test_strided_fragments_take_turns_and_sequential_ones_do_not() -> None:
    model = transformer(layers=6)
    strided = split(streaming(3), model)
    assert [layers_of(part) for part in strided] == [["0", "3"], ["1", "4"], ["2", "5"]]
    sequential = split(streaming(3, "sequential"), model)
    assert [layers_of(part) for part in sequential] == [["0", "1"], ["2", "3"], ["4", "5"]]


def test_what_belongs_to_no_layer_goes_to_the_lightest_fragment() -> None:
    model = transformer(layers=3)
    first, second = split(streaming(2), model)
    assert layers_of(first) == ["0", "2"]
    assert "embedding.weight" in second
    assert "head.weight" in first


def test_a_tied_parameter_is_placed_once_under_its_first_name() -> None:
    parts = split(streaming(2), Tied())
    names = [name for part in parts for name in part]
    assert names.count("head.weight") == 1
    assert "body.tokens.weight" not in names


def test_the_blocks_of_all_stages_are_layers() -> None:
    model = ResNet()
    owners = modules(model, sizes_of(model))
    starts = [names[0].rsplit(".", 1)[0] for names in owners]
    blocks = [f"stage{stage}.{block}.conv" for stage in (1, 2, 3) for block in (0, 1)]
    assert starts == [*blocks, "stem", "head"]


def test_modules_beside_the_layers_are_named_where_they_leave_the_way_to_them() -> None:
    model = Tied(layers=2)
    owners = modules(model, sizes_of(model))
    assert [names[0] for names in owners] == [
        "body.blocks.0.0.weight",
        "body.blocks.1.0.weight",
        "head.weight",
        "body.norm.weight",
    ]
    assert modules(model, ["body.norm.bias"]) == (("body.norm.bias",),)


def test_a_list_that_holds_nearly_all_in_one_child_is_looked_into() -> None:
    body = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    model = nn.Sequential(nn.Embedding(4, 8), body, nn.Linear(8, 2))
    assert [names[0] for names in modules(model, sizes_of(model))] == [
        "0.weight",
        "1.0.weight",
        "1.1.weight",
        "1.2.weight",
        "1.3.weight",
        "2.weight",
    ]


def test_without_a_list_the_models_children_are_its_layers() -> None:
    model = nn.ModuleDict({"first": nn.Linear(2, 2), "second": nn.Linear(2, 2)})
    assert split(streaming(2), model) == (
        ("first.weight", "first.bias"),
        ("second.weight", "second.bias"),
    )


def test_frozen_layers_are_not_counted() -> None:
    model = transformer(layers=3)
    model.get_submodule("blocks.1").requires_grad_(False)
    first, second = split(streaming(2), model)
    assert (layers_of(first), layers_of(second)) == (["0"], ["2"])
    with pytest.raises(ValueError, match="3 fragments of 2 layers"):
        split(streaming(3), model)


def test_layers_can_be_named() -> None:
    cut = streaming(2, layers=["stage1", "stage2", "stage3.0"])
    first, second = split(cut, ResNet())
    assert {n.split(".")[0] for n in first} >= {"stage1", "stage3"}
    assert {n.split(".")[0] for n in second} >= {"stage2"}
    assert hash(cut) == hash(streaming(2, layers=("stage1", "stage2", "stage3.0")))


@pytest.mark.parametrize("missing", ["blocks.9", "block", "blocks.0.query", "norm.bias"])
def test_a_layer_that_holds_nothing_is_named(missing: str) -> None:
    with pytest.raises(ValueError, match=rf"got '{missing}', which holds none"):
        split(streaming(1, layers=["blocks.1", missing]), transformer())


def test_a_layer_with_only_frozen_parameters_holds_nothing() -> None:
    model = transformer()
    model.get_submodule("blocks.1").requires_grad_(False)
    with pytest.raises(ValueError, match=r"got 'blocks.1', which holds none"):
        split(streaming(1, layers=["blocks.0", "blocks.1"]), model)


@pytest.mark.parametrize("order", ["strided", "sequential"])
def test_one_fragment_takes_a_model_of_no_layers(order: Any) -> None:
    assert split(streaming(1, order), nn.Linear(2, 1)) == (("weight", "bias"),)
    with pytest.raises(ValueError, match="got 2 fragments of 0 layers"):
        split(streaming(2, order), nn.Linear(2, 1))


def test_more_fragments_than_layers_are_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match="got 5 fragments of 4 layers; lower count, or name"):
        split(streaming(5), transformer())


def test_whole_is_one_part_applied_at_once() -> None:
    cut: Fragments = whole()
    assert (cut.count, cut.delay, cut.mix) == (1, 0, 0)
    model = transformer()
    assert split(cut, model) == (tuple(sizes_of(model)),)


def test_splitting_needs_no_memory_for_parameters() -> None:
    with torch.device("meta"):
        model = transformer()
    sizes = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    assert len(streaming(4).split(model, sizes)) == 4


BAD: list[tuple[dict[str, Any], str]] = [
    ({"count": 0}, "count must be at least 1 fragment, got 0"),
    ({"count": 2, "delay": -1}, "delay must be at least 0 steps, got -1"),
    ({"count": 2, "mix": 1.5}, r"mix must be from 0 to 1, got 1\.5"),
    ({"count": 2, "mix": -0.5}, r"mix must be from 0 to 1, got -0\.5"),
    ({"count": 2, "mix": float("nan")}, "mix must be from 0 to 1, got nan"),
    ({"count": 2, "order": "random"}, "order must be one of .*, got 'random'"),
    ({"count": 1, "layers": ["a.b", "a"]}, "must not hold each other, got 'a.b' and 'a'"),
    ({"count": 1, "layers": ["a", "b", "a"]}, "must not hold each other, got 'a' and 'a'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_what_makes_no_sense_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fragments.streaming(**arguments)


def test_names_that_only_begin_alike_are_apart() -> None:
    assert streaming(1, layers=["blocks.1", "blocks.10"]).layers == ("blocks.1", "blocks.10")
