"""The emulated link: what is sent waits as long as the formula says, and nothing else waits."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import postlocal
from postlocal import checkpoint, strategies, wire
from postlocal.cli.units import parse_bandwidth
from postlocal.comm.group import torch_group
from postlocal.errors import PeerError
from postlocal.strategies import Strategy
from postlocal.train import link, make_config
from postlocal.train.link import Link, LinkedProcesses, linked
from tests.launcher import said, say
from tests.models import adamw, batches, equal, mlp, train_plain, train_step, values

Ranks = Callable[..., list[Any]]

RATE = 16e6
NUMEL = 2 * 512 * 512
STRATEGIES: dict[str, Strategy] = {
    "ddp": strategies.ddp(),
    "ddp in bf16": replace(strategies.ddp(), gradient_wire=wire.bf16()),
    "local_sgd": strategies.local_sgd(period=1),
    "local_sgd in int4": replace(strategies.local_sgd(period=1), wire=wire.named("int4")),
}
SHARES = {"ddp": 1, "ddp in bf16": 1 / 2, "local_sgd": 1, "local_sgd in int4": 1 / 8}


class Clock:
    """A clock for links, whose time passes only while a link carries something."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@contextmanager
def links_own_clock() -> Iterator[Clock]:
    clock = Clock()
    with mock.patch.object(link, "time", clock):
        yield clock


def behind(rate: float) -> LinkedProcesses:
    return LinkedProcesses(torch_group(None), timedelta(seconds=20), Link(rate))


