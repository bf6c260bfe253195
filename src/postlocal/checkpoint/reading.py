"""Finding checkpoints, reading one, and loading it if it matches."""

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from postlocal.checkpoint import folder as folders
from postlocal.checkpoint import matching, tensors
from postlocal.checkpoint import restart as agreed
from postlocal.checkpoint.contents import follow_model
from postlocal.checkpoint.folder import INDEX, Place, Seen
from postlocal.checkpoint.packing import keys, unpack
from postlocal.checkpoint.ranks import on_all_ranks
from postlocal.comm.agreement import by_ranks, check, ranks_named
from postlocal.comm.group import Group
from postlocal.errors import CheckpointError
from postlocal.expressions import expression
from postlocal.schedule import WORLD
from postlocal.sync.clock import Sync
from postlocal.sync.consistency import take_first_

logger = logging.getLogger("postlocal")


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was read.

    Args:
        place: its folders.
        world: number of ranks that saved it.
        state: of this rank or, on another number of ranks, of saved rank ``rank % world``.
    """

    place: Place
    world: int
    state: Mapping[str, Any]


def find(base: Path, step: int | None, group: Group, must_exist: bool) -> list[Place]:
    """Checkpoints in a folder that exist for all ranks, newest first; collective.

    Args:
        base: the folder, which may differ between ranks.
        step: the only one to look for; None: all.
        group: all ranks.
        must_exist: whether an empty or missing folder is an error.

    Raises:
        CheckpointError: if there is none and ``must_exist``, or ranks see different folders.
    """
    everyones = _look_together(base, group)
    common = frozenset.intersection(*(seen.own for seen in everyones))
    places = [Place(base, found, "shared") for found in everyones[0].shared]
    places += [Place(base, found, "per-rank") for found in common]
    places.sort(key=lambda place: place.step, reverse=True)
    if group.rank == 0:
        _warn_of_unfinished(base, group.rank)
    if step is not None:
        return _of_step(base, step, places)
    if not places:
        _check_start(base, everyones, group, must_exist)
    return places


def read(place: Place, group: Group) -> Saved:
    """Read this rank's part of a checkpoint; collective.

    Raises:
        Damaged: if any rank cannot.
        CheckpointError: if it is of another format, differs between ranks, or parts of it are in
            another place.
    """
    problem, path = f"checkpoint {place}:", place.folder(group.rank)
    index = on_all_ranks(group, lambda: folders.read_index(place, group.rank), problem, path)
    ids = group.all_gather_object(index["id"])
    strangers = [rank for rank, theirs in enumerate(ids) if theirs != ids[0]]
    if strangers:
        raise CheckpointError(
            f"{problem} ranks see different ones of this step: that of {ranks_named(strangers)} "
            "was not saved together with rank 0's",
            path=path,
            ranks=strangers,
        )
    world = index["world"]
    if world != group.size:
        on_all_ranks(group, lambda: _check_parts(place, world, group), problem, path)
    state = on_all_ranks(group, lambda: _read_part(place, group.rank % world), problem, path)
    return Saved(place, world, state)


def apply(sync: Sync, saved: Saved, change: bool) -> None:
    """Load a checkpoint into model, optimizer and clock, if it matches on all ranks.

    Args:
        sync: the clock.
        saved: the checkpoint.
        change: whether a new round may start under another strategy.

    Raises:
        CheckpointError: if it does not match; nothing was changed.
    """
    group, world, state = sync.groups[WORLD], saved.world, saved.state
    name, path = f"checkpoint {saved.place}", saved.place.folder(group.rank % world)
    on_all_ranks(group, lambda: follow_model(sync), f"{name} cannot be loaded:", path)
    words = on_all_ranks(group, lambda: _differences(sync, saved, change), name, path)
    changed = any(group.all_gather_object(words is not None))
    model = state["model"]
    if changed or world != group.size:
        model = agreed.mean(
            lambda rank: model_of(saved, rank, group),
            world,
            sync,
            lambda part: on_all_ranks(group, part, f"{name}:", path),
        )
    if changed:
        model = model | agreed.anchor(state["sync"])
    values = on_all_ranks(group, lambda: _changed_values(sync, saved), name, path)
    if group.rank == 0:
        _log(sync, saved, words, values)
    with torch.no_grad():
        problem = f"{name} was loaded in part only:"
        on_all_ranks(group, lambda: _load(sync, state, model), problem, path)
        if not changed and world == group.size:
            sync.load_state_dict(state["sync"])
            return
        clock = state["sync"]
        if changed:
            clock = agreed.restarted(sync, clock, model, _same_outer(sync, saved))
        _restart(sync, clock, group)


def _restart(sync: Sync, clock: Mapping[str, Any], group: Group) -> None:
    """Start a new round; if replicas stay equal in it, they get equal states of the optimizer."""
    sync.restart(clock)
    if sync.round.gradients != WORLD:
        return
    check(group, {"state of the optimizer": sync.inner.describe()})
    device = next(iter(sync.replica.parameters.values())).device
    take_first_(group, sync.inner.tensors, device)


def _load(sync: Sync, state: Mapping[str, Any], model: Mapping[str, Tensor]) -> None:
    """Load the saved state into optimizer and model of this rank."""
    for optimizer, saved in zip(sync.inner.optimizers, state["optimizers"], strict=True):
        _load_optimizer(optimizer, saved)
    for name, tensor in sync.replica.tensors.items():
        tensor.copy_(model[name])
    for name, tensor in sync.replica.own.items():
        tensor.copy_(state["own"][name])


def model_of(saved: Saved, rank: int, group: Group) -> Mapping[str, Tensor]:
    """The tensors of a saved rank."""
    if rank == group.rank % saved.world:
        own: Mapping[str, Tensor] = saved.state["model"]
        return own
    others: Mapping[str, Tensor] = _read_part(saved.place, rank, "model")["model"]
    return others


def _look_together(base: Path, group: Group) -> list[Seen]:
    """The checkpoints that ranks see; the same on all if they share a folder."""
    everyones = group.all_gather_object(folders.look(base, group.rank))
    every = frozenset().union(*(seen.shared for seen in everyones))
    if any(seen.shared != every for seen in everyones):  # a network file system may be late
        everyones = group.all_gather_object(folders.await_steps(base, group.rank, every))
    problems = {r: seen.problem for r, seen in enumerate(everyones) if seen.problem is not None}
    if problems:
        words = by_ranks(problems, group.size)
        raise CheckpointError(f"no checkpoint can be in {base}: {words}", path=base, ranks=problems)
    lacking = {
        rank: f"{_list(every - seen.shared)} not there"
        for rank, seen in enumerate(everyones)
        if every - seen.shared
    }
    if lacking:
        raise CheckpointError(
            f"ranks see different folders at {base}: {by_ranks(lacking, group.size)}; give one "
            'that they share, or what was saved with layout="per-rank"',
            path=base,
            ranks=lacking,
        )
    _compare_own(base, everyones, group)
    return everyones


def _compare_own(base: Path, everyones: Sequence[Seen], group: Group) -> None:
    """Raise an error that names ranks without the checkpoints that others have of their own."""
    every = frozenset().union(*(seen.own for seen in everyones))
    common = frozenset.intersection(*(seen.own for seen in everyones))
    newer = {step for step in every if step > max(common, default=-1)}
    lacking = {
        rank: f"{_list(newer - seen.own)} not there"
        for rank, seen in enumerate(everyones)
        if newer - seen.own
    }
    if not lacking:
        return
    words = (
        f"ranks do not all have the newest checkpoints in {base}: {by_ranks(lacking, group.size)}"
    )
    if not common and not everyones[0].shared:
        raise CheckpointError(f"{words}; no step is there on all of them", path=base, ranks=lacking)
    if group.rank == 0:
        logger.warning("%s", words)


def _of_step(base: Path, step: int, places: Sequence[Place]) -> list[Place]:
    chosen = [place for place in places if place.step == step]
    if not chosen:
        there = _list(place.step for place in places) if places else "there is none at all"
        raise CheckpointError(f"no checkpoint of step {step} in {base}: {there}", path=base)
    return chosen


def _check_start(base: Path, everyones: Sequence[Seen], group: Group, must_exist: bool) -> None:
    """Check that a folder without checkpoints can be that of a run that has not started."""
    others = {
        rank: f"holds {', '.join(seen.others[:5])}{', ...' * (len(seen.others) > 5)}"
        for rank, seen in enumerate(everyones)
        if seen.others
    }
    if others:
        raise CheckpointError(
            f"no checkpoint in {base}, which {by_ranks(others, group.size)}: give the folder that "
            "checkpoints were saved to, or an empty one to start at step 0",
            path=base,
            ranks=others,
        )
    state = "is empty" if everyones[0].exists else "does not exist"
    if must_exist:
        raise CheckpointError(f"no checkpoint in {base.absolute()}, which {state}", path=base)
    if group.rank == 0:
        logger.warning(
            "no checkpoint in %s, which %s: training starts at step 0", base.absolute(), state
        )


def _warn_of_unfinished(base: Path, rank: int) -> None:
    for home in (base, base / folders.rank_name(rank)):
        for unfinished in folders.leftovers(home):
            warnings.warn(f"skipped checkpoint {unfinished}: it is unfinished", stacklevel=4)


def _list(steps: Any) -> str:
    return ", ".join(folders.step_name(step) for step in sorted(steps))


def _check_parts(place: Place, world: int, group: Group) -> None:
    """Check that this rank sees the parts it needs, on another number of ranks than saved."""
    needed = {group.rank % world, *range(group.rank, world, group.size)}
    missing = [r for r in sorted(needed) if not (place.folder(r) / INDEX).exists()]
    if missing and place.layout == "per-rank":
        raise CheckpointError(
            f"it was saved by {world} ranks, each for itself: to resume on {group.size}, copy all "
            f"of its rank-* folders into one that all ranks see; missing here: "
            f"{', '.join(folders.rank_name(rank) for rank in missing)}"
        )


def _read_part(place: Place, rank: int, *names: str) -> dict[str, Any]:
    """Some of the state of a saved rank, or all of it."""
    folder, index = place.folder(rank), folders.read_index(place, rank)
    packed = folders.read_json(folder / f"{folders.rank_name(rank)}.json", index["files"])
    chosen = {name: packed[name] for name in names or packed}
    found = tensors.read(folder / folders.TENSORS, keys(list(chosen.values())))
    return {name: unpack(plain, found) for name, plain in chosen.items()}


def _differences(sync: Sync, saved: Saved, change: bool) -> str | None:
    """How the strategy differs, if that is allowed.

    Raises:
        CheckpointError: if anything differs that must be equal.
    """
    there, here = saved.state["about"], matching.describe(sync)
    fault = matching.model_difference(there, here) or matching.optimizer_difference(
        there, here, saved.state["optimizers"], sync.inner.optimizers
    )
    same_world = saved.world == sync.groups[WORLD].size
    fault = fault or matching.own_difference(there, here, same_world)
    if fault is not None:
        raise CheckpointError(fault)
    words = matching.strategy_differences(there, here, same_world)
    if words is not None and not change:
        raise CheckpointError(
            f"is of another strategy: {words}; resume with that one, or pass on_strategy_change="
            '"restart" to start a new round of this one from the parameters last agreed on'
        )
    return words


def _same_outer(sync: Sync, saved: Saved) -> bool:
    there: str = saved.state["about"]["outer"]
    return there == expression(sync.strategy.outer, "outer")


def _changed_values(sync: Sync, saved: Saved) -> list[str]:
    return list(matching.changed_values(saved.state["optimizers"], sync.inner.optimizers))


def _log(sync: Sync, saved: Saved, words: str | None, values: Sequence[str]) -> None:
    """Log what differs from the saved run."""
    if values:
        logger.warning("values of the checkpoint are used: %s", "; ".join(values))
    size = sync.groups[WORLD].size
    if saved.world == size and words is None:
        return
    clock = saved.state["sync"]
    anchored = bool(agreed.anchor(clock))
    how = [f"was saved by {saved.world} ranks and is resumed on {size}"] * (saved.world != size)
    how += [f"is of another strategy ({words})"] * (words is not None)
    logger.warning(
        "checkpoint %s %s: training starts from the agreed parameters (%s) with a new round%s",
        saved.place, " and ".join(how),
        "the anchor" if anchored else "the mean of the saved replicas",
        "" if words is None or not anchored
        else "; outer state is loaded" if _same_outer(sync, saved)
        else "; outer state is reset",
    )  # fmt: skip


def _load_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load state in its saved dtype, which torch would cast to that of the parameters."""
    optimizer.load_state_dict(dict(state))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, saved in state["state"].items():
        held = optimizer.state[parameters[index]]
        for key, value in saved.items():
            if isinstance(value, Tensor) and held[key].dtype != value.dtype:
                held[key] = value.to(held[key].device)
