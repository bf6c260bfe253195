"""What differs between versions of torch, and what postlocal uses of torch's private names.

postlocal runs on torch 2.11 and later. Everything that depends on the version is here, and no other
module reads a private name of torch: a test holds that. Each function says what it does on a
version of torch that lacks the name.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from itertools import count
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

if TYPE_CHECKING:  # the public names have no types
    from torch._C._distributed_c10d import GradBucket, PrefixStore, Store
else:
    from torch.distributed import GradBucket, PrefixStore, Store

__all__ = ["GradBucket", "PrefixStore", "Store"]

# Groups of ranks


def all_gather_single(
    output: Tensor, tensor: Tensor, process_group: dist.ProcessGroup
) -> dist.Work | None:
    """Start an all-gather into one tensor; torch 2.11 calls it ``all_gather_into_tensor``."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    work: dist.Work | None = gather(output, tensor, group=process_group, async_op=True)
    return work


def default_group() -> dist.ProcessGroup:
    """The default process group, which must be there."""
    group = dist.group.WORLD
    assert group is not None
    return group


def default_store() -> Store:
    """The store of the default process group."""
    return default_group().get_group_store()


def own_connection(store: Store) -> Store:
    """A connection of its own to a store; the same one where torch cannot open another."""
    clone: Any = getattr(store, "clone", None)
    opened: Store = store if clone is None else clone()
    return opened


def timeout_of(process_group: dist.ProcessGroup) -> timedelta | None:
    """How long collectives of a group wait.

    None where the backend or torch does not tell: subgroups then wait as long as torch's default.
    """
    try:
        backend = process_group._get_backend(process_group._device_types[0])
    except (AttributeError, IndexError, RuntimeError):
        return None
    limit: timedelta | None = getattr(getattr(backend, "options", None), "_timeout", None)
    return limit


def new_group(ranks: Sequence[int], name: str, timeout: timedelta | None) -> dist.ProcessGroup:
    """A process group of torch with a name of our own, on the calling ranks alone.

    torch would name it by its ranks and by how many groups there are. Such a name comes again after
    groups were destroyed, and the store still holds addresses of those that had it; and ranks that
    have destroyed more than others wait at a name that nobody else has.

    Where torch makes no group by name, torch chooses the name from the ranks, and `destroy` keeps
    groups: then no name comes again.

    Args:
        ranks: global ranks of the members, in ascending order.
        name: the same on all members, and of no other group.
        timeout: how long its collectives wait; None: torch's default for the backend.
    """
    if not _makes_groups_by_name():
        made = dist.new_group(list(ranks), timeout=timeout, use_local_synchronization=True)
        return cast(dist.ProcessGroup, made)
    world, default = distributed_c10d._world, default_group()
    backend, store = world.pg_map[default]
    timeout = timeout or distributed_c10d._get_default_timeout(distributed_c10d.Backend(backend))
    created, _ = distributed_c10d._new_process_group_helper(
        len(ranks),
        ranks.index(dist.get_rank()),
        list(ranks),
        backend,
        store,
        distributed_c10d.GroupName(name),
        timeout=timeout,
        device_id=default.bound_device_id,
    )
    world.pg_group_ranks[created] = {rank: index for index, rank in enumerate(ranks)}
    return cast(dist.ProcessGroup, created)


def destroy(process_groups: Iterable[dist.ProcessGroup]) -> None:
    """Destroy groups that `new_group` made, unless the user has destroyed all groups already."""
    if not _makes_groups_by_name():
        return
    for process_group in process_groups:
        if process_group in distributed_c10d._world.pg_map:
            dist.destroy_process_group(process_group)


def _makes_groups_by_name() -> bool:
    needs = ("_world", "_get_default_timeout", "_new_process_group_helper", "GroupName")
    return all(hasattr(distributed_c10d, name) for name in needs)


# Tensors

_never_twice = count()


def version_of(tensor: Tensor) -> int:
    """A number that changes where a tensor is written to, except through ``.data``.

    Where torch does not count writes, it is another number each time, as after a write.
    """
    known: int | None = getattr(tensor, "_version", None)
    return -1 - next(_never_twice) if known is None else known