def seconds_of_steps(
    rank: int, name: str, steps: int, clock: Callable[[], float]
) -> tuple[list[float], float, float]:
    """Seconds of each step of a model in two buckets, bytes a step, seconds of computing a step."""
    layers = (nn.Linear(512, 512, bias=False) for _ in range(2))
    model = DistributedDataParallel(nn.Sequential(*layers), bucket_cap_mb=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sync = postlocal.attach(model, optimizer, STRATEGIES[name], process_group=behind(RATE))
    seconds, computing = [], time.process_time()
    for _ in range(steps):
        dist.barrier()
        start = clock()
        model(torch.ones(1, 512)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        sync.step()
        seconds.append(clock() - start)
    computing = (time.process_time() - computing) / steps
    sync.close()
    return seconds, sync.meter.total_bytes / steps, computing


def links_seconds_of_steps(rank: int, name: str) -> tuple[list[float], float, float]:
    with links_own_clock() as clock:
        return seconds_of_steps(rank, name, 3, clock.monotonic)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_step_takes_as_long_as_a_link_needs_for_what_is_sent_in_it(
    ranks: Ranks, name: str
) -> None:
    results = ranks(2, links_seconds_of_steps, name)
    due = 8 * max(sent for _, sent, _ in results) / RATE
    ring = 2 * 1 / 2 * 4 * NUMEL  # bytes that each of 2 ranks sends in an fp32 ring all-reduce
    assert due == pytest.approx(SHARES[name] * 8 * ring / RATE, rel=0.05)
    for seconds, sent, _ in results:
        assert sum(seconds) == pytest.approx(3 * 8 * sent / RATE)
        assert seconds == pytest.approx([due] * 3, rel=1e-3)  # the first one says more


def real_seconds_of_a_step(rank: int) -> tuple[list[float], float, float]:
    return seconds_of_steps(rank, "ddp", 1, time.monotonic)


def test_whoever_waits_for_a_link_leaves_the_processor_to_others(ranks: Ranks) -> None:
    for (seconds,), sent, computing in ranks(2, real_seconds_of_a_step):
        assert seconds >= 8 * sent / RATE > 1
        assert computing < 0.8


def train_behind(rank: int) -> list[Tensor]:
    model = DistributedDataParallel(mlp())
    optimizer = adamw(model)
    sync = postlocal.attach(model, optimizer, strategies.ddp(), process_group=behind(1e9))
    for x, y in batches(rank, 6):
        train_step(model, optimizer, x, y)
        sync.step()
    sync.close()
    return values(model)


def test_ddp_behind_a_link_is_ddp_bit_for_bit(ranks: Ranks) -> None:
    plain = ranks(4, train_plain, 6, "adamw")
    for behind_a_link in ranks(4, train_behind):
        assert equal(behind_a_link, plain[0])


def reduce_late(rank: int) -> tuple[bool, float, float]:
    """Whether a sum is here when rank 1 has contributed; the link's seconds, with a broadcast's."""
    with links_own_clock() as clock:
        group = behind(RATE)
        tensor = torch.ones(100_000)
        dist.barrier()
        if rank == 1:
            time.sleep(0.3)
            say("rank 1 sends")
        group.all_reduce(tensor).wait()
        waited, reduced = said("rank 1 sends"), clock.now
        assert float(tensor.sum()) == 200_000
        group.broadcast(torch.ones(10_000_000)).wait()
        return waited, reduced, clock.now


def test_a_rank_that_sends_late_is_waited_for_and_broadcasts_are_not_delayed(ranks: Ranks) -> None:
    for waited, reduced, broadcast in ranks(2, reduce_late):
        assert waited
        assert reduced == broadcast == pytest.approx(0.2)  # a link would need 20 s to broadcast


def test_messages_queue_and_a_link_that_was_idle_saves_nothing_up() -> None:
    with links_own_clock() as clock:
        line = Link(8e6)
        first, second = [line.send(100_000, clock.monotonic) for _ in range(2)]
        assert [first.result(), second.result()] == pytest.approx([0.1, 0.2])
        clock.sleep(0.3)
        assert line.send(100_000, clock.monotonic).result() == pytest.approx(0.6)
        line.close()
    line = Link(8e6)
    start = time.monotonic()
    assert line.send(100_000, time.monotonic).result() - start >= 0.1
    line.close()
    with pytest.raises(ValueError, match="rate must be above 0 bit/s, got 0"):
        Link(0)


def resume_behind(rank: int, folder: str) -> bool:
    model = DistributedDataParallel(mlp())
    strategy = replace(strategies.local_sgd(period=4), wire=wire.named("int4"))
    optimizer = adamw(model)
    sync = postlocal.attach(model, optimizer, strategy, process_group=behind(1e9))
    for x, y in batches(rank, 6):
        train_step(model, optimizer, x, y)
        sync.step()
    checkpoint.save(folder, sync)
    saved = values(model)
    for x, y in batches(rank, 2):
        train_step(model, optimizer, x, y)
        sync.step()
    checkpoint.restore(folder, sync)
    return equal(saved, values(model)) and sync.steps == 6


def test_checkpoints_work_behind_a_link(ranks: Ranks, tmp_path: Any) -> None:
    assert ranks(2, resume_behind, str(tmp_path)) == [True, True]


def lose_a_rank(rank: int) -> str:
    group = LinkedProcesses(torch_group(None), timedelta(seconds=1), Link(RATE))
    pair = group.subgroup([[0, 1]])
    assert isinstance(pair, LinkedProcesses)
    if rank == 1:
        return ""
    with pytest.raises(PeerError) as caught:
        pair.all_reduce(torch.ones(1000)).wait()
    with pytest.raises(RuntimeError):
        pair.sum_(torch.ones(1000)).wait()
    return str(caught.value)


def test_a_rank_that_does_not_come_is_named_behind_a_link_too(ranks: Ranks) -> None:
    assert "rank 1" in ranks(2, lose_a_rank)[0]


def test_a_link_is_for_models_on_the_cpu_and_for_several_ranks(alone: None) -> None:
    assert linked(None, 1.0, torch.device("cpu")) is None
    assert isinstance(linked(Link(1e6), 1.0, torch.device("cpu")), LinkedProcesses)
    with pytest.raises(ValueError, match=r"link must be left out .* not on the CPU, got cuda"):
        linked(Link(1e6), 1.0, torch.device("cuda"))


@pytest.mark.parametrize("text", ["100", "0Mbit", "fast"])
def test_a_rate_without_sense_is_refused_by_the_name_of_the_option(text: str) -> None:
    with pytest.raises(ValueError, match=f"link must be above 0 and have a unit.*got '{text}'"):
        parse_bandwidth(text, "link")
    with pytest.raises(ValueError, match=r"link must be greater than 0, got -1\.0"):
        make_config(link=-1.0)


def test_the_run_that_is_compared_with_has_the_same_link() -> None:
    assert make_config(link=40e6, compare="ddp").compared().link == 40e6
