"""How a training loop comes under a strategy: `attach` checks, compares ranks and makes groups."""

import logging
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from datetime import timedelta
from threading import Lock
from typing import Literal
from weakref import WeakSet

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from postlocal import checks, fragments, outer, schedule
from postlocal.checks import choice, optional
from postlocal.codec import kernels
from postlocal.comm import agreement, group
from postlocal.comm.group import Group, Processes
from postlocal.comm.groups import LevelGroups, by_node
from postlocal.errors import DisagreementError
from postlocal.expressions import difference
from postlocal.meter import Meter
from postlocal.schedule import WORLD, Round
from postlocal.strategies import Strategy, is_strategy
from postlocal.sync import supported_tensors
from postlocal.sync.clock import Sync
from postlocal.sync.consistency import take_first_
from postlocal.sync.ddp import DDPHook, UnreducedGradients, check_ddp
from postlocal.sync.fragment import Fragment
from postlocal.sync.inner_optimizer import InnerOptimizers, as_optimizers
from postlocal.sync.parameters import Replica
from postlocal.sync.supported_wrappers import check_model, find_ddp
from postlocal.topology import Partition, Topology, default, is_topology, unknown_level
from postlocal.torch_versions import buffers_option
from postlocal.version import __version__
from postlocal.wire import Staging, fp32, sent_as

logger = logging.getLogger("postlocal")

_attached: WeakSet[Sync] = WeakSet()
_lock = Lock()  # ranks may be threads
_LARGE = 2**23  # parameters for which compiled codecs are worth their half a minute


def attach(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    strategy: Strategy,
    *,
    topology: Topology | None = None,
    process_group: dist.ProcessGroup | Group | None = None,
    initial: Literal["broadcast", "refuse"] = "broadcast",
    timeout: checks.Timeout | None = None,
) -> Sync:
    """Put a training loop under a strategy; collective, to be called by all ranks.

    All process groups are made here, all levels resolved, and all ranks compared: whatever only
    some of them were given raises on every one.

    Args:
        model: the module that is trained. A strategy that averages gradients at any level but
            ``"rank"`` needs it wrapped in DistributedDataParallel, with no communication hook.
            Where there is such a wrapper, pass it, and not the module inside. Parameters and
            buffers that it was told to ignore are left alone.
        optimizer: the inner optimizer, or a list of them, such as Muon for matrices and AdamW for
            the rest. Each must hold parameters of ``model``, no two the same, and neither reduce
            nor shard by itself. A schedule that follows the learning rate sees the greatest of all
            parameter groups. ``step()`` is called once, however many of them stepped.
        strategy: what to do; see `postlocal.strategies`.
        topology: the levels between ``"rank"`` and ``"world"``; None: the machines, as level
            ``"node"``, where the strategy needs it, and else none; see
            `postlocal.topology.default`.
        process_group: the replicas; None: torch's default group, or one rank alone where torch
            has none. A group of `postlocal.virtual` works too.
        initial: what to do with parameters and buffers that differ between ranks: take rank 0's,
            or raise. The same holds for the optimizer's state where gradients are averaged over
            all ranks from the first step on.
        timeout: seconds, or a `datetime.timedelta`, that a synchronization waits for a missing
            rank, at most 1e7 seconds; None: as long as ``process_group`` does. `attach` itself
            always waits as long as that.

    Returns:
        The clock to call ``step()`` on, once for each optimizer step.

    Raises:
        ValueError: if an argument is bad, the strategy names a level that the topology lacks, or
            it follows a learning rate that no optimizer has.
        TypeError: if an argument is of another type, an object of the strategy has no repr of its
            own, a parameter or a buffer is of a kind that cannot be averaged, or something else
            than DistributedDataParallel shards or manages parameters.
        DisagreementError: if ranks were given different versions, strategies, topologies or
            models.
        PeerError: if a rank does not come in time.

    Example:
        >>> import torch
        >>> import postlocal
        >>> from postlocal import strategies
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> sync = postlocal.attach(model, optimizer, strategies.local_sgd(period=2))
        >>> for _ in range(3):
        ...     model(torch.ones(4)).sum().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     sync.step()
        >>> sync.finish()
        >>> sync.steps, sync.agreed
        (3, True)
    """
    everyone = group.resolve(process_group, _span(timeout))
    everyone.announce(0)
    machines = by_node(everyone)  # on every rank, whatever it was given
    with agreement.together(everyone):
        optional(checks.timeout)("timeout", timeout)
        choice("initial", initial, ("broadcast", "refuse"))
        is_strategy("strategy", strategy)
        check_comparable(strategy)
        if topology is None:
            topology = default(strategy.levels, machines, everyone.rank)
        is_topology("topology", topology)
        loop = _look_at(model, optimizer, strategy, topology, everyone)
    agreement.check(everyone, loop.described() | {"initial": [initial]}, difference)
    with ExitStack() as opened:  # what is closed where something fails
        groups = LevelGroups(everyone, topology)
        opened.callback(groups.close)
        meter = Meter()
        with agreement.together(everyone):
            gradients = _gradients(loop.ddp, strategy, everyone, groups, meter)
            opened.callback(gradients.close)
            gradients.use(loop.first.gradients)
        _agree_on_start(groups[WORLD], loop.replica, initial)
        if loop.first.gradients == WORLD:
            _agree_on_state(groups[WORLD], loop.replica, loop.inner, initial)
        with agreement.together(everyone):
            made = _fragments(loop, groups)
            sync = Sync(strategy, loop.replica, loop.inner, groups, gradients, meter, made)
            opened.pop_all()
            opened.callback(sync.close)
        opened.pop_all()
    _take_over(sync)
    if everyone.rank == 0:
        _warn_of_one_group(strategy, loop.partitions)
        _warn_of_averages_in_state(strategy, loop.inner)
        logger.info("attached: %r; %s; %s", sync, loop.replica, loop.inner)
    return sync


