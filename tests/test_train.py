"""The trainer's parts: data, model, settings, stopping and report."""

import io
import json
import math
import os
import re
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
from rich.console import Console
from torch import nn

from postlocal import DisagreementError, schedule, strategies, wire
from postlocal.expressions import ExpressionError
from postlocal.meter import SyncRecord
from postlocal.strategies import streaming_diloco
from postlocal.train import TrainConfig, make_config, train
from postlocal.train.config_file import SavedRun, Text, changes, merge_settings
from postlocal.train.data import Corpus, Share, Windows, find_files
from postlocal.train.metrics import Metrics, Summary
from postlocal.train.model import SIZES, Transformer
from postlocal.train.plots import plot
from postlocal.train.preparation import WEIGHTS, prepare_run
from postlocal.train.progress import ProgressDisplay
from postlocal.train.run import save_weights
from postlocal.train.sample import sample
from postlocal.train.stop import Stop
from tests.launcher import free_port

Ranks = Callable[..., list[Any]]


def write(folder: Path, *texts: bytes) -> list[Path]:
    files = [folder / f"{index}.txt" for index in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        file.write_bytes(text)
    return files


def text(repeats: int) -> bytes:
    """256 bytes so many times over, none of them NUL."""
    return (bytes(range(1, 256)) + b"x") * repeats


def test_a_corpus_reads_across_files_and_skips_empty_ones(tmp_path: Path) -> None:
    corpus = Corpus(write(tmp_path, b"abc", b"", b"defg", b"h"))
    assert len(corpus) == 8
    for start in range(8):
        for length in range(1, 8 - start):
            assert bytes(corpus.read(start, length)) == b"abcdefgh"[start : start + length]


def test_the_default_data_is_the_standard_library() -> None:
    found = find_files([])
    assert {"argparse.py", "zipfile.py"} & {file.name for file in found.texts}
    assert len(Corpus(found.texts)) > 3_000_000


def test_data_takes_files_folders_and_globs(tmp_path: Path) -> None:
    files = write(tmp_path, b"a", b"b")
    nested = tmp_path / "below" / "c.md"
    nested.parent.mkdir()
    nested.write_bytes(b"c")
    assert find_files([str(files[0])]).texts == (files[0],)
    assert find_files([str(tmp_path)]).texts == (*files, nested)
    assert find_files([str(tmp_path / "*.txt")]).texts == tuple(files)


def test_files_with_a_nul_byte_are_skipped_and_named(tmp_path: Path) -> None:
    text, binary, late = write(tmp_path, b"abc", b"ab\0c", b"a" * 8192 + b"\0")
    found = find_files([str(tmp_path)])
    assert found.texts == (text, late)
    assert found.binary == (binary,)
    with pytest.raises(ValueError, match=r"data must hold text, got 1 binary file, first .*1.txt"):
        find_files([str(binary)])


def test_data_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, rule in {
        str(tmp_path / "nowhere"): r"data must be .* that exist, got '.*nowhere'",
        str(tmp_path / "empty"): r"data must hold files, got '.*empty', a folder without any",
        "": "data must be files, folders or globs, got an empty name ''",
        "x" * 300: r"data must be readable, got 'xxx.*File name too long",
    }.items():
        with pytest.raises(ValueError, match=rule):
            find_files([name])


def test_a_digest_tells_texts_apart_whatever_files_they_are_in(tmp_path: Path) -> None:
    one, two, same, other = write(tmp_path, b"abc", b"def", b"abcdef", b"abcdeg")
    assert Corpus([one, two]).digest == Corpus([same]).digest
    assert Corpus([same]).digest != Corpus([other]).digest
    assert Corpus([same]).digest != Corpus([one]).digest


def test_of_a_long_text_blocks_are_digested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("postlocal.train.data._BLOCK", 4)
    monkeypatch.setattr("postlocal.train.data._BLOCKS", 3)
    texts = write(tmp_path, b"a" * 50, b"a" * 49 + b"b", b"a" * 10 + b"b" + b"a" * 39)
    whole, last, between = (Corpus([text]).digest for text in texts)
    assert whole != last
    assert whole == between


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
    noise = np.random.default_rng(0).integers(0, 256, 9_000, dtype=np.uint8).tobytes()
    windows = Windows(Corpus(write(tmp_path, noise)), 16)
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
    config = make_config(steps=100, strategy="qsr(0.01)")
    assert config.make_strategy().schedule.total == 100  # type: ignore[attr-defined]


def test_a_wire_is_the_one_named_or_the_strategys_own_or_bf16() -> None:
    assert make_config(strategy="diloco").make_strategy().wire == wire.bf16()
    assert make_config(strategy="diloco(wire=int4)").make_strategy().wire == wire.named("int4")
    flagged = make_config(strategy="diloco(wire=int8())", wire="int4")
    assert flagged.make_strategy().wire == wire.named("int4")
    streaming = make_config(strategy="streaming_diloco")
    assert streaming.make_strategy().wire == streaming_diloco().wire
    assert streaming.make_strategy().gradient_wire == wire.bf16()


def test_a_compared_run_takes_the_options_that_its_strategy_has() -> None:
    given: dict[str, Any] = {
        "strategy": "diloco(outer_lr=0.5, optimizer_state='average')",
        "period": 5,
        "wire": "int4",
    }
    slowmo = make_config(**given, compare="slowmo")
    expected = 'slowmo(period=5, wire=int4(), optimizer_state="average")'
    assert slowmo.compared().strategy == expected
    assert slowmo.not_compared == ["outer_lr"]
    ddp = make_config(**given, compare="ddp")
    assert ddp.compared().make_strategy() == strategies.ddp()
    assert ddp.not_compared == ["outer_lr", "optimizer_state", "period", "wire"]
    assert list(ddp.runs()) == ["ddp", "diloco"]


def test_a_strategy_compared_with_itself_takes_its_defaults_under_another_name() -> None:
    config = make_config(strategy="diloco", period=5, compare="diloco")
    assert list(config.runs()) == ["diloco()", "diloco(period=5)"]
    assert config.compared().make_strategy().schedule == schedule.periodic(100)
    assert config.compared().out != config.out
    assert config.not_compared == ["period"]
    with pytest.raises(ValueError, match=r"compare must differ from the run itself, got 'diloco'"):
        make_config(strategy="diloco", compare="diloco")


def test_a_compared_strategy_can_be_an_expression() -> None:
    config = make_config(strategy="diloco(period=32)", compare="local_sgd(period=8, wire=int4())")
    compared = config.compared().make_strategy()
    assert str(compared) == "local_sgd(period=8, wire=int4(), gradient_wire=bf16())"
    assert config.not_compared == ["period"]
    assert list(config.runs()) == ["local_sgd", "diloco"]


def test_the_strategy_that_is_kept_reads_back_as_the_same(tmp_path: Path) -> None:
    text = "Strategy(schedule=growing(2), wire=fp32(), guard=clip(1.0), name='mine')"
    config = make_config(strategy=text)
    kept = TrainConfig.model_validate_json(config.resolved().model_dump_json())
    assert kept.make_strategy() == config.make_strategy()
    assert kept.make_strategy().wire == wire.fp32()


BAD_SETTINGS = [
    ({"steps": 0}, "steps must be greater than or equal to 1, got 0"),
    ({"lr": math.nan}, "lr must be .*, got nan"),
    ({"model": "huge"}, "model must be one of tiny, small, base, got 'huge'"),
    ({"batch_size": 8, "accumulate": 3}, "accumulate must divide the batch size 8, got 3"),
    ({"period": 0}, "period must be at least 1 step, got 0"),
    ({"strategy": "ddp", "period": 4}, "period must not be given to ddp, which has no such arg"),
    ({"parameters": {"period": 4}}, "parameters must be written in the strategy, as in"),
    ({"optimizer_state": "reset"}, "optimizer_state must be written in the strategy, as in"),
    ({"lr_warmup": 101}, "lr-warmup must be at most the 100 steps of the run, got 101"),
    ({"colour": 1}, "colour: extra inputs are not permitted"),
    ({"workers": 10**30}, "workers must be less than or equal to 1000000, got 1"),
    ({"seed": 2**63}, "seed must be less than 9223372036854775808, got 9"),
    ({"timeout": math.inf}, "timeout must be less than or equal to 10000000, got inf"),
    ({"weight_decay": math.inf}, "weight-decay must be a finite number, got inf"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_SETTINGS)
def test_a_bad_setting_is_named_in_one_line(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make_config(**bad)
    assert "\n" not in str(error.value)


BAD_EXPRESSIONS = [
    ({"strategy": "sgd"}, "strategy: there is no strategy sgd"),
    ({"compare": "sgd"}, "compare: there is no strategy sgd"),
    ({"strategy": "diloco(period=0)"}, "strategy: period must be at least 1 step, got 0"),
    ({"strategy": "post_local_sgd(alpha=1)"}, "strategy: post_local_sgd has no argument alpha"),
    ({"compare": "local_sgd(period=0)"}, "compare: period must be at least 1 step, got 0"),
    ({"wire": "int3"}, "wire: there is no wire int3: did you mean"),
    ({"gradient_wire": "int3"}, "gradient-wire: there is no wire int3"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_EXPRESSIONS)
def test_a_bad_expression_is_shown_with_the_place_of_the_mistake(
    bad: dict[str, Any], message: str
) -> None:
    with pytest.raises(ExpressionError, match=re.escape(message)) as error:
        make_config(**bad)
    _, shown, carets = str(error.value).splitlines()
    assert set(carets.strip()) == {"^"}
    assert len(carets) <= len(shown)


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
    before = signal.getsignal(signal.SIGINT)
    with Stop(0, 1, None, interval=0.01) as stop:
        assert not stop.due(1)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop._decided.wait(20)  # the thread decides after step 1: the next one is the last
        assert stop.due(2)
        assert stop.signal == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is before


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
    write(tmp_path, text(20))
    losses = []
    for accumulate in (1, 2):
        config = config_of(
            tmp_path,
            strategy="diloco(period=4)",
            accumulate=accumulate,
            out=tmp_path / str(accumulate),
        )
        summary = train(config)
        assert (summary.workers, summary.payload_bytes) == (1, 0)
        losses.append(summary.final_val_loss)
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    assert losses[0] < math.log(256)


def test_a_run_that_replaces_an_earlier_one_keeps_what_it_compares_with(tmp_path: Path) -> None:
    write(tmp_path, text(20))
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


def test_both_of_two_runs_of_one_strategy_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, text(20))
    train(config_of(tmp_path, strategy="diloco(period=5)", compare="diloco"))
    lines = capsys.readouterr().out.splitlines()
    assert any("│ diloco() " in line and "│ diloco(period=5) " in line for line in squeezed(lines))
    here, there = (Summary.read(f) for f in (tmp_path / "out", tmp_path / "out/compare/diloco"))
    assert here.strategy_details == "diloco(period=5, wire=bf16(), gradient_wire=bf16())"
    assert there.strategy_details == "diloco(wire=bf16(), gradient_wire=bf16())"
    assert (here.strategy, there.strategy) == ("diloco", "diloco")


def squeezed(lines: list[str]) -> list[str]:
    return [line.replace("┃", "│") for line in lines]


def test_a_resumed_run_takes_its_settings_from_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, text(20))
    train(config_of(tmp_path, lr=0.01, seed=3, strategy="diloco", period=4))
    out = tmp_path / "out"
    capsys.readouterr()
    train(make_config(out=out, resume=True, steps=20))
    printed = capsys.readouterr().out
    assert "changed   steps: 12 -> 20" in printed
    assert "resumed after step 12" in printed
    summary = Summary.read(out)
    assert (summary.strategy, summary.seed, summary.steps) == ("diloco", 3, 20)
    kept = SavedRun.read(out)
    assert kept is not None
    assert kept.settings.lr == 0.01
    assert kept.settings.steps == 20
    assert kept.settings.data == (str(tmp_path / "0.txt"),)
    assert not list(out.glob(".config*"))


def test_a_run_is_not_made_shorter_than_it_is(tmp_path: Path) -> None:
    write(tmp_path, text(20))
    train(config_of(tmp_path))
    before = (tmp_path / "out" / "config.json").read_text()
    with pytest.raises(ValueError, match=r"steps must be at least the 12 that .* done, got 10"):
        train(make_config(out=tmp_path / "out", resume=True, steps=10))
    assert (tmp_path / "out" / "config.json").read_text() == before


BOTH_BF16 = "wire=bf16(), gradient_wire=bf16()"
KEPT = f"diloco({BOTH_BF16})"


def saved_run(folder: Path, **settings: Any) -> SavedRun:
    write(folder, text(20))
    config = config_of(folder, **{"lr": 0.01, "seed": 3, "strategy": "diloco"} | settings)
    saved = SavedRun.of(config, Text.of(config.data), workers=2)
    (folder / "out").mkdir(exist_ok=True)
    saved.write(folder / "out")
    return saved


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"lr": 0.003}, "lr: 0.01 kept, 0.003 given"),
        ({"lr": 0.003, "seed": 4}, "lr: 0.01 kept, 0.003 given; seed: 3 kept, 4 given"),
        ({"strategy": "slowmo"}, f"strategy: {KEPT} kept, slowmo({BOTH_BF16}) given"),
        (
            {"strategy": "diloco(outer_lr=0.3)"},
            f"strategy: {KEPT} kept, diloco(outer_lr=0.3, {BOTH_BF16}) given (outer_lr: default and"
            " 0.3)",
        ),
        (
            {"wire": "int4"},
            f"strategy: {KEPT} kept, diloco(wire=int4(), gradient_wire=bf16()) given "
            "(wire: bf16() and int4())",
        ),
        ({"lr_warmup": 7}, "lr-warmup: 1 kept, 7 given"),
    ],
)
def test_settings_that_contradict_those_kept_are_named(
    tmp_path: Path, given: dict[str, Any], words: str
) -> None:
    saved = saved_run(tmp_path)
    config = make_config(out=tmp_path / "out", resume=True, **given)
    with pytest.raises(ValueError, match=re.escape(f"got {words}: leave them out")):
        merge_settings(config, saved)


