"""Checkpoints that appear whole or not at all, and resume to the bit.

One folder a checkpoint, named after its step::

    step-00000400/
        checkpoint.json     what it is; written last
        rank-00000.json     state of rank 0, with a key in place of each tensor
        tensors/            torch.distributed.checkpoint; a tensor's key is made from its content

As keys come from contents, what several ranks have in common (the anchor, outer state, replicas
that agree) is stored once, and damage to a tensor shows when it is read. A checkpoint is written
under another name and renamed when all of it is on disk. Nothing in it is unpickled but torch's
index of tensors, and that only as far as it consists of torch's own plain classes.

All functions are collective where the `Sync` given has more than one rank, and the folder must be
one that all ranks see.
"""

import json
import logging
import os
import pickle
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from postlocal.errors import CheckpointError
from postlocal.group import Alone, Group, Processes
from postlocal.packing import digest, empty, key_of, keys, pack, unpack
from postlocal.schedule import WORLD
from postlocal.sync import Sync

logger = logging.getLogger("postlocal")

FORMAT = 1
_INDEX = "checkpoint.json"
_TENSORS = "tensors"

Value = TypeVar("Value")


@dataclass(frozen=True)
class Restored:
    """What `restore` found.

    Attributes:
        path: the checkpoint's folder.
        step: steps taken when it was saved.
        world: number of ranks that saved it.
        extra: what the caller had saved along; on another number of ranks, that of saved rank
            ``rank % world``.
    """

    path: Path
    step: int
    world: int
    extra: dict[str, Any]