@dataclass(frozen=True)
class _Loop:
    """What one rank was given, looked at and found fit; nothing of it is altered yet."""

    strategy: Strategy
    partitions: Mapping[str, Partition]
    replica: Replica
    inner: InnerOptimizers
    ddp: DistributedDataParallel | None
    fragments: Sequence[Sequence[str]]
    """Names of the parameters of each fragment."""
    first: Round

    def described(self) -> dict[str, agreement.Lines]:
        """What has to be the same on all ranks."""
        averages = self.strategy.optimizer_state == "average"
        return {
            "version of postlocal": [__version__],
            "strategy": [str(self.strategy)],
            "first round": [repr(self.first)],
            "topology": [repr(self.partitions)],
            "wrapper of the model": [_describe(self.ddp)],
            "parameters and buffers": self.replica.describe(),
            "fragments": [", ".join(names) for names in self.fragments],
            "optimizers": self.inner.kinds() if averages else [],
        }


def _look_at(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    strategy: Strategy,
    topology: Topology,
    everyone: Group,
) -> _Loop:
    """Check what one rank was given; nothing is sent."""
    check_model(model)
    optimizers = as_optimizers(optimizer)
    replica = Replica(model)
    ddp = find_ddp(model)
    _check_ddp(ddp, everyone)
    if ddp is not None and strategy.gradient_wire != fp32():
        supported_tensors.check_dense(ddp.module)
    _warn_of_batch_norm(model, strategy, everyone)
    inner = InnerOptimizers(optimizers, replica)
    _check_lr(strategy, inner, replica)
    names = strategy.fragments.split(replica.module, _sizes(replica))
    partitions = topology.partition(everyone.size)
    check_levels(strategy, partitions)
    first = schedule.planned(strategy.schedule, 0, inner.lr)
    _warm_up(strategy, replica)
    return _Loop(strategy, partitions, replica, inner, ddp, names, first)


def _fragments(loop: _Loop, groups: LevelGroups) -> list[Fragment]:
    """What is synchronized at level ``"world"``, with wires and anchors."""
    strategy, parameters, staging = loop.strategy, loop.replica.parameters, Staging()
    return [
        Fragment(
            {name: parameters[name] for name in names},
            WORLD,
            strategy.wire.open(groups, WORLD, staging),
            strategy,
            fragments.modules(loop.replica.module, names, strategy.fragments.layers),
            number=index if len(loop.fragments) > 1 else None,
        )
        for index, names in enumerate(loop.fragments)
    ]