def test_settings_given_again_agree_if_they_come_to_the_same(tmp_path: Path) -> None:
    saved = saved_run(tmp_path)
    given: dict[str, Any] = {"wire": "bf16", "period": 100, "lr_warmup": 1}
    config = make_config(out=tmp_path / "out", resume=True, workers=3, keep=7, **given)
    settled = merge_settings(config, saved)
    assert (settled.workers, settled.keep, settled.seed, settled.lr) == (3, 7, 3, 0.01)
    assert changes(saved.settings, settled) == ["keep: 3 -> 7", "workers: 2 -> 3"]


def test_the_same_strategy_in_another_spelling_is_the_one_kept(tmp_path: Path) -> None:
    whole, part = "diloco(outer=nesterov(momentum=0.5))", "diloco(outer_momentum=0.5)"
    saved = saved_run(tmp_path, strategy=whole)
    assert saved.settings.strategy == part
    for again in ({"strategy": whole}, {"strategy": part}, {"outer_momentum": 0.5}):
        config = make_config(out=tmp_path / "out", resume=True, **({"strategy": "diloco"} | again))
        assert merge_settings(config, saved).make_strategy() == saved.settings.make_strategy()
        assert str(config.call) == f"diloco(outer_momentum=0.5, {BOTH_BF16})"


