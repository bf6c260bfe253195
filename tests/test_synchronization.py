"""What a synchronization leaves where something is uneven: a replica, a round, a rank, a resume."""

import logging
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import postlocal
from postlocal import (
    DisagreementError,
    PeerError,
    Strategy,
    checkpoint,
    fragments,
    guard,
    outer,
    schedule,
    strategies,
    topology,
    virtual,
    wire,
)
from postlocal.checkpoint import packing
from postlocal.comm.group import Group
from postlocal.sync.clock import Sync
from tests.models import OPTIMIZERS, batches, equal, train_step, values

Ranks = Callable[..., list[Any]]
Loop = Callable[[Group, nn.Module, Sync], Any]


def stack(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)]
    return nn.Sequential(*layers).to(dtype)


def run(
    strategy: Strategy,
    loop: Loop,
    workers: int = 2,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> list[Any]:
    """What ``loop(group, model, sync)`` returns on each worker."""
    models = [stack(dtype) for _ in range(workers)]  # made here: threads share torch's generator

    def work(group: Group) -> Any:
        model = models[group.rank]
        optimizer = OPTIMIZERS["adamw"](model)
        sync = postlocal.attach(model, optimizer, strategy, process_group=group, **options)
        try:
            return loop(group, model, sync)
        finally:
            sync.close()

    return virtual.run(workers, work)


def streaming(period: int = 10, count: int = 3, delay: int = 0, mix: float = 0.0) -> Strategy:
    return replace(strategies.streaming_diloco(period, count, delay, mix), wire=wire.fp32())


def move(model: nn.Module, by: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by)


@pytest.mark.parametrize("ranks", [{1}, {0, 1}], ids=["one replica", "all replicas"])
@pytest.mark.parametrize(("delay", "mix"), [(0, 0.0), (2, 0.5)])
def test_a_replica_that_was_nan_trains_on_with_finite_values(
    ranks: set[int], delay: int, mix: float
) -> None:
    def loop(group: Group, model: nn.Module, sync: Sync) -> list[bool]:
        finite = []
        for step, (x, y) in enumerate(batches(group.rank, 40)):
            nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
            if step == 6 and group.rank in ranks:
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter.grad.fill_(torch.nan)
            sync.inner.optimizer.step()
            sync.inner.optimizer.zero_grad()
            sync.step()
            finite.append(all(bool(p.isfinite().all()) for p in model.parameters()))
        return finite

    for finite in run(streaming(delay=delay, mix=mix), loop):
        assert all(finite[:6])
        assert all(finite[6 + 4 + delay :])  # a fragment is sent at least every 4 steps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("share", [0.0, 0.3, 2.5])
def test_equal_replicas_of_equal_work_stay_as_they_are(dtype: torch.dtype, share: float) -> None:
    def loop(group: Group, model: nn.Module, sync: Sync) -> bool:
        before = values(model)
        sync.step(work=share)
        sync.step(work=share)
        return equal(before, values(model))

    assert all(run(strategies.local_sgd(2), loop, workers=3, dtype=dtype))


def idle_after_the_warmup(rank: int) -> float:
    model = DistributedDataParallel(nn.Linear(1, 1, bias=False))
    strategy = Strategy(schedule.post_local(20, schedule.periodic(4)))
    sync = postlocal.attach(model, OPTIMIZERS["sgd"](model), strategy)
    for step in range(24):
        if step == 20:
            nn.init.constant_(model.module.weight, 4.0 * (1 - rank))
        sync.step(work=1.0 if rank == 0 or step < 20 else 0.0)
    return float(model.module.weight.detach())


def test_work_counts_from_where_replicas_part(ranks: Ranks) -> None:
    assert ranks(2, idle_after_the_warmup) == pytest.approx([4.0, 4.0])


def test_work_is_counted_anew_at_every_wider_synchronization() -> None:
    def loop(group: Group, model: nn.Module, sync: Sync) -> float:
        for step in range(1, 11):
            if step == 9:
                move(model, float(group.rank % 2))
            idle = group.rank % 2 == 1 and step <= 8
            sync.step(work=0.0 if idle else 1.0)
        return float(model[0].bias.detach()[0])  # type: ignore[index]

    strategy = strategies.hierarchical({"node": 2, "world": 8})
    start = float(stack()[0].bias.detach()[0])  # type: ignore[index]
    results = run(strategy, loop, workers=4, topology=topology.nodes(size=2))
    assert results == pytest.approx([start + 0.5] * 4, abs=1e-5)


def test_a_resume_between_two_synchronizations_of_nodes_keeps_their_work() -> None:
    strategy = strategies.hierarchical({"node": 4, "world": 16})
    twins = [stack() for _ in range(4)]

    def go_on(group: Group, model: nn.Module, sync: Sync, first: int) -> list[Tensor]:
        for step in range(first, 9):
            move(model, 0.1 * (group.rank + step))
            sync.step(work=0.25 + 0.1 * (group.rank + step % 3))
        return values(model)

    def loop(group: Group, model: nn.Module, sync: Sync) -> bool:
        for step in range(6):
            move(model, 0.1 * (group.rank + step))
            sync.step(work=0.25 + 0.1 * (group.rank + step % 3))
        state = deepcopy(packing.pack(sync.state_dict()))
        twin = twins[group.rank]
        again = postlocal.attach(
            twin, OPTIMIZERS["adamw"](twin), strategy,
            process_group=group, topology=topology.nodes(size=2),
        )  # fmt: skip
        twin.load_state_dict(model.state_dict())
        again.load_state_dict(packing.unpack(*state))
        return equal(go_on(group, model, sync, 6), go_on(group, twin, again, 6))

    assert all(run(strategy, loop, workers=4, topology=topology.nodes(size=2)))


def test_ranks_behind_a_relay_hear_of_a_disagreement_too() -> None:
    strategy = replace(strategies.qsr(alpha=0.02, base=4), wire=wire.two_level(wire.bf16(), "node"))

    def loop(group: Group, model: nn.Module, sync: Sync) -> str:
        sync.inner.optimizer.param_groups[0]["lr"] = 0.002 if group.rank != 2 else 0.001
        with pytest.raises((DisagreementError, PeerError)) as error:
            for _ in range(40):
                sync.step()
        return type(error.value).__name__

    names = run(strategy, loop, workers=4, topology=topology.nodes(size=2))
    assert names == ["DisagreementError"] * 4


def test_the_outer_step_is_the_same_where_learning_rates_differ() -> None:
    def loop(group: Group, model: nn.Module, sync: Sync) -> list[Tensor]:
        for step in range(8):
            sync.inner.optimizer.param_groups[0]["lr"] = 0.01 / (1 + group.rank * (step > 3))
            move(model, 0.1)
            sync.step()
        return values(model)

    first, second = run(strategies.slowmo(4), loop)
    assert equal(first, second)


def test_fragments_of_nested_levels_are_refused() -> None:
    nested = schedule.hierarchical({"node": 4, "world": 16})
    with pytest.raises(ValueError, match="synchronizes parameters at one level"):
        Strategy(nested, fragments=fragments.streaming(2))
    with pytest.raises(ValueError, match="synchronizes parameters at one level"):
        Strategy(schedule.post_local(8, nested), fragments=fragments.streaming(2))
    Strategy(schedule.hierarchical({"world": 16}), fragments=fragments.streaming(2))


def test_a_delay_is_refused_where_the_schedule_follows_the_drift() -> None:
    adaptive = schedule.adaptive(0.1, initial=8, shortest=4)
    with pytest.raises(ValueError, match="delay must be 0 where the schedule follows the drift"):
        Strategy(adaptive, fragments=fragments.streaming(2, delay=1))
    Strategy(adaptive, fragments=fragments.streaming(2, delay=0))


def test_finish_takes_no_step_for_a_fragment_that_was_just_synchronized() -> None:
    def loop(group: Group, model: nn.Module, sync: Sync) -> tuple[list[Tensor], list[Tensor]]:
        for _ in range(20):
            move(model, 0.1)
            sync.step()
        with sync.agreed_parameters():
            agreed = values(model)
        sync.finish()
        return agreed, values(model)

    for agreed, final in run(streaming(10, count=2), loop):
        names = [name for name, _ in stack().named_parameters()]
        last = [index for index, name in enumerate(names) if name.startswith("1.")]
        others = [index for index, name in enumerate(names) if name.startswith("0.")]
        assert all(torch.equal(agreed[index], final[index]) for index in last)
        assert not any(torch.equal(agreed[index], final[index]) for index in others)


def test_loading_a_state_waits_for_what_is_under_way_and_drops_it() -> None:
    strategy = replace(streaming(4, count=1, delay=3), guard=guard.outliers(warmup=2))

    def loop(group: Group, model: nn.Module, sync: Sync) -> tuple[bool, list[Tensor]]:
        start = deepcopy((model.state_dict(), packing.pack(sync.state_dict())))
        for _ in range(5):
            move(model, 0.1 * (1 + group.rank))
            sync.step()
        assert sync._executor.under_way
        model.load_state_dict(start[0])
        sync.load_state_dict(packing.unpack(*start[1]))
        again = packing.pack(sync.state_dict())
        for _ in range(5):
            move(model, 0.1 * (1 + group.rank))
            sync.step()
        return str(again[0]) == str(start[1][0]), values(model)

    for same, _ in run(strategy, loop):
        assert same


@pytest.mark.parametrize("mix", [0.0, 0.5])
def test_after_a_fault_the_parameters_are_not_pseudo_gradients(mix: float) -> None:
    def factor(step: int) -> float:
        return -1.0  # refused when the outer step is taken

    strategy = Strategy(
        schedule.periodic(4),
        outer.scheduled(outer.nesterov(0.5, 0.0), factor),
        fragments=fragments.streaming(1, delay=0, mix=mix),
    )

    def loop(group: Group, model: nn.Module, sync: Sync) -> tuple[list[Tensor], list[Tensor]]:
        start = values(model)
        with pytest.raises(ValueError, match="factor"):
            for _ in range(4):
                move(model, 0.5)
                sync.step()
        return start, values(model)

    for start, left in run(strategy, loop):
        expected = 2.0 if mix else 0.0  # local steps are kept where they were not in the way
        for before, after in zip(start, left, strict=True):
            torch.testing.assert_close(after, before + expected)


def test_a_rank_that_did_no_step_is_not_called_an_outlier(
    caplog: pytest.LogCaptureFixture,
) -> None:
    strategy = Strategy(schedule.periodic(2), outer.nesterov(1.0, 0.0), guard=guard.outliers())

    def loop(group: Group, model: nn.Module, sync: Sync) -> tuple[int, ...]:
        for _ in range(2):
            move(model, 0.1)
            sync.step(work=1.0 if group.rank == 0 else 0.0)
        return sync.meter.records[0].excluded

    with caplog.at_level(logging.WARNING):
        assert run(strategy, loop) == [(1,), (1,)]
    assert "rank 1: it did no step" in caplog.text


def test_an_outliers_optimizer_state_is_left_out_as_well() -> None:
    strategy = Strategy(
        schedule.periodic(1), outer.nesterov(1.0, 0.0),
        guard=guard.outliers(warmup=3, max_norm=1e9), optimizer_state="average",
    )  # fmt: skip

    def loop(group: Group, model: nn.Module, sync: Sync) -> float:
        for step, (x, y) in enumerate(batches(group.rank, 8)):
            train_step(model, sync.inner.optimizer, x, y)
            if step == 7 and group.rank == 1:
                move(model, 100.0)
                for state in sync.inner.optimizer.state.values():
                    state["exp_avg"].fill_(1000.0)
            sync.step()
        return max(float(s["exp_avg"].abs().max()) for s in sync.inner.optimizer.state.values())

    assert max(run(strategy, loop)) < 10


def test_a_round_that_is_cut_short_applies_before_it_sends_again() -> None:
    strategy = Strategy(
        schedule.quadratic(alpha=0.01, base=6, total=8),
        outer.nesterov(1.0, 0.0),
        fragments=fragments.streaming(1, delay=5, mix=0.5),
    )

    def loop(group: Group, model: nn.Module, sync: Sync) -> list[tuple[int, int | None]]:
        sync.inner.optimizer.param_groups[0]["lr"] = 1.0
        for _ in range(8):
            move(model, 0.1 * (1 + group.rank))
            sync.step()
        sync.finish()
        return [(record.step, record.applied) for record in sync.meter.records]

    assert run(strategy, loop) == [[(6, 8), (8, 8)]] * 2


@pytest.mark.parametrize("stop", [5, 8, 10])
def test_momentum_buffers_and_juries_under_way_resume_to_the_bit(stop: int) -> None:
    strategy = Strategy(
        schedule.periodic(4), outer.slow_momentum(1.0, 0.5),
        fragments=fragments.streaming(2, delay=3, mix=0.5), guard=guard.outliers(warmup=1),
    )  # fmt: skip
    twins = [stack() for _ in range(2)]

    def go_on(group: Group, model: nn.Module, sync: Sync, first: int, last: int) -> None:
        for step, (x, y) in enumerate(batches(group.rank, last)):
            if step >= first:
                sync.inner.optimizer.param_groups[0]["lr"] = 0.01 / (1 + step)
                train_step(model, sync.inner.optimizer, x, y)
                sync.step()

    def loop(group: Group, model: nn.Module, sync: Sync) -> bool:
        go_on(group, model, sync, 0, stop)
        twin = twins[group.rank]
        again = postlocal.attach(twin, OPTIMIZERS["adamw"](twin), strategy, process_group=group)
        state = deepcopy(packing.pack(sync.state_dict()))
        twin.load_state_dict(deepcopy(model.state_dict()))
        again.inner.optimizer.load_state_dict(deepcopy(sync.inner.optimizer.state_dict()))
        again.load_state_dict(packing.unpack(*state))
        for trained, clock in ((model, sync), (twin, again)):
            go_on(group, trained, clock, stop, 15)
            clock.finish()
        again.close()
        tensors = [*values(model), *model.buffers()]
        return equal(tensors, [*values(twin), *twin.buffers()])

    assert all(run(strategy, loop))


def save_at(rank: int, strategy: Strategy, folder: Path, steps: int) -> list[Tensor]:
    model = stack()
    sync = postlocal.attach(model, OPTIMIZERS["sgd"](model), strategy)
    for x, y in batches(rank, steps):
        train_step(model, sync.inner.optimizer, x, y)
        sync.step()
    with sync.agreed_parameters():
        agreed = values(model)
    checkpoint.save(folder, sync)
    sync.close()
    return agreed


def start_at(rank: int, strategy: Strategy, folder: Path) -> tuple[list[Tensor], bool, int]:
    model = stack()
    sync = postlocal.attach(model, OPTIMIZERS["sgd"](model), strategy)
    assert checkpoint.restore(folder, sync) is not None
    state = values(model), sync.agreed, len(sync._executor.under_way)
    sync.step()
    sync.close()
    return state


def test_on_another_number_of_ranks_fragments_start_from_the_anchor(
    ranks: Ranks, tmp_path: Path
) -> None:
    strategy = streaming(6, count=2, delay=4, mix=0.5)
    saved = ranks(2, save_at, strategy, tmp_path, 8)
    for parameters, agreed, under_way in ranks(3, start_at, strategy, tmp_path):
        assert equal(parameters, saved[0])
        assert (agreed, under_way) == (True, 0)


def test_bf16_parameters_are_mixed_in_fp32() -> None:
    strategy = replace(streaming(2, count=1, mix=0.5), outer=outer.nesterov(1.0, 0.0))

    def loop(group: Group, model: nn.Module, sync: Sync) -> Tensor:
        with torch.no_grad():
            model[0].bias.fill_([1.0, 1.0 + 2**-6][group.rank])  # type: ignore[index]
        sync.step()
        sync.step()
        return values(model)[1].float()

    first, second = run(strategy, loop, dtype=torch.bfloat16)
    mean = 1.0 + 2**-7
    assert torch.equal(first, torch.full((8,), (1.0 + mean) / 2).bfloat16().float())
    assert torch.equal(second, torch.full((8,), (1.0 + 2**-6 + mean) / 2).bfloat16().float())


def test_bf16_parameters_carry_what_they_moved_in_fp32() -> None:
    strategy = replace(
        strategies.streaming_diloco(4, 1, delay=2, mix=0.0, keep_delayed_steps=True),
        outer=outer.nesterov(1.0, 0.0), wire=wire.fp32(),
    )  # fmt: skip

    def loop(group: Group, model: nn.Module, sync: Sync) -> Tensor:
        bias: Tensor = model[0].bias  # type: ignore[index]
        for step in range(6):
            with torch.no_grad():
                bias.fill_(1 + 2**-7 if group.rank == 1 or step >= 4 else 1.0)
            sync.step()
        return bias.detach().float()

    first, second = run(strategy, loop, dtype=torch.bfloat16)
    mean, half = 1 + 2**-8, 2**-8  # neither is, added to 1, a bf16 number
    assert torch.equal(first, torch.full((8,), mean + 2 * half).bfloat16().float())
    assert torch.equal(second, torch.full((8,), mean).bfloat16().float())
    assert float(first[0]) == 1 + 2**-6  # 1 + 2**-7 if the mean had been rounded before


def test_an_outlier_carries_nothing() -> None:
    strategy = replace(
        strategies.streaming_diloco(4, 1, delay=2, mix=0.0, keep_delayed_steps=True),
        wire=wire.fp32(), guard=guard.outliers(warmup=1),
    )  # fmt: skip

    def loop(group: Group, model: nn.Module, sync: Sync) -> float:
        for step in range(14):  # the fragment sent after step 12 lands after step 14
            move(model, 100.0 if (group.rank, step) == (1, 11) else 0.25)
            sync.step()
        assert sync.meter.records[-1].excluded == (1,)
        own = values(model)[0]
        with sync.agreed_parameters():
            return float((own - values(model)[0]).mean())

    assert run(strategy, loop, workers=3) == pytest.approx([0.5, 0.0, 0.5], abs=1e-5)


def test_an_idle_replica_carries_what_it_does_during_the_delay() -> None:
    strategy = replace(
        strategies.streaming_diloco(4, 1, delay=2, mix=0.0, keep_delayed_steps=True),
        outer=outer.nesterov(1.0, 0.0), wire=wire.fp32(), guard=guard.outliers(),
    )  # fmt: skip

    def loop(group: Group, model: nn.Module, sync: Sync) -> float:
        for step in range(6):  # what is sent after step 4 lands after step 6
            idle = group.rank == 1 and step < 4
            move(model, 0.0 if idle else 1.0)
            sync.step(work=0.0 if idle else 1.0)
        assert sync.meter.records[-1].excluded == (1,)
        own = values(model)[0]
        with sync.agreed_parameters():
            return float((own - values(model)[0]).mean())

    assert run(strategy, loop) == pytest.approx([2.0, 2.0])


def test_a_replica_that_recovers_carries_only_what_it_did_since() -> None:
    strategy = replace(
        strategies.streaming_diloco(8, 2, delay=6, mix=0.0, keep_delayed_steps=True),
        outer=outer.nesterov(1.0, 0.0), wire=wire.fp32(),
    )  # fmt: skip

    def loop(group: Group, model: nn.Module, sync: Sync) -> list[float]:
        first = next(model.parameters())
        for step in range(1, 15):  # fragments are sent after steps 4 and 8, and applied 6 later
            move(model, float(first.isfinite().all()))  # skip steps of what is not finite
            if group.rank == 1 and step == 4:
                with torch.no_grad():
                    first.fill_(torch.nan)
            sync.step()
        own = values(model)
        with sync.agreed_parameters():
            moved = [mine - agreed for mine, agreed in zip(own, values(model), strict=True)]
        return [float(tensor.mean()) for tensor in (moved[0], moved[-1])]

    well, recovered = run(strategy, loop)
    assert well == pytest.approx([10.0, 6.0])
    assert recovered == pytest.approx([4.0, 4.0])


def test_a_guard_judges_the_layers_that_the_user_named() -> None:
    named = ("0", "1")
    strategy = replace(
        streaming(4, count=2), fragments=fragments.streaming(2, layers=named),
        guard=guard.outliers(),
    )  # fmt: skip

    def loop(group: Group, model: nn.Module, sync: Sync) -> list[list[str]]:
        return [[module[0] for module in part.modules] for part in sync._executor.fragments]

    (first, *_) = run(strategy, loop)
    assert {name for part in first for name in part} == {
        "0.weight",
        "1.weight",
        "2.weight",
        "3.weight",
    }