def check_comparable(strategy: Strategy) -> None:
    """Refuse an object whose repr is only its address: ranks compare strategies as text.

    Functions have names, and partials show their arguments; both pass.

    Raises:
        TypeError: naming the axis and the object's class.
    """
    for axis in fields(strategy):
        hidden = re.search(r"<([\w.<>]+) object at 0x", repr(getattr(strategy, axis.name)))
        if hidden:
            raise TypeError(
                f"{axis.name} must be a value that ranks can compare by its repr, got an object of "
                f"class {hidden[1]}, whose repr shows only an address: make the class a frozen "
                "dataclass, @dataclass(frozen=True)"
            )


def check_levels(strategy: Strategy, partitions: Mapping[str, Partition]) -> None:
    """Check that a strategy's levels are there.

    Args:
        strategy: its schedule names levels.
        partitions: what `Topology.partition` gives for the world.

    Raises:
        ValueError: naming the level that is missing.
    """
    for level in sorted(strategy.levels):
        if level not in partitions:
            raise ValueError(unknown_level(level, partitions))


def _warn_of_one_group(strategy: Strategy, partitions: Mapping[str, Partition]) -> None:
    """Say that a level of the strategy saves nothing, since all ranks are one group of it."""
    for level in sorted(strategy.levels - {WORLD}):
        ranks = len(partitions[level][0])
        if len(partitions[level]) == 1 and ranks > 1:
            logger.warning(
                "level %r holds all %d ranks, so that every step communicates with everybody; pass "
                "a topology with more than one group, such as topology.nodes(size=1)",
                level, ranks,
            )  # fmt: skip


def _warn_of_averages_in_state(strategy: Strategy, inner: InnerOptimizers) -> None:
    """Say that a schedule-free optimizer evaluates what is in its own state, rank by rank."""
    if strategy.schedule == schedule.every_step() or strategy.optimizer_state == "average":
        return
    for optimizer in inner.optimizers:
        if all(callable(getattr(optimizer, name, None)) for name in ("train", "eval")):
            logger.warning(
                "%s computes the parameters of optimizer.eval() from its state, which is each "
                "rank's own with optimizer_state=%r: take optimizer_state='average'",
                type(optimizer).__name__, strategy.optimizer_state,
            )  # fmt: skip


def _span(given: checks.Timeout | None) -> timedelta | None:
    """What a timeout comes to; None for none, and for one that all ranks refuse together."""
    try:
        limit = optional(checks.timeout)("timeout", given)
    except (TypeError, ValueError):
        return None
    return None if limit is None else timedelta(seconds=limit)


def _check_lr(strategy: Strategy, inner: InnerOptimizers, replica: Replica) -> None:
    """Refuse an optimizer without learning rate where something follows it."""
    asking = {
        "schedule": schedule.follows_lr(strategy.schedule),
        "outer": outer.follows_lr(
            strategy.outer, [parameter.detach() for parameter in replica.parameters.values()]
        ),
    }
    for axis, follows in asking.items():
        if follows and math.isnan(inner.lr):
            kinds = " and ".join(type(optimizer).__name__ for optimizer in inner.optimizers)
            raise ValueError(
                f"optimizer must have an 'lr' that is a number in a parameter group, since {axis} "
                f"{getattr(strategy, axis)} follows it, got none from "
                f"{kinds}: take a strategy that does not follow the "
                "learning rate, or, where a schedule of your own does not, set its attribute "
                "follows_lr to False"
            )


def _warn_of_batch_norm(model: nn.Module, strategy: Strategy, everyone: Group) -> None:
    """Warn of layers that communicate with all ranks in local steps too."""
    if everyone.size == 1 or not isinstance(everyone, Processes):  # it needs torch's own groups
        return
    if strategy.schedule == schedule.every_step():
        return
    for name, module in model.named_modules():
        norm = isinstance(module, nn.SyncBatchNorm)
        if norm and dist.get_world_size(module.process_group) == everyone.size:
            warnings.warn(
                f"{name!r} is a SyncBatchNorm, which communicates with all {everyone.size} ranks "
                "in each forward pass, in local steps too: keep BatchNorm, whose statistics are "
                "averaged at each synchronization, or give the layer the process_group of a node",
                stacklevel=4,
            )
            return


