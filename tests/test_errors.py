"""Errors carry what they say as attributes, and the same on all ranks."""

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import postlocal
from postlocal import (
    CheckpointError,
    DisagreementError,
    ModelChangedError,
    NonFiniteError,
    PeerError,
    PostlocalError,
    Strategy,
    checkpoint,
    strategies,
    virtual,
)
from postlocal.comm.group import Group
from postlocal.errors import __doc__ as tree
from postlocal.model_averaging.averagers import PeriodicModelAverager
from tests.models import batches, mlp, sgd, train_step

Ranks = Callable[..., list[Any]]
LOCAL = strategies.local_sgd(2)


def raised(
    workers: int,
    before_step: Callable[[int, int, nn.Module], None],
    strategy: Callable[[int], Strategy] = lambda rank: LOCAL,
    steps: Callable[[int], int] = lambda rank: 2,
) -> list[Any]:
    """What each worker raises in a few steps; ``before_step(rank, step, model)`` spoils them."""

    def work(group: Group) -> Exception | None:
        model = mlp()
        optimizer = sgd(model)
        try:
            sync = postlocal.attach(model, optimizer, strategy(group.rank), process_group=group)
            for step, (x, y) in enumerate(batches(group.rank, steps(group.rank))):
                train_step(model, optimizer, x, y)
                before_step(group.rank, step, model)
                sync.step()
            sync.finish()
        except PostlocalError as error:
            return error
        return None

    return virtual.run(workers, work, timeout=20.0)


def nothing(rank: int, step: int, model: nn.Module) -> None:
    return None


def test_ranks_that_were_given_different_strategies_say_which() -> None:
    errors = raised(3, nothing, lambda rank: strategies.local_sgd(2 + (rank == 2)))
    for error in errors:
        assert isinstance(error, DisagreementError)
        assert (error.what, error.ranks, set(error.by_rank)) == ("strategy", (2,), {0, 2})
        assert "period=3" in error.by_rank[2]


def test_ranks_at_different_steps_say_how_many_each_took() -> None:
    for error in raised(3, nothing, steps=lambda rank: 2 if rank == 1 else 1):
        assert isinstance(error, DisagreementError)
        assert (error.what, error.ranks) == ("steps", (1,))
        assert error.by_rank == {0: "1", 1: "2", 2: "1"}


def test_a_rank_that_cannot_go_on_is_told_by_number() -> None:
    def work(group: Group) -> Exception | None:
        model = mlp()
        given: Any = "ddp" if group.rank else LOCAL
        try:
            postlocal.attach(model, sgd(model), given, process_group=group)
        except (TypeError, PostlocalError) as error:
            return error
        return None

    first, second = virtual.run(2, work)
    assert isinstance(second, TypeError)
    assert isinstance(first, DisagreementError)
    assert (first.ranks, first.by_rank) == ((1,), {1: f"TypeError: {second}"})


def test_values_that_differ_are_named_by_tensor_and_rank() -> None:
    def spoil(rank: int, step: int, model: nn.Module) -> None:
        if rank == 1 and step == 1:
            torch.nn.init.ones_(model.get_parameter("0.bias"))

    def work(group: Group) -> Exception | None:
        model = mlp()
        sync = postlocal.attach(model, sgd(model), LOCAL, process_group=group)
        for step in range(2):
            sync.step()
            spoil(group.rank, step, model)
        try:
            sync.finish()
        except PostlocalError as error:
            return error
        return None

    for error in virtual.run(2, work):
        assert isinstance(error, DisagreementError)
        assert (error.what, error.ranks, error.by_rank) == ("0.bias", (1,), {1: "0.bias"})


def test_a_model_that_changed_is_told_with_its_ranks() -> None:
    def spoil(rank: int, step: int, model: nn.Module) -> None:
        if rank == 1:
            model.append(nn.Linear(4, 4))  # type: ignore[operator]

    for error in raised(3, spoil):
        assert isinstance(error, ModelChangedError)
        assert error.ranks == (1,)
        assert str(error).endswith(" (rank 1)")


def test_replicas_that_are_all_lost_are_told_with_the_step() -> None:
    def spoil(rank: int, step: int, model: nn.Module) -> None:
        torch.nn.init.constant_(model.get_parameter("0.weight"), math.nan)

    for error in raised(2, spoil):
        assert isinstance(error, NonFiniteError)
        assert (error.ranks, error.step) == ((0, 1), 2)


def test_a_checkpoint_that_is_not_there_is_told_with_its_folder(
    alone: None, tmp_path: Path
) -> None:
    model = mlp()
    sync = postlocal.attach(model, sgd(model), LOCAL)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.restore(tmp_path / "none", sync, missing="raise")
    assert caught.value.path == tmp_path / "none"
    taken = tmp_path / "step-00000000"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError) as caught:
        checkpoint.save(tmp_path, sync)
    assert (caught.value.path, caught.value.ranks) == (taken, (0,))


def leave(rank: int) -> tuple[tuple[int, ...], int | None, str]:
    model = mlp()
    sync = postlocal.attach(model, sgd(model), LOCAL, timeout=2.0)
    with pytest.raises(PeerError) as caught:
        for _ in range(4):
            sync.step()
            if rank == 1 and sync.steps == 3:
                raise PeerError("left", ranks=[rank], step=3)
    return caught.value.ranks, caught.value.step, str(caught.value)


def disagree_on_a_timeout(rank: int) -> str:
    with pytest.raises((ValueError, DisagreementError)) as caught:
        PeriodicModelAverager(2, timeout=math.inf if rank else 5.0)
    return str(caught.value)


def missing_and_endless(rank: int) -> Any:
    return disagree_on_a_timeout(rank), leave(rank)


def test_a_missing_rank_is_told_by_number_and_an_endless_timeout_is_refused_on_all(
    ranks: Ranks,
) -> None:
    (told, missing), (refused, _) = ranks(2, missing_and_endless)
    assert missing[:2] == ((1,), 4)
    assert missing[2].startswith("missing at the synchronization after step 4: rank 1")
    assert refused == "timeout must be a finite number above 0 seconds, got inf"
    assert told == f"another rank cannot go on: ValueError: {refused} (rank 1)"


def test_a_worker_that_leaves_is_told_by_number() -> None:
    def work(group: Group) -> tuple[int, ...]:
        if group.rank == 1:
            return ()
        with pytest.raises(PeerError) as caught:
            group.all_gather_object(0)
        return caught.value.ranks

    assert virtual.run(3, work, timeout=0.5) == [(1,), (), (1,)]


@pytest.mark.parametrize("timeout", [math.inf, 1e8, math.nan, 0])
def test_a_timeout_without_end_is_refused_by_virtual_workers(timeout: float) -> None:
    with pytest.raises(ValueError, match="timeout must be"):
        virtual.run(2, lambda group: None, timeout)


@pytest.mark.parametrize(
    "error",
    [
        PostlocalError("said", ranks=[1]),
        DisagreementError("said", what="steps", by_rank={0: "1", 1: "2"}, ranks=[1]),
        ModelChangedError("said", ranks=[1]),
        PeerError("said", ranks=[1], step=3),
        NonFiniteError("said", ranks=[0, 1], step=3),
        CheckpointError("said", path=Path("run"), ranks=[1]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_travel_between_processes_with_what_they_carry(error: PostlocalError) -> None:
    twin = pickle.loads(pickle.dumps(error))
    assert type(twin) is type(error)
    assert (str(twin), vars(twin)) == ("said", vars(error))
    assert type(error).__name__ in str(tree)