def save(
    folder: str | Path, sync: Sync, extra: Mapping[str, Any] | None = None, keep: int = 3
) -> Path:
    """Save model, optimizer, clock and anchor of all ranks; training goes on as if it had not.

    Args:
        folder: where checkpoints of this run go; made if missing.
        sync: the clock, which knows the model and the optimizer.
        extra: more to save for this rank: nested dicts, lists and tuples of tensors, numbers,
            strings and None.
        keep: number of newest checkpoints kept, at least 1.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: if ``keep`` is below 1, or the group is neither processes nor alone.
        CheckpointError: on every rank, if any could not write its part.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1 checkpoint, got {keep}")
    group = sync.layout[WORLD]
    final = Path(folder) / f"step-{sync.steps:08d}"
    partial = final.with_name(f".{final.name}.partial")
    parts = {**_local_state(sync), "extra": dict(extra or {})}
    packed = {part: pack(state) for part, state in parts.items()}
    state = {part: plain for part, (plain, _) in packed.items()}
    tensors = {key: tensor for _, found in packed.values() for key, tensor in found.items()}

    problem = f"cannot write checkpoint {final}"
    _on_all_ranks(group, lambda: _prepare(partial, group), problem)
    _on_all_ranks(group, lambda: _write(partial, group, state, tensors), problem)
    _on_all_ranks(group, lambda: _publish(partial, final, sync, keep), problem)
    return final


def restore(folder: str | Path, sync: Sync) -> Restored | None:
    """Load the newest checkpoint that is whole; damaged ones are skipped with a warning.

    On as many ranks as saved it, training continues bit for bit, also in the middle of a round.
    On another number it starts a new round from the parameters last agreed on: the anchor, or,
    where the strategy keeps none, the mean of the saved replicas. Outer state is taken over, and
    inner optimizer state comes from saved rank ``rank % world``.

    Args:
        folder: where checkpoints of this run are.
        sync: a freshly attached clock.

    Returns:
        What was loaded; None if there is no checkpoint that can be.

    Raises:
        CheckpointError: if the newest whole checkpoint is of another model or strategy.
    """
    group = sync.layout[WORLD]
    if group.rank == 0:
        for unfinished in sorted(Path(folder).glob(".step-*.partial")):
            warnings.warn(f"skipped checkpoint {unfinished}: it is unfinished", stacklevel=2)
    for path in group.all_gather_object(_found(Path(folder)))[0]:
        saved = _read_together(group, path)
        if saved is not None:
            return _apply(sync, path, saved)
    return None


def _local_state(sync: Sync) -> dict[str, Any]:
    return {
        "model": {name: tensor.detach() for name, tensor in sync.replica.tensors.items()},
        "optimizer": sync.inner.optimizer.state_dict(),
        "sync": sync.state_dict(),
    }


@dataclass
class _Saved:
    index: dict[str, Any]
    state: dict[str, Any]
    model: dict[str, Tensor]


def _read_together(group: Group, path: Path) -> _Saved | None:
    saved, problem = None, None
    try:
        saved = _read(path, group)
    except (CheckpointError, OSError) as error:
        problem = str(error)
    problems = [words for words in group.all_gather_object(problem) if words]
    if problems:
        if group.rank == 0:
            warnings.warn(f"skipped checkpoint {path}: {problems[0]}", stacklevel=3)
        return None
    return saved


def _read(path: Path, group: Group) -> _Saved:
    index = _read_json(path / _INDEX)
    if index.get("format") != FORMAT:
        raise CheckpointError(f"its format is {index.get('format')!r}, this is {FORMAT}")
    world = index["world"]
    packed = _read_json(path / f"rank-{group.rank % world:05d}.json", index)
    tensors = _load_tensors(path / _TENSORS, keys(list(packed.values())))
    state = {part: unpack(plain, tensors) for part, plain in packed.items()}
    model = state["model"] if world == group.size else _agreed_model(path, index, state)
    return _Saved(index, state, model)


def _agreed_model(path: Path, index: dict[str, Any], state: dict[str, Any]) -> dict[str, Tensor]:
    """Mean of all saved replicas, and largest integers; one saved replica in memory at a time."""
    world = index["world"]
    sums = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in state["model"].items()}
    largest = {name: tensor.clone() for name, tensor in state["model"].items()}
    for rank in range(world):
        packed = _read_json(path / f"rank-{rank:05d}.json", index)["model"]
        replica = unpack(packed, _load_tensors(path / _TENSORS, keys(packed)))
        for name, tensor in replica.items():
            if tensor.is_floating_point():
                sums[name] += tensor
            elif not tensor.is_complex():
                largest[name] = torch.maximum(largest[name], tensor)
    return {
        name: (sums[name] / world).to(tensor.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in largest.items()
    }


def _apply(sync: Sync, path: Path, saved: _Saved) -> Restored:
    tensors = sync.replica.tensors
    _check_same_model(path, tensors, saved.model)
    clock = saved.state["sync"]
    if clock["strategy"] != sync.strategy.fingerprint:
        raise CheckpointError(
            f"checkpoint {path} is of strategy {clock['strategy']}, this run has "
            f"{sync.strategy.fingerprint}: resume with the same strategy"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(saved.model[name])
        sync.inner.optimizer.load_state_dict(saved.state["optimizer"])
        world = saved.index["world"]
        if world == sync.layout[WORLD].size:
            sync.load_state_dict(clock)
        else:
            sync.restart(clock)
            if sync.layout[WORLD].rank == 0:
                logger.warning(
                    "checkpoint %s was saved by %d ranks and is resumed on %d: training starts "
                    "from the agreed parameters (%s) with a new round",
                    path, world, sync.layout[WORLD].size,
                    "the anchor" if sync.strategy.anchored else "the mean of the saved replicas",
                )  # fmt: skip
    return Restored(path, saved.index["step"], world, saved.state["extra"])


def _check_same_model(path: Path, mine: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    for name in [*mine, *saved]:
        here, there = (_kind(tensors.get(name)) for tensors in (mine, saved))
        if here != there:
            raise CheckpointError(
                f"checkpoint {path} is of another model: {name!r} is {there} there, {here} here"
            )


def _kind(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{tuple(tensor.shape)} of {tensor.dtype}"


def _found(folder: Path) -> list[Path]:
    """Checkpoints in a folder, newest first."""
    return sorted(folder.glob("step-*"), reverse=True)


def _on_all_ranks(group: Group, part: Callable[[], None], problem: str) -> None:
    words = None
    try:
        part()
    except (Exception, CheckpointException) as error:  # the other ranks must hear of any
        words = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    for rank, theirs in enumerate(group.all_gather_object(words)):
        if theirs is not None:
            raise CheckpointError(f"{problem}: rank {rank}: {theirs}")


def _prepare(partial: Path, group: Group) -> None:
    if group.rank == 0:
        for leftover in partial.parent.glob(".step-*.partial"):
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)


def _write(partial: Path, group: Group, state: Any, tensors: dict[str, Tensor]) -> None:
    (partial / f"rank-{group.rank:05d}.json").write_text(json.dumps(state))
    match group:
        case Alone():
            with _alone():
                save_tensors(tensors, checkpoint_id=partial / _TENSORS, no_dist=True)
        case Processes():
            save_tensors(
                tensors, checkpoint_id=partial / _TENSORS, process_group=group.process_group
            )
        case _:
            raise ValueError("checkpoints need ranks that are processes")


def _publish(partial: Path, final: Path, sync: Sync, keep: int) -> None:
    group = sync.layout[WORLD]
    if group.rank == 0:
        _write_index(partial, sync, group.size)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in _found(final.parent)[keep:]:
            shutil.rmtree(old)


def _write_index(folder: Path, sync: Sync, world: int) -> None:
    index = {
        "format": FORMAT,
        "step": sync.steps,
        "world": world,
        "strategy": sync.strategy.fingerprint,
        "saved": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {"postlocal": version("postlocal"), "torch": torch.__version__},
        "files": {file.name: digest(file.read_bytes()) for file in folder.glob("rank-*.json")},
    }
    with (folder / _INDEX).open("w") as file:
        json.dump(index, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _read_json(path: Path, index: Mapping[str, Any] | None = None) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path.name} is missing") from None
    if index is not None and index["files"].get(path.name) != digest(content):
        raise CheckpointError(f"{path.name} is damaged")
    try:
        read: dict[str, Any] = json.loads(content)
    except ValueError:
        raise CheckpointError(f"{path.name} is damaged") from None
    return read


def _load_tensors(folder: Path, keys: Iterator[str]) -> dict[str, Tensor]:
    tensors = {key: empty(key) for key in keys}
    try:
        reader = _Reader(folder)
        reader.read_metadata()  # torch logs a traceback where this fails; here it is one line
        with _alone():
            load_tensors(tensors, storage_reader=reader, no_dist=True)
    except (Exception, CheckpointException) as error:  # many kinds for a damaged file
        raise CheckpointError(
            f"its tensors cannot be read: {str(error).splitlines()[0]}"
        ) from error
    for key, tensor in tensors.items():
        if key_of(tensor) != key:
            raise CheckpointError(f"tensor {key} is damaged")
    return tensors


@contextmanager
def _alone() -> Iterator[None]:
    """Quiets torch's warning that a single process works alone, which it gives even if asked to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


class _Reader(FileSystemReader):
    """torch's reader, with an index that can hold nothing but torch's plain classes."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata: Metadata = _PlainUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _PlainUnpickler(pickle.Unpickler):
    _PLAIN: Mapping[str, Sequence[str]] = {
        "torch": ("Size",),
        "torch.serialization": ("_get_layout",),
        "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
        "torch.distributed.checkpoint.metadata": (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        ),
        "pathlib": ("PosixPath", "WindowsPath"),
    }

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or name in self._PLAIN.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"the index of tensors refers to {module}.{name}")
