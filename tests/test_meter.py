"""The meter counts what is sent, by purpose and by synchronization."""

import math
import pickle
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import postlocal
from postlocal import strategies, virtual
from postlocal.comm.group import Group
from postlocal.meter import Meter, Purpose, SyncRecord, human_bytes
from postlocal.wire import fp32
from tests.models import batches, mlp, sgd, train_step

Ranks = Callable[..., list[Any]]

PURPOSES: list[Purpose] = ["gradients", "parameters", "buffers", "optimizer", "control"]
counts = st.lists(st.tuples(st.sampled_from(PURPOSES), st.integers(0, 10**12)))


@given(outside=counts, inside=counts)
def test_totals_are_sums_and_a_record_holds_what_was_sent_within_it(
    outside: list[tuple[Purpose, int]], inside: list[tuple[Purpose, int]]
) -> None:
    meter = Meter()
    for purpose, size in outside:
        meter.count(purpose, size)
    record = SyncRecord(step=3, level="world")
    for purpose, size in inside:
        meter.count(purpose, size, record)
    meter.close(record)
    meter.count("gradients", 1)
    within = sum(size for _, size in inside)
    assert sum(record.payload_bytes.values()) == within
    assert meter.total_bytes == sum(size for _, size in outside) + within + 1


def test_only_the_latest_records_are_kept_and_all_are_counted() -> None:
    meter = Meter(history=2)
    for step in range(5):
        meter.close(SyncRecord(step, "world", excluded=(0, 2)))
    assert [record.step for record in meter.records] == [3, 4]
    assert (meter.syncs, meter.excluded) == (5, 10)


def test_time_in_a_block_that_fails_is_not_counted() -> None:
    meter, record = Meter(), SyncRecord(4, "world")
    with pytest.raises(KeyError), meter.waiting(record):
        raise KeyError
    assert (meter.wait_seconds, record.wait_seconds) == (0, 0)


def test_waiting_is_counted_for_the_run_and_for_the_synchronization() -> None:
    meter, record = Meter(), SyncRecord(4, "world")
    for _ in range(2):
        with meter.waiting(record):
            time.sleep(0.01)
    meter.wait(1.0)
    assert record.wait_seconds >= 0.02
    assert meter.wait_seconds == pytest.approx(1.0 + record.wait_seconds)


def test_threads_count_together() -> None:
    meter, record = Meter(), SyncRecord(4, "world")
    with ThreadPoolExecutor(4) as pool:
        for _ in range(400):
            pool.submit(meter.count, "parameters", 1, record)
    assert (meter.total_bytes, record.payload_bytes) == (400, {"parameters": 400})


def test_a_meter_survives_pickling() -> None:
    meter = Meter()
    meter.count("control", 7)
    again = pickle.loads(pickle.dumps(meter))
    again.count("control", 1)
    assert (again.total_bytes, meter.total_bytes) == (8, 7)


def test_counting_goes_on_after_a_resume() -> None:
    meter, again = Meter(), Meter()
    meter.count("parameters", 100)
    meter.close(SyncRecord(4, "node", excluded=(1,)))
    again.load_state_dict(meter.state_dict())
    again.count("parameters", 11)
    again.wait(1.0, last := SyncRecord(8, "node"))
    again.close(last)
    assert again.payload_bytes == {"parameters": 111}
    assert meter.payload_bytes == {"parameters": 100}
    assert (again.syncs, again.excluded, len(again.records)) == (2, 1, 1)
    assert again.wait_seconds == 1.0


WIDE = 2**20 + 3


def wide() -> nn.Module:
    """A tensor that travels on its own, and small ones that share a chunk."""
    return nn.ParameterList([torch.zeros(7), torch.zeros(WIDE), torch.zeros(3, 5)])


def parameter_bytes(rank: int) -> list[dict[str, int]]:
    model = wide()
    sync = postlocal.attach(model, sgd(model), strategies.local_sgd(1))
    for _ in range(2):
        sync.step()
    return [record.payload_bytes for record in sync.meter.records]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_parameters_cost_what_a_ring_sends_for_each_chunk(ranks: Ranks, world: int) -> None:
    numel = WIDE + 7 + 15  # they share chunks
    limit = fp32().limit(world, numel)
    chunks = [min(limit, numel - start) for start in range(0, numel, limit)]
    for rank, records in enumerate(ranks(world, parameter_bytes)):
        expected = 0
        for chunk in chunks:
            share = math.ceil(chunk / world)
            own = max(0, min(share, chunk - rank * share))
            expected += (chunk - own + (world - 1) * own) * 4
        assert [record["parameters"] for record in records] == [expected, expected]


