"""Where checkpoints are looked for and written, by one rank and by several."""

import errno
import json
import os
import shutil
import stat
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystem

import postlocal
from postlocal import CheckpointError, PeerError, PostlocalError, checkpoint, strategies
from postlocal.checkpoint import folder as folders
from tests.models import batches, equal, mlp, sgd, train_step

Ranks = Callable[..., list[Any]]


def trained(rank: int = 0, steps: int = 3, seed: int = 0, period: int = 4) -> postlocal.Sync:
    model = mlp(seed)
    sync = postlocal.attach(model, sgd(model), strategies.local_sgd(period), timeout=20)
    go_on(sync, rank, steps)
    return sync


def go_on(sync: postlocal.Sync, rank: int, steps: int) -> None:
    for x, y in batches(rank, steps):
        train_step(model_of(sync), sync.inner.optimizer, x, y)
        sync.step()


def model_of(sync: postlocal.Sync) -> Any:
    """A function of the parameters that the clock's optimizer trains."""
    first, bias, second, last = sync.replica.parameters.values()
    return lambda x: torch.tanh(x @ first.t() + bias) @ second.t() + last


def parameters(sync: postlocal.Sync) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in sync.replica.parameters.values()]


def save_steps(folder: Path, *steps: int) -> postlocal.Sync:
    """Checkpoints at these steps, all of one run."""
    sync = trained(steps=0)
    for step in steps:
        go_on(sync, 0, step - sync.steps)
        checkpoint.save(folder, sync, {"step": step}, keep=10)
    return sync


def test_one_of_several_is_chosen_by_its_step_or_by_its_path(tmp_path: Path) -> None:
    save_steps(tmp_path, 2, 3, 5)
    sync = trained(steps=0, seed=1)
    for chosen, arguments in (
        (5, {"folder": tmp_path}),
        (3, {"folder": tmp_path, "step": 3}),
        (2, {"folder": tmp_path / "step-00000002"}),
        (3, {"folder": str(tmp_path / "step-00000003"), "step": 3}),
    ):
        restored = checkpoint.restore(sync=sync, **arguments)
        assert restored is not None
        assert (restored.step, restored.extra["step"], sync.steps) == (chosen,) * 3
    with pytest.raises(ValueError, match="step must be the one of the checkpoint"):
        checkpoint.restore(tmp_path / "step-00000003", sync, step=2)


def test_one_that_is_asked_for_and_not_there_is_refused_with_those_that_are(
    tmp_path: Path,
) -> None:
    save_steps(tmp_path, 2, 3)
    sync = trained(steps=0)
    there = "of step 4 in .*: step-00000002, step-00000003$"
    with pytest.raises(CheckpointError, match=there):
        checkpoint.restore(tmp_path, sync, step=4)
    with pytest.raises(CheckpointError, match=there):
        checkpoint.restore(tmp_path / "step-00000004", sync)
    with pytest.raises(CheckpointError, match="there is none at all"):
        checkpoint.restore(tmp_path / "nowhere" / "step-00000004", sync)


def damage(path: Path) -> None:
    (path / "rank-00000.json").write_text("{")


def test_a_damaged_one_that_is_asked_for_is_not_replaced_by_another(tmp_path: Path) -> None:
    save_steps(tmp_path, 2, 3)
    damage(tmp_path / "step-00000003")
    sync = trained(steps=0)
    with (
        pytest.warns(UserWarning, match=r"rank-00000.json is damaged"),
        pytest.raises(CheckpointError, match=r"rank-00000.json is damaged"),
    ):
        checkpoint.restore(tmp_path, sync, step=3)
    assert sync.steps == 0