def copy_all_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source to its target: in one call, or one by one where torch lacks that call."""
    together = getattr(torch, "_foreach_copy_", None)
    if together is not None:
        together(targets, sources)
        return
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def norms_of(tensors: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """The norm of each tensor: in one call, or one by one where torch lacks that call."""
    together = getattr(torch, "_foreach_norm", None)
    if together is not None:
        return cast(Sequence[Tensor], together(tensors, dtype=dtype))
    return [torch.linalg.vector_norm(tensor, dtype=dtype) for tensor in tensors]


def compiled_from(model: nn.Module) -> nn.Module | None:
    """The module that torch.compile made a model from, or None."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else None


def tensors_of(layer: nn.Module) -> list[Tensor | None]:
    """Parameters and buffers of one module, not of those in it; tied ones as often as they occur.

    Without torch's own dictionaries they are asked for by name, which takes longer.
    """
    held = getattr(layer, "_parameters", None), getattr(layer, "_buffers", None)
    if held[0] is not None and held[1] is not None:
        return [*held[0].values(), *held[1].values()]
    named = (
        *layer.named_parameters(recurse=False, remove_duplicate=False),
        *layer.named_buffers(recurse=False, remove_duplicate=False),
    )
    return [tensor for _, tensor in named]


# Ahead-of-time compiler


def load_compiled(package: str) -> Any:
    """What runs a compiled package; called with a list of tensors, it takes that list apart.

    Raises:
        RuntimeError: if torch lacks the loader, or refuses the package: codecs then run eagerly.
    """
    try:
        return torch._inductor.aoti_load_package(package).loader.boxed_run
    except AttributeError as error:
        raise RuntimeError(f"torch {torch.__version__} loads no compiled package") from error


def compile_ahead(program: Any, package: str, options: Mapping[str, Any]) -> None:
    """Compile an exported program into a package.

    Raises:
        AttributeError: if torch lacks the compiler: codecs then run eagerly.
    """
    torch._inductor.aoti_compile_and_package(
        program, package_path=package, inductor_configs=dict(options)
    )


# Optimizers


def hooks_of(optimizer: Optimizer, name: str) -> list[Any]:
    """Hooks that a user registered for an optimizer's state, in order.

    Args:
        optimizer: the optimizer.
        name: such as ``"state_dict_pre"``, after `Optimizer.register_state_dict_pre_hook`.

    Returns:
        The hooks; none where torch keeps them elsewhere.
    """
    return list(getattr(optimizer, f"_optimizer_{name}_hooks", {}).values())


# DistributedDataParallel


def buffers_option(model: DistributedDataParallel) -> str:
    """The attribute that tells whether forward passes broadcast buffers.

    It is ``forward_sync_buffers`` from torch 2.13 on, and ``broadcast_buffers`` before.
    """
    name = "forward_sync_buffers"
    return name if hasattr(model, name) else "broadcast_buffers"


def ignored_names(module: nn.Module) -> set[str]:
    """Names that DistributedDataParallel, once it wraps a module, leaves alone.

    None where torch keeps them elsewhere.
    """
    return set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))


def joins(model: DistributedDataParallel) -> bool:
    """Whether a model is inside ``join()``, or was: torch does not reset it.

    False where torch does not tell.
    """
    return bool(getattr(getattr(model, "_join_config", None), "enable", False))


def delays_parameters(model: DistributedDataParallel) -> bool:
    """Whether it has ``delay_all_reduce_named_params``; False where torch does not tell."""
    return bool(getattr(model, "_delay_all_reduce_params", ()))


def reduces_in_python(model: DistributedDataParallel) -> bool:
    """Whether torch.compile's reducer reduces its gradients; False where torch does not tell."""
    return bool(getattr(model, "_use_python_reducer", False))


def own_hook(model: DistributedDataParallel) -> str | None:
    """The name of its communication hook.

    None where torch does not tell: it refuses a second hook by itself.
    """
    data: Any = getattr(model, "_get_ddp_logging_data", dict)()
    name: str | None = data.get("comm_hook") or None
    return name