def gradient_bytes(rank: int, micro_batches: int, skip: bool) -> tuple[list[int], int, float]:
    """Sizes of DDP's buckets at each reduction, gradient bytes of two steps, seconds waited."""
    torch.manual_seed(0)
    model = DistributedDataParallel(
        nn.Sequential(nn.Linear(8, 300), nn.Linear(300, 300), nn.Linear(300, 4)),
        bucket_cap_mb=0.1,
    )
    optimizer = sgd(model)
    sync = postlocal.attach(model, optimizer, strategies.ddp())
    where: Any = sync._gradients
    sizes, reduce = [], where.reduce

    def spy(bucket: Any) -> Any:
        sizes.append(bucket.buffer().numel())
        return reduce(bucket)

    where.reduce = spy
    stream = batches(rank, 2 * micro_batches)
    for _ in range(2):
        for micro in range(micro_batches):
            model.require_backward_grad_sync = not skip or micro == micro_batches - 1
            x, y = next(stream)
            nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        sync.step()
    return sizes, sync.meter.payload_bytes["gradients"], sync.meter.wait_seconds


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(("micro_batches", "skip"), [(1, False), (2, False), (2, True)])
def test_gradients_cost_what_their_buckets_hold(
    ranks: Ranks, world: int, micro_batches: int, skip: bool
) -> None:
    numel = 8 * 300 + 300 + 300 * 300 + 300 + 300 * 4 + 4
    for sizes, sent, waited in ranks(world, gradient_bytes, micro_batches, skip):
        assert len(sizes) > 2
        assert sum(sizes) == numel * 2 * (1 if skip else micro_batches)
        assert sent == sum(2 * (world - 1) * math.ceil(size / world) * 4 for size in sizes)
        assert waited > 0


def test_local_steps_send_nothing() -> None:
    models = [mlp(), mlp()]

    def work(group: Group) -> list[int]:
        model = models[group.rank]
        optimizer = sgd(model)
        sync = postlocal.attach(model, optimizer, strategies.local_sgd(4), process_group=group)
        totals = []
        for x, y in batches(group.rank, 8):
            train_step(model, optimizer, x, y)
            sync.step()
            totals.append(sync.meter.total_bytes)
        return totals

    for totals in virtual.run(2, work):
        assert totals[:3] == [0, 0, 0]
        assert totals[3] == totals[6] > 0
        assert totals[7] == 2 * totals[3]


def test_drift_is_zero_where_replicas_agree_and_unknown_where_none_is_finite() -> None:
    models = [mlp(), mlp()]

    def work(group: Group) -> list[float]:
        model = models[group.rank]
        strategy = strategies.diloco(1)
        sync = postlocal.attach(model, sgd(model), strategy, process_group=group)
        sync.step()
        with torch.no_grad():
            next(model.parameters()).fill_(math.nan)
        sync.step()
        return [record.drift for record in sync.meter.records]

    for agreed, unknown in virtual.run(2, work):
        assert agreed == 0
        assert math.isnan(unknown)


def test_a_meter_prints_what_communication_cost() -> None:
    meter = Meter()
    assert str(meter) == "0 synchronizations, 0 B sent, waited 0 s"
    for step in range(16, 16 * 23, 16):
        record = SyncRecord(step, "world", excluded=(1,) if step == 32 else ())
        meter.count("parameters", 522_000, record)
        meter.wait(0.0098, record)
        meter.close(record)
    assert str(meter) == (
        "22 synchronizations, 11.5 MB sent, waited 0.22 s, contributions left out: 1"
    )
    assert repr(meter) == f"<Meter: {meter}>"
    assert repr(pickle.loads(pickle.dumps(meter))) == repr(meter)


@pytest.mark.parametrize(
    ("record", "text"),
    [
        (SyncRecord(16, "world"), "step 16, world: 0 B sent, waited 0 s"),
        (
            SyncRecord(
                32, "node", 0, 33, {"parameters": 4000, "control": 96}, 0.0123, 0.01234, (1, 3)
            ),
            "step 32, node, fragment 0: 4.1 kB sent, waited 0.012 s, drift 0.0123, "
            "left out: rank 1, 3",
        ),
        (SyncRecord(1, "world", wait_seconds=9.96), "step 1, world: 0 B sent, waited 10 s"),
    ],
)
def test_a_record_prints_what_one_synchronization_cost(record: SyncRecord, text: str) -> None:
    assert str(record) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (999.6, "1 kB"), (999_600, "1 MB"), (2.5e15, "2.5 PB")],
)
def test_bytes_have_three_digits_and_a_unit(count: float, text: str) -> None:
    assert human_bytes(count) == text
