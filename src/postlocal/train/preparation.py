"""Preparation of a run: final settings, checks, and the first lines of output."""

import os
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from postlocal.meter import human_bytes
from postlocal.planning.rounds import events_of
from postlocal.schedule import WORLD, rollout
from postlocal.sync.attach import check_levels
from postlocal.sync.timeline import Start, Synchronize, Timeline
from postlocal.train import config_file
from postlocal.train.config import TrainConfig
from postlocal.train.config_file import CONFIG, SavedRun, Text
from postlocal.train.data import open_data
from postlocal.train.metrics import METRICS, PLOT, SUMMARY
from postlocal.train.model import SIZES, Transformer
from postlocal.train.progress import human_rate

CHECKPOINTS = "checkpoints"
WEIGHTS = "model.safetensors"
_ROUNDS = 10_000  # that are checked before the start


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to start.

    Attributes:
        config: its settings; those saved with it if it is resumed.
        text: the text that it trains on.
        changes: settings that a resumed run changes, a line for each.
    """

    config: TrainConfig
    text: Text
    changes: tuple[str, ...] = ()

    def lines(self, workers: int) -> Iterator[str]:
        """Model, data, workers, strategy and output folder, as lines of text.

        Args:
            workers: number of workers.
        """
        config, text = self.config, self.text
        plural = "" if workers == 1 else "s"
        yield from _item(
            "resuming" if config.resume else "training",
            f"{config.model} model of {_parameters(config):,} parameters, {config.steps:,} steps, "
            f"{workers} worker{plural}",
        )
        where = ", ".join(config.data) or "Python's standard library"
        yield from _item("data", f"{_files(text.files)}, {human_bytes(text.bytes)}: {where}")
        if text.binary:
            skipped = f"{_files(text.binary)} skipped for NUL bytes, the first is"
            yield from _item("", f"{skipped} {text.first_binary}")
        yield from _item("strategy", str(config.call))
        if config.compare is not None:
            yield from _item("compared", f"with {config.compared().call}, trained first")
        if config.not_compared:
            yield from _item("", f"it does not use: {', '.join(config.not_compared)}")
        if config.link is not None:
            yield from _item("link", f"emulated, {human_rate(config.link)} a worker")
        yield from _item("out", str(config.out))
        for change in self.changes:
            yield from _item("changed", change)
        if workers > 1:
            yield from self._warnings()

    def _warnings(self) -> Iterator[str]:
        for label, run in self.config.runs().items():
            if words := _warning(run):
                yield from _item("warning", f"{label} {words}")


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count:,} files"


def _item(name: str, text: str) -> list[str]:
    """A name, and a text beside it, as lines."""
    beside = " " * 10
    return textwrap.wrap(
        text,
        79,
        initial_indent=f"{name:10}",
        subsequent_indent=beside,
        break_long_words=False,
        break_on_hyphens=False,
    )


def prepare_run(config: TrainConfig, workers: int | None = None) -> Prepared:
    """Decide on the settings of a run; for one process, which sees the output folder.

    Args:
        config: settings of which some were given (``model_fields_set``).
        workers: number of ranks; None: the number in the settings.

    Raises:
        ValueError: if there is no text, or if a run to resume is missing or has other settings or
            another text.
    """
    kept = _kept(config)
    before = config
    if kept is not None:
        before, config = kept.settings, config_file.merge_settings(config, kept, workers)
    text = Text.of(config.data)
    if kept is not None and text.digest != kept.text.digest:
        raise ValueError(
            f"data must be the text that {config.out} was started with, {kept.text.identity}, got "
            f"{text.identity} in {', '.join(config.data) or 'the standard library'}"
        )
    changes = config_file.changes(before, config)
    if config.resume and kept is None:
        changes = [f"{config.out} has no {CONFIG}: all settings are taken as given here"]
    return Prepared(config, text, tuple(changes))


def _kept(config: TrainConfig) -> SavedRun | None:
    """The saved settings of a run to resume."""
    if not config.resume:
        return None
    kept = SavedRun.read(config.out)
    if kept is None and not any((config.out / n).exists() for n in (METRICS, CHECKPOINTS)):
        raise ValueError(
            f"out must hold a run to resume, got {config.out} with none: leave --resume out to "
            "start one, or correct the folder"
        )
    return kept


def check_before_launch(config: TrainConfig) -> None:
    """Find errors of the workers before they start.

    Raises:
        ValueError: if data, levels, fragments or the output folder cannot be used.
    """
    for each in config.runs().values():
        strategy = each.make_strategy()
        check_levels(strategy, each.make_topology().partition(each.workers))
        model = _model(each)
        strategy.fragments.split(model, {name: p.nbytes for name, p in model.named_parameters()})
    open_data(config, 0, config.workers)
    prepare_folder(config.out, config.resume, config.overwrite)


def _model(config: TrainConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(SIZES[config.model])


def _parameters(config: TrainConfig) -> int:
    return sum(parameter.numel() for parameter in _model(config).parameters())


def _warning(config: TrainConfig) -> str | None:
    """A warning for a run without local steps, or without a synchronization before its end."""
    strategy = config.make_strategy()
    first = strategy.schedule(0, config.lr_at(0))
    timeline = Timeline.new(strategy.fragments, first)
    local = False
    for start, taken in islice(rollout(strategy.schedule, config.steps, config.lr_at), _ROUNDS):
        planned = strategy.schedule(start, config.lr_at(start))
        timeline, events = events_of(timeline, planned, taken.steps)
        if any(isinstance(event, Start | Synchronize) for event in events):
            return None
        local |= planned.gradients != WORLD
    if local:
        return (
            f"synchronizes all workers only at the end: {config.steps:,} steps are too few for a "
            "round"
        )
    if strategy.name == "ddp":
        return None
    return f"reduces gradients of all workers at each of the {config.steps:,} steps, as ddp does"


def prepare_folder(folder: Path, resumes: bool, overwrite: bool) -> None:
    """Make the output folder; an earlier run in it is resumed, replaced or refused.

    Raises:
        ValueError: if it cannot be written, or has a run that is neither resumed nor replaced.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"out must be a folder that can be written, got {folder} ({error.strerror})"
        ) from None
    if resumes or not (folder / METRICS).exists():
        return
    if not overwrite:
        raise ValueError(
            f"out must not hold an earlier run, got {folder}: pass --resume to continue it, "
            "--overwrite to replace it, or another folder"
        )
    for name in (METRICS, SUMMARY, PLOT, WEIGHTS, CONFIG):
        (folder / name).unlink(missing_ok=True)
    for name in (CHECKPOINTS, "compare"):
        shutil.rmtree(folder / name, ignore_errors=True)
