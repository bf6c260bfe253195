"""Contenders of `benchmarks.time_to_loss`: what they say of their replicas is so."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmarks import network
from benchmarks.apart import lighthouse, torchrun_apart
from benchmarks.cluster import cluster, wait
from benchmarks.contenders import ALONE, CONTENDERS

from tests.contender_rank import History, train_as_launched

WORLD = 2


TOGETHER = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(not one.installed, reason=f"{one.package} is not installed"),
    )
    for name, one in CONTENDERS.items()
    if not one.apart
]
APART = [name for name, one in CONTENDERS.items() if one.apart and one.installed]


def check(name: str, histories: list[History]) -> None:
    for step, states in enumerate(zip(*histories, strict=True)):
        said = {agrees for agrees, _ in states}
        equal = len({digest for _, digest in states}) == 1
        assert said == {equal}, f"{name}, after {step + 1} steps"


@pytest.mark.parametrize("name", TOGETHER)
def test_replicas_are_equal_exactly_when_a_contender_says_so(
    ranks: Callable[..., list[Any]], name: str
) -> None:
    histories = ranks(WORLD, train_as_launched, name, WORLD)
    if name == ALONE:
        histories = [history[:-1] for history in histories]
    check(name, histories)


@pytest.mark.cluster
@pytest.mark.timeout(method="signal")
@pytest.mark.skipif(network.missing() is not None, reason=str(network.missing()))
@pytest.mark.skipif(not APART, reason="torchft is not installed")
def test_replicas_of_hosts_apart_are_equal_exactly_when_contenders_say_so(tmp_path: Path) -> None:
    command = ["python", "-m", "tests.contender_rank", str(tmp_path), *APART]
    with (
        cluster(hosts=WORLD) as hosts,
        lighthouse(hosts[0], WORLD) as address,
        (tmp_path / "output").open("w+") as output,
    ):
        codes = wait(torchrun_apart(hosts, command, address, [output] * WORLD), grace=10)
    assert codes == [0] * WORLD, (tmp_path / "output").read_text()
    said = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(WORLD)]
    for name in APART:
        check(name, [histories[name] for histories in said])