def test_a_longer_run_keeps_its_warm_ups(tmp_path: Path) -> None:
    saved = saved_run(tmp_path, strategy="post_local_sgd")
    longer = merge_settings(make_config(out=tmp_path / "out", resume=True, steps=24), saved)
    assert longer.make_strategy() == saved.settings.make_strategy()
    assert longer.rising_steps == 1
    qsr = saved_run(tmp_path, strategy="qsr(0.01)")
    with pytest.raises(ValueError, match="steps: 12 kept, 24 given"):
        merge_settings(make_config(out=tmp_path / "out", resume=True, steps=24), qsr)


def test_other_text_under_the_same_path_is_named(tmp_path: Path) -> None:
    saved_run(tmp_path)
    config = make_config(out=tmp_path / "out", resume=True)
    assert prepare_run(config).config.seed == 3
    (tmp_path / "0.txt").write_bytes(text(20)[:-1] + b"?")
    with pytest.raises(ValueError, match=r"data must be the text that .*out was started with"):
        prepare_run(config)


def test_a_folder_without_a_run_is_not_resumed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"out must hold a run to resume, got .*none"):
        prepare_run(make_config(out=tmp_path / "none", resume=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{", "EOF while parsing"),
        ('{"strategy": "diloco("}', r"settings.strategy: this must be a strategy, .*\n +diloco\("),
        ('{"steps": 0}', r"settings.steps must be greater than or equal to 1, got 0"),
        ('{"strategy": null}', r"settings.strategy must be a valid string, got None"),
        ('{"colour": 1}', "settings.colour: extra inputs are not permitted"),
    ],
)
def test_a_config_file_that_was_damaged_is_told_with_the_setting(
    tmp_path: Path, settings: str, message: str
) -> None:
    (tmp_path / "config.json").write_text(f'{{"settings": {settings}')
    if settings != "{":
        with (tmp_path / "config.json").open("a") as file:
            file.write(', "text": {"files": 1, "bytes": 1, "digest": ""}}')
    with pytest.raises(
        ValueError, match=rf"out must hold a config.json that can be read, .*{message}"
    ):
        prepare_run(make_config(out=tmp_path, resume=True))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"outer_lr": 0.5}, "outer must not be given to diloco beside outer_lr"),
        ({"warmup": 3}, "warmup must not be given to diloco, which has no such argument"),
    ],
)
def test_a_flag_that_does_not_go_with_what_was_kept_is_told_as_such(
    tmp_path: Path, given: dict[str, Any], words: str
) -> None:
    saved_run(tmp_path, strategy="diloco(outer=slow_momentum(0.7, 0.5))")
    with pytest.raises(ValueError, match=f"kept, and of what is given: {words}"):
        prepare_run(make_config(out=tmp_path / "out", resume=True, **given))


