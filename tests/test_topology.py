"""Topologies are nested partitions of the world."""

import os
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh

from postlocal import topology, virtual
from postlocal.comm.group import Group, resolve
from postlocal.comm.groups import LevelGroups, by_node

Ranks = Callable[..., list[Any]]


@given(factors=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_levels_cover_the_world_and_nest(factors: list[int]) -> None:
    sizes, size = {}, 1
    for index, factor in enumerate(factors[:-1]):
        size *= factor
        sizes[f"level {index}"] = size
    world = size * factors[-1]
    partitions = topology.nested(sizes).partition(world)
    assert list(partitions) == [*sizes, "world"]
    finer: topology.Partition = tuple((rank,) for rank in range(world))
    for partition in partitions.values():
        assert sorted(rank for group in partition for rank in group) == list(range(world))
        assert all(any(set(small) <= set(big) for big in partition) for small in finer)
        finer = partition


def test_nodes_take_their_size_from_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert topology.nodes().partition(4)["node"] == ((0, 1), (2, 3))
    assert topology.nodes(size=4).partition(4)["node"] == ((0, 1, 2, 3),)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    with pytest.raises(ValueError, match="LOCAL_WORLD_SIZE is not set"):
        topology.nodes().partition(4)


def test_one_process_keeps_the_topology_of_the_real_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for recipe in (topology.nodes(), topology.nodes(8), topology.nested({"node": 8, "rack": 16})):
        assert all(partition == ((0,),) for partition in recipe.partition(1).values())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="node size must divide the world size 6, got 4"):
        topology.nodes(4).partition(6)
    with pytest.raises(ValueError, match="size must be at least 1 rank a node, got 0"):
        topology.nodes(0)
    with pytest.raises(ValueError, match=r"positive multiple of the level below it \(4\), got 6"):
        topology.nested({"node": 4, "rack": 6})
    with pytest.raises(ValueError, match="'world' is always there"):
        topology.nested({"world": 4})


def levels_of_mesh(rank: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("machines", "node"))
    with pytest.raises(ValueError, match="must have named dimensions"):
        topology.from_mesh(init_device_mesh("cpu", (4,)))
    with pytest.raises(ValueError, match="level 'node' has 4 ranks, the world has 8"):
        topology.from_mesh(mesh).partition(8)
    return topology.from_mesh(mesh).partition(4)


def test_a_device_mesh_gives_the_levels_of_its_dimensions(ranks: Ranks) -> None:
    for levels in ranks(4, levels_of_mesh):
        assert levels == {"node": ((0, 1), (2, 3)), "world": ((0, 1, 2, 3),)}


def test_a_layout_holds_this_ranks_group_at_each_level() -> None:
    def look(group: Group) -> list[tuple[str, int, int]]:
        groups = LevelGroups(group, topology.nested({"node": 2, "rack": 4}))
        return [(level, groups[level].rank, groups[level].size) for level in groups.levels]

    levels = virtual.run(8, look)
    assert levels[5] == [("rank", 0, 1), ("node", 1, 2), ("rack", 1, 4), ("world", 5, 8)]


def test_an_unknown_level_is_named_with_those_that_are_there() -> None:
    def look(group: Group) -> None:
        LevelGroups(group, topology.nodes(2))["rack"]

    with pytest.raises(ValueError, match=r"\(rank, node, world\), got 'rack'"):
        virtual.run(2, look)


def nodes_found(rank: int) -> list[topology.Partition]:
    """By the launcher's number of the node, by its ranks a node, by the machine's name."""
    group = resolve(None, None)
    os.environ["GROUP_RANK"] = "010"[rank]
    found = [by_node(group)]
    del os.environ["GROUP_RANK"]
    found.append(by_node(group))
    del os.environ["LOCAL_WORLD_SIZE"]
    return [*found, by_node(group)]


def test_nodes_are_found_by_what_the_launcher_tells_or_by_name(ranks: Ranks) -> None:
    for found in ranks(3, nodes_found, local_world_size=2):
        assert found == [((0, 2), (1,)), ((0, 1), (2,)), ((0, 1, 2),)]


def layout_of_uneven_nodes(rank: int) -> list[tuple[str, int]]:
    base = resolve(None, None)
    base.subgroup([(0, 1), (2,)])
    groups = LevelGroups(base, topology.world())
    leaders = groups.leaders("world")
    return [(level, groups[level].size) for level in groups.levels] + [
        ("led", leaders["world"].size)
    ]


def test_groups_can_be_made_after_some_ranks_were_alone(ranks: Ranks) -> None:
    for sizes in ranks(3, layout_of_uneven_nodes):
        assert sizes == [("rank", 1), ("world", 3), ("led", 1)]


def test_leaders_meet_at_the_levels_above_theirs() -> None:
    def look(group: Group) -> list[int]:
        groups = LevelGroups(group, topology.nested({"node": 2, "rack": 4}))
        led = groups.leaders("node")
        assert groups.leaders("node") is led
        return [led[level].size for level in led.levels]

    assert virtual.run(8, look)[:3] == [[1, 1, 2, 4], [1, 1, 1, 1], [1, 1, 2, 4]]
