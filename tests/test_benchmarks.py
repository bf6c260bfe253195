"""What benchmarks rest on: their control, their cache, and their network."""

import statistics
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from benchmarks import scale, sync_cost
from benchmarks.cache import Cache
from benchmarks.cluster import network
from benchmarks.convergence.__main__ import main as convergence
from benchmarks.convergence.campaign import Campaign, Result, train_control, train_replicas
from benchmarks.convergence.table import name_and_title, summarize
from benchmarks.measure import loopback_traffic
from benchmarks.peers import PEERS, installed
from benchmarks.report import machine
from benchmarks.shapes import small
from benchmarks.training import Worker
from torch import Tensor
from typer.testing import CliRunner

from postlocal import strategies
from postlocal.train import TrainConfig, make_config
from tests.models import equal, values

Ranks = Callable[..., list[Any]]

CONFIG = make_config(workers=4, batch_size=2, sequence_length=32, steps=3)
SETTINGS = {"ddp": strategies.ddp(), "averaging": strategies.local_sgd(2)}


def no_tick() -> None:
    return None


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def train_ddp(rank: int, config: TrainConfig) -> list[Tensor]:
    worker = Worker(config, [rank], distributed=True)
    for step in range(config.steps):
        worker.step(step)
    return values(worker.model)


def test_the_control_is_what_ddp_computes(ranks: Ranks) -> None:
    start = flat(values(Worker(CONFIG, [0]).model))
    control = flat(values(train_control(CONFIG, strategies.ddp(), no_tick)[0]))
    ddp = flat(ranks(4, train_ddp, CONFIG)[0])
    # AdamW takes whole steps where gradients are hardly more than rounding: no bound holds for
    # each element alone.
    assert (control - ddp).norm() < 1e-4 * (ddp - start).norm()


def test_a_run_of_threads_is_repeated_bit_for_bit() -> None:
    first, second = (train_replicas(CONFIG, SETTINGS["averaging"], no_tick) for _ in range(2))
    assert equal(values(first[0]), values(second[0]))
    assert first[1] == second[1]


def campaign(seeds: int = 2) -> Campaign:
    return Campaign(CONFIG, SETTINGS, range(seeds))


def results(of: Campaign) -> list[Result]:
    return [
        Result(task.key, "source", 2.0 + seed + 0.1 * (name != "ddp"), 10, 40, 1, 1.0)
        for (name, seed), task in of.tasks.items()
    ]


def test_a_campaign_takes_from_its_cache_what_is_there(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "new" / "results.jsonl", Result)
    for result in results(campaign()):
        cache.add(replace(result, loss=9.0))
        cache.add(result)
    taken = campaign().train(cache, jobs=1, resume=True)  # nothing is left to train
    assert list(taken.values()) == results(campaign())


def test_runs_that_differ_have_different_keys() -> None:
    slower = Campaign(CONFIG.model_copy(update={"lr": 1e-3}), SETTINGS, range(2))
    keys = [task.key for of in (campaign(), slower) for task in of.tasks.values()]
    assert len(set(keys)) == 8


def test_the_command_of_a_record_can_be_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/there/scale.py", "--label", "two words", "--only", "a-*|b"])
    assert machine()["command"] == "python -m benchmarks.scale --label 'two words' --only 'a-*|b'"
    monkeypatch.setattr("sys.argv", ["/there/vision/__main__.py"])
    assert machine()["command"] == "python -m benchmarks.vision"


def test_penalties_are_against_the_control_of_the_same_seed() -> None:
    of = campaign()
    rows = summarize(of, dict(zip(of.tasks, results(of), strict=True)))
    assert rows["averaging"]["penalties"] == pytest.approx([100 * 0.1 / 2, 100 * 0.1 / 3])
    assert rows["averaging"]["ddp_over_payload"] == 4


def test_a_label_sets_records_of_one_model_and_length_apart() -> None:
    name, title = name_and_title("tiny", 4800, "")
    assert (name, title) == (
        "convergence-tiny-4800-steps",
        "Convergence at equal tokens, tiny, 4800 steps",
    )
    assert name_and_title("tiny", 4800, "long periods") == (
        f"{name}-long-periods",
        f"{title}, long periods",
    )


