"""The simulation of fleets: its limits are the plan, order statistics, and Daly's formula."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from postlocal import Strategy, strategies, wire
from postlocal.cli.units import parse_bandwidth, parse_duration, parse_shares
from postlocal.planning import (
    Failures,
    Fleet,
    Job,
    Link,
    StepTime,
    exponential_tail,
    normal,
    plan,
    quantiles,
    simulate,
    steady,
    sweep,
)
from tests.calling import calling
from tests.test_plan import KINDS, job, kinds

FAST = Link(math.inf)
ANCHORED = replace(strategies.local_sgd(10), wire=wire.bf16())


@pytest.mark.parametrize("overlap", [0.0, 0.5])
@pytest.mark.parametrize("bandwidth", [1e8, 1e9, 1e11])
@pytest.mark.parametrize("name", KINDS)
def test_equal_replicas_that_never_fail_take_as_long_as_planned(
    name: str, bandwidth: float, overlap: float
) -> None:
    fleet = Fleet(8, Link(bandwidth, 0.003), node_size=2, node_link=Link(100e9))
    train = job(parameter_overlap=overlap)
    done = simulate(KINDS[name], train, fleet)
    planned = plan(KINDS[name], train, fleet.cluster(4, Link(bandwidth, 0.003)))
    assert done.planned == planned
    assert done.seconds == pytest.approx(500 * planned.seconds_a_step, rel=1e-9)
    assert done.shares.computing == pytest.approx(planned.share_computing, rel=1e-9)
    assert done.efficiency == pytest.approx(planned.share_computing, rel=1e-9)
    assert done.steps == 8 * 500


@pytest.mark.parametrize("name", KINDS)
def test_uneven_steps_take_as_long_as_planned_on_average(name: str) -> None:
    fleet = Fleet(8, Link(1e9, 0.003), node_size=2, node_link=Link(100e9))
    train = job(step=normal(0.1, 0.01))
    seconds = fmean(simulate(KINDS[name], train, fleet, seed).seconds for seed in range(4))
    planned = 500 * plan(KINDS[name], train, fleet.cluster(4, Link(1e9, 0.003))).seconds_a_step
    if KINDS[name].fragments.delay:  # who is late has the delay to come after
        assert 500 * 0.1 * 0.99 < seconds < planned
    else:
        assert seconds == pytest.approx(planned, rel=0.01)


@pytest.mark.parametrize("replicas", [2, 10, 100])
@pytest.mark.parametrize("step", [exponential_tail(1.0, 1.0), normal(1.0, 0.2)], ids=repr)
def test_a_synchronous_step_takes_as_long_as_the_slowest_of_so_many_draws(
    step: StepTime, replicas: int
) -> None:
    done = simulate(strategies.ddp(), job(step=step, steps=8000), Fleet(replicas, FAST))
    assert done.seconds / 8000 == pytest.approx(step.slowest(replicas), rel=0.02)


def test_the_slowest_of_exponential_times_follows_the_harmonic_numbers() -> None:
    harmonic = sum(1 / place for place in range(1, 51))
    assert exponential_tail(1.0, 1.0).slowest(50) == pytest.approx(harmonic)
    assert exponential_tail(1.0, 0.1).slowest(50) == pytest.approx(0.9 + 0.1 * harmonic)


def test_in_rounds_normal_steps_even_out_with_the_root_of_the_period() -> None:
    train = job(step=normal(1.0, 0.2), steps=50_000)
    done = simulate(strategies.local_sgd(25), train, Fleet(64, FAST))
    excess = normal(1.0, 0.2).slowest(64) - 1
    assert done.seconds / 50_000 == pytest.approx(1 + excess / 5, rel=2e-3)


@pytest.mark.parametrize("name", ["ddp", "diloco"])
def test_who_is_slow_for_good_is_not_evened_out(name: str) -> None:
    speeds = exponential_tail(1.0, 0.3)
    fleet = Fleet(16, FAST, speeds)
    seconds = [simulate(KINDS[name], job(step=1.0, steps=50), fleet, s).seconds for s in range(300)]
    assert fmean(seconds) / 50 == pytest.approx(speeds.slowest(16), rel=0.03)


TIMES = (
    steady(0.7),
    normal(1.0, 0.1),
    exponential_tail(1.0, 0.4),
    quantiles([0.5, 1.0, 3.0]),
)


@pytest.mark.parametrize("time", TIMES, ids=repr)
def test_draws_have_the_mean_and_the_highest_that_they_tell(time: StepTime) -> None:
    source = np.random.default_rng(0)
    assert time.draw(12, (20_000,), source).mean() == pytest.approx(12 * time.mean, rel=0.01)
    highest = time.draw(1, (5_000, 20), source).max(axis=1).mean()
    assert highest == pytest.approx(time.slowest(20), rel=0.01)


@pytest.mark.parametrize("apart", [2000.0, 500.0, 120.0])
def test_a_job_that_goes_back_to_checkpoints_is_as_fast_as_dalys_formula(apart: float) -> None:
    # Daly (2006): M e^(R/M) (e^((T + C)/M) - 1) seconds for T seconds of work.
    failures = Failures(10 * apart, away=0.0, restart=30.0, saving=8.0)
    fleet = Fleet(10, FAST, failures=failures)
    work = math.ceil(failures.interval(10))
    train = Job(1, step=1.0, steps=work * 400)
    expected = work / (apart * math.exp(30 / apart) * math.expm1((work + 8) / apart))
    shares = [simulate(strategies.ddp(), train, fleet, seed).efficiency for seed in range(4)]
    assert fmean(shares) == pytest.approx(expected, rel=0.05)


def test_a_host_of_an_anchored_job_loses_a_round_and_the_time_away() -> None:
    # Lost at any time of a round of 10 s, away for 3 rounds, back at the next synchronization.
    failures = Failures(apart=20_000.0, away=30.0)
    fleet = Fleet(50, FAST, failures=failures)
    done = simulate(ANCHORED, Job(1, step=1.0, steps=50_000), fleet)
    assert done.failures > 100
    missing = (done.shares.lost + done.shares.away) * 50 * done.seconds
    assert missing / done.failures == pytest.approx(40.0, rel=0.02)
    assert done.seconds == pytest.approx(50_000)  # the others wait for nobody
    assert done.efficiency == pytest.approx(1 - missing / 50 / done.seconds)


def test_an_average_without_anchor_goes_back_and_one_with_an_anchor_goes_on() -> None:
    fleet = Fleet(200, FAST, failures=Failures(apart=20_000.0, away=60.0))
    plain, anchored = (
        simulate(strategy, Job(1, step=1.0, steps=2000), fleet)
        for strategy in (strategies.local_sgd(10), ANCHORED)
    )
    assert plain.shares.stopped > 0.3
    assert anchored.shares.stopped == 0
    assert anchored.efficiency > 0.95 > 0.6 > plain.efficiency


def test_a_warm_up_goes_back_and_local_rounds_after_it_go_on() -> None:
    fleet = Fleet(100, FAST, failures=Failures(apart=20_000.0))
    train = Job(1, step=1.0, steps=2000)
    stopped = []
    for warmup in (0, 1000, 2000):
        strategy = replace(strategies.post_local_sgd(warmup, 10, "rank"), wire=wire.bf16())
        done = simulate(strategy, train, fleet)
        stopped.append(done.shares.stopped * done.seconds)
    assert stopped[0] == 0
    assert all(after > before + 100 for before, after in pairwise(stopped))


def test_a_job_without_anybody_left_waits_for_the_first_to_come_back() -> None:
    fleet = Fleet(1, FAST, failures=Failures(apart=500.0, away=250.0, restart=0.0, saving=0.0))
    done = simulate(ANCHORED, Job(1, step=1.0, steps=20_000), fleet)
    assert done.finished
    assert done.shares.away == pytest.approx(1 / 3, rel=0.2)
    assert done.steps == 20_000


def test_a_job_that_never_comes_to_its_end_is_left() -> None:
    fleet = Fleet(1000, FAST, failures=Failures(apart=5000.0))
    done = simulate(strategies.ddp(), Job(1, step=1.0, steps=1000), fleet)
    assert not done.finished
    assert done.seconds <= 10 * 1000
    assert done.efficiency < 0.05
    assert done.shares.total == pytest.approx(1)


@given(
    kinds,
    st.sampled_from([(1, 1), (6, 1), (8, 2)]),
    st.floats(50.0, 1e5),
    st.floats(0.0, 100.0),
    st.integers(0, 2**32),
)
@example(strategies.streaming_diloco(100, delay=5), (8, 2), 50.0, 0.0, 142)  # slowest lost
@example(strategies.streaming_diloco(20), (8, 2), 50.0, 20.0, 245)  # all lost, and done again
@example(strategies.local_sgd(5), (8, 2), 50.0, 20.0, 40)  # lost, and done again from a checkpoint
@example(strategies.ddp(), (8, 2), 50.0, 20.0, 1186)  # a slower one came back to a checkpoint
@settings(max_examples=100, deadline=None)
def test_every_second_of_every_replica_has_one_cause(
    strategy: Strategy, size: tuple[int, int], apart: float, away: float, seed: int
) -> None:
    fleet = Fleet(
        size[0],
        [(0.5, Link(1e8, 0.01)), (0.5, Link(1e9))],
        exponential_tail(1.0, 0.1),
        Failures(apart, away, restart=5.0, saving=1.0),
        size[1],
        Link(100e9),
    )
    done = simulate(strategy, job(step=normal(0.1, 0.01), steps=200), fleet, seed)
    assert done.shares.total == pytest.approx(1, rel=1e-5)
    assert min(done.shares.values()) >= 0
    assert done.steps <= 200 * size[0]
    assert done == simulate(strategy, job(step=normal(0.1, 0.01), steps=200), fleet, seed)


@pytest.mark.parametrize("seed", [6, 20, 35])
def test_what_a_lost_host_held_up_leaves_when_it_was_lost(seed: int) -> None:
    slow = Link(2e7)
    failures = Failures(apart=300.0, away=1e9, restart=0.0, saving=0.0)
    fleet = Fleet(3, slow, exponential_tail(1.0, 1.0), failures)
    strategy = strategies.streaming_diloco(100, fragments=1, delay=1)
    train = job(step=1.0, steps=100)
    done = simulate(strategy, train, fleet, seed)
    assert done.failures == 1  # of the slowest, while the others wait to send
    exchange = 100 * (plan(strategy, train, fleet.cluster(2, slow)).seconds_a_step - 1.0)
    assert fleet.hosts * done.shares.away * done.seconds == pytest.approx(exchange, rel=1e-3)


def test_another_seed_is_another_run() -> None:
    fleet = Fleet(20, FAST, failures=Failures(apart=5000.0))
    runs = [simulate(ANCHORED, job(step=normal(1, 0.1)), fleet, seed) for seed in range(2)]
    assert runs[0] != runs[1]


def test_one_slow_uplink_sets_the_pace_of_all() -> None:
    shares = [(0.01, Link(1e7)), (0.99, Link(1e9))]
    with_one, with_none = (
        simulate(strategies.diloco(50), job(), Fleet(count, shares)).seconds for count in (100, 40)
    )
    slow = simulate(strategies.diloco(50), job(), Fleet(100, Link(1e7))).seconds
    fast = simulate(strategies.diloco(50), job(), Fleet(40, Link(1e9))).seconds
    assert (with_one, with_none) == (slow, fast)


def test_a_delay_gives_stragglers_time_to_come_after() -> None:
    train = job(step=normal(0.1, 0.02), steps=2000)
    waiting = []
    for delay in (0, 5, 20):
        strategy = strategies.streaming_diloco(50, fragments=2, delay=delay)
        waiting.append(simulate(strategy, train, Fleet(100, FAST)).shares.stragglers)
    assert waiting == sorted(waiting, reverse=True)
    assert waiting[2] < 0.5 * waiting[0]


def test_a_host_that_comes_back_over_a_slow_uplink_comes_later() -> None:
    failures = Failures(apart=5000.0, away=0.0)
    away = []
    for bandwidth in (1e9, 32e4):
        fleet = Fleet(20, Link(bandwidth), failures=failures)
        train = Job(10**4, step=1.0, steps=5000)
        done = simulate(replace(strategies.sparse_loco(10), name="sparse"), train, fleet)
        away.append(done.shares.away * 20 * done.seconds / done.failures)
    assert 4 < away[0] < 7  # half a round
    assert away[1] == pytest.approx(away[0] + 1.0, abs=1.0)


def test_ten_thousand_replicas_are_followed_one_by_one() -> None:
    fleet = Fleet(10_000, Link(1e10, 0.001), failures=Failures(apart=30 * 86_400.0))
    train = Job(10**9, step=normal(1.0, 0.05), steps=300)
    results = dict(sweep({"diloco": strategies.diloco(100)}, train, fleet, [10_000]))
    done = results["diloco"]
    assert done.finished
    assert 0 < 300 * 10_000 - done.steps <= 100 * done.failures + 300 * done.failures
    assert done.shares.stragglers == pytest.approx(0.05 * 3.85 / 10, rel=0.2)


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "apart": (lambda: Failures(apart=0), "apart must be above 0 seconds, got 0"),
    "away": (lambda: Failures(away=-1), "away must be at least 0 seconds, got -1"),
    "shares": (lambda: Fleet(4, [(0.5, FAST)]), r"above 0 and sum to 1, got \[0.5\]"),
    "nodes": (lambda: Fleet(5, FAST, node_size=2), "multiple of the node size 2, got 5"),
    "none": (lambda: Fleet(0, FAST), "multiple of the node size 1, got 0"),
    "tail": (lambda: exponential_tail(1.0, 2.0), "tail must be from 0 to the mean of 1.0, got 2.0"),
    "speeds": (
        lambda: simulate(strategies.ddp(), job(), Fleet(99, FAST, normal(1.0, 1.0))),
        "speeds must be above 0, got -",
    ),
    "level": (
        lambda: simulate(strategies.hierarchical({"rack": 2, "world": 4}), job(), Fleet(4, FAST)),
        "rack",
    ),
    "duration": (lambda: parse_duration("30", "away"), "away must have a unit, such as 90s"),
    "pairs": (lambda: parse_shares("1Gbit:x", parse_bandwidth), "must be value:share pairs"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    make, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        make()


command = calling("simulate", "--steps", "60")


def test_the_command_shows_every_strategy_and_draws(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = ["--workers", "1,20,400", "--mtbf", "1d", "--plot", str(tmp_path / "scale.png")]
    code, out, _ = command(capsys, monkeypatch, *words)
    assert code == 0
    assert all(out.count(name) >= 2 for name in strategies.NAMED)
    assert "with 400 workers" in out
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")


def test_json_of_the_command_is_the_simulations_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "--strategy diloco --period 20 --workers 16 --node-size 2 --speed-deviation 0.1"
    more = "--bandwidth 1Gbit:0.5,100Mbit:0.5 --latency 10ms --mtbf 2h --tokens-a-worker 100 --json"
    code, out, _ = command(capsys, monkeypatch, *words.split(), *more.split(), "--seed", "3")
    assert code == 0
    fleet = Fleet(
        16,
        [(0.5, Link(1e9, 0.01)), (0.5, Link(1e8, 0.01))],
        exponential_tail(1.0, 0.1),
        Failures(apart=7200.0),
        node_size=2,
        node_link=Link(400e9),
    )
    train = Job(10**9, normal(1.0, 0.0), steps=60)
    expected = simulate(replace(strategies.diloco(20), wire=wire.bf16()), train, fleet, seed=3)
    (found,) = json.loads(out)
    assert found["tokens_a_second"] == pytest.approx(100 * expected.steps_a_second)
    assert found["shares"] == pytest.approx(expected.to_dict()["shares"])
    assert found["efficiency"] == expected.efficiency


WRONG = {
    "no duration": (["--mtbf", "30"], "mtbf must have a unit"),
    "no bandwidth": (["--bandwidth", "fast:1"], "bandwidth must be above 0 and have a unit"),
    "nobody": (["--workers", "0"], "workers must be at least 1, got '0'"),
    "no latency": (["--latency", "1e400s"], "latency must have a unit"),
    "parts": (
        ["--strategy", "streaming_diloco(fragments=10001)"],
        "fragments must be at most 10,000, got 10001",
    ),
    "too many": (["--workers", "1,1e9"], "workers must be at most 1,000,000, got 1000000000"),
    "shares": (["--bandwidth", "1Gbit:0.5,1Mbit:0.4"], "must be above 0 and sum to 1"),
    "no folder": (["--plot", "/dev/null/x.png"], "plot must be a file in a folder that exists"),
    "foreign parameter": (
        ["--strategy", "ddp", "--period", "4"],
        "period must not be given to ddp",
    ),
    "nodes": (
        ["--node-size", "8", "--workers", "12"],
        "workers must be a multiple of the node-size 8, or less",
    ),
    "no node": (["--node-size", "0"], "node-size must be at least 1, got 0"),
}


def test_numbers_are_whole_however_long_a_strategy_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    written = "diloco(period=200, outer=average(), wire=int4())"
    code, out, _ = command(
        capsys, monkeypatch, "--strategy", f"{written},sparse_loco", "--workers", "1,4"
    )
    assert code == 0
    assert "…" not in out
    row = next(line for line in out.splitlines() if line.startswith(written))
    assert row.removeprefix(written).count("%") == 2


@pytest.mark.parametrize("name", WRONG)
def test_bad_options_are_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    words, message = WRONG[name]
    code, _, error = command(capsys, monkeypatch, *words)
    assert code == 2
    assert error.count("\n") == 1
    assert message in error
