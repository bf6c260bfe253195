"""What wraps a model or its optimizer: what a strategy works with, and what it cannot.

A strategy works with a plain module, or with a DistributedDataParallel around one. Whatever else
shards, reduces or copies parameters does so behind the strategy's back, and is refused. Classes are
recognised by the module that defines them, so that no package is imported for it.
"""

import gc
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from postlocal import torch_versions
from postlocal.checks import shown
from postlocal.tensors import is_dtensor


class _Known(NamedTuple):
    """Classes that manage parameters by themselves, and what to do about them."""

    module: str
    """Beginning of the name of the module that defines them."""
    name: str
    """Pattern of the names of the classes."""
    fix: str


_OWN_SHARDS = (
    "it shards the parameters, and each rank's shard would be taken for the whole: wrap the model "
    "in DistributedDataParallel"
)
_OWN_REDUCTION = (
    "it reduces gradients by itself, beside the strategy: wrap the model in torch's "
    "DistributedDataParallel"
)
_MANAGER = r"Parallel|DDP|Engine|Shard|Zero|Gemini|Pipeline|Distributed"
_MODELS = (
    _Known("torch.distributed.fsdp", "FullyShardedDataParallel|FSDPModule", _OWN_SHARDS),
    _Known("torch.distributed._composable", "FSDP|Replicate", _OWN_SHARDS),
    _Known(
        "torch.nn.parallel.data_parallel",
        "DataParallel",
        "it copies the model to several devices in each forward pass: use one process a device, "
        "and DistributedDataParallel",
    ),
    _Known("deepspeed.", _MANAGER, _OWN_SHARDS),
    _Known("fairscale.", _MANAGER, _OWN_SHARDS),
    _Known("megatron.", _MANAGER, _OWN_SHARDS),
    _Known("colossalai.", _MANAGER, _OWN_SHARDS),
    _Known("torchrec.", _MANAGER, _OWN_SHARDS),
    _Known("apex.", _MANAGER, _OWN_REDUCTION),
    _Known("horovod.", ".", _OWN_REDUCTION),
    _Known("hivemind.", ".", _OWN_REDUCTION),
    _Known("torchft.", ".", _OWN_REDUCTION),
    _Known("bagua.", ".", _OWN_REDUCTION),
    _Known("byteps.", ".", _OWN_REDUCTION),
)
_INNER = "make the optimizer that it wraps, of torch.optim, and pass that"
_OPTIMIZERS = (
    _Known("torch.distributed.optim.zero", ".", f"it shards updates over the ranks: {_INNER}"),
    _Known("torch.distributed.optim.post", ".", f"it averages parameters itself: {_INNER}"),
    _Known("postlocal.optim", ".", f"it averages parameters itself: {_INNER}"),
    _Known("horovod.", ".", f"it reduces gradients itself: {_INNER}"),
    _Known("deepspeed.runtime.", ".", f"it reduces or shards by itself: {_INNER}"),
    _Known("fairscale.optim.oss", ".", f"it shards updates over the ranks: {_INNER}"),
    _Known("colossalai.", "Zero|Distributed|Hybrid|Gemini", f"it shards by itself: {_INNER}"),
    _Known("megatron.", "Distributed|Chained|Float16", f"it shards by itself: {_INNER}"),
    _Known("apex.contrib.optimizers.", "Distributed", f"it shards by itself: {_INNER}"),
    _Known("hivemind.", ".", f"it averages by itself: {_INNER}"),
    _Known("torchft.", ".", f"it averages by itself: {_INNER}"),
    _Known("bagua.", ".", f"it reduces gradients itself: {_INNER}"),
    _Known("byteps.", ".", f"it reduces gradients itself: {_INNER}"),
)
_WRAPPED = ("optimizer", "_optimizer", "optim", "_optim")
_COMPILED = "_orig_mod."


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside DistributedDataParallel and torch.compile.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> unwrap(model) is model
        True
    """
    for inner in _layers(model):
        model = inner
    return model


def find_ddp(model: nn.Module) -> DistributedDataParallel | None:
    """The DistributedDataParallel around a model, or None."""
    for layer in _layers(model):
        if isinstance(layer, DistributedDataParallel):
            return layer
    return None


def ignored(model: nn.Module) -> frozenset[str]:
    """Names of the parameters and buffers that DistributedDataParallel was told to leave alone.

    They belong to each rank: a strategy leaves them alone as well. Names are those within
    `unwrap` of the model.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["bias"])
        >>> sorted(ignored(model))
        ['bias']
    """
    ddp = find_ddp(model)
    names = set() if ddp is None else set(ddp.parameters_to_ignore)
    for layer in _layers(model):
        names |= torch_versions.ignored_names(layer)
    return frozenset(name.replace(_COMPILED, "") for name in names)


def check_model(model: nn.Module) -> None:
    """Refuse a model that anything but an outermost DistributedDataParallel manages.

    Raises:
        TypeError: if it is no module, or something in it shards or manages parameters.
        ValueError: if it is part of a DistributedDataParallel that is not passed itself.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(_no_module(model))
    outer = [layer for layer in _layers(model) if isinstance(layer, DistributedDataParallel)]
    for name, module in model.named_modules():
        place = f"{name!r}, which is" if name else "model is"
        if (known := _known(type(module), _MODELS)) is not None:
            raise TypeError(f"model must not hold {_title(type(module))}; {place} one: {known.fix}")
        if isinstance(module, DistributedDataParallel) and module not in outer[:1]:
            raise TypeError(
                f"a DistributedDataParallel must be outermost, and {name!r} in model is one: pass "
                "that DistributedDataParallel itself, or build it around the whole model"
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        _check_whole(name, tensor)
    owner = None if outer else _owner(model.parameters())
    if owner is not None:
        raise ValueError(
            f"model is inside a {_title(type(owner))}{_of(owner)}, which goes on reducing "
            "gradients in each step: pass that wrapper, which the loop calls, or drop it (del)"
        )


def check_optimizer(optimizer: object, name: str = "optimizer") -> None:
    """Refuse an optimizer that reduces or shards by itself, and what is no optimizer.

    A proxy that hands everything on to an optimizer is one.

    Args:
        optimizer: what was given.
        name: what messages call it.

    Raises:
        TypeError: with the fix.

    Example:
        >>> import torch
        >>> check_optimizer(torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.1))
    """
    for inner in _wrapped(optimizer):
        known = _known(type(inner), _OPTIMIZERS)
        if known is not None:
            raise TypeError(f"{name} must not be {_title(type(inner))}: {known.fix}")
    if not all(hasattr(optimizer, need) for need in ("param_groups", "state", "step")):
        hint = ""
        if isinstance(optimizer, nn.Module):
            hint = ": model comes first, then optimizer"
        elif hasattr(optimizer, "optimizer"):
            hint = ": pass its optimizer"
        elif isinstance(optimizer, Iterable):
            hint = ": for several, pass a list of them"
        raise TypeError(f"{name} must be a torch.optim.Optimizer, got {shown(optimizer)}{hint}")


def gradients_reduced_elsewhere(
    parameters: Iterable[Tensor], attached: nn.Module | None = None
) -> str | None:
    """What else averages the gradients of some parameters, in words; None if nothing is found.

    Args:
        parameters: those of the model.
        attached: the wrapper that was passed to `attach`, which is not meant.

    A search through all objects alive: it takes tens of milliseconds.
    """
    owner = _owner(parameters, attached)
    return None if owner is None else _title(type(owner)) + _of(owner)


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    yield model
    inner = (
        model.module
        if isinstance(model, DistributedDataParallel)
        else torch_versions.compiled_from(model)
    )
    if isinstance(inner, nn.Module):
        yield from _layers(inner)


def _known(kind: type, table: tuple[_Known, ...]) -> _Known | None:
    for base in kind.__mro__:
        module = getattr(base, "__module__", None)
        for known in table:
            if str(module).startswith(known.module) and re.search(known.name, base.__name__):
                return known
    return None


def _title(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _no_module(model: object) -> str:
    kind = _title(type(model))
    if kind.startswith("torch.distributed.pipelining"):
        return (
            f"model must be a torch.nn.Module, got a pipeline stage, {kind}: pass the module of "
            "the stage, with the process_group of the ranks that hold the same stage"
        )
    hint = ""
    if isinstance(model, Optimizer):
        hint = ": model comes first, then optimizer"
    elif isinstance(getattr(model, "module", None), nn.Module):
        hint = ": pass the module in it"
    return f"model must be a torch.nn.Module, got {shown(model)}{hint}"


def _check_whole(name: str, tensor: Tensor) -> None:
    if is_dtensor(tensor):
        what = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
        raise TypeError(
            f"{what} {name!r} is a DTensor: sharded models (FSDP2, tensor parallel) are not "
            "supported yet; wrap the model in DistributedDataParallel"
        )


def innermost(optimizer: object) -> object:
    """The optimizer that a proxy hands on to, or the optimizer itself.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.1)
        >>> innermost(optimizer) is optimizer
        True
    """
    *_, inner = _wrapped(optimizer)
    return inner


def _wrapped(optimizer: object) -> Iterator[object]:
    """An optimizer, and those that it hands on to."""
    seen: set[int] = set()
    waiting = [optimizer]
    while waiting:
        inner = waiting.pop()
        if id(inner) in seen:
            continue
        seen.add(id(inner))
        yield inner
        held = (getattr(inner, name, None) for name in _WRAPPED)
        waiting += [one for one in held if hasattr(one, "param_groups")]


def _owner(parameters: Iterable[Tensor], besides: nn.Module | None = None) -> nn.Module | None:
    """A module alive that reduces gradients of some of the parameters, besides a known one."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    ids = {id(parameter) for parameter in parameters if parameter.requires_grad}
    if _reducing(ids, besides) is None:
        return None
    gc.collect()  # one that nothing refers to any more reduces nothing
    return _reducing(ids, besides)


def _reducing(ids: set[int], besides: nn.Module | None) -> nn.Module | None:
    kinds: dict[type, bool] = {}
    for found in gc.get_objects():
        kind = type(found)  # `isinstance` would ask the object, which may be anything
        if kind not in kinds:
            kinds[kind] = _reduces(kind)
        if kinds[kind] and found is not besides and _holds(found, ids):
            reducing: nn.Module = found
            return reducing
    return None


def _reduces(kind: type) -> bool:
    bases = kind.__mro__
    if nn.Module not in bases or nn.DataParallel in bases:
        return False
    return DistributedDataParallel in bases or _known(kind, _MODELS) is not None


def _holds(module: nn.Module, ids: set[int]) -> bool:
    try:
        return any(id(held) in ids for held in module.parameters())
    except AttributeError:  # one that is being made, or was taken apart
        return False


def _of(owner: nn.Module) -> str:
    inside = getattr(owner, "module", None)
    return f" of {_title(type(inside))}" if isinstance(inside, nn.Module) else ""
