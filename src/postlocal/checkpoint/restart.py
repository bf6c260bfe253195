"""The state that a new round starts from: the parameters last agreed on, and outer state."""

import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from postlocal.schedule import WORLD, planned
from postlocal.sync.clock import Sync
from postlocal.sync.parameters import Replica
from postlocal.tensors import all_finite
from postlocal.wire import fp32, maximum_, mean_

logger = logging.getLogger("postlocal")

Value = TypeVar("Value")
Load = Callable[[int], Mapping[str, Tensor]]
"""Gives the tensors of a saved rank, by name, on CPU."""


class Locally(Protocol):
    """Calls a function that does not communicate, and returns its value if no rank failed."""

    def __call__(self, part: Callable[[], Value]) -> Value: ...


def mean(load: Load, world: int, sync: Sync, locally: Locally) -> dict[str, Tensor]:
    """The mean of all saved replicas, and the maximum of integers; equal on all ranks.

    It is the result that the next synchronization would have had. Parameters that are not finite
    are left out, and so are all buffers of a replica with NaN in one. If that leaves out all
    replicas, none is left out. Ranks share the reading, one replica at a time.

    Args:
        load: reads a saved replica.
        world: number of ranks that saved one.
        sync: the clock of the present ranks.
        locally: calls functions that read.
    """
    group, replica = sync.groups[WORLD], sync.replica
    mine = range(group.rank, world, group.size)
    found = locally(lambda: {rank: _is_well(load(rank), replica) for rank in mine})
    well = [pair for theirs in group.all_gather_object(found) for pair in theirs.items()]
    parameters, buffers = (_chosen(kind, dict(well)) for kind in (0, 1))
    if group.rank == 0 and len(parameters) < world:
        left_out = ", ".join(str(rank) for rank in sorted({*range(world)} - parameters))
        logger.warning("the mean of the saved replicas leaves out rank %s: not finite", left_out)
    sums = locally(lambda: _sums(load, mine, replica, parameters, buffers))
    for names, count in (
        (replica.parameters | replica.frozen, parameters),
        (replica.buffers, buffers),
    ):
        floats = [sums[name] for name in names if sums[name].is_floating_point()]
        mean_(floats, group, fp32(), _number(len(count)))
    maximum_([total for total in sums.values() if not total.is_floating_point()], group)
    return {name: _like(sums[name], tensor) for name, tensor in replica.tensors.items()}


def anchor(clock: Mapping[str, Any]) -> dict[str, Tensor]:
    """The anchor in a saved clock; empty if there is none, or replicas had not diverged yet."""
    anchors = [fragment["anchor"] for fragment in clock["fragments"]]
    if clock["timeline"]["synchronous"] or None in anchors:
        return {}
    return {name: tensor for one in anchors for name, tensor in one["tensors"].items()}


def restarted(
    sync: Sync, clock: Mapping[str, Any], parameters: Mapping[str, Tensor], keep_outer: bool
) -> dict[str, Any]:
    """A state for `Sync.restart`, made from the clock of another strategy.

    Args:
        sync: a clock of the new strategy.
        clock: the saved one.
        parameters: those last agreed on, by name, from which all ranks start.
        keep_outer: whether the saved state of the outer optimizer is loaded.
    """
    present = sync.state_dict()
    outer = dict(_outer_state(clock)) if keep_outer else {}
    steps = clock["timeline"]["steps"]
    first = planned(sync.strategy.schedule, steps, sync.inner.lr)
    timeline = {"steps": steps, "agreed_at": steps, "synchronous": first.gradients == WORLD}
    return present | {
        "timeline": present["timeline"] | timeline,
        "work": clock["work"],
        "meter": clock["meter"],
        "moving": clock["moving"],
        "lr": sync.inner.lr,
        "drift": math.nan,
        "fragments": [_with_anchor(one, parameters, outer) for one in present["fragments"]],
    }


def _with_anchor(
    fragment: Mapping[str, Any], parameters: Mapping[str, Tensor], outer: Mapping[str, Any]
) -> dict[str, Any]:
    if fragment["anchor"] is None:
        return dict(fragment)
    names = list(fragment["anchor"]["tensors"])
    state = {index: outer[name] for index, name in enumerate(names) if name in outer}
    anchor = {
        "tensors": {name: parameters[name] for name in names},
        "outer": {**fragment["anchor"]["outer"], "state": state},
    }
    return {**fragment, "anchor": anchor}


def _outer_state(clock: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The outer optimizer's state by the parameters' names."""
    for fragment in clock["fragments"]:
        if fragment["anchor"] is not None:
            names = list(fragment["anchor"]["tensors"])
            for index, state in fragment["anchor"]["outer"]["state"].items():
                yield names[index], state


def _is_well(tensors: Mapping[str, Tensor], replica: Replica) -> tuple[bool, bool]:
    """Whether parameters are finite, and whether no buffer has NaN."""
    buffers = [_wide(tensors[name]) for name in replica.buffers]
    return (
        all_finite((tensors[name] for name in replica.parameters), math.inf),
        not any(bool(torch.isnan(buffer).any()) for buffer in buffers),
    )


def _chosen(kind: int, well: Mapping[int, tuple[bool, bool]]) -> set[int]:
    """Ranks whose parameters or buffers are valid; all ranks if none are."""
    return {rank for rank, pair in well.items() if pair[kind]} or {*well}


def _sums(
    load: Load,
    ranks: Collection[int],
    replica: Replica,
    parameters: Collection[int],
    buffers: Collection[int],
) -> dict[str, Tensor]:
    """Sums of floats and maxima of integers, over the chosen ranks among some saved ones."""
    totals = {name: _start(tensor) for name, tensor in replica.tensors.items()}
    for rank in ranks:
        for name, tensor in load(rank).items():
            total, value = totals[name], _wide(tensor).to(totals[name].device)
            if not value.is_floating_point():
                torch.maximum(total, value, out=total)
            elif rank in (buffers if name in replica.buffers else parameters):
                total += value
    return totals


def _wide(tensor: Tensor) -> Tensor:
    """As int64, or as fp64; complex numbers as pairs."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.to(torch.float64 if real.is_floating_point() else torch.int64)


def _start(tensor: Tensor) -> Tensor:
    """The initial value of a sum or maximum."""
    wide = _wide(torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device))
    least = 0.0 if wide.is_floating_point() else torch.iinfo(wide.dtype).min
    return wide.fill_(least)


def _like(total: Tensor, tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        return torch.view_as_complex(total).to(tensor.dtype)
    return total.to(tensor.dtype)


def _number(count: int) -> Callable[[], float]:
    return lambda: float(count)
