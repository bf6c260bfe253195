"""Checkpoints that are written completely or not at all, and resume to the bit.

One folder a checkpoint, named after its step::

    step-00000400/
        checkpoint.json     its description; written last
        rank-00000.json     state of rank 0, with a key in place of each tensor
        tensors/            torch.distributed.checkpoint; a tensor's key is made from its content

Keys come from contents. Tensors that several ranks have in common (the anchor, outer state, equal
replicas) are therefore stored once, and a damaged tensor is detected when it is read. A checkpoint
is written under another name and renamed when all of it is on disk. Only torch's index of tensors
is unpickled, and only if it consists of torch's own plain classes.

`save` and `restore` are collective: every rank calls them. Ranks that share a folder save
together. If each machine has only its own disks, use ``save(..., layout="per-rank")``: each rank
then writes its own folder, ``rank-00000/step-00000400/`` and so on, with the same files in it.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args
from uuid import uuid4

from postlocal.checkpoint import contents, reading, writing
from postlocal.checkpoint.folder import Damaged, Place, Sharing, locate
from postlocal.checkpoint.packing import pack
from postlocal.checkpoint.ranks import on_all_ranks
from postlocal.checks import choice, shown
from postlocal.comm.agreement import check, together
from postlocal.comm.group import Alone, Group, Processes
from postlocal.errors import CheckpointError, PeerError
from postlocal.schedule import WORLD
from postlocal.sync.clock import Sync

__all__ = ["Restored", "restore", "save"]


@dataclass(frozen=True)
class Restored:
    """A checkpoint that `restore` loaded.

    Attributes:
        path: the checkpoint's folder; that of this rank if each has its own.
        step: steps taken when it was saved.
        world: number of ranks that saved it.
        extra: the ``extra`` that was saved; on another number of ranks, that of saved rank
            ``rank % world``.
    """

    path: Path
    step: int
    world: int
    extra: dict[str, Any]


def save(
    folder: str | Path,
    sync: Sync,
    extra: Mapping[Any, Any] | None = None,
    keep: int = 3,
    *,
    layout: Sharing = "shared",
) -> Path:
    """Save a run; collective: every rank calls it, after the same step.

    Model, optimizer, clock and anchor of all ranks are saved, and training is not changed by it. A
    checkpoint of the same step is replaced. Checkpoints of later steps, from before training was
    resumed at an earlier one, are renamed to ``superseded-step-...``.

    Args:
        folder: of all checkpoints of this run; made if missing.
        sync: the clock, with its model and optimizer.
        extra: more to save for this rank: nested dicts, lists, tuples and sets of tensors, numpy
            arrays, numbers, strings, bytes, paths and None. These include the states of random
            number generators of torch, numpy and Python. A subclass is restored as the plain type.
        keep: number of newest checkpoints kept, at least 1.
        layout: ``"shared"``: all ranks share the folder; ``"per-rank"``: they need not, and each
            writes its own checkpoint below it.

    Returns:
        The checkpoint's folder; that of this rank if each has its own.

    Raises:
        ValueError: if ``keep`` or ``layout`` is out of its range, or the group is neither
            processes nor alone.
        TypeError: if ``extra`` contains a value that cannot be stored, which the message names; or
            if ``sync`` is of another type.
        RuntimeError: if ``sync`` was closed, or is in ``agreed_parameters``.
        DisagreementError: if that is so on another rank, or ranks differ in steps or arguments.
        CheckpointError: on every rank, if any cannot write its part, cannot see the folder of
            rank 0, or changed the model so that it cannot be synchronized.
        PeerError: if a rank does not call it within the timeout given to `attach`.

    Example:
        >>> import tempfile
        >>> import torch
        >>> import postlocal
        >>> from postlocal import checkpoint
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> sync = postlocal.attach(model, optimizer, postlocal.strategies.diloco(period=8))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = checkpoint.save(folder, sync, extra={"rng": torch.get_rng_state()})
        ...     path.name, list(checkpoint.restore(folder, sync).extra)
        ('step-00000000', ['rng'])
    """
    group = _meet(sync, "save", "the checkpoint after step {}")
    on_all_ranks(group, lambda: contents.follow_model(sync), "cannot save the model:")
    with together(group):
        _check_choices(group, keep, layout)
        place = Place(Path(folder), sync.steps, layout)
        packed = {
            part: pack(state, part) for part, state in contents.local_state(sync, extra).items()
        }
    check(
        group,
        {"steps": [str(sync.steps)], "keep": [str(keep)], "layout of the checkpoint": [layout]},
    )
    token = group.all_gather_object(uuid4().hex[:12])[0]
    writing.Writing(place, group, token).write(packed, str(sync.strategy), keep)
    return place.folder(group.rank)


def restore(
    folder: str | Path,
    sync: Sync,
    *,
    step: int | None = None,
    missing: Literal["start", "raise"] = "start",
    on_strategy_change: Literal["refuse", "restart"] = "refuse",
) -> Restored | None:
    """Load a checkpoint; collective: every rank calls it, with a freshly attached clock.

    The newest complete checkpoint is loaded; damaged ones are skipped with a warning. Model,
    optimizer and strategy are compared on all ranks before anything is changed.

    On the same number of ranks, training continues bit for bit, also in the middle of a round.
    On another number it starts a new round from the parameters last agreed on: the anchor or, if
    the strategy keeps none, the mean of the saved replicas. Outer state is loaded, and inner
    optimizer state comes from saved rank ``rank % world``. Learning rates and other values
    of param groups come from the checkpoint, as in torch.

    Args:
        folder: of all checkpoints of this run, or of one of them.
        sync: a freshly attached clock.
        step: load the checkpoint of this step, and no other; None: the newest.
        missing: what to do if the folder does not exist or is empty: ``"start"`` logs a warning
            and returns None, so that training starts at step 0; ``"raise"`` detects a mistyped
            path.
        on_strategy_change: what to do with a checkpoint of another strategy or topology:
            ``"restart"`` starts a new round of the given one from the parameters last agreed on,
            and loads the outer state if the outer optimizer is the same.

    Returns:
        The loaded checkpoint; None if there was none and ``missing`` is ``"start"``.

    Raises:
        TypeError, ValueError: if an argument is bad.
        RuntimeError: if ``sync`` was closed, or is in ``agreed_parameters``.
        CheckpointError: on every rank: if the folder has checkpoints, but none can be loaded; if
            the given step is not there; if it is of another model, optimizer or strategy, or was
            saved in another format; if ranks see different folders.
        DisagreementError: if ranks differ in arguments.
        PeerError: if a rank does not call it within the timeout given to `attach`.
    """
    group = _meet(sync, "restore", "restore after step {}")
    with together(group):
        choice("missing", missing, ("start", "raise"))
        choice("on_strategy_change", on_strategy_change, ("refuse", "restart"))
        base, wanted = locate(Path(folder), step)
    check(
        group,
        {
            "step of the checkpoint": [str(wanted)],
            "missing": [missing],
            "on_strategy_change": [on_strategy_change],
        },
    )
    must_exist = missing == "raise" or wanted is not None
    problems = []
    for place in reading.find(base, wanted, group, must_exist):
        try:
            saved = reading.read(place, group)
            reading.apply(sync, saved, change=on_strategy_change == "restart")
        except Damaged as problem:
            problems.append(str(problem))
            if group.rank == 0:
                warnings.warn(f"skipped {problem}", stacklevel=2)
            continue
        path = place.folder(group.rank % saved.world)
        return Restored(path, place.step, saved.world, saved.state["extra"])
    if problems:
        raise CheckpointError(
            f"no checkpoint in {base} can be loaded: {'; '.join(problems)}", path=base
        )
    return None


def _check_choices(group: Group, keep: object, layout: object) -> None:
    if not isinstance(keep, int) or isinstance(keep, bool) or keep < 1:
        raise ValueError(f"keep must be at least 1 checkpoint, a whole number, got {keep!r}")
    choice("layout", layout, get_args(Sharing))
    if not isinstance(group, Alone | Processes):
        raise ValueError(
            "sync must be of processes or of a single rank to be saved, got one of threads"
        )


def _meet(sync: object, function: str, place: str) -> Group:
    """Wait for all ranks, and for exchanges under way, before the first collective."""
    if not isinstance(sync, Sync):
        raise TypeError(f"sync must be the Sync that postlocal.attach returned, got {shown(sync)}")
    if sync.closed:
        raise RuntimeError(f"this Sync was closed: call checkpoint.{function} before sync.close()")
    try:
        sync.groups[WORLD].wait_for_all(sync.steps, place.format(sync.steps))
    except PeerError as error:
        raise PeerError(
            f"{error}: checkpoint.{function} is collective, call it on every rank",
            ranks=error.ranks,
            step=error.step,
        ) from None
    group = sync.groups[WORLD]
    with together(group):
        sync.state_dict()  # a thread may still exchange fragments over the same group
    return group
