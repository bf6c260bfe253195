"""The methods of `benchmarks.time_to_loss`: replicas are equal exactly when they say so."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmarks.cluster import cluster, network, wait
from benchmarks.time_to_loss.methods import ALONE, METHODS
from benchmarks.time_to_loss.replica_groups import lighthouse, start_replica_groups

from tests.method_rank import History, train_as_launched

WORLD = 2


ONE_WORLD = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(not one.installed, reason=f"{one.package} is not installed"),
    )
    for name, one in METHODS.items()
    if not one.replica_groups
]
REPLICA_GROUPS = [name for name, one in METHODS.items() if one.replica_groups and one.installed]


def check(name: str, histories: list[History]) -> None:
    for step, states in enumerate(zip(*histories, strict=True)):
        said = {agrees for agrees, _ in states}
        equal = len({digest for _, digest in states}) == 1
        assert said == {equal}, f"{name}, after {step + 1} steps"


@pytest.mark.parametrize("name", ONE_WORLD)
def test_replicas_are_equal_exactly_when_a_method_says_so(
    ranks: Callable[..., list[Any]], name: str
) -> None:
    histories = ranks(WORLD, train_as_launched, name, WORLD)
    if name == ALONE:
        histories = [history[:-1] for history in histories]
    check(name, histories)


@pytest.mark.cluster
@pytest.mark.timeout(method="signal")
@pytest.mark.skipif(network.missing() is not None, reason=str(network.missing()))
@pytest.mark.skipif(not REPLICA_GROUPS, reason="torchft is not installed")
def test_replica_groups_are_equal_exactly_when_methods_say_so(tmp_path: Path) -> None:
    command = ["python", "-m", "tests.method_rank", str(tmp_path), *REPLICA_GROUPS]
    with (
        cluster(hosts=WORLD) as hosts,
        lighthouse(hosts[0], WORLD) as address,
        (tmp_path / "output").open("w+") as output,
    ):
        codes = wait(start_replica_groups(hosts, command, address, [output] * WORLD), grace=10)
    assert codes == [0] * WORLD, (tmp_path / "output").read_text()
    said = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(WORLD)]
    for name in REPLICA_GROUPS:
        check(name, [histories[name] for histories in said])
