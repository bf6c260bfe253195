"""Folders of checkpoints: their names, which ones a rank sees, and how one is written."""

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from postlocal.checkpoint.packing import digest
from postlocal.errors import CheckpointError

logger = logging.getLogger("postlocal")

FORMAT = 3  # also raised where a default of a strategy changes: its text leaves defaults out
INDEX = "checkpoint.json"
TENSORS = "tensors"
Sharing = Literal["shared", "per-rank"]

_STEP = re.compile(r"step-(\d{8,})")
_RANK = re.compile(r"rank-\d{5,}")
_LEFTOVERS = ".step-*.partial"
_NOTHING = {"lost+found"}  # what an empty file system has
_SEEN_SECONDS = 5.0  # how much later another rank may see a folder that one made


class Damaged(CheckpointError):
    """A checkpoint that cannot be read; an earlier one may be readable."""


@dataclass(frozen=True)
class Place:
    """The folders of one checkpoint.

    Args:
        base: the folder of all checkpoints of a run.
        step: steps taken when it was saved.
        layout: ``"shared"``: all parts are in one folder; ``"per-rank"``: each in its own.
    """

    base: Path
    step: int
    layout: Sharing

    def home(self, rank: int) -> Path:
        """The folder with the checkpoints that a rank writes to."""
        return self.base if self.layout == "shared" else self.base / rank_name(rank)

    def folder(self, rank: int) -> Path:
        """The folder with the part of a rank."""
        return self.home(rank) / step_name(self.step)

    def partial(self, rank: int, token: str) -> Path:
        """The folder where that part is written first, under a name that no other attempt has."""
        return self.home(rank) / f".{step_name(self.step)}.{token}.partial"

    def __str__(self) -> str:
        middle = "" if self.layout == "shared" else "rank-*/"
        return f"{self.base}/{middle}{step_name(self.step)}"


@dataclass(frozen=True)
class Seen:
    """The checkpoints that one rank sees in a folder.

    Args:
        problem: why it cannot have checkpoints; None: it can, or does not exist.
        exists: whether it does.
        shared: steps of checkpoints that all ranks saved together.
        own: steps of checkpoints that this rank saved in its own folder.
        others: names of everything else in the folder.
    """

    problem: str | None = None
    exists: bool = False
    shared: frozenset[int] = frozenset()
    own: frozenset[int] = frozenset()
    others: tuple[str, ...] = ()


def step_name(step: int) -> str:
    """Name of a checkpoint's folder."""
    return f"step-{step:08d}"


def rank_name(rank: int) -> str:
    """Name of the folder of a rank's own checkpoints, and of the file of its state."""
    return f"rank-{rank:05d}"


def locate(folder: Path, step: int | None) -> tuple[Path, int | None]:
    """The folder of all checkpoints, and the step, if the path is that of one checkpoint.

    Raises:
        ValueError: if the path is that of another step.
    """
    match = _STEP.fullmatch(folder.name)
    if match is None or _steps(folder):
        return folder, step
    named = int(match[1])
    if step not in (None, named):
        raise ValueError(
            f"step must be the one of the checkpoint, or be left out, got step {step} of {folder}"
        )
    per_rank = _RANK.fullmatch(folder.parent.name) and _layout_of(folder) == "per-rank"
    return folder.parent.parent if per_rank else folder.parent, named


def look(base: Path, rank: int) -> Seen:
    """The checkpoints that a rank sees in a folder."""
    try:
        if not base.is_dir():
            above = next(path for path in (base, *base.absolute().parents) if path.exists())
            return Seen(None if above.is_dir() else f"{above} is a file")
        names = sorted(path.name for path in base.iterdir())
        own = _steps(base / rank_name(rank))
        if not own:  # another number of ranks may have saved them
            own = {step for name in names if _RANK.fullmatch(name) for step in _steps(base / name)}
        return Seen(
            exists=True,
            shared=frozenset(_steps(base)),
            own=frozenset(own),
            others=tuple(name for name in names if _is_foreign(base / name)),
        )
    except OSError as error:
        return Seen(f"{base} cannot be read ({error.strerror})")


def await_steps(base: Path, rank: int, shared: frozenset[int]) -> Seen:
    """The same, once these steps are visible, or after some seconds without them."""
    deadline = time.monotonic() + _SEEN_SECONDS
    while True:
        seen = look(base, rank)
        if shared <= seen.shared or time.monotonic() > deadline:
            return seen
        time.sleep(0.1)


