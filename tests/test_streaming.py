"""Fragments, delay and mix: against the paper's algorithm, under way, resumed, and under faults."""

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
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
    fragments,
    outer,
    schedule,
    strategies,
    virtual,
    wire,
)
from postlocal.checkpoint import packing
from postlocal.comm.group import Group
from tests.launcher import await_event, said, say
from tests.models import (
    OPTIMIZERS,
    batches,
    convnet,
    distance,
    equal,
    mlp,
    stacked,
    train,
    train_step,
    values,
)

Ranks = Callable[..., list[Any]]


def stack(seed: int = 0) -> nn.Module:
    """Four layers, of two sizes."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4))


def streaming(
    period: int,
    count: int = 2,
    delay: int = 1,
    mix: float = 0.5,
    carry: bool = False,
    **axes: Any,
) -> Strategy:
    """Streaming DiLoCo over an exact wire, unless told otherwise."""
    strategy = strategies.streaming_diloco(period, count, delay, mix, keep_delayed_steps=carry)
    return replace(strategy, **{"wire": wire.fp32()} | axes)


def run(
    strategy: Strategy, steps: int, workers: int = 3, finish: bool = False
) -> list[list[list[Tensor]]]:
    """Of each worker, the parameters after every step, and after ``finish``."""
    models = [stack() for _ in range(workers)]  # made here: threads share torch's generator

    def work(group: Group) -> list[list[Tensor]]:
        model = models[group.rank]
        optimizer = OPTIMIZERS["adamw"](model)
        sync = postlocal.attach(model, optimizer, strategy, process_group=group)
        history = []
        for x, y in batches(group.rank, steps):
            train_step(model, optimizer, x, y)
            sync.step()
            history.append(values(model))
        if finish:
            sync.finish()
            history.append(values(model))
        sync.close()
        return history

    return virtual.run(workers, work)


class Reference:
    """Algorithm 2 of arXiv 2501.18512 in fp32, all replicas in one process; and with carry."""

    def __init__(
        self, workers: int, parts: list[list[int]], lr: float, momentum: float, carry: bool = False
    ) -> None:
        self.carry = carry
        self.sent: dict[int, Tensor] = {}
        self.replicas = [stack() for _ in range(workers)]
        self.optimizers = [OPTIMIZERS["adamw"](replica) for replica in self.replicas]
        self.parts, self.lr, self.mu = parts, lr, momentum
        self.anchor = values(self.replicas[0])
        self.momentum = [torch.zeros_like(tensor) for tensor in self.anchor]
        self.under_way: list[tuple[int, int, dict[int, Tensor]]] = []

    def send(self, step: int, part: int) -> None:
        means = {
            index: self.anchor[index] - stacked(self.replicas, index).mean(0)
            for index in self.parts[part]
        }
        self.under_way.append((step, part, means))
        self.sent |= {index: stacked(self.replicas, index) for index in self.parts[part]}

    def apply(self, step: int, delay: int, mix: float) -> None:
        due = [sent for sent in self.under_way if sent[0] + delay == step]
        self.under_way = [sent for sent in self.under_way if sent[0] + delay != step]
        for _, _, means in due:
            for index, mean in means.items():
                self.momentum[index] = self.mu * self.momentum[index] + mean
                self.anchor[index] = self.anchor[index] - self.lr * (
                    mean + self.mu * self.momentum[index]
                )
                for replica, sent in zip(self.replicas, self.sent[index], strict=True):
                    parameter = list(replica.parameters())[index].data
                    moved = parameter - sent if self.carry else 0
                    parameter.copy_(mix * parameter + (1 - mix) * (self.anchor[index] + moved))

    def train(self, steps: int, period: int, delay: int, mix: float) -> list[list[Tensor]]:
        streams = [list(batches(rank, steps)) for rank in range(len(self.replicas))]
        offsets = [-(-(part + 1) * period // len(self.parts)) for part in range(len(self.parts))]
        for step in range(1, steps + 1):
            for replica, optimizer, stream in zip(
                self.replicas, self.optimizers, streams, strict=True
            ):
                train_step(replica, optimizer, *stream[step - 1])
            if delay:
                self.apply(step, delay, mix)
            for part, offset in enumerate(offsets):
                if (step - offset) % period == 0 and step >= offset:
                    self.send(step, part)
                    if not delay:
                        self.apply(step, delay, mix)
        return [values(replica) for replica in self.replicas]


# The first two layers alternate with the last two; weight and bias of each are neighbours.
STRIDED = [[0, 1, 4, 5], [2, 3, 6, 7]]


@pytest.mark.parametrize(
    ("period", "delay", "mix", "carry"),
    [(4, 0, 0.0, False), (4, 0, 0.5, False)]
    + [
        (*row, carry) for row in [(4, 1, 0.5), (5, 3, 0.0), (6, 5, 0.25)] for carry in (False, True)
    ],
)
def test_streaming_equals_the_algorithm_in_one_process(
    period: int, delay: int, mix: float, carry: bool
) -> None:
    ours = run(streaming(period, 2, delay, mix, carry), 17)
    reference = Reference(3, STRIDED, 0.4, 0.9, carry).train(17, period, delay, mix)
    for rank in range(3):
        assert distance(ours[rank][-1], reference[rank]) < 1e-6


@pytest.mark.parametrize("mix", [0.0, 0.25, 0.5])
@pytest.mark.parametrize(("delay", "carry"), [(0, False), (2, False), (2, True)])
def test_mix_and_lost_steps_limit_how_far_the_anchor_goes(
    delay: int, mix: float, carry: bool
) -> None:
    period, rounds, reach = 5, 120, 0.7 / (1 - 0.9)
    strategy = replace(streaming(period, 1, delay, mix, carry), outer=outer.nesterov(0.7, 0.9))
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    (weight,) = model.parameters()
    optimizer = torch.optim.SGD([weight], lr=1 / period)
    sync = postlocal.attach(model, optimizer, strategy)
    places = []
    for _ in range(rounds):
        for _ in range(period):
            weight.grad = torch.ones_like(weight)  # so that replicas move by 1 a round
            optimizer.step()
            sync.step()
        with sync.agreed_parameters():
            places.append(weight.item())
    sync.close()
    lost = 0.0 if carry else delay / period * (1 - mix)
    speed = reach * (1 - lost) / (1 + (reach - 1) * mix)
    assert places[-2] - places[-1] == pytest.approx(speed, rel=1e-2)


def test_one_fragment_without_delay_or_mix_is_diloco_to_the_bit() -> None:
    plain = run(strategies.diloco(4, 0.4, 0.9), 10, finish=True)
    ours = run(streaming(4, count=1, delay=0, mix=0.0), 10, finish=True)
    for mine, theirs in zip(ours, plain, strict=True):
        assert all(equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_averaging_in_parts_averages_each_part_at_its_step() -> None:
    strategy = Strategy(schedule.periodic(4), fragments=fragments.streaming(2, delay=0, mix=0))
    history = run(strategy, 4)
    for index in STRIDED[0]:
        assert torch.equal(history[0][1][index], history[1][1][index])
        assert not torch.equal(history[0][3][index], history[1][3][index])
    for index in STRIDED[1]:
        assert not torch.equal(history[0][1][index], history[1][1][index])
        assert torch.equal(history[0][3][index], history[1][3][index])


@pytest.mark.parametrize("recipe", [wire.fp32(), wire.fp4()], ids=["fp32", "fp4"])
def test_replicas_are_equal_after_finish_and_the_agreed_parameters_always(recipe: Any) -> None:
    models = [stack() for _ in range(3)]

    def work(group: Group) -> tuple[list[list[Tensor]], list[Tensor]]:
        model = models[group.rank]
        optimizer = OPTIMIZERS["adamw"](model)
        strategy = streaming(4, delay=2, wire=recipe)
        sync = postlocal.attach(model, optimizer, strategy, process_group=group)
        agreed = []
        for x, y in batches(group.rank, 11):
            train_step(model, optimizer, x, y)
            sync.step()
            own = values(model)
            with sync.agreed_parameters():
                agreed.append(values(model))
            assert equal(own, values(model))
            assert not sync.agreed
        sync.finish()
        assert sync.agreed
        sync.close()
        return agreed, values(model)

    (first_agreed, first), *others = virtual.run(3, work)
    for agreed, final in others:
        assert equal(first, final)
        assert all(equal(a, b) for a, b in zip(first_agreed, agreed, strict=True))


def test_agreed_parameters_need_an_anchor_once_replicas_are_apart() -> None:
    def work(group: Group) -> str:
        model = stack()
        sync = postlocal.attach(
            model, OPTIMIZERS["sgd"](model), strategies.local_sgd(4), process_group=group
        )
        with sync.agreed_parameters():
            pass
        sync.step()
        with pytest.raises(RuntimeError) as error, sync.agreed_parameters():
            pass
        return str(error.value)

    assert "keeps no anchor" in virtual.run(2, work)[0]


FEEDBACK = wire.int8(block=8)


@pytest.mark.parametrize("stop", [3, 5, 6, 9])
@pytest.mark.parametrize(
    "strategy",
    [
        streaming(6, delay=4),
        streaming(6, delay=4, wire=FEEDBACK),
        streaming(6, delay=4, mix=0.0, carry=True),
    ],
    ids=["fp32", "int8 with feedback", "carry"],
)
def test_a_resume_with_fragments_under_way_is_bit_exact(stop: int, strategy: Strategy) -> None:
    models = [[stack() for _ in range(2)] for _ in range(3)]

    def work(group: Group) -> tuple[list[Tensor], list[Tensor]]:
        finals = []
        saved: Any = None
        for run_number in range(2):
            model = models[group.rank][run_number]
            optimizer = OPTIMIZERS["adamw"](model)
            sync = postlocal.attach(model, optimizer, strategy, process_group=group)
            stream = list(batches(group.rank, 15))
            first = 0
            if saved is not None:
                model.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
                packed, tensors = saved[2]
                sync.load_state_dict(packing.unpack(packed, tensors))
                first = stop
            for step in range(first, 15):
                train_step(model, optimizer, *stream[step])
                sync.step()
                if run_number == 0 and step + 1 == stop:
                    packed, tensors = packing.pack(sync.state_dict())
                    copies = {key: tensor.clone() for key, tensor in tensors.items()}
                    saved = deepcopy((model.state_dict(), optimizer.state_dict()))
                    saved = (*saved, (packed, copies))
            sync.finish()
            finals.append(values(model))
            sync.close()
        return finals[0], finals[1]

    for straight, resumed in virtual.run(3, work):
        assert equal(straight, resumed)


def late(rank: int, delay: int) -> tuple[list[bool], float, float]:
    """Rank 1 comes to step 4 half a second after rank 0 came to the step that waits for it.

    What rank 0 finds after each step: whether rank 1 had come by then. Then seconds of waiting as
    the meter counts them, and as they were.
    """
    model = stack()
    optimizer = OPTIMIZERS["sgd"](model)
    sync = postlocal.attach(model, optimizer, streaming(4, count=1, delay=delay))
    came, waited = [], 0.0
    for step, (x, y) in enumerate(batches(rank, 8), 1):
        train_step(model, optimizer, x, y)
        if rank == 0 and step == 4 + delay:
            say("rank 0 waits")
        if rank == 1 and step == 4:
            await_event("rank 0 waits")
            time.sleep(0.5)
            say("rank 1 comes")
        start = time.monotonic()
        sync.step()
        waited = time.monotonic() - start if step == 4 + delay else waited
        came.append(said("rank 1 comes"))
    counted = sync.meter.records[0].wait_seconds
    sync.close()
    return came, counted, waited


def test_training_goes_on_while_a_fragment_is_under_way(ranks: Ranks) -> None:
    came, counted, waited = ranks(2, late, 3)[0]
    assert came == [False] * 6 + [True] * 2  # sent after step 4, and waited for after step 7
    assert counted > waited / 2


def test_without_delay_the_same_run_stands_still_at_once(ranks: Ranks) -> None:
    came, counted, waited = ranks(2, late, 0)[0]
    assert came == [False] * 3 + [True] * 5
    assert counted > waited / 2


def never_come(rank: int) -> str:
    model = stack()
    optimizer = OPTIMIZERS["sgd"](model)
    sync = postlocal.attach(model, optimizer, streaming(4, count=1, delay=2), timeout=2.0)
    if rank == 1:
        return ""
    with pytest.raises(PeerError) as error:
        for x, y in batches(rank, 8):
            train_step(model, optimizer, x, y)
            sync.step()
    return f"{sync.steps}: {error.value}"


def test_a_rank_that_is_missing_is_named_when_the_fragment_should_be_applied(ranks: Ranks) -> None:
    message = ranks(2, never_come)[0]
    assert message.startswith("6: missing at the synchronization after step 4: rank 1")


def test_delays_and_fragments_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match=r"delay must be shorter than a round, .* got 4"):
        streaming(4, delay=4)
    with pytest.raises(ValueError, match="optimizer_state must be 'keep' or 'reset'"):
        replace(streaming(4), optimizer_state="average")
    with pytest.raises(ValueError, match=r"mix must be from 0 to 1, got 1\.5"):
        streaming(4, mix=1.5)
    with pytest.raises(
        ValueError, match="keep_delayed_steps needs a delay of at least 1 step, got 0"
    ):
        streaming(4, delay=0, carry=True)


def too_many_fragments(rank: int) -> str:
    model = stack()
    with pytest.raises((ValueError, DisagreementError)) as error:
        postlocal.attach(model, OPTIMIZERS["sgd"](model), streaming(8, count=5))
    return str(error.value)


def test_more_fragments_than_layers_are_refused_at_attach(ranks: Ranks) -> None:
    for message in ranks(2, too_many_fragments):
        assert "got 5 fragments of 4 layers" in message


def stream_convnet(rank: int) -> list[Tensor]:
    model = DistributedDataParallel(convnet())
    optimizer = OPTIMIZERS["sgd"](model)
    sync = postlocal.attach(model, optimizer, streaming(4, delay=1))
    for x, y in batches(rank, 9, (1, 6, 6)):
        train_step(model, optimizer, x, y)
        sync.step()
    sync.finish()
    sync.close()
    return [buffer.clone() for buffer in model.buffers()] + values(model)


def test_buffers_travel_with_the_last_fragment_and_end_equal(ranks: Ranks) -> None:
    first, *others = ranks(3, stream_convnet)
    for other in others:
        assert equal(first, other)


def poison(
    group: Group, models: list[nn.Module], carry: bool
) -> tuple[list[Tensor], list[tuple[int, ...]]]:
    model = models[group.rank]
    optimizer = OPTIMIZERS["sgd"](model)
    strategy = streaming(4, delay=1, carry=carry)
    sync = postlocal.attach(model, optimizer, strategy, process_group=group)
    for step, (x, y) in enumerate(batches(group.rank, 12)):
        train_step(model, optimizer, x, y)
        if group.rank == 1 and step == 2:
            with torch.no_grad():
                next(model.parameters()).fill_(torch.nan)
        sync.step()
    sync.finish()
    sync.close()
    return values(model), [record.excluded for record in sync.meter.records]


@pytest.mark.parametrize("carry", [False, True])
def test_a_replica_with_nan_is_left_out_and_takes_the_anchor(carry: bool) -> None:
    models = [stack() for _ in range(3)]
    results = virtual.run(3, lambda group: poison(group, models, carry))
    for parameters, excluded in results:
        assert equal(parameters, results[0][0])
        assert all(bool(torch.isfinite(tensor).all()) for tensor in parameters)
        assert (1,) in excluded


def test_an_anchor_is_what_replicas_agree_on_when_they_part() -> None:
    """The first pseudo-gradient after a warm-up holds none of the warm-up's own movement."""
    models = [mlp() for _ in range(1)]
    strategy = Strategy(
        schedule.post_local(6, schedule.periodic(3)), outer=outer.nesterov(1.0, 0.9)
    )

    def work(group: Group) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        model = models[0]
        optimizer = OPTIMIZERS["sgd"](model)
        sync = postlocal.attach(model, optimizer, strategy, process_group=group)
        marks = []
        for step, (x, y) in enumerate(batches(0, 9)):
            train_step(model, optimizer, x, y)
            if step == 8:
                marks.append(values(model))
            sync.step()
            if step == 5:
                marks.append(values(model))
        return marks[0], marks[1], values(model)

    parted, local, after = virtual.run(1, work)[0]
    for anchor, moved, result in zip(parted, local, after, strict=True):
        expected = anchor + 1.9 * (moved - anchor)  # Nesterov's first step: 1 + momentum
        assert torch.allclose(result, expected, atol=1e-6)


