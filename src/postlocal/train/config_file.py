"""The file ``config.json`` in a run's folder: the settings of the run, and its text.

A resumed run takes its settings from there. Settings that are given again must be equal, except
those that may change.
"""

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from postlocal.expressions import ExpressionError, difference, read
from postlocal.strategies import AXIS
from postlocal.train.config import TrainConfig, first_problem
from postlocal.train.data import Corpus, find_files
from postlocal.train.metrics import write_whole

CONFIG = "config.json"

CHANGEABLE = frozenset(
    {
        "steps", "workers", "accumulate", "compare", "checkpoint_every", "keep", "log_every",
        "eval_every", "eval_sequences", "timeout", "link",
    }
)  # fmt: skip
"""Settings that may change when a run is resumed."""

_OF_A_START = {"out", "resume", "overwrite"}
_STRATEGY = {
    "strategy", "period", "warmup", "outer_lr", "outer_momentum", "wire", "gradient_wire",
}  # fmt: skip


class Text(BaseModel):
    """The text of a run.

    Attributes:
        files: number of files.
        bytes: size of all of them.
        digest: digest of the bytes; see `postlocal.train.data.Corpus.digest`.
        binary: number of files that were skipped.
        first_binary: the first skipped file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    files: int
    bytes: int
    digest: str
    binary: int = 0
    first_binary: str | None = None

    @classmethod
    def of(cls, data: Sequence[str]) -> "Text":
        """The text of files.

        Raises:
            ValueError: if there are none, or they have no text.
        """
        found = find_files(data)
        corpus = Corpus(found.texts)
        return cls(
            files=len(found.texts),
            bytes=len(corpus),
            digest=corpus.digest,
            binary=len(found.binary),
            first_binary=str(found.binary[0]) if found.binary else None,
        )

    @property
    def identity(self) -> str:
        """Size and digest, for messages."""
        return f"{self.bytes:,} bytes with digest {self.digest}"


class SavedRun(BaseModel):
    """The content of ``config.json``.

    Attributes:
        settings: current settings of the run; ``workers`` is the number at the last start.
        text: the text that it trains on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: TrainConfig
    text: Text

    def write(self, folder: Path) -> None:
        """Write it, completely or not at all."""
        write_whole(folder / CONFIG, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "SavedRun | None":
        """Read it; None if there is none.

        Raises:
            ValueError: if it cannot be read.
        """
        path = folder / CONFIG
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            problem = first_problem(error) if isinstance(error, ValidationError) else error
            raise ValueError(
                f"out must hold a {CONFIG} that can be read, got {path}: {problem}"
            ) from None

    @classmethod
    def of(cls, config: TrainConfig, text: Text, workers: int) -> "SavedRun":
        """The content of ``config.json`` for a run."""
        here = {"data": _absolute(config.data), "workers": workers}
        starting = here | {"resume": False, "overwrite": False}
        return cls(settings=config.resolved().model_copy(update=starting), text=text)


def merge_settings(config: TrainConfig, saved: SavedRun, workers: int | None = None) -> TrainConfig:
    """Settings of a resumed run: the saved ones, and given ones that may change.

    Args:
        config: settings of which some were given (``model_fields_set``).
        saved: the content of ``config.json``.
        workers: number of ranks; None: as given, or as saved.

    Raises:
        ValueError: naming each setting whose given value differs from the saved one.
    """
    kept = saved.settings
    given = {name: getattr(config, name) for name in config.model_fields_set}
    if "strategy" in given:
        given["strategy"] = _completed(config.strategy, kept.strategy)
    if "data" in given:
        given["data"] = _absolute(config.data)
    if workers is not None:
        given["workers"] = workers
    merged = kept.model_copy(update=given | {n: getattr(config, n) for n in _OF_A_START})
    if wrong := _contradictions(kept, merged):
        raise ValueError(
            f"settings given must be those that {config.out / CONFIG} has kept, got "
            f"{'; '.join(wrong)}: leave them out, or start another run in another folder"
        )
    return merged.model_copy(update={"resume": True})


def changes(before: TrainConfig, after: TrainConfig) -> list[str]:
    """Settings that a resumed run changes, a line for each.

    Example:
        >>> from postlocal.train.config import make_config
        >>> changes(make_config(steps=100), make_config(steps=30))
        ['steps: 100 -> 30']
    """
    names = sorted(_differing(before, after) & (CHANGEABLE | {"data"}))
    return [f"{_option(n)}: {_shown(before, n)} -> {_shown(after, n)}" for n in names]


def _completed(given: str, kept: str) -> str:
    """A strategy that is given again; arguments that it does not give are the saved ones."""
    call, before = read(given, AXIS), read(kept, AXIS)
    return str(call.with_defaults(before.arguments)) if call.name == before.name else given


def _contradictions(kept: TrainConfig, merged: TrainConfig) -> list[str]:
    names = _differing(kept, merged) - CHANGEABLE - _OF_A_START - {"data"}
    if kept.rising_steps == merged.rising_steps:
        names -= {"lr_warmup"}
    wrong = [
        f"{_option(name)}: {_shown(kept, name)} kept, {_shown(merged, name)} given"
        for name in sorted(names - _STRATEGY)
    ]
    if "total" in kept.call.parameters and kept.steps != merged.steps:
        # The last round ends with the run.
        return [*wrong, f"steps: {kept.steps} kept, {merged.steps} given"]
    return wrong + _strategy_contradictions(kept, merged)


def _strategy_contradictions(kept: TrainConfig, merged: TrainConfig) -> list[str]:
    try:
        if kept.make_strategy() == merged.make_strategy():
            return []
    except ValueError as error:  # given and saved settings do not match
        problem = error.problem if isinstance(error, ExpressionError) else error
        return [f"strategy: {kept.call} kept, and of what is given: {problem}"]
    words = difference(str(kept.call), str(merged.call))
    return [f"strategy: {kept.call} kept, {merged.call} given" + (f" ({words})" if words else "")]


def _differing(one: TrainConfig, other: TrainConfig) -> set[str]:
    return {name for name, value in one if value != getattr(other, name)}


def _absolute(data: Sequence[str]) -> tuple[str, ...]:
    return tuple(str(Path(entry).absolute()) for entry in data)


def _option(name: str) -> str:
    return name.replace("_", "-")


def _shown(config: TrainConfig, name: str) -> str:
    value = getattr(config, name)
    return ", ".join(value) if isinstance(value, tuple) else str(value)