def appears(path: Path) -> bool:
    """Whether a folder that another rank made is visible here within some seconds."""
    deadline = time.monotonic() + _SEEN_SECONDS
    while not path.is_dir():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def prepare(final: Path, partial: Path) -> None:
    """Remove the remains of earlier attempts, and make the folder to write to.

    Raises:
        CheckpointError: if the checkpoint's name is taken by something else.
    """
    if final.exists() and not _is_ours(final):
        raise CheckpointError(f"{final} exists and is no checkpoint: move it away", path=final)
    for leftover in leftovers(final.parent):
        shutil.rmtree(leftover)
    partial.mkdir(parents=True)


def publish(partial: Path, final: Path) -> None:
    """Rename a written folder to its final name, and remove an older one of that name."""
    replaced = partial.with_name(f"{partial.name.removesuffix('.partial')}.replaced.partial")
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)


def tidy(home: Path, step: int, keep: int) -> None:
    """Remove all but the newest checkpoints, and rename those of later steps.

    Later ones exist if training was resumed from an earlier checkpoint. A folder that cannot be
    removed is logged.
    """
    try:
        for later in sorted(found for found in _steps(home) if found > step):
            _set_aside(home / step_name(later))
        complete = [s for s in _steps(home) if (home / step_name(s) / INDEX).is_file()]
        for old in sorted(complete, reverse=True)[keep:]:
            shutil.rmtree(home / step_name(old))
    except OSError as error:
        logger.warning("cannot remove old checkpoints in %s: %s", home, error)


def leftovers(home: Path) -> list[Path]:
    """Folders of checkpoints that were never finished."""
    return sorted(home.glob(_LEFTOVERS))


def write_json(path: Path, value: Any) -> None:
    """Write a file, and flush it to disk."""
    with path.open("w") as file:
        json.dump(value, file, indent=1 if path.name == INDEX else None)
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path, digests: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Read a file.

    Args:
        path: the file.
        digests: name -> digest; None: the digest is unknown.

    Raises:
        Damaged: if it is missing, or differs from what was written.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        words = "is missing" if missing else f"cannot be read ({error.strerror})"
        raise Damaged(f"{path.name} {words}", path=path) from None
    if digests is not None and digests.get(path.name) != digest(content):
        raise Damaged(f"{path.name} is damaged", path=path)
    try:
        read = json.loads(content)
    except ValueError:
        read = None
    if not isinstance(read, dict):
        raise Damaged(f"{path.name} is damaged", path=path)
    return read


def read_index(place: Place, rank: int) -> dict[str, Any]:
    """The description of a checkpoint, as one rank has it.

    Raises:
        Damaged: if it cannot be read.
        CheckpointError: if it is of another format, or lies in a folder of another layout.
    """
    path = place.folder(rank) / INDEX
    if place.layout == "per-rank" and not path.exists():  # another number of ranks saved it
        path = min(place.base.glob(f"rank-*/{step_name(place.step)}/{INDEX}"), default=path)
    index = read_json(path)
    if index.get("format") != FORMAT:
        saved = index.get("versions", {}).get("postlocal", "another version")
        raise CheckpointError(
            f"its format is {index.get('format')!r}, of postlocal {saved}; this version reads "
            f"format {FORMAT}: resume with the version that saved it"
        )
    if not {"id", "world", "layout", "files"} <= index.keys():
        raise Damaged(f"{INDEX} is damaged", path=path)
    if index["layout"] != place.layout:
        raise CheckpointError(
            f"it was saved with layout {index['layout']!r} and is not in the place of such a one: "
            "give the folder that was given to save"
        )
    return index


def _steps(home: Path) -> set[int]:
    """Steps of the checkpoints in a folder; none where it does not exist."""
    if not home.is_dir():
        return set()
    matches = [(path, _STEP.fullmatch(path.name)) for path in home.iterdir()]
    return {int(match[1]) for path, match in matches if match and path.is_dir()}


def _is_foreign(path: Path) -> bool:
    if path.name.startswith(".") or path.name in _NOTHING:
        return False
    ours = _STEP.fullmatch(path.name) or _RANK.fullmatch(path.name)
    return not (ours and path.is_dir())


def _is_ours(folder: Path) -> bool:
    """Whether a folder is, or was, a checkpoint; an empty one may become one."""
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    return not names or bool(names & {INDEX, TENSORS})


def _layout_of(folder: Path) -> object:
    try:
        return read_json(folder / INDEX).get("layout")
    except Damaged:
        return None


def _set_aside(later: Path) -> None:
    aside = later.with_name(f"superseded-{later.name}")
    shutil.rmtree(aside, ignore_errors=True)
    later.rename(aside)
    logger.warning(
        "checkpoint %s is of a later step than the one now saved, because training was resumed "
        "from an earlier one; renamed to %s", later, aside.name,
    )  # fmt: skip
