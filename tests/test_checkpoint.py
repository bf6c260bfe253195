"""Checkpoints: exact where the number of ranks is the same, clear where something is wrong."""

import os
import pickle
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import postlocal
from postlocal import CheckpointError, Strategy, checkpoint, schedule, strategies, wire
from postlocal.checkpoint.packing import pack
from tests.models import OPTIMIZERS, batches, convnet, distance, equal, mlp, train_step, values

Ranks = Callable[..., list[Any]]

STRATEGIES = {
    "ddp": strategies.ddp(),
    "post_local": strategies.post_local_sgd(3, 4, gradients="rank"),
    "diloco": strategies.diloco(4),
    "slowmo over bf16": replace(strategies.slowmo(4), wire=wire.bf16()),
    "streaming over fp4": replace(
        strategies.streaming_diloco(4, fragments=2, delay=3),
        wire=wire.fp4(),
    ),
    "edit": strategies.edit(4),
    "averaged state": replace(strategies.local_sgd(4), optimizer_state="average"),
}


def run(
    rank: int,
    strategy: Strategy,
    folder: Path,
    until: int,
    save_at: int | None = None,
    die_at: int | None = None,
    make_model: Callable[[], nn.Module] = mlp,
    shape: tuple[int, ...] = (8,),
) -> tuple[list[Tensor], Any, Any, Any]:
    """Resume if there is something to resume from; parameters, inner and outer state, extra."""
    model = DistributedDataParallel(make_model())
    optimizer = OPTIMIZERS["adamw"](model)
    sync = postlocal.attach(model, optimizer, strategy)
    restored = checkpoint.restore(folder, sync)
    for step, (x, y) in enumerate(batches(rank, until, shape)):
        if step < sync.steps:
            continue
        train_step(model, optimizer, x, y)
        sync.step()
        if sync.steps == save_at:
            checkpoint.save(folder, sync, {"rank": rank, "noise": torch.ones(2) * rank})
        if sync.steps == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
    sync.close()
    state = [tensor.clone() for _, _, tensor in sync.inner._state()]
    anchor = sync.state_dict()["fragments"][0]["anchor"]
    return [*values(model), *model.buffers()], state, anchor, restored


@pytest.mark.parametrize("name", STRATEGIES)
def test_killed_in_the_middle_of_a_round_and_resumed_is_bit_exact(
    ranks: Ranks, tmp_path: Path, name: str
) -> None:
    strategy = STRATEGIES[name]
    whole = ranks(2, run, strategy, tmp_path / "none", 16)
    ranks(2, run, strategy, tmp_path, 16, 9, 10, expect_dead=(0, 1))
    resumed = ranks(2, run, strategy, tmp_path, 16)
    for rank in range(2):
        parameters, state, anchor, restored = resumed[rank]
        assert restored.step == 9
        assert restored.extra["rank"] == rank
        assert equal(restored.extra["noise"][None], torch.ones(1, 2) * rank)  # type: ignore[arg-type]
        assert equal(parameters, whole[rank][0])
        assert equal(state, whole[rank][1])
        assert (anchor is None) == (whole[rank][2] is None)
        if anchor is not None:
            assert equal(list(anchor["tensors"].values()), list(whole[rank][2]["tensors"].values()))
            assert pack(anchor["outer"])[0] == pack(whole[rank][2]["outer"])[0]


def test_saving_does_not_change_the_trajectory(ranks: Ranks, tmp_path: Path) -> None:
    strategy = strategies.diloco(4)
    whole = ranks(2, run, strategy, tmp_path / "none", 12)
    saving = ranks(2, run, strategy, tmp_path, 12, 6)
    assert equal(whole[1][0], saving[1][0])


def test_batch_norm_statistics_resume_too(ranks: Ranks, tmp_path: Path) -> None:
    strategy, model, shape = strategies.local_sgd(4), convnet, (1, 6, 6)
    whole = ranks(2, run, strategy, tmp_path / "none", 10, None, None, model, shape)
    ranks(2, run, strategy, tmp_path, 7, 7, None, model, shape)
    resumed = ranks(2, run, strategy, tmp_path, 10, None, None, model, shape)
    assert equal(whole[1][0], resumed[1][0])


def agreed_start(rank: int, strategy: Strategy, folder: Path) -> tuple[list[Tensor], int, bool]:
    model = mlp(seed=7)
    optimizer = OPTIMIZERS["adamw"](model)
    sync = postlocal.attach(model, optimizer, strategy)
    restored = checkpoint.restore(folder, sync)
    assert restored is not None
    return values(model), restored.world, sync.agreed


def test_on_another_number_of_ranks_it_starts_from_the_anchor(ranks: Ranks, tmp_path: Path) -> None:
    saved = ranks(2, run, strategies.diloco(4), tmp_path, 9, 9)
    started = ranks(3, agreed_start, strategies.diloco(4), tmp_path)
    for parameters, world, agreed in started:
        assert equal(parameters, list(saved[0][2]["tensors"].values()))
        assert (world, agreed) == (2, True)


def test_on_another_number_of_ranks_without_anchor_it_starts_from_the_mean(
    ranks: Ranks, tmp_path: Path
) -> None:
    saved = ranks(2, run, strategies.local_sgd(4), tmp_path, 9, 9)
    mean = [(a + b) / 2 for a, b in zip(saved[0][0], saved[1][0], strict=True)]
    ((alone, _, _),) = ranks(1, agreed_start, strategies.local_sgd(4), tmp_path)
    assert distance(alone, mean) < 1e-7