def test_a_label_says_what_settings_made_of_the_strategy() -> None:
    assert make_config(strategy="diloco", period=7).label == "diloco"
    assert make_config(strategy="diloco(32, wire=int4)", period=7).label == (
        "diloco(period=7, wire=int4())"
    )


def lines_of(folder: Path, **settings: Any) -> list[str]:
    write(folder, text(20))
    return list(prepare_run(config_of(folder, **settings)).lines(workers=2))


def test_a_run_says_first_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "b.bin").write_bytes(b"\0")
    settings: dict[str, Any] = {"data": (str(tmp_path),), "strategy": "diloco", "compare": "ddp"}
    lines = lines_of(tmp_path, **settings, period=4)
    assert lines[0] == "training  tiny model of 853,120 parameters, 12 steps, 2 workers"
    assert any(line.startswith("data      1 file, 5.1") for line in lines)
    together = " ".join(line.strip() for line in lines)
    assert "1 file skipped for NUL bytes, the first is " in together
    assert f"strategy  diloco(period=4, {BOTH_BF16}) " in together
    assert "with ddp(wire=fp32(), gradient_wire=fp32()), trained first" in together
    assert "it does not use: period" in together
    assert not [line for line in lines if len(line) >= 80 and str(tmp_path) not in line]


@pytest.mark.parametrize(
    ("strategy", "late"),
    [
        ("local_sgd(period=1000)", True),
        ("local_sgd(period=12)", False),
        ("streaming_diloco(period=1000)", True),
        ("streaming_diloco(period=24)", False),
        ("post_local_sgd(period=10)", True),
        ("ddp", False),
    ],
)
def test_a_round_longer_than_the_run_is_said_at_the_start(
    tmp_path: Path, strategy: str, late: bool
) -> None:
    lines = lines_of(tmp_path, strategy=strategy)
    warned = [line for line in lines if line.startswith("warning")]
    assert bool(warned) == late
    name = strategy.partition("(")[0]
    assert all(f"{name} synchronizes all workers only at the end" in line for line in warned)