def register_hook(model: DistributedDataParallel, state: object, hook: Any) -> None:
    """Register a communication hook that copies of the model do not have.

    Where torch keeps hooks elsewhere, copies have it too.
    """
    model.register_comm_hook(state, hook)
    kept = getattr(model, "_comm_hooks", None)
    if kept:
        kept.pop()


def forward_pre_hooks(module: nn.Module) -> list[Any]:
    """Hooks that run before a module's forward pass; none where torch keeps them elsewhere."""
    return list(getattr(module, "_forward_pre_hooks", {}).values())


def search_within(model: DistributedDataParallel, process_group: dist.ProcessGroup) -> None:
    """Have its search for unused parameters communicate within a group.

    Where torch cannot, it goes on to communicate within the model's own group: slower, and right,
    since all ranks of it run the same backward passes.
    """
    update = getattr(model.reducer, "_update_process_group", None)
    if update is not None:
        update(process_group)


def remove_hook(model: DistributedDataParallel) -> bool:
    """Give a model a reducer without communication hook, since torch cannot take one away.

    Returns:
        Whether it did. Where torch lacks what this needs the hook stays, and the caller has to
        have it raise.
    """
    build: Any = model
    needs = ("_build_params_for_reducer", "_build_debug_param_to_name_mapping", "_ddp_init_helper")
    if not all(hasattr(model, name) for name in needs) or not _can_let_go(model):
        return False
    build.reducer._remove_autograd_hooks()
    if not any(parameter.requires_grad for parameter in model.module.parameters()):
        return True
    parameters, sparse = build._build_params_for_reducer()
    names = build._build_debug_param_to_name_mapping(parameters)
    build._ddp_init_helper(parameters, sparse, names, build.static_graph)
    build._has_rebuilt_buckets = False
    if build.static_graph:
        build._static_graph_delay_allreduce_enqueued = False
        build.reducer._set_static_graph()
        build.logger._set_static_graph()
    return True


def _can_let_go(model: DistributedDataParallel) -> bool:
    return all(
        hasattr(model.reducer, name) for name in ("_remove_autograd_hooks", "_set_static_graph")
    )


# Optimizers in the backward pass

_IN_BACKWARD = "_in_backward_optimizers"  # the attribute by which torch, too, finds them


def optimizers_in_backward(parameter: Tensor) -> Sequence[Optimizer]:
    """The optimizers that step a parameter as soon as its gradient is there."""
    return cast(Sequence[Optimizer], getattr(parameter, _IN_BACKWARD, ()))


def has_optimizer_in_backward(parameter: Tensor) -> bool:
    """Whether `set_optimizer_in_backward`, or torch's function for it, was called."""
    return hasattr(parameter, _IN_BACKWARD)


def set_optimizer_in_backward(parameter: Tensor, optimizer: Optimizer) -> None:
    """Note an optimizer where torch looks for it."""
    setattr(parameter, _IN_BACKWARD, [optimizer])


def check_optimizers_in_backward(model: DistributedDataParallel) -> None:
    """Refuse a version of torch that cannot step parameters in the backward pass.

    Raises:
        RuntimeError: naming what it lacks, and the fix.
    """
    engine: Any = getattr(torch.autograd.Variable, "_execution_engine", None)
    lacks = [
        name
        for owner, name in (
            (engine, "queue_callback"),
            (model, "_lazy_init"),
            (model.reducer, "_set_optimizer_in_backward"),
        )
        if not hasattr(owner, name)
    ]
    if lacks:
        raise RuntimeError(
            f"torch {torch.__version__} lacks {', '.join(lacks)}, which optimizers in the backward "
            "pass need: call optimizer.step() in the loop"
        )


def initialize(model: DistributedDataParallel) -> None:
    """Have a model look now for optimizers in its backward pass, and not in its first pass."""
    made: Any = model
    if not made._lazy_init_ran:
        made._lazy_init()


def leave_used_gradients(model: DistributedDataParallel) -> None:
    """Have the reducer leave alone gradients that optimizers have used up."""
    reducer: Any = model.reducer
    reducer._set_optimizer_in_backward()


def after_backward(act: Any) -> None:
    """Call a function at the end of the backward pass that is under way."""
    engine: Any = torch.autograd.Variable._execution_engine
    engine.queue_callback(act)