def test_where_all_are_damaged_training_does_not_start_anew(tmp_path: Path) -> None:
    save_steps(tmp_path, 2, 3)
    damage(tmp_path / "step-00000002")
    damage(tmp_path / "step-00000003")
    with (
        pytest.warns(UserWarning, match="skipped checkpoint"),
        pytest.raises(CheckpointError, match=r"can be loaded: .*step-00000003: .*step-00000002: "),
    ):
        checkpoint.restore(tmp_path, trained(steps=0))


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_where_nothing_is_training_starts_anew_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    (tmp_path / "empty" / "lost+found").mkdir(parents=True)
    (tmp_path / "empty" / ".hidden").touch()
    state = {"missing": "does not exist", "empty": "is empty"}[name]
    sync = trained(steps=0)
    assert checkpoint.restore(tmp_path / name, sync) is None
    message = f"no checkpoint in {tmp_path / name}, which {state}: training starts at step 0"
    assert message in caplog.text
    with pytest.raises(CheckpointError, match=f"no checkpoint in .*{name}, which {state}"):
        checkpoint.restore(tmp_path / name, sync, missing="raise")


def test_a_folder_that_holds_other_things_is_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    save_steps(tmp_path / "checkpoints", 2)
    (tmp_path / "metrics.jsonl").touch()
    sync = trained(steps=0)
    with pytest.raises(CheckpointError, match=r"which holds checkpoints, metrics.jsonl: give"):
        checkpoint.restore(tmp_path, sync)
    with pytest.raises(CheckpointError, match=r"which holds __0_0.distcp: give"):
        checkpoint.restore(tmp_path / "checkpoints" / "step-00000002" / "tensors", sync)
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError, match="file is a file"):
            checkpoint.restore(path, sync)


def test_arguments_out_of_their_range_are_refused(tmp_path: Path) -> None:
    sync = trained(steps=0)
    for keep in (0, 1.5, "3", True):
        with pytest.raises(ValueError, match="keep must be at least 1 checkpoint, a whole number"):
            checkpoint.save(tmp_path, sync, keep=keep)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layout must be one of"):
        checkpoint.save(tmp_path, sync, layout="private")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="missing must be one of"):
        checkpoint.restore(tmp_path, sync, missing="fail")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="on_strategy_change must be one of"):
        checkpoint.restore(tmp_path, sync, on_strategy_change="new")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_an_older_format_is_refused_and_not_skipped(tmp_path: Path) -> None:
    save_steps(tmp_path, 2, 3)
    path = tmp_path / "step-00000003" / "checkpoint.json"
    index = json.loads(path.read_text()) | {"format": 1, "versions": {"postlocal": "0.1"}}
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"its format is 1, of postlocal 0.1; this version"):
        checkpoint.restore(tmp_path, trained(steps=0))


@pytest.mark.parametrize("index", ["[]", "3", '{"format": 3}'])
def test_an_index_of_something_else_is_damaged_and_the_one_before_is_loaded(
    tmp_path: Path, index: str
) -> None:
    save_steps(tmp_path, 2, 3)
    (tmp_path / "step-00000003" / "checkpoint.json").write_text(index)
    with pytest.warns(UserWarning, match="step-00000003: checkpoint.json is damaged"):
        found = checkpoint.restore(tmp_path, trained(steps=0))
    assert found is not None
    assert found.step == 2


def test_what_others_put_beside_checkpoints_stays(tmp_path: Path) -> None:
    (tmp_path / "step-by-step.txt").touch()
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "step-00000001" / "mine").touch()
    sync = trained()
    for _ in range(3):
        go_on(sync, 0, 1)
        checkpoint.save(tmp_path, sync, keep=1)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"step-by-step.txt", "step-00000001", "step-00000006"}
    (tmp_path / "step-00000007").mkdir()
    (tmp_path / "step-00000007" / "mine").touch()
    go_on(sync, 0, 1)
    with pytest.raises(CheckpointError, match="step-00000007 exists and is no checkpoint"):
        checkpoint.save(tmp_path, sync)