def test_a_warm_up_as_long_as_the_run_is_said_at_the_start(tmp_path: Path) -> None:
    lines = lines_of(tmp_path, strategy="post_local_sgd", warmup=12)
    assert (
        "warning   post_local_sgd reduces gradients of all workers at each of the 12" in lines[-2]
    )


def test_progress_is_short_lines_where_there_is_no_terminal() -> None:
    console = Console(file=io.StringIO(), width=200)
    entry = {
        "loss": 2.5134, "payload_bytes": 493_000, "ddp_payload_bytes": 10**7,
        "wait_seconds": 1.0, "train_seconds": 10.0,
    }  # fmt: skip
    with ProgressDisplay(console, "diloco", 100, shown=True) as view:
        view.start(20)
        for step in (30, 40):
            view.advance(step)
            view.step(step, entry)
            view.evaluated(2.61)
        view.advance(100)
        view.step(100, entry)
    assert isinstance(console.file, io.StringIO)
    first, second, last = console.file.getvalue().splitlines()
    assert re.fullmatch(r"diloco   30/100  loss 2\.513  16\.4 kB/step  0:\d\d left", first)
    assert re.fullmatch(
        r"diloco   40/100  loss 2\.513  held-out 2\.610  12\.3 kB/step  0:\d\d left", second
    )
    assert last == "diloco  100/100  loss 2.513  held-out 2.610  4.93 kB/step"


