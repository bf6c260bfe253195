"""Wires tell their own messages: what a run sends, and what a planner prices, of any wire."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import postlocal
from postlocal import codec, strategies, topology, virtual, wire
from postlocal.comm.group import Group, OnPaper
from postlocal.comm.groups import LevelGroups
from postlocal.planning import Cluster, Job, Link, plan
from postlocal.planning.exchange import of_tensors
from postlocal.topology import WORLD
from postlocal.wire import Divisor, Leg, Reducer, Staging, Wire, sent_bytes
from tests.models import batches, sgd, train_step

SIXTEEN = LevelGroups(OnPaper(16), topology.nodes(size=8))
MATRIX = {"matrix": torch.empty(512, 512, device="meta")}
VALUES = 512 * 512


@dataclass(frozen=True)
class star(Wire):
    """A user's own wire: the first rank gathers all contributions, and broadcasts the mean."""

    lossy = False

    def messages(self, tensors: Mapping[str, Tensor], groups: LevelGroups, level: str) -> list[Leg]:
        group = groups[level]
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        everything = (group.size - 1) * nbytes
        return [
            Leg(nbytes if group.rank else 0, group.size, "root", everything, level),
            Leg(0 if group.rank else everything, group.size, "root", everything, level),
        ]

    def open(self, groups: LevelGroups, level: str, staging: Staging | None = None) -> Reducer:
        return Star(groups[level])