def test_replicas_weigh_as_much_as_they_worked() -> None:
    def work(group: Group) -> float:
        model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(model.weight)
        sync = postlocal.attach(
            model, torch.optim.SGD(model.parameters(), lr=0.1), strategies.local_sgd(4),
            process_group=group,
        )  # fmt: skip
        nn.init.constant_(model.weight, [2.0, 5.0][group.rank])
        for step in range(4):
            sync.step(work=1.0 if group.rank == 0 or step < 2 else 0.0)
        return float(model.weight.detach())

    assert virtual.run(2, work) == pytest.approx([3.0, 3.0])


def test_replicas_that_all_did_nothing_are_averaged_as_ever() -> None:
    def work(group: Group) -> float:
        model = nn.Linear(1, 1, bias=False)
        nn.init.constant_(model.weight, 1.0)
        sync = postlocal.attach(
            model, torch.optim.SGD(model.parameters(), lr=0.1), strategies.local_sgd(1),
            process_group=group,
        )  # fmt: skip
        nn.init.constant_(model.weight, [2.0, 5.0][group.rank])
        sync.step(work=0.0)
        return float(model.weight.detach())

    assert virtual.run(2, work) == pytest.approx([3.5, 3.5])


@pytest.mark.parametrize("work", [-1.0, float("nan"), float("inf")])
def test_work_is_refused_where_it_is_no_share(work: float) -> None:
    model = stack()
    sync = postlocal.attach(model, OPTIMIZERS["sgd"](model), strategies.local_sgd(4))
    with pytest.raises(ValueError, match="work must be a"):
        sync.step(work=work)


def test_work_is_given_by_name_so_that_a_step_number_is_refused() -> None:
    model = stack()
    sync = postlocal.attach(model, OPTIMIZERS["sgd"](model), strategies.local_sgd(4))
    with pytest.raises(TypeError, match="positional argument"):
        sync.step(7)  # type: ignore[call-arg]


def test_real_ranks_stream_as_threads_do(ranks: Ranks) -> None:
    strategy = replace(streaming(4, delay=2), fragments=fragments.streaming(2, delay=2, mix=0.5))
    real = ranks(2, train, strategy, 9, "adamw", finish=True)
    models = [mlp() for _ in range(2)]

    def work(group: Group) -> list[Tensor]:
        model = models[group.rank]
        optimizer = OPTIMIZERS["adamw"](model)
        sync = postlocal.attach(model, optimizer, strategy, process_group=group)
        for x, y in batches(group.rank, 9):
            train_step(model, optimizer, x, y)
            sync.step()
        sync.finish()
        sync.close()
        return values(model)

    pretended = virtual.run(2, work)
    assert equal(real[0][-1], real[1][-1])
    assert distance(real[0][-1], pretended[0]) < 1e-6