def test_progress_is_a_bar_on_a_terminal() -> None:
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=True)
    with ProgressDisplay(console, "diloco", 100, shown=True) as view:
        view.start(0)
        view.advance(50)
    assert "━" in file.getvalue()
    assert "50/100" in file.getvalue()
    assert "left" in file.getvalue()


def train_differently(rank: int, folder: Path, port: int) -> str:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with pytest.raises(DisagreementError) as error:
        train(config_of(folder, steps=12 + rank))
    return str(error.value)


def test_ranks_with_different_arguments_are_told_so(ranks: Ranks, tmp_path: Path) -> None:
    write(tmp_path, text(20))
    expected = "ranks differ in arguments: rank 0 has 'steps: 12', rank 1 has 'steps: 13'"
    assert ranks(2, train_differently, tmp_path, free_port(), join=False) == [expected] * 2


def train_on_other_text(rank: int, folder: Path, port: int) -> str:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with pytest.raises(DisagreementError) as error:
        train(config_of(folder, data=(str(folder / f"{rank}.txt"),)))
    return str(error.value)


def test_ranks_with_different_text_are_told_so(ranks: Ranks, tmp_path: Path) -> None:
    write(tmp_path, text(20), text(21))
    first, second = ranks(2, train_on_other_text, tmp_path, free_port(), join=False)
    assert first == second
    assert first.startswith("ranks differ in data: rank 0 has '5,120 bytes with digest ")


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