class Star:
    """Sums at the first rank."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def mean_(
        self,
        tensors: Mapping[str, Tensor],
        divisor: Divisor | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> int:
        return sum(self._mean(tensor, divisor) for tensor in tensors.values())

    def _mean(self, tensor: Tensor, divisor: Divisor | None) -> int:
        size, mine = self.group.size, tensor.reshape(-1).clone()
        nothing: list[Sequence[Tensor]] = [[] for _ in range(size)]
        if self.group.rank:
            self.group.all_to_all([[mine], *nothing[1:]], nothing).wait()
            self.group.all_to_all(nothing, [[mine], *nothing[1:]]).wait()
        else:
            others = [torch.empty_like(mine) for _ in range(size)]
            self.group.all_to_all(nothing, [[other] for other in others]).wait()
            total = torch.stack([mine, *others[1:]]).sum(0)
            mine = total / (float(size) if divisor is None else divisor())
            self.group.all_to_all([[mine]] * size, nothing).wait()
        tensor.copy_(mine.view_as(tensor))
        return tensor.nbytes * (1 if self.group.rank else size - 1)

    def drop_residuals(self, names: Iterable[str] | None = None) -> None:
        return None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        return None


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(*pair) for pair in pairwise([8, 24, 24, 4])))


@pytest.mark.parametrize("recipe", [star(), wire.two_level(star())], ids=["star", "two levels"])
def test_a_users_own_wire_is_planned_as_it_runs(recipe: Wire) -> None:
    strategy = replace(strategies.diloco(2), wire=recipe)
    levels = topology.nodes(size=2)

    def work(group: Group) -> int:
        model = layers()
        optimizer = sgd(model)
        sync = postlocal.attach(model, optimizer, strategy, topology=levels, process_group=group)
        for x, y in batches(group.rank, 4):
            train_step(model, optimizer, x, y)
            sync.step()
        sync.finish()
        return sync.meter.payload_bytes["parameters"]

    there = Cluster(4, {"node": Link(1e9), "world": Link(1e9)}, levels)
    planned = plan(strategy, Job(layers(), step=0.1, steps=4), there)
    assert planned.payload_bytes_a_step * 4 == virtual.run(4, work)[0] > 0


def test_a_users_own_wire_is_priced_by_the_legs_that_it_tells() -> None:
    cluster = Cluster(5, {"world": Link(1e9, latency=0.5)})
    exchange = of_tensors(star(), MATRIX, cluster, WORLD)
    assert exchange.payload_bytes == 4 * 4 * VALUES
    assert exchange.seconds == pytest.approx(2 * (8 * 4 * 4 * VALUES / 1e9 + 0.5))


def test_a_users_own_wire_has_defaults() -> None:
    assert star().payload_bytes(numel=10, size=3) == 80
    assert (star().codecs, star().levels) == ((), frozenset())
    assert not star().keeps_residuals
    assert not star().by_bucket


def test_a_wire_that_tells_no_messages_is_refused() -> None:
    class silent:
        lossy = False
        payload_bytes = open = star.open

    with pytest.raises(TypeError, match=r"wire must be a value such as .* which has no messages"):
        replace(strategies.diloco(2), wire=silent())  # type: ignore[arg-type]


class plain(star):
    """A wire whose repr is an address, whatever it holds."""

    __repr__ = object.__repr__


class aggregate:
    """An outer optimizer likewise."""

    def __call__(self, anchor: Sequence[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(anchor, lr=0.7)


def averaging(anchor: Sequence[Tensor], lr: float = 0.7) -> torch.optim.Optimizer:
    return torch.optim.SGD(anchor, lr=lr)


def attach(**axes: Any) -> None:
    model = layers()
    postlocal.attach(model, sgd(model), replace(strategies.local_sgd(2), **axes)).close()


@pytest.mark.parametrize(
    ("axis", "value"),
    [("wire", plain()), ("wire", wire.two_level(plain())), ("outer", aggregate())],
)
def test_an_object_that_ranks_cannot_compare_is_refused(axis: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"^{axis} must be .*(plain|aggregate), .*frozen=True"):
        attach(**{axis: value})


@pytest.mark.parametrize(
    "outer",
    [averaging, partial(averaging, lr=0.5), lambda anchor: torch.optim.SGD(anchor, lr=0.7)],
    ids=["function", "partial", "lambda"],
)
def test_functions_have_names_to_compare(outer: Any) -> None:
    attach(outer=outer)


def test_a_mean_is_a_reduce_scatter_and_an_all_gather() -> None:
    scatter, gather = wire.fp32().messages(MATRIX, SIXTEEN, WORLD)
    assert (scatter.pattern, scatter.peers, scatter.level) == ("exchange", 16, "world")
    assert scatter.payload_bytes == gather.payload_bytes == 4 * VALUES * 15 // 16


def test_a_gathered_mean_is_one_leg() -> None:
    codes = codec.top_k()
    (leg,) = wire.gathered(codes).messages(MATRIX, SIXTEEN, WORLD)
    assert leg.payload_bytes == 15 * codes.nbytes(VALUES)


def test_error_feedback_sends_what_the_wire_within_sends() -> None:
    inner = wire.quantised(codec.int4())
    both = [each.messages(MATRIX, SIXTEEN, WORLD) for each in (inner, wire.error_feedback(inner))]
    assert both[0] == both[1]


def test_factors_travel_along_rings_and_the_rest_exactly() -> None:
    tensors = MATRIX | {"bias": torch.empty(512, device="meta")}
    legs = wire.powersgd(rank=2).messages(tensors, SIXTEEN, WORLD)
    assert [leg.pattern for leg in legs] == ["exchange", "exchange", "ring", "ring"]
    assert legs[2].payload_bytes == legs[3].payload_bytes == 2 * 15 * 512 * 2 // 16 * 4


def test_two_levels_have_legs_inside_nodes_and_between_them() -> None:
    legs = wire.two_level(wire.bf16()).messages(MATRIX, SIXTEEN, WORLD)
    assert [(leg.level, leg.peers, leg.pattern) for leg in legs] == [
        ("node", 8, "exchange"), ("node", 8, "root"),
        ("world", 2, "exchange"), ("world", 2, "exchange"),
        ("node", 8, "root"),
    ]  # fmt: skip
    assert legs[1].busiest == pytest.approx(4 * VALUES * 7 / 8, rel=1e-4)
    assert sent_bytes(legs[2:4]) == 2 * VALUES
    assert legs[4].busiest == legs[4].payload_bytes == 7 * 4 * VALUES


def test_within_one_node_two_levels_send_what_fp32_does() -> None:
    four = LevelGroups(OnPaper(4), topology.nodes(size=4))
    legs = wire.two_level(wire.sign()).messages(MATRIX, four, WORLD)
    assert [replace(leg, level=WORLD) for leg in legs] == [
        *wire.fp32().messages(MATRIX, four, WORLD)
    ]


def test_nothing_is_sent_by_a_rank_alone() -> None:
    for name in wire.NAMED:
        assert not wire.named(name).messages(
            MATRIX, LevelGroups(OnPaper(1), topology.world()), WORLD
        )


def test_codecs_and_levels_are_those_within() -> None:
    nested = wire.two_level(wire.two_level(wire.int8(block=64), level="rack"), level="node")
    assert nested.codecs == (codec.int8(block=64),)
    assert nested.levels == {"rack", "node"}
    assert nested.keeps_residuals
    assert not wire.two_level(wire.bf16()).keeps_residuals