def test_training_that_went_back_sets_later_checkpoints_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_steps(tmp_path, 2, 4, 6)
    sync = trained(steps=0)
    checkpoint.restore(tmp_path, sync, step=2)
    go_on(sync, 0, 1)
    checkpoint.save(tmp_path, sync, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000003", "superseded-step-00000004", "superseded-step-00000006",
    ]  # fmt: skip
    assert "renamed to superseded-step-00000006" in caplog.text
    restored = checkpoint.restore(tmp_path, trained(steps=0))
    assert restored is not None
    assert restored.step == 3


def test_saving_works_before_any_step_twice_and_after_the_folder_was_deleted(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "checkpoints"
    sync = trained(steps=0)
    assert checkpoint.save(folder, sync).name == "step-00000000"
    checkpoint.save(folder, sync, {"time": 2})
    shutil.rmtree(folder)
    checkpoint.save(folder, sync, {"time": 3})
    damage(folder / "step-00000000")
    checkpoint.save(folder, sync, {"time": 4})
    assert [path.name for path in folder.iterdir()] == ["step-00000000"]
    for _ in range(2):
        restored = checkpoint.restore(folder, sync)
        assert restored is not None
        assert (restored.step, restored.extra["time"]) == (0, 4)


def test_all_files_have_the_mode_that_the_umask_gives(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        checkpoint.save(tmp_path, trained())
    finally:
        os.umask(before)
    modes = {(path.is_dir(), stat.S_IMODE(path.stat().st_mode)) for path in tmp_path.rglob("*")}
    assert modes == {(True, 0o750), (False, 0o640)}


def words_of(call: Callable[[], object]) -> tuple[str, float]:
    """The message of an error, and the seconds until it came."""
    start = time.monotonic()
    with pytest.raises(PostlocalError) as error:
        call()
    return f"{type(error.value).__name__}: {error.value}", time.monotonic() - start


@mock.patch.object(folders, "_SEEN_SECONDS", 0.5)
def apart(rank: int, folder: Path) -> dict[str, Any]:
    """A folder for each rank, or none for one of them."""
    sync = trained(rank)
    own = folder / f"host{rank}"
    found: dict[str, Any] = {"save": words_of(lambda: checkpoint.save(own, sync))}
    found["left"] = [str(path) for path in own.rglob("*")] if own.exists() else []

    below_a_file = (folder / "file" / "x") if rank == 1 else folder / "shared"
    found["file"] = words_of(lambda: checkpoint.save(below_a_file, sync, layout="per-rank"))

    checkpoint.save(folder / "shared", sync)
    seen_by_one = folder / "shared" if rank == 0 else folder / "elsewhere"
    found["restore"] = words_of(lambda: checkpoint.restore(seen_by_one, sync))
    sync.close()
    return found


def test_a_folder_that_ranks_do_not_share_is_found_at_once_and_by_all(
    ranks: Ranks, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for found in ranks(2, apart, tmp_path):
        words, seconds = found["save"]
        assert "CheckpointError: folder " in words
        assert "is not there for rank 1; give one on a file system that they share" in words
        assert seconds < 15
        assert found["left"] == []
        words, _ = found["file"]
        assert "cannot write checkpoint" in words
        assert "NotADirectoryError" in words
        assert words.endswith("(rank 1)")
        words, seconds = found["restore"]
        assert "ranks see different folders" in words
        assert "step-00000003 not there (rank 1)" in words
        assert seconds < 15


def one_rank_cannot_write(rank: int, folder: Path) -> list[str]:
    """Its disk is full: for a rank's state, then for its tensors."""
    sync = trained(rank)
    full = OSError(errno.ENOSPC, "No space left on device")
    places = ((Path, "open"), (FileSystem, "create_stream"))
    found = []
    for owner, method in places:
        spoiled = mock.patch.object(owner, method, side_effect=full)
        with spoiled if rank == 1 else nullcontext():
            found.append(words_of(lambda: checkpoint.save(folder, sync, {"rank": rank}))[0])
    checkpoint.save(folder, sync)
    sync.close()
    return found


def test_a_rank_that_cannot_write_is_named_on_all(ranks: Ranks, tmp_path: Path) -> None:
    for found in ranks(2, one_rank_cannot_write, tmp_path):
        for words in found:
            assert "cannot write checkpoint" in words
            assert words.endswith("OSError: [Errno 28] No space left on device (rank 1)")
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def one_rank_only(rank: int, folder: Path, function: str) -> tuple[str, float]:
    sync = trained(rank, steps=1, period=3)
    if rank == 1:
        try:
            go_on(sync, rank, 4)
        except PeerError as error:
            return str(error), 0.0
    call = {"save": lambda: checkpoint.save(folder, sync)}
    call["restore"] = lambda: checkpoint.restore(folder, sync)  # type: ignore[assignment,return-value]
    return words_of(call[function])


@pytest.mark.parametrize("function", ["save", "restore"])
def test_a_call_on_one_rank_only_is_found_when_the_others_went_on(
    ranks: Ranks, tmp_path: Path, function: str
) -> None:
    (words, seconds), (others, _) = ranks(2, one_rank_only, tmp_path, function, leaving=(0,))
    place = {"save": "the checkpoint after step 1", "restore": "restore after step 1"}[function]
    assert f"PeerError: missing at {place}: rank 1 (last seen at the synchronization" in words
    assert f"checkpoint.{function} is collective, call it on every rank" in words
    assert seconds < 10
    assert "the synchronization after step 3" in others
    assert f"rank 0 (last seen at {place})" in others


def at_different_steps(rank: int, folder: Path) -> tuple[str, float]:
    sync = trained(rank, steps=1 + rank)
    return words_of(lambda: checkpoint.save(folder, sync))


def test_ranks_that_save_at_different_steps_do_not_wait_for_each_other(
    ranks: Ranks, tmp_path: Path
) -> None:
    (words, seconds), (others, more) = ranks(2, at_different_steps, tmp_path)
    assert "missing at the checkpoint after step 1: rank 1 (last seen at the checkpoint" in words
    assert "missing at the checkpoint after step 2: rank 0 (last seen at the checkpoint" in others
    assert max(seconds, more) < 10


def never(rank: int, folder: Path) -> tuple[str, float]:
    model = mlp()
    sync = postlocal.attach(model, sgd(model), strategies.local_sgd(4), timeout=2)
    if rank == 1:
        return "", 0.0
    return words_of(lambda: checkpoint.save(folder, sync))


def test_a_rank_that_never_comes_is_waited_for_as_long_as_attach_was_told(
    ranks: Ranks, tmp_path: Path
) -> None:
    (words, seconds), _ = ranks(2, never, tmp_path)
    assert "missing at the checkpoint after step 0: rank 1 (last seen at attach)" in words
    assert 2 <= seconds < 8


def save_apart(rank: int, folder: Path, private: bool) -> list[torch.Tensor]:
    sync = trained(rank)
    own = folder / f"host{rank}" if private else folder
    path = checkpoint.save(own, sync, {"rank": rank}, layout="per-rank")
    assert path == own / f"rank-{rank:05d}" / "step-00000003"
    saved = parameters(sync)
    go_on(sync, rank, 2)
    checkpoint.save(own, sync, {"rank": rank}, keep=1, layout="per-rank")
    assert not path.exists()
    checkpoint.save(own, sync, layout="per-rank")
    sync.close()
    return saved if private else parameters(sync)


def restore_apart(rank: int, folder: Path, private: bool) -> Any:
    sync = trained(rank, steps=0, seed=9)
    restored = checkpoint.restore(folder / f"host{rank}" if private else folder, sync)
    assert restored is not None
    sync.close()
    return restored, parameters(sync)


def test_each_rank_can_have_a_folder_of_its_own(ranks: Ranks, tmp_path: Path) -> None:
    saved = ranks(2, save_apart, tmp_path, False)
    for rank, (restored, loaded) in enumerate(ranks(2, restore_apart, tmp_path, False)):
        assert restored.path == tmp_path / f"rank-{rank:05d}" / "step-00000005"
        assert (restored.step, restored.world) == (5, 2)
        assert equal(loaded, saved[rank])
    # Seen by one process, all parts make what any number of ranks can go on from.
    _, mean = ranks(1, restore_apart, tmp_path, False)[0]
    assert all(
        torch.allclose(m, (a + b) / 2, atol=1e-7) for m, a, b in zip(mean, *saved, strict=True)
    )


def three_steps_apart(rank: int, folder: Path) -> None:
    sync = trained(rank)
    for step in (3, 4, 5):
        checkpoint.save(folder / f"host{rank}", sync, {"step": step}, layout="per-rank")
        go_on(sync, rank, 1)
    sync.close()


def resume_apart(rank: int, folder: Path) -> tuple[int, int, str]:
    sync = trained(rank, steps=0, seed=9)
    own = folder / f"host{rank}"
    restored = checkpoint.restore(own, sync)
    chosen = checkpoint.restore(own / f"rank-{rank:05d}" / "step-00000003", sync)
    assert restored is not None
    assert chosen is not None
    words = words_of(lambda: checkpoint.restore(own, sync, step=5))[0]
    sync.close()
    return restored.step, chosen.step, words


def resume_refused(rank: int, folder: Path) -> str:
    sync = trained(rank, steps=0)
    own = folder / (f"host{rank}" if sync.groups["world"].size == 2 else "host0")
    words = words_of(lambda: checkpoint.restore(own, sync))[0]
    sync.close()
    return words


def test_ranks_with_folders_of_their_own_resume_from_the_newest_that_all_have(
    ranks: Ranks, tmp_path: Path
) -> None:
    ranks(2, three_steps_apart, tmp_path)
    shutil.rmtree(tmp_path / "host1" / "rank-00001" / "step-00000005")
    for step, chosen, words in ranks(2, resume_apart, tmp_path):
        assert (step, chosen) == (4, 3)
        assert "no checkpoint of step 5" in words
    for words in ranks(3, resume_refused, tmp_path):
        assert "it was saved by 2 ranks, each for itself: to resume on 3, copy all" in words
    other = tmp_path / "host1" / "rank-00001" / "step-00000004" / "checkpoint.json"
    other.write_text(json.dumps(json.loads(other.read_text()) | {"id": "of another run"}))
    for words in ranks(2, resume_refused, tmp_path):
        assert "step-00000004: ranks see different ones of this step: that of rank 1 was" in words


def test_the_folder_of_one_ranks_own_checkpoints_is_recognised(
    ranks: Ranks, tmp_path: Path
) -> None:
    ranks(2, three_steps_apart, tmp_path)
    with pytest.raises(CheckpointError, match="layout 'per-rank' and is not in the place"):
        checkpoint.restore(tmp_path / "host0" / "rank-00000", trained(steps=0))


def ranks_that_differ(rank: int, folder: Path) -> list[str]:
    sync = trained(rank)
    found = [
        words_of(lambda: checkpoint.save(folder, sync, keep=1 + rank))[0],
        words_of(lambda: checkpoint.restore(folder, sync, step=rank))[0],
    ]
    if rank == 1:
        found.append("")
        with pytest.raises(ValueError, match="keep must be"):
            checkpoint.save(folder, sync, keep=0)
    else:
        found.append(words_of(lambda: checkpoint.save(folder, sync))[0])
    sync.close()
    return found


def test_arguments_of_one_rank_only_are_an_error_on_all(ranks: Ranks, tmp_path: Path) -> None:
    first, second = ranks(2, ranks_that_differ, tmp_path)
    for keep, step in ((first[0], first[1]), (second[0], second[1])):
        assert "ranks differ in keep: rank 0 has '1', rank 1 has '2'" in keep
        assert "ranks differ in step of the checkpoint: rank 0 has '0', rank 1 has '1'" in step
    assert "another rank cannot go on: ValueError: keep must be at least 1 checkpoint" in first[2]
    assert list(tmp_path.iterdir()) == []