def test_a_label_that_is_no_file_name_is_refused() -> None:
    app = typer.Typer()
    app.command()(convergence)
    result = CliRunner().invoke(app, ["--label", "../Long"])
    assert result.exit_code == 2
    assert "label is '../Long': it must be words" in result.output


def test_a_fleet_stops_scaling_where_half_of_it_is_idle() -> None:
    case = replace(scale.CASES["homes"], job=replace(scale.SLOW, steps=100), replicas=(1, 10, 100))
    results = scale.run(case, seed=0)
    for label, row in scale.by_label(results).items():
        half = [done.replicas for done in row if done.efficiency >= 0.5]
        line = next(line for line in scale.scaling(case, results).splitlines() if label in line)
        assert line.endswith(f"| {max(half)} |")
        assert label in scale.causes(results)


COUNTERPARTS = {
    "averager, torch": "local SGD, postlocal",
    "LocalSGD, torchft": "local SGD, postlocal",
    "DiLoCo, torchft": "DiLoCo, postlocal",
}


def synchronized(rank: int, name: str) -> list[Tensor]:
    """Parameters after two rounds of a case, drifting apart before each."""
    torch.manual_seed(0)
    module = small()
    case = sync_cost.make(name, module)
    drift = sync_cost.drifting(module, rank)
    for _ in range(2):
        drift()
        case.call()
    return values(module)


@pytest.mark.parametrize("peer", PEERS)
def test_a_peer_comes_to_the_values_that_ours_comes_to(ranks: Ranks, peer: str) -> None:
    if not installed(peer):
        pytest.skip(f"{PEERS[peer][0]} is not installed")
    theirs, ours = (flat(ranks(2, synchronized, name)[0]) for name in (peer, COUNTERPARTS[peer]))
    torch.manual_seed(0)
    start = flat(values(small()))
    assert (theirs - ours).norm() < 1e-3 * (ours - start).norm()


needs_namespaces = pytest.mark.skipif(network.missing() is not None, reason=str(network.missing()))


@needs_namespaces
def test_an_own_loopback_is_empty_and_removed_after_a_failure() -> None:
    outside = Path("/proc/thread-self/ns/net").readlink()
    namespaces = subprocess.check_output(["ip", "netns", "list"])
    with pytest.raises(KeyError), network.own_loopback() as limit:
        assert Path("/proc/thread-self/ns/net").readlink() != outside
        assert loopback_traffic() == (0, 0)
        limit(1e6)
        assert b"tbf" in subprocess.check_output(["tc", "qdisc", "show", "dev", "lo"])
        raise KeyError
    assert Path("/proc/thread-self/ns/net").readlink() == outside
    assert subprocess.check_output(["ip", "netns", "list"]) == namespaces


@needs_namespaces
def test_a_command_that_fails_says_why() -> None:
    with network.own_loopback() as limit, pytest.raises(RuntimeError, match="tc qdisc"):
        limit(-1)


def measured(rank: int) -> dict[str, Any]:
    """What a synchronization of the small model costs."""
    sync_cost.SIZES["0.3 M"] = small
    return sync_cost.measure(rank, "local SGD, postlocal", "0.3 M", rounds=4)


def test_the_cost_of_a_synchronization_is_given_in_copies_too(ranks: Ranks) -> None:
    row = ranks(2, measured)[0]
    seconds = row["seconds"]
    assert [len(seconds[name]) for name in ("copy", "raw", "case")] == [4, 4, 4]
    copies = [
        (case - raw) / copy
        for copy, raw, case in zip(seconds["copy"], seconds["raw"], seconds["case"], strict=True)
    ]
    assert row["copies_beyond_raw"]["median"] == pytest.approx(statistics.median(copies))
    lines = sync_cost._table(2, "0.3 M", {"ours": row, "theirs": None}).splitlines()
    assert f"as long as {row['raw_over_copy']['median']:.1f} of them" in lines[2]
    assert lines[-2].split(" | ")[3] == f"{statistics.median(copies):.1f}"
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