def _sizes(replica: Replica) -> dict[str, int]:
    return {name: parameter.nbytes for name, parameter in replica.parameters.items()}


def _warm_up(strategy: Strategy, replica: Replica) -> None:
    """Compile codecs where it pays, while nobody waits at a synchronization."""
    parameters = list(replica.parameters.values())
    if sum(parameter.numel() for parameter in parameters) < _LARGE:
        return
    for wire in (strategy.wire, strategy.gradient_wire):
        for codec in wire.codecs:
            for dtype in {sent_as(parameter.dtype) for parameter in parameters}:
                kernels.warm_up(codec, dtype, parameters[0].device)


def _gradients(
    ddp: DistributedDataParallel | None,
    strategy: Strategy,
    everyone: Group,
    groups: LevelGroups,
    meter: Meter,
) -> UnreducedGradients | DDPHook:
    if ddp is None:
        return UnreducedGradients(groups)
    # Wires but fp32 reduce on a thread beside the backward pass, where DDP may communicate too.
    wire = strategy.gradient_wire
    its_own = {WORLD: _over(everyone, ddp.process_group)}
    own = groups.beside(its_own if wire == fp32() else {})
    search = None
    if ddp.find_unused_parameters and not ddp.static_graph:
        search = own if wire == fp32() else groups.beside(its_own)
    return DDPHook(ddp, own, wire, meter, search)


def _over(everyone: Group, process_group: dist.ProcessGroup) -> Group:
    base = everyone if isinstance(everyone, Processes) else Processes(process_group)
    return base.over(process_group)


def _check_ddp(ddp: DistributedDataParallel | None, everyone: Group) -> None:
    if ddp is None:
        return
    check_ddp(ddp)
    if dist.get_world_size(ddp.process_group) != everyone.size:
        raise ValueError(
            f"process_group must be the one of the DistributedDataParallel model, which has "
            f"{dist.get_world_size(ddp.process_group)} ranks; got one of {everyone.size}"
        )


def _describe(ddp: DistributedDataParallel | None) -> str:
    """The wrapper, and those of its options that make collectives."""
    if ddp is None:
        return "none"
    options = ("find_unused_parameters", "static_graph", buffers_option(ddp))
    values = ", ".join(f"{name}={getattr(ddp, name)}" for name in options)
    return f"DistributedDataParallel({values})"


def _take_over(sync: Sync) -> None:
    """Have earlier clocks of the same parameters refuse to go on: two would undo each other."""
    taken = {id(parameter) for parameter in sync.replica.parameters.values()}
    with _lock:
        for earlier in _attached:
            held = {id(parameter) for parameter in earlier.replica.parameters.values()}
            if held & taken and not earlier.closed:
                earlier.give_way()
        _attached.add(sync)


def _agree_on_state(group: Group, replica: Replica, inner: InnerOptimizers, initial: str) -> None:
    """Where gradients are averaged from the start, equal replicas need equal optimizers."""
    agreement.check(group, {"state of the optimizer": inner.describe()})
    device = next(iter(replica.parameters.values())).device
    differing = take_first_(group, inner.tensors, device)
    if differing and initial == "refuse":
        raise DisagreementError(
            f"ranks differ in the state of the optimizer: {differing[0]}; start from equal states, "
            "or pass initial='broadcast'",
            what=differing[0],
        )
    if differing and group.rank == 0:
        logger.info(
            "states of the optimizer differed, as after rounds of local steps, and are rank 0's now"
        )


def _agree_on_start(group: Group, replica: Replica, initial: str) -> None:
    differing = agreement.same_values_(group, replica.tensors)
    replica.mark()
    if initial == "broadcast":
        return
    everyones = group.all_gather_object(differing)
    ranks = [rank for rank, names in enumerate(everyones) if names]
    if ranks:
        name = everyones[ranks[0]][0]
        raise DisagreementError(
            f"ranks differ in initial values: {name!r} on rank {ranks[0]} is not rank 0's; "
            "start from equal values, or pass initial='broadcast'",
            what=name,
            by_rank={rank: ", ".join(everyones[rank]) for rank in ranks},
            ranks=ranks,
        )
