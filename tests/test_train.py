"""The trainer's parts: data, model, settings, stopping and report."""

import json
import math
import os
import signal
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from postlocal import DisagreementError, wire
from postlocal.meter import SyncRecord
from postlocal.report import Metrics, Summary
from postlocal.strategies import streaming_diloco
from postlocal.train import make_config, train
from postlocal.train.data import Corpus, Share, Windows, find_files
from postlocal.train.model import SIZES, Transformer
from postlocal.train.plots import plot
from postlocal.train.run import WEIGHTS, save_weights
from postlocal.train.sample import sample
from postlocal.train.stop import Stop
from tests.launcher import free_port

Ranks = Callable[..., list[Any]]


def write(folder: Path, *texts: bytes) -> list[Path]:
    files = [folder / f"{index}.txt" for index in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        file.write_bytes(text)
    return files


def test_a_corpus_reads_across_files_and_skips_empty_ones(tmp_path: Path) -> None:
    corpus = Corpus(write(tmp_path, b"abc", b"", b"defg", b"h"))
    assert len(corpus) == 8
    for start in range(8):
        for length in range(1, 8 - start):
            assert bytes(corpus.read(start, length)) == b"abcdefgh"[start : start + length]


def test_the_default_data_is_the_standard_library() -> None:
    names = {file.name for file in find_files([])}
    assert {"argparse.py", "zipfile.py"} & names
    assert len(Corpus(find_files([]))) > 3_000_000


def test_data_takes_files_folders_and_globs(tmp_path: Path) -> None:
    files = write(tmp_path, b"a", b"b")
    nested = tmp_path / "below" / "c.md"
    nested.parent.mkdir()
    nested.write_bytes(b"c")
    assert find_files([str(files[0])]) == [files[0]]
    assert find_files([str(tmp_path)]) == [*files, nested]
    assert find_files([str(tmp_path / "*.txt")]) == files
    with pytest.raises(ValueError, match=r"data must be .* that exist, got '.*nowhere'"):
        find_files([str(tmp_path / "nowhere")])


def test_targets_are_inputs_one_byte_on(tmp_path: Path) -> None:
    windows = Windows(Corpus(write(tmp_path, bytes(range(256)) * 4)), 8)
    inputs, targets = windows.batch(np.array([0, 5]))
    assert inputs.shape == targets.shape == (2, 8)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert inputs[1, 0] == 40


@settings(deadline=None, max_examples=25)
@given(size=st.integers(400, 20_000), world=st.integers(1, 5), batch_size=st.integers(1, 4))
def test_shares_cover_the_training_windows_once_an_epoch(
    tmp_path_factory: pytest.TempPathFactory, size: int, world: int, batch_size: int
) -> None:
    folder = tmp_path_factory.mktemp("corpus")
    windows = Windows(Corpus(write(folder, bytes(size))), 8)
    assert not set(windows.training) & set(windows.held_out)
    assert len(windows.training) + len(windows.held_out) == (size - 1) // 8
    shares = [Share(windows, rank, world, batch_size, seed=3) for rank in range(world)]
    seen = [share._window(position) for share in shares for position in range(len(share._own))]
    assert sorted(seen) == sorted(windows.training)


def test_a_batch_depends_on_seed_rank_and_step_alone(tmp_path: Path) -> None:
    text = np.random.default_rng(0).integers(0, 256, 9_000, dtype=np.uint8).tobytes()
    windows = Windows(Corpus(write(tmp_path, text)), 16)
    whole = Share(windows, 1, 2, 4, seed=5)
    batches = [whole.batch(step)[0] for step in range(200)]
    resumed = Share(windows, 1, 2, 4, seed=5)
    for step in (130, 7, 199):
        assert torch.equal(resumed.batch(step)[0], batches[step])
    assert not torch.equal(Share(windows, 1, 2, 4, seed=6).batch(0)[0], batches[0])


def test_too_little_data_is_said_with_the_numbers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 20 sequences of 8 bytes, got 100 bytes"):
        Windows(Corpus(write(tmp_path, bytes(100))), 8)
    windows = Windows(Corpus(write(tmp_path, bytes(400))), 8)
    with pytest.raises(ValueError, match="for 4 workers are fewer than batch size 16 each"):
        Share(windows, 0, 4, 16, seed=0)
    with pytest.raises(ValueError, match="data must hold text, got 1 empty files"):
        Corpus(write(tmp_path, b""))


@pytest.mark.parametrize(("name", "millions"), [("tiny", 0.9), ("small", 3.3), ("base", 25)])
def test_presets_have_about_the_documented_number_of_parameters(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = Transformer(SIZES[name])
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count / 1e6 == pytest.approx(millions, rel=0.06)


def test_the_model_looks_back_only_and_at_where_things_are() -> None:
    torch.manual_seed(0)
    model = Transformer(SIZES["tiny"])
    tokens = torch.randint(0, 256, (1, 12))
    changed = tokens.clone()
    changed[0, 8:] += 1
    before, after = model(tokens), model(changed % 256)
    assert torch.allclose(before[0, :8], after[0, :8], atol=1e-6)
    assert not torch.allclose(before[0, 8:], after[0, 8:], atol=1e-3)
    swapped = tokens[:, [1, 0, *range(2, 12)]]
    assert not torch.allclose(model(swapped)[0, -1], before[0, -1], atol=1e-6)


def test_sampling_is_deterministic_in_the_seed() -> None:
    torch.manual_seed(0)
    model = Transformer(SIZES["tiny"]).eval()
    first = sample(model, 16, "def ", 20, 1.0, seed=1)
    assert first == sample(model, 16, "def ", 20, 1.0, seed=1)
    assert first != sample(model, 16, "def ", 20, 1.0, seed=2)
    assert first.startswith("def ")
    assert sample(model, 16, "def ", 5, 0.0, 1) == sample(model, 16, "def ", 5, 0.0, 2)
    with pytest.raises(ValueError, match="prompt must not be empty"):
        sample(model, 16, "", 5, 1.0, 0)
    with pytest.raises(ValueError, match="must be at least 0, got -1"):
        sample(model, 16, "x", -1, 1.0, 0)


def test_the_learning_rate_rises_and_falls() -> None:
    config = make_config(steps=100, lr=1.0, lr_warmup=10)
    rates = [config.lr_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[9] == pytest.approx(1.0)
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(0.05, abs=0.001)


def test_strategies_get_defaults_that_suit_the_run() -> None:
    assert make_config(steps=100).make_strategy().schedule.warmup == 30  # type: ignore[attr-defined]
    config = make_config(steps=100, strategy="qsr", parameters={"alpha": 0.01})
    assert config.make_strategy().schedule.total == 100  # type: ignore[attr-defined]


def test_a_wire_is_the_one_named_or_the_strategys_own_or_bf16() -> None:
    assert make_config(strategy="diloco").make_strategy().wire == wire.bf16()
    assert make_config(strategy="diloco", wire="int4").make_strategy().wire == wire.named("int4")
    streaming = make_config(strategy="streaming_diloco")
    assert streaming.make_strategy().wire == streaming_diloco().wire
    assert streaming.make_strategy().gradient_wire == wire.bf16()


BAD_SETTINGS = [
    ({"steps": 0}, "steps must be greater than or equal to 1, got 0"),
    ({"lr": math.nan}, "lr must be .*, got nan"),
    ({"model": "huge"}, "model must be one of tiny, small, base, got 'huge'"),
    ({"batch_size": 8, "accumulate": 3}, "accumulate must divide the batch size 8, got 3"),
    ({"strategy": "sgd"}, "strategy must be one of ddp, .*, got 'sgd'"),
    ({"compare": "sgd"}, "strategy must be one of ddp, .*, got 'sgd'"),
    ({"parameters": {"period": 0}}, "period must be at least 1 step, got 0"),
    ({"parameters": {"alpha": 1.0}}, "alpha is not a parameter of post_local_sgd, which takes"),
    ({"strategy": "qsr"}, "qsr needs the parameter alpha"),
    ({"wire": "int3"}, "wire must be one of fp32, .*, got 'int3'"),
    ({"gradient_wire": "int3"}, "wire must be one of fp32, .*, got 'int3'"),
    ({"colour": 1}, "colour must be .*"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_SETTINGS)
def test_a_bad_setting_is_named_in_one_line(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make_config(**bad)
    assert "\n" not in str(error.value)


def stop_at(rank: int, victim: int, step_seconds: float) -> int:
    """Count steps until told to stop; one rank is signalled on its way."""
    import torch.distributed as dist

    from postlocal.train.world import store

    with Stop(rank, dist.get_world_size(), store(), interval=0.05) as stop:
        for steps in range(1, 1000):
            time.sleep(step_seconds * (1 + rank))
            if steps == 5 and rank == victim:
                os.kill(os.getpid(), signal.SIGTERM)
            if stop.due(steps):
                assert stop.signal == signal.SIGTERM
                return steps
    raise AssertionError("never stopped")


@pytest.mark.parametrize("victim", [0, 2])
def test_a_signal_to_any_rank_stops_all_at_one_step(ranks: Ranks, victim: int) -> None:
    steps = ranks(3, stop_at, victim, 0.02)
    assert len(set(steps)) == 1
    assert steps[0] >= 5


def test_a_signal_to_a_rank_alone_stops_it_at_the_next_step() -> None:
    with Stop(0, 1, None, interval=0.01) as stop:
        assert not stop.due(1)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        assert not stop.due(2) or stop.due(3)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def config_of(folder: Path, **changes: Any) -> Any:
    defaults = {
        "data": (str(folder / "0.txt"),),
        "steps": 12,
        "batch_size": 2,
        "sequence_length": 16,
        "eval_sequences": 8,
        "out": folder / "out",
        "checkpoint_every": 5,
    }
    return make_config(**defaults | changes)


def test_one_process_alone_trains_too_and_accumulation_does_not_change_it(tmp_path: Path) -> None:
    write(tmp_path, bytes(range(256)) * 20)
    losses = []
    for accumulate in (1, 2):
        config = config_of(
            tmp_path,
            strategy="diloco",
            parameters={"period": 4},
            accumulate=accumulate,
            out=tmp_path / str(accumulate),
        )
        summary = train(config)
        assert (summary.workers, summary.payload_bytes) == (1, 0)
        losses.append(summary.final_val_loss)
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    assert losses[0] < math.log(256)


def test_a_run_that_replaces_an_earlier_one_keeps_what_it_compares_with(tmp_path: Path) -> None:
    write(tmp_path, bytes(range(256)) * 20)
    config = config_of(tmp_path, strategy="local_sgd", compare="ddp", overwrite=True)
    for _ in range(2):
        train(config)
        assert Summary.read(tmp_path / "out").strategy == "local_sgd"
        assert Summary.read(tmp_path / "out" / "compare" / "ddp").strategy == "ddp"
    with pytest.raises(ValueError, match="out must not hold an earlier run"):
        train(config.model_copy(update={"overwrite": False}))


def test_weights_have_the_mode_that_the_umask_gives(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_weights(nn.Linear(2, 1), config_of(tmp_path), tmp_path / WEIGHTS)
    finally:
        os.umask(before)
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS]
    assert (tmp_path / WEIGHTS).stat().st_mode & 0o777 == 0o640


def train_differently(rank: int, folder: Path, port: int) -> str:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with pytest.raises(DisagreementError) as error:
        train(config_of(folder, steps=12 + rank))
    return str(error.value)


def test_ranks_with_different_arguments_are_told_so(ranks: Ranks, tmp_path: Path) -> None:
    write(tmp_path, bytes(range(256)) * 20)
    expected = "ranks differ in arguments: rank 0 has 'steps: 12', rank 1 has 'steps: 13'"
    assert ranks(2, train_differently, tmp_path, free_port(), join=False) == [expected] * 2


def test_metrics_drop_what_an_interrupted_run_logged_after_its_checkpoint(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path)
    metrics.start(0)
    for step in (10, 20, 30):
        metrics.add("step", step, loss=1.0)
    metrics.add_sync(SyncRecord(30, "world"))
    with metrics.path.open("a") as file:
        file.write('{"kind": "st')
    metrics.start(20)
    assert [entry["step"] for entry in metrics.read()] == [10, 20]
    metrics.start(0)
    assert metrics.read() == []


def test_a_sync_without_drift_is_still_json(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path)
    metrics.add_sync(SyncRecord(4, "world"))
    (entry,) = metrics.read()
    assert entry["drift"] is None
    json.dumps(entry, allow_nan=False)


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path)
    for step in (10, 20):
        metrics.add("step", step, loss=3.0, train_seconds=step, payload_bytes=step * 1000)
        metrics.add("eval", step, val_loss=3.0, train_seconds=step, payload_bytes=step * 1000)
    plot({"ddp": tmp_path}, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
