"""The planner: what it tells is what a run does, and its limits are those of arithmetic."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.utilisation import PUBLISHED, SHARES, needed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from typer.core import TyperGroup
from typer.main import get_command

import postlocal
from postlocal import Strategy, codec, outer, schedule, strategies, topology, virtual, wire
from postlocal.cli import app, main
from postlocal.cli.units import by_level, parse_bandwidth, parse_count, parse_latency
from postlocal.comm.group import Group
from postlocal.comm.groups import LevelGroups
from postlocal.fragments import streaming
from postlocal.planning import (
    Cluster,
    Job,
    Link,
    Plan,
    bandwidth_for,
    best,
    measure_links,
    normal,
    plan,
    quantiles,
    steady,
)
from postlocal.planning.exchange import Costs
from postlocal.train import make_config
from postlocal.train.measure import measure_in
from tests.calling import calling
from tests.models import adamw, batches, sgd, train_step
from tests.test_command import TORCHRUN, run

Ranks = Callable[..., list[Any]]

KINDS = {
    "ddp": strategies.ddp(),
    "local_sgd": strategies.local_sgd(16),
    "post_local_sgd": strategies.post_local_sgd(warmup=50, period=8),
    "hierarchical": strategies.hierarchical({"node": 4, "world": 16}),
    "diloco": replace(strategies.diloco(100), wire=wire.bf16()),
    "streaming": strategies.streaming_diloco(100, fragments=4, delay=5),
    "sparse_loco": strategies.sparse_loco(),
    "qsr": strategies.qsr(alpha=0.02, total=500),
    "two levels": replace(strategies.diloco(50), wire=wire.two_level(wire.bf16())),
    "powersgd": replace(strategies.ddp(), gradient_wire=wire.powersgd()),
}
kinds = st.sampled_from(list(KINDS.values()))


def cosine(step: int) -> float:
    return 0.004 * (1 + math.cos(math.pi * step / 500)) + 1e-4


def cluster(bandwidth: float = 1e9, latency: float = 0.0, workers: int = 8) -> Cluster:
    links = {"node": Link(100e9), "world": Link(bandwidth, latency)}
    return Cluster(workers, links, topology.nodes(size=2))


def job(**changes: Any) -> Job:
    usual: dict[str, Any] = {"parameters": 10**7, "step": 0.1, "steps": 500, "lr": cosine}
    return Job(**usual | changes)


def layers() -> nn.Module:
    torch.manual_seed(0)
    sizes = [8, 24, 24, 24, 4]
    return nn.Sequential(*(nn.Linear(*pair) for pair in pairwise(sizes)))


@given(kinds, st.floats(1e6, 1e12), st.floats(1.0, 1e3), st.floats(0, 0.5))
@settings(max_examples=60, deadline=None)
def test_more_bandwidth_is_never_slower(
    strategy: Strategy, bandwidth: float, times: float, latency: float
) -> None:
    slow = plan(strategy, job(), cluster(bandwidth, latency))
    fast = plan(strategy, job(), cluster(times * bandwidth, latency))
    assert fast.seconds_a_step <= slow.seconds_a_step * (1 + 1e-9)
    assert fast.payload_bytes_a_step == slow.payload_bytes_a_step


@given(kinds, st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_more_latency_is_never_faster(strategy: Strategy, latency: float, more: float) -> None:
    near = plan(strategy, job(), cluster(latency=latency))
    far = plan(strategy, job(), cluster(latency=latency + more))
    assert near.seconds_a_step <= far.seconds_a_step * (1 + 1e-9)


@pytest.mark.parametrize("name", KINDS)
def test_on_an_infinite_network_only_computing_takes_time(name: str) -> None:
    links = {"node": Link(math.inf), "world": Link(math.inf)}
    planned = plan(KINDS[name], job(), Cluster(8, links, topology.nodes(size=2)))
    assert planned.seconds_a_step == pytest.approx(0.1)
    assert planned.share_computing == pytest.approx(1)


@pytest.mark.parametrize("name", KINDS)
def test_a_rank_alone_sends_nothing(name: str) -> None:
    planned = plan(KINDS[name], job(), Cluster(1, {}, topology.nodes(size=1)))
    assert planned.payload_bytes_a_step == 0
    assert planned.share_computing == pytest.approx(1)


def test_with_a_longer_period_the_share_goes_to_one_and_the_bytes_to_none() -> None:
    plans = [plan(strategies.local_sgd(4**n), job(steps=4**9), cluster()) for n in range(1, 10)]
    shares = [each.share_computing for each in plans]
    sent = [each.payload_bytes_a_step for each in plans]
    assert shares == sorted(shares)
    assert shares[-1] > 0.9999
    assert sent == pytest.approx([4 * sent[0] / 4**n for n in range(1, 10)])


def test_blocking_seconds_are_those_of_the_formula() -> None:
    planned = plan(strategies.local_sgd(20), job(), Cluster(4, {"world": Link(1e9, 0.01)}))
    exchange = 2 * 3 / 4 * 10**7 * 32 / 1e9 + 2 * 0.01
    assert planned.seconds_a_step == pytest.approx(0.1 + exchange / 20, rel=1e-4)


def test_a_reduction_of_gradients_is_hidden_as_far_as_the_backward_pass_goes() -> None:
    first, last = 2**20 / (4 * 10**7), 1 - 26 * 2**20 / (4 * 10**7)  # of three buckets

    def exposed(bandwidth: float, overlap: float) -> float:
        four = Cluster(4, {"world": Link(bandwidth, 0.001)})
        planned = plan(strategies.ddp(), job(gradient_overlap=overlap), four)
        return planned.seconds_a_step - 0.1

    def reduction(bandwidth: float) -> float:
        return 2 * 3 / 4 * 10**7 * 32 / bandwidth + 2 * 3 * 0.001

    assert exposed(1e10, 0.0) == pytest.approx(reduction(1e10), rel=1e-3)
    assert exposed(1e11, 1.0) == pytest.approx(last * reduction(1e11), rel=1e-3)
    hidden = (1 - first) * 0.07  # from when the first bucket is full; then the link is never idle
    assert exposed(1e8, 0.7) == pytest.approx(reduction(1e8) - hidden, rel=1e-3)


def test_gradients_of_a_wire_with_state_wait_for_the_whole_backward_pass() -> None:
    bare = replace(strategies.ddp(), gradient_wire=wire.quantised(codec.int8()))
    with_state = replace(strategies.ddp(), gradient_wire=wire.named("int8"))
    quick = Cluster(2, {"world": Link(2e9)})
    alone = 0.1 / (0.1 + 10**7 * 8 / 2e9)
    assert plan(with_state, job(), quick).share_computing == pytest.approx(alone, rel=0.02)
    # Of three buckets the second is sent once it is full, and the link is busy from then on.
    (first, second), backward = (2**20 / 4e7, 26 * 2**20 / 4e7), 2 / 3 * 0.1
    beside = 0.1 / (0.1 + second * backward + (1 - first) * 10**7 * 8 / 2e9 - backward)
    assert plan(bare, job(), quick).share_computing == pytest.approx(beside, rel=0.02)


def test_a_gathered_exchange_takes_a_payload_for_each_other_rank() -> None:
    strategy = replace(strategies.sparse_loco(period=10), wire=wire.gathered(codec.top_k()))
    planned = plan(strategy, job(), Cluster(5, {"world": Link(1e8, 0.05)}))
    exchange = 8 * wire.gathered(codec.top_k()).payload_bytes(10**7, 5) / 1e8 + 0.05
    assert planned.seconds_a_step == pytest.approx(0.1 + exchange / 10, rel=1e-3)


def test_levels_of_a_hierarchy_take_their_time_one_after_the_other() -> None:
    planned = plan(strategies.hierarchical({"node": 5, "world": 20}), job(), cluster(1e9))
    node = 10**7 * 32 / 100e9
    world = 2 * 2 * 6 / 8 * 10**7 * 32 / 1e9  # two ranks share the link of their node
    expected = 0.1 + (3 * node + world) / 20
    assert planned.seconds_a_step == pytest.approx(expected, rel=1e-4)


def test_a_relay_sends_between_nodes_once_a_node() -> None:
    flat = plan(strategies.diloco(50), job(), cluster(1e8))
    two_level = replace(strategies.diloco(50), wire=wire.two_level(wire.fp32()))
    once = plan(two_level, job(), cluster(1e8))
    waiting = [each.seconds_a_step - 0.1 for each in (flat, once)]
    assert waiting[0] / waiting[1] == pytest.approx(2, rel=0.02)


def streamed(period: int, count: int, delay: int, steps: int, exchange: float) -> float:
    """Seconds a step where a fragment's exchange takes as many steps' time as given."""
    fragments = streaming(count, delay=delay, mix=0.5)
    strategy = replace(strategies.diloco(period), fragments=fragments)
    bandwidth = 10**7 // count * 32 / (exchange * 0.1)
    planned = plan(strategy, job(steps=steps), Cluster(2, {"world": Link(bandwidth)}))
    return planned.seconds_a_step


@pytest.mark.parametrize(("count", "delay"), [(1, 3), (4, 1), (4, 5), (5, 10)])
def test_what_lands_within_the_delay_costs_nothing_and_the_rest_is_waited_for(
    count: int, delay: int
) -> None:
    # The run ends with the last flight, and exchanges of the other fragments: all are waited for.
    longest = min(delay, 50 / count)
    hidden = streamed(50, count, delay, 5000, exchange=0.9 * longest)
    assert hidden == pytest.approx(0.1 + count * 0.9 * longest * 0.1 / 5000, rel=1e-6)
    waited = streamed(50, count, delay, 5000, exchange=delay + 2.0)
    if delay * count < 50:
        assert waited == pytest.approx(0.1 + count * 0.2 / 50, rel=1e-2)


def test_fragments_that_share_a_link_go_one_after_the_other() -> None:
    # An exchange takes a sixth more than the steps between two launches: the queue grows until
    # the delay is used up, and from then on the link is never idle.
    between, exchange = 10.0, 11.7
    assert streamed(50, 5, 49, 50_000, exchange) == pytest.approx(
        0.1 * exchange / between, rel=2e-3
    )


def test_fragments_of_one_shape_and_of_two_dtypes_have_each_their_own_bytes() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, dtype=torch.float64))
    strategy = replace(strategies.diloco(), fragments=streaming(count=2))
    costs = Costs(strategy, job(parameters=model), cluster(workers=2))
    assert costs.fragment(1).payload_bytes == 2 * costs.fragment(0).payload_bytes > 0


def test_a_round_that_is_repeated_costs_what_it_costs_one_by_one() -> None:
    def wavering(step: int, lr: float) -> schedule.Round:
        return schedule.Round(40 + step % 2, "rank", "world")  # never twice the same in a row

    even = replace(strategies.streaming_diloco(40, delay=3), schedule=schedule.periodic(40))
    uneven = replace(even, schedule=wavering)
    slow = Cluster(2, {"world": Link(4e7)})
    assert plan(even, job(steps=8000), slow).seconds_a_step == pytest.approx(
        plan(uneven, job(steps=8000), slow).seconds_a_step, rel=0.03
    )


ROUNDS = {
    "local": strategies.local_sgd(4),
    "averaged optimizer state": replace(strategies.local_sgd(4), optimizer_state="average"),
    "bf16": replace(strategies.diloco(4), wire=wire.bf16()),
    "int8": replace(strategies.diloco(4), wire=wire.named("int8")),
    "powersgd": replace(strategies.diloco(4), wire=wire.powersgd(rank=1)),
    "sparse": strategies.sparse_loco(period=4, top_k=2, chunk=16),
    "streaming": strategies.streaming_diloco(period=6, fragments=3, delay=2),
    "streaming, blocking": strategies.streaming_diloco(period=6, fragments=2, delay=0),
    "hierarchical": strategies.hierarchical({"node": 2, "world": 6}),
    "two levels": replace(strategies.diloco(4), wire=wire.two_level(wire.bf16())),
    "edit": strategies.edit(period=4),
    "qsr": strategies.qsr(alpha=0.3, base=2, total=22),
    "growing": Strategy(schedule.growing(start=2)),
}


@pytest.mark.parametrize("steps", [12, 22])
@pytest.mark.parametrize("name", ROUNDS)
def test_bytes_and_synchronizations_are_those_that_a_run_counts(name: str, steps: int) -> None:
    strategy = ROUNDS[name]
    levels = topology.nodes(size=2)

    def work(group: Group) -> tuple[int, int]:
        model = layers()
        optimizer = adamw(model) if strategy.optimizer_state == "average" else sgd(model)
        sync = postlocal.attach(model, optimizer, strategy, topology=levels, process_group=group)
        for x, y in batches(group.rank, steps):
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + sync.steps // 8)
            train_step(model, optimizer, x, y)
            sync.step()
        sync.finish()
        sync.close()
        sent = sync.meter.payload_bytes
        return sent["parameters"] + sent["optimizer"], sync.meter.syncs

    counted, syncs = virtual.run(4, work)[0]
    there = Cluster(4, {"node": Link(1e9), "world": Link(1e9)}, levels)

    # A round is planned after the last step of the one before, at that step's learning rate.
    def lr(step: int) -> float:
        return 0.1 / (1 + max(0, step - 1) // 8)

    planned = plan(strategy, Job(layers(), step=0.1, steps=steps, lr=lr), there)
    assert planned.syncs == syncs
    # Counters of Adam's steps travel too.
    slack = 0.05 if strategy.optimizer_state == "average" else 1e-9
    assert planned.payload_bytes_a_step * steps == pytest.approx(counted, rel=slack)


def gradient_bytes(rank: int, strategy: Strategy, steps: int) -> tuple[int, int]:
    model = DistributedDataParallel(layers())
    optimizer = sgd(model)
    levels = topology.nodes(size=2)
    sync = postlocal.attach(model, optimizer, strategy, topology=levels)
    for x, y in batches(rank, steps):
        train_step(model, optimizer, x, y)
        sync.step()
    sync.finish()
    sync.close()
    sent = sync.meter.payload_bytes
    return sent["gradients"], sent["parameters"]


@pytest.mark.parametrize("wired", ["fp32", "int8", "powersgd"])
def test_bytes_of_gradients_are_those_of_real_ranks(ranks: Ranks, wired: str) -> None:
    strategy = replace(
        strategies.post_local_sgd(warmup=3, period=4), gradient_wire=wire.named(wired)
    )
    counted = sum(ranks(4, gradient_bytes, strategy, 11)[0])
    there = Cluster(4, {"node": Link(1e9), "world": Link(1e9)}, topology.nodes(size=2))
    planned = plan(strategy, Job(layers(), step=0.1, steps=11), there)
    # DDP reduces by buckets, whose parts are rounded up one by one.
    assert planned.payload_bytes_a_step * 11 == pytest.approx(counted, rel=0.01)


def test_memory_is_what_the_strategy_keeps() -> None:
    def memory(strategy: Strategy, **changes: Any) -> dict[str, int]:
        planned = plan(strategy, job(**changes), cluster())
        return {k: v / 10**7 for k, v in planned.to_dict()["memory"].items() if v}

    plain = memory(strategies.local_sgd())
    assert plain == {"parameters": 4, "gradients": 4, "optimizer": 8, "staging": 4, "total": 20}
    assert memory(strategies.diloco()).items() >= {"anchor": 4, "outer": 4}.items()
    assert "outer" not in memory(strategies.sparse_loco())
    assert memory(strategies.sparse_loco())["residual"] == 4
    assert memory(strategies.streaming_diloco(fragments=5, delay=1))["under_way"] == 4 / 5
    carrying = strategies.streaming_diloco(fragments=5, delay=1, keep_delayed_steps=True)
    assert memory(carrying)["under_way"] == 8 / 5
    narrow = memory(strategies.local_sgd(), dtype=torch.bfloat16, optimizer_bytes=4)
    assert (narrow["parameters"], narrow["gradients"], narrow["optimizer"]) == (2, 2, 4)
    adaptive = replace(strategies.diloco(), outer=outer.slow_momentum())
    assert memory(adaptive)["outer"] == 4


@given(st.floats(0.01, 10), st.floats(0, 1), st.integers(1, 64))
@settings(max_examples=40, deadline=None)
def test_the_slowest_of_more_is_slower(mean: float, relative: float, workers: int) -> None:
    for time in (normal(mean, relative * mean), quantiles([mean, 2 * mean, 3 * mean])):
        assert time.slowest(1) == pytest.approx(time.mean)
        assert time.mean <= time.slowest(workers) * (1 + 1e-9)
        assert time.slowest(workers) <= time.slowest(workers + 1) * (1 + 1e-9)


def test_the_slowest_of_two_normal_times_is_as_integrated_by_hand() -> None:
    assert normal(0.5, 0.1).slowest(2) == pytest.approx(0.5 + 0.1 / math.sqrt(math.pi), rel=1e-4)


def test_the_slowest_is_what_draws_give() -> None:
    torch.manual_seed(0)
    draws = torch.randn(200_000, 16).amax(dim=1).mean().item()
    assert normal(1.0, 0.2).slowest(16) == pytest.approx(1 + 0.2 * draws, rel=2e-3)


def test_waiting_for_stragglers_falls_with_the_root_of_the_period() -> None:
    links = {"world": Link(math.inf)}
    waiting = {}
    for period in (1, 16):
        strategy = strategies.local_sgd(period) if period > 1 else strategies.ddp()
        uneven = job(step=normal(0.1, 0.02), steps=1600)
        waiting[period] = plan(strategy, uneven, Cluster(8, links)).seconds_a_step - 0.1
    assert waiting[1] == pytest.approx(0.02 * 1.4236, rel=1e-2)
    assert waiting[16] == pytest.approx(waiting[1] / 4, rel=1e-6)


def test_stragglers_are_waited_for_at_each_level_where_ranks_meet() -> None:
    links = {"node": Link(math.inf), "world": Link(math.inf)}
    uneven = job(step=normal(0.1, 0.02), steps=2000)
    planned = plan(
        strategies.hierarchical({"node": 5, "world": 20}),
        uneven,
        Cluster(8, links, topology.nodes(size=2)),
    )
    within, between = (normal(0.1, 0.02).slowest(count) - 0.1 for count in (2, 4))
    waited = 3 * math.sqrt(5) * within + math.sqrt(20) * between
    assert planned.seconds_a_step == pytest.approx(0.1 + waited / 20)


@pytest.mark.parametrize("name", PUBLISHED)
def test_bandwidths_are_those_published_within_a_quarter(name: str) -> None:
    for share, ours, theirs in zip(SHARES, needed(name), PUBLISHED[name], strict=True):
        if (name, share) != ("data parallel", 0.99):
            assert ours == pytest.approx(theirs, rel=0.25), share


@given(kinds, st.floats(0.05, 0.95))
@settings(max_examples=15, deadline=None)
def test_the_bandwidth_found_is_just_enough(strategy: Strategy, share: float) -> None:
    found = bandwidth_for(strategy, job(), cluster(), share)
    reached = [
        plan(strategy, job(), cluster().with_bandwidth(bits)).share_computing
        for bits in (found, 0.99 * found)
    ]
    assert reached[0] >= share > reached[1]


def test_no_bandwidth_makes_up_for_latency() -> None:
    assert bandwidth_for(strategies.ddp(), job(), cluster(latency=1.0), 0.5) == math.inf


@given(st.floats(1e7, 1e11), st.floats(0.3, 0.99))
@settings(max_examples=15, deadline=None)
def test_the_smallest_change_reaches_the_share_and_ddp_wins_where_it_does(
    bandwidth: float, share: float
) -> None:
    there = Cluster(4, {"world": Link(bandwidth)})
    found = best(job(), there, share)
    plain = plan(strategies.ddp(), job(), there)
    if plain.share_computing >= share:
        assert found is not None
        assert found[0] == strategies.ddp()
    elif found is not None:
        assert found[1].share_computing >= share
        assert plan(found[0], job(), there) == found[1]


def test_where_nothing_is_enough_there_is_no_change() -> None:
    assert best(job(), Cluster(4, {"world": Link(1e3)}), 0.95) is None


@given(kinds)
@settings(max_examples=10, deadline=None)
def test_a_plan_survives_json(strategy: Strategy) -> None:
    planned = plan(strategy, job(), cluster())
    assert Plan.from_dict(json.loads(json.dumps(planned.to_dict()))) == planned


def test_the_same_rounds_come_with_the_model_or_with_its_number_of_parameters() -> None:
    model, there = nn.Linear(512, 512, bias=False), Cluster(2, {"world": Link(1e6)})
    for strategy in (strategies.diloco(10), replace(strategies.diloco(10), wire=wire.powersgd())):
        of_model = plan(strategy, job(parameters=model), there)
        assert of_model == plan(strategy, job(parameters=512**2), there)


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "bandwidth": (lambda: Link(0), "bandwidth must be above 0 bit/s, got 0"),
    "latency": (lambda: Link(1, -1), "latency must be at least 0 seconds, got -1"),
    "workers": (lambda: Cluster(0, {}), "workers must be at least 1, got 0"),
    "foreign level": (lambda: Cluster(2, {"rack": Link(1)}), r"levels of the topology \(world\)"),
    "uneven nodes": (
        lambda: Cluster(3, {"world": Link(1)}, topology.nodes(size=2)),
        "node size must divide the world size 3, got 2",
    ),
    "no link": (
        lambda: plan(KINDS["hierarchical"], job(), Cluster(4, {}, topology.nodes(size=2))),
        "links must have every level that is communicated at, got none for 'node'",
    ),
    "no level": (
        lambda: plan(KINDS["hierarchical"], job(), Cluster(4, {"world": Link(1)})),
        "level must be one that the topology has",
    ),
    "parameters": (lambda: Job(0, 1.0), "parameters must be at least 1, got 0"),
    "steps": (lambda: Job(1, 1.0, steps=0), "steps must be at least 1, got 0"),
    "overlap": (lambda: Job(1, 1.0, gradient_overlap=2), "share of a step from 0 to 1, got 2"),
    "step": (lambda: Job(1, 0.0), "step time must be above 0 seconds, got 0"),
    "deviation": (lambda: normal(1.0, -1.0), "deviation must be at least 0 seconds, got -1"),
    "no times": (lambda: quantiles([]), "at least one step's time, got none"),
    "steady": (lambda: steady(-1.0), "step time must be above 0 seconds"),
    "share": (lambda: best(job(), cluster(), 1.0), "share must be above 0 and below 1, got 1"),
    "fragments": (
        lambda: plan(KINDS["streaming"], job(parameters=nn.Linear(2, 2)), cluster()),
        "got 4 fragments of",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    make, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        make()


@given(st.floats(1e-3, 1e3), st.sampled_from(["", "k", "M", "G", "T"]))
def test_bytes_a_second_are_eight_times_bits(number: float, prefix: str) -> None:
    bits, in_bytes = (parse_bandwidth(f"{number:f}{prefix}{unit}") for unit in ("bit/s", "B/s"))
    assert in_bytes == pytest.approx(8 * bits)


@pytest.mark.parametrize("text", ["", "fast", "100", "0Mbit", "-1Gbit", "1Xbit", "1 Gbit x"])
def test_a_bandwidth_without_sense_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="bandwidth must be above 0 and have a unit"):
        parse_bandwidth(text)


@pytest.mark.parametrize("text", ["", "5", "1min", "-1ms"])
def test_a_latency_without_sense_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="latency must have a unit"):
        parse_latency(text)


@pytest.mark.parametrize("text", ["", "many", "1Q", "-3"])
def test_a_count_without_sense_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="tokens must be a number such as"):
        parse_count(text, "tokens")


@pytest.mark.parametrize("text", ["=1ms", "node=1ms,2ms"])
def test_levels_without_a_name_or_value_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="level=value pairs"):
        by_level(text, parse_latency)


command = calling("plan", "--steps", "200")


def test_the_command_lists_every_strategy_and_the_smallest_change(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = ["--bandwidth", "node=100Gbit,world=1Gbit", "--node-size", "2", "--steps", "5000"]
    code, out, _ = command(capsys, monkeypatch, *words, "--plot", str(tmp_path / "share.png"))
    assert code == 0
    assert all(name in out for name in strategies.NAMED)
    assert "The smallest change that computes 95% of the time: --strategy " in out
    assert "wire=int4())'" in out
    assert (tmp_path / "share.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_says_what_it_assumed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "--strategy diloco --outer-lr 0.3 --wire int4 --workers 16 --node-size 8 --dtype bf16"
    links = "--bandwidth node=100Gbit,world=200Mbit --latency world=20ms"
    code, out, _ = command(capsys, monkeypatch, *words.split(), *links.split())
    assert code == 0
    for said in (
        "16 workers, 8 a node",
        "node 100 Gbit/s, 0 ms one way; world 200 Mbit/s, 20 ms one way",
        "1,000,000,000 parameters in bf16 with 8 bytes of optimizer state each",
        "200 steps of 1 s computing",
        "overlap 67% of a step; peak learning rate 0.003",
        "diloco(outer_lr=0.3, wire=int4(), gradient_wire=bf16())",
        "docs/strategies.md",
    ):
        assert said in out


@pytest.mark.parametrize("name", ["plan", "simulate"])
def test_what_looks_ahead_takes_the_options_of_strategies_that_train_takes(name: str) -> None:
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    options, train = (
        {option for parameter in group.commands[each].params for option in parameter.opts}
        for each in (name, "train")
    )
    of_strategies = {
        "--strategy", "--period", "--warmup", "--outer-lr", "--outer-momentum", "--wire",
        "--gradient-wire",
    }  # fmt: skip
    assert of_strategies <= train
    assert of_strategies | {"--workers", "--bandwidth", "--latency", "--node-size"} <= options


def test_json_of_the_command_is_the_planners_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "--strategy diloco --period 50 --wire fp32 --gradient-wire fp32 --parameters 10M"
    code, out, _ = command(capsys, monkeypatch, *words.split(), "--latency", "10ms", "--json")
    assert code == 0
    there = Cluster(8, {"world": Link(1e9, 0.01)})
    expected = plan(strategies.diloco(50), job(step=normal(1.0, 0.0), steps=200), there)
    (planned,) = map(Plan.from_dict, json.loads(out)["plans"])
    assert planned == expected


def test_a_token_budget_gives_the_steps(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "postlocal",
            "plan",
            "--strategy",
            "ddp",
            "--tokens-a-step",
            "1M",
            "--token-budget",
            "1.5B",
            "--json",
        ],
    )
    with pytest.raises(SystemExit):
        main()
    assert json.loads(capsys.readouterr().out)["plans"][0]["steps"] == 1500


WRONG = {
    "no unit": (["--bandwidth", "100"], "bandwidth must be above 0 and have a unit"),
    "foreign parameter": (
        ["--strategy", "ddp", "--period", "4"],
        "period must not be given to ddp",
    ),
    "no such dtype": (["--dtype", "int1"], "dtype must be one of fp32, bf16, got 'int1'"),
    "no folder": (["--plot", "/dev/null/x.png"], "plot must be a file in a folder that exists"),
    "no drawing": (["--plot", "x.foo"], "plot must be a file ending in .png, .pdf, .svg"),
    "no such level": (["--bandwidth", "rack=1Gbit"], "bandwidth must be of levels of the topology"),
    "no link": (["--node-size", "2"], "bandwidth must have every level that is communicated at"),
    "nowhere to say": (
        ["--strategy", "ddp,local_sgd", "--outer-lr", "1"],
        "outer-lr must not be given to ddp, local_sgd",
    ),
    "latency of no link": (["--latency", "node=1ms"], "bandwidth must be given for each level"),
    "share": (["--share", "2"], "share must be above 0 and below 1, got 2"),
    "steps": (["--steps", "0"], "steps must be greater than or equal to 1, got 0"),
    "too many steps": (["--steps", "1000000000"], "steps must be at most 10,000,000, got 1000"),
    "half a budget": (["--token-budget", "1B"], "must be given together"),
    "no launcher": (["--measure"], "measure needs the workers of a launcher"),
    "parameters": (["--parameters", "big"], "parameters must be a number such as"),
    "no parameters": (["--parameters", ""], "parameters must be a number such as"),
    "no step": (["--step-seconds", "inf"], "step time must be finite, got inf"),
    "no deviation": (["--step-deviation", "inf"], "deviation must be finite, got inf"),
    "no end": (["--parameters", "1e400"], "parameters must be at most 1e+18, got '1e400'"),
    "no memory": (["--optimizer-bytes", "inf"], "optimizer_bytes must be finite, got inf"),
}


@pytest.mark.parametrize("name", ["[red]x", "[/]"])
def test_a_strategy_is_shown_as_it_is_written(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    words = ["--strategy", f'Strategy(periodic(4), name="{name}")', "--steps", "8"]
    code, output, _ = command(capsys, monkeypatch, *words)
    assert code == 0
    assert output.count(f'name="{name}"') == 2


def test_numbers_are_whole_however_long_a_strategy_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    written = "diloco(period=200, outer=average(), wire=int4())"
    code, out, _ = command(capsys, monkeypatch, "--strategy", f"{written},sparse_loco")
    assert code == 0
    assert "…" not in out
    row = next(line for line in out.splitlines() if line.startswith(written))
    assert row.removeprefix(written).count("%") == 1


def test_an_option_that_some_strategies_lack_is_said_to_not_concern_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--strategy", "diloco,local_sgd,ddp", "--outer-lr", "1.0", "--period", "8"]
    code, _, error = command(capsys, monkeypatch, *words)
    assert code == 0
    assert error == (
        "postlocal: --period does not concern ddp; --outer-lr does not concern local_sgd, ddp\n"
    )
    code, _, error = command(capsys, monkeypatch, "--period", "8")
    assert (code, error) == (0, "postlocal: --period does not concern ddp\n")


@pytest.mark.parametrize("name", WRONG)
def test_bad_options_are_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    words, message = WRONG[name]
    code, _, error = command(capsys, monkeypatch, *words)
    assert code == 2
    assert error.count("\n") == 1
    assert message in error


def measured(rank: int) -> Any:
    config = make_config(workers=2, node_size=2, batch_size=2, sequence_length=16)
    return measure_in(
        postlocal.comm.group.resolve(None, None), torch.device("cpu"), config, steps=3
    )


def test_links_and_steps_are_measured_and_all_ranks_know_the_same(ranks: Ranks) -> None:
    first, second = ranks(2, measured)
    assert first == second
    assert set(first.links) == {"node", "world"}
    assert all(1e5 < link.bandwidth < 1e13 for link in first.links.values())
    assert all(0 < link.latency < 1 for link in first.links.values())
    assert (first.workers, len(first.step_seconds), first.parameters > 800_000) == (2, 6, True)


def test_a_rank_that_is_alone_at_a_level_helps_to_measure_the_others() -> None:
    class lopsided:
        def partition(self, size: int) -> dict[str, topology.Partition]:
            return {"node": ((0, 1), (2,)), "world": ((0, 1, 2),)}

    def work(group: Group) -> set[str]:
        return set(measure_links(LevelGroups(group, lopsided()), numel=64))

    assert virtual.run(3, work) == [{"node", "world"}] * 3


def test_under_torchrun_the_command_measures_and_one_rank_speaks() -> None:
    code, output = run(
        *TORCHRUN, "--nproc-per-node", "2", "-m", "postlocal", "plan", "--measure",
        "--steps", "100", "--strategy", "diloco", "--node-size", "2",
    )  # fmt: skip
    assert code == 0, output
    assert output.count("The smallest change that computes") == 1