def solo(strategy: Strategy, seed: int = 0) -> tuple[nn.Module, postlocal.Sync]:
    model = mlp(seed)
    optimizer = OPTIMIZERS["adamw"](model)
    sync = postlocal.attach(model, optimizer, strategy)
    for x, y in batches(0, 3):
        train_step(model, optimizer, x, y)
        sync.step()
    return model, sync


def test_the_message_says_what_another_number_of_ranks_means(
    ranks: Ranks, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ranks(2, run, strategies.diloco(4), tmp_path, 9, 9)
    _, sync = solo(strategies.diloco(4))
    assert checkpoint.restore(tmp_path, sync) is not None
    assert "saved by 2 ranks and is resumed on 1" in caplog.text
    assert "the anchor" in caplog.text


def test_equal_replicas_are_stored_once(ranks: Ranks, tmp_path: Path) -> None:
    def size(folder: Path) -> int:
        return sum(file.stat().st_size for file in folder.rglob("*.distcp"))

    ranks(2, run, strategies.ddp(), tmp_path / "equal", 9, 9)
    ranks(2, run, strategies.local_sgd(4), tmp_path / "apart", 9, 9)
    assert size(tmp_path / "apart") > 1.5 * size(tmp_path / "equal")


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    model, sync = solo(strategies.diloco(4))
    for x, y in batches(0, 4):
        train_step(model, sync.inner.optimizer, x, y)
        sync.step()
        checkpoint.save(tmp_path, sync, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000006", "step-00000007"]


def two_checkpoints(folder: Path) -> tuple[list[Tensor], list[Tensor]]:
    """At steps 3 and 4; the parameters of both."""
    model, sync = solo(strategies.diloco(4))
    checkpoint.save(folder, sync)
    before = values(model)
    train_step(model, sync.inner.optimizer, *next(batches(0, 1)))
    sync.step()
    checkpoint.save(folder, sync)
    return before, values(model)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit_of(tensor: Tensor, folder: Path) -> None:
    (path,) = folder.rglob("*.distcp")
    content = bytearray(path.read_bytes())
    content[content.index(tensor.numpy().tobytes()) + 11] ^= 64
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path, Tensor], object]] = {
    "a flipped bit in a tensor": lambda folder, tensor: flip_a_bit_of(tensor, folder),
    "truncated tensors": lambda folder, _: truncate(next(folder.rglob("*.distcp"))),
    "missing tensors": lambda folder, _: shutil.rmtree(folder / "tensors"),
    "a flipped bit in a state": lambda folder, _: flip_a_bit(folder / "rank-00000.json"),
    "missing state": lambda folder, _: (folder / "rank-00000.json").unlink(),
    "missing index": lambda folder, _: (folder / "checkpoint.json").unlink(),
    "garbled index": lambda folder, _: (folder / "checkpoint.json").write_text("{"),
    "damaged index of tensors": lambda folder, _: truncate(folder / "tensors" / ".metadata"),
    "code in the index of tensors": lambda folder, _: (
        folder / "tensors" / ".metadata"
    ).write_bytes(pickle.dumps(os.getcwd)),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_skipped_and_the_one_before_loaded(
    tmp_path: Path, name: str
) -> None:
    before, after = two_checkpoints(tmp_path)
    DAMAGE[name](tmp_path / "step-00000004", after[0])
    model, sync = solo(strategies.diloco(4), seed=3)
    with pytest.warns(UserWarning, match="skipped checkpoint .*step-00000004"):
        restored = checkpoint.restore(tmp_path, sync)
    assert restored is not None
    assert restored.step == 3
    assert equal(values(model), before)


def test_an_unfinished_checkpoint_is_skipped_and_later_removed(tmp_path: Path) -> None:
    unfinished = tmp_path / ".step-00000009.partial"
    unfinished.mkdir()
    _, sync = solo(strategies.diloco(4))
    with pytest.warns(UserWarning, match="it is unfinished"):
        assert checkpoint.restore(tmp_path, sync) is None
    checkpoint.save(tmp_path, sync)
    assert not unfinished.exists()


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    two_checkpoints(tmp_path)
    model = nn.Linear(8, 4)
    sync = postlocal.attach(model, OPTIMIZERS["adamw"](model), strategies.diloco(4))
    with pytest.raises(CheckpointError, match="of another model: 'weight' is missing there"):
        checkpoint.restore(tmp_path, sync)


def test_a_checkpoint_of_another_strategy_is_refused(tmp_path: Path) -> None:
    two_checkpoints(tmp_path)
    _, sync = solo(Strategy(schedule.periodic(2)))
    with pytest.raises(
        CheckpointError, match=r"diloco\(period=4\) saved, Strategy\(schedule=periodic\(2\)\) here"
    ):
        checkpoint.restore(tmp_path, sync)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    _, sync = solo(strategies.diloco(4))
    with pytest.raises(CheckpointError, match=r"cannot write checkpoint .*file/step-00000003"):
        checkpoint.save(tmp_path / "file", sync)
    with pytest.raises(ValueError, match="keep must be at least 1"):
        checkpoint.save(tmp_path, sync, keep=0)
