"""Comparison of a checkpoint with the run that it is loaded into."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from postlocal.checkpoint.packing import pack
from postlocal.expressions import difference, expression
from postlocal.strategies import parse
from postlocal.sync.clock import Sync

_LONGEST = 60  # characters of a value in a message
_FOLLOWS_THE_STEP = ("params", "lr", "initial_lr")


def describe(sync: Sync) -> dict[str, Any]:
    """Model, optimizer, strategy and levels as plain values, to compare and to show."""
    replica = sync.replica
    names = {id(tensor): name for name, tensor in replica.tensors.items()}
    return {
        "tensors": {
            name: f"{tuple(tensor.shape)} of {tensor.dtype}"
            + (", not trained" if name in replica.frozen else "")
            for name, tensor in replica.tensors.items()
        },
        "own": {name: f"{tuple(t.shape)} of {t.dtype}" for name, t in replica.own.items()},
        "optimizers": [_describe_optimizer(each, names) for each in sync.inner.optimizers],
        "strategy": str(sync.strategy),
        "outer": expression(sync.strategy.outer, "outer"),
        "levels": {level: sync.groups[level].size for level in sync.groups.levels},
    }


def model_difference(saved: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """A message about the first tensor that differs between two descriptions."""
    return _first_difference(saved["tensors"], here["tensors"])


def own_difference(
    saved: Mapping[str, Any], here: Mapping[str, Any], same_world: bool
) -> str | None:
    """The same for tensors that belong to one rank, which no other rank can load."""
    if saved["own"] and not same_world:
        return (
            f"holds tensors that belong to one rank alone, as DistributedDataParallel ignores them "
            f"({next(iter(saved['own']))!r}): resume it on as many ranks as saved it"
        )
    return _first_difference(saved["own"], here["own"])


def _first_difference(there: Mapping[str, str], present: Mapping[str, str]) -> str | None:
    for name in [*present, *there]:
        if there.get(name) != present.get(name):
            return (
                f"is of another model: {name!r} is {there.get(name, 'missing')} there, "
                f"{present.get(name, 'missing')} here"
            )
    return None


def _describe_optimizer(optimizer: Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
    """Its class, and the names of its parameters, group by group."""
    return {
        "class": _class_of(optimizer),
        "groups": [
            [names.get(id(p), f"another of shape {tuple(p.shape)}") for p in group["params"]]
            for group in optimizer.param_groups
        ],
    }


def optimizer_difference(
    saved: Mapping[str, Any],
    here: Mapping[str, Any],
    states: Sequence[Mapping[str, Any]],
    present: Sequence[Optimizer],
) -> str | None:
    """A message about the first difference between optimizers that prevents loading.

    Args:
        saved: description of the saved run.
        here: description of this one.
        states: the saved optimizers' states.
        present: this run's optimizers.
    """
    if len(states) != len(present):
        return f"is of other optimizers: {len(states)} saved, {len(present)} here"
    described = zip(saved["optimizers"], here["optimizers"], states, present, strict=True)
    for number, (there, mine, state, optimizer) in enumerate(described):
        differences = (
            _both(there["class"], mine["class"]),
            _group_difference(there["groups"], mine["groups"]),
            _state_difference(state["state"], optimizer.state_dict()["state"]),
        )
        which = f" (optimizer[{number}])" if len(present) > 1 else ""
        for words in filter(None, differences):
            return f"is of another optimizer{which}: {words}"
    return None


def changed_values(
    states: Sequence[Mapping[str, Any]], present: Sequence[Optimizer]
) -> Iterator[str]:
    """A message about entries of param groups that differ, except those that schedulers set."""
    for number, (state, optimizer) in enumerate(zip(states, present, strict=True)):
        which = f" of optimizer[{number}]" if len(present) > 1 else ""
        groups = zip(state["param_groups"], optimizer.param_groups, strict=True)
        for index, (saved, here) in enumerate(groups):
            for key in sorted({*saved} & {*here} - {*_FOLLOWS_THE_STEP}):
                if pack(saved[key])[0] != pack(here[key])[0]:
                    yield f"{key} of param group {index}{which}: {_both(saved[key], here[key])}"


def strategy_differences(
    saved: Mapping[str, Any], here: Mapping[str, Any], same_world: bool
) -> str | None:
    """A message about how strategies and levels differ.

    Args:
        saved: description of the saved run.
        here: description of this one.
        same_world: whether the same number of ranks saved it; otherwise levels differ.
    """
    there, present = saved["strategy"], here["strategy"]
    found = []
    if not _same(there, present):
        words = difference(there, present)
        found = [f"{there} saved, {present} here" + (f" ({words})" if words else "")]
    if same_world:
        levels = [_levels(about["levels"]) for about in (saved, here)]
        found += [f"topology: {_both(*levels)}"] * (levels[0] != levels[1])
    return "; ".join(found) or None


def _same(there: str, here: str) -> bool:
    """Whether two expressions give equal strategies."""
    if there == here:
        return True
    try:
        return parse(there) == parse(here)
    except ValueError:  # there is a value without an expression
        return False


def _levels(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{level} of {size}" for level, size in sizes.items())


def _both(saved: Any, here: Any) -> str | None:
    if isinstance(saved, Tensor) or isinstance(here, Tensor) or saved != here:
        return f"{_short(saved)} saved, {_short(here)} here"
    return None


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _class_of(optimizer: Optimizer) -> str:
    kind = type(optimizer)
    # The module of a script's class depends on whether the script is run or imported.
    module = f"{kind.__module__}." if kind.__module__.startswith("torch.") else ""
    return f"{module}{kind.__qualname__}"


def _group_difference(saved: Sequence[Sequence[str]], here: Sequence[Sequence[str]]) -> str | None:
    if len(saved) != len(here):
        return f"{len(saved)} param groups saved, {len(here)} here"
    for number, (there, present) in enumerate(zip(saved, here, strict=True)):
        for index, (mine, other) in enumerate(zip_longest(present, there, fillvalue="none")):
            if mine != other:
                return f"parameter {index} of param group {number}: {_both(other, mine)}"
    return None


def _state_difference(saved: Mapping[Any, Any], here: Mapping[Any, Any]) -> str | None:
    """Entries of the state of one parameter that differ, if both have some."""
    for index in here:
        there, present = (
            ", ".join(sorted(map(str, state.get(index, {})))) for state in (saved, here)
        )
        if there and present and there != present:
            return f"state of parameter {index}: {_both(there, present)}"
    return None
