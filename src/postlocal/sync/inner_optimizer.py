"""The inner optimizers, the user's: learning rate, and state at a synchronization."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from postlocal.checks import shown
from postlocal.comm.group import Group
from postlocal.sync.parameters import Replica
from postlocal.sync.status import layout_number
from postlocal.sync.supported_wrappers import check_optimizer, innermost
from postlocal.tensors import weigh_
from postlocal.torch_versions import version_of
from postlocal.wire import Divisor, fp32, maximum_, mean_

logger = logging.getLogger("postlocal")

_FIX = "call sync.finish() and sync.close() before such a change, and attach again after it"


def as_optimizers(given: Any) -> tuple[Optimizer, ...]:
    """The optimizers that a caller means by one, or by a list of them.

    Raises:
        TypeError: if it is neither, or one of them reduces or shards by itself.
        ValueError: if the list is empty.

    Example:
        >>> as_optimizers([])
        Traceback (most recent call last):
        ValueError: optimizer must be one, or a list of at least one, got []
    """
    if isinstance(given, str) or not isinstance(given, Sequence):
        check_optimizer(given)
        return (cast(Optimizer, given),)
    if not given:
        raise ValueError(f"optimizer must be one, or a list of at least one, got {shown(given)}")
    for number, optimizer in enumerate(given):
        check_optimizer(optimizer, f"optimizer[{number}]")
    return tuple(given)


def _names(optimizers: Sequence[object]) -> list[str]:
    """What messages call each of some optimizers."""
    if len(optimizers) == 1:
        return ["optimizer"]
    return [f"optimizer[{number}]" for number in range(len(optimizers))]


class InnerOptimizers:
    """View of the user's optimizers by the names of a replica's parameters.

    Args:
        optimizers: the user's; each parameter is held by one of them, or by none.
        replica: the parameters that are synchronized.

    Attributes:
        optimizers: as given.

    Raises:
        ValueError: if one of them holds no parameter of the replica, parameters of other modules,
            or one that another of them holds too.
    """

    def __init__(self, optimizers: Sequence[Optimizer], replica: Replica) -> None:
        self.optimizers = tuple(optimizers)
        self._names = _names(self.optimizers)
        self._replica = replica
        self._held = self._ids()
        for name, optimizer, held in zip(self._names, self.optimizers, self._held, strict=True):
            if not self._known(held):
                raise ValueError(
                    f"{name} must hold parameters of model, got one that holds none of them: make "
                    "it from model.parameters()"
                )
            if strangers := self._strangers(optimizer):
                raise ValueError(f"{name} must hold parameters of model only, {strangers}")
        if problem := self._shared():
            raise ValueError(problem)
        self._parameters = self._all_known()
        self._watches = [_Watch(optimizer) for optimizer in self.optimizers]
        self._written = self._versions()
        self._warned = False

    @property
    def optimizer(self) -> Optimizer:
        """The first of the optimizers."""
        return self.optimizers[0]

    def watch(self) -> None:
        """Count steps of the optimizers from here on, until `close`; see `warn_of_idle`."""
        for watch in self._watches:
            watch.open()
        self._idle()

    def warn_of_idle(self, rank: int) -> None:
        """Warn once where parameters were written to, and their optimizer took no step.

        Both are of the time since the last call, as far as can be seen. What is written in
        `own_writes` does not count.

        Args:
            rank: this rank; rank 0 logs.
        """
        idle = self._idle()
        if not idle or self._warned:
            return
        self._warned = True
        if rank == 0:
            logger.warning(
                "parameters changed, and the %s that attach was given took no step: if another one "
                "was made since, its learning rate and its state are not seen, nor saved; call "
                "sync.finish() and sync.close(), and attach again with it",
                " and ".join(idle),
            )

    @contextmanager
    def own_writes(self) -> Iterator[None]:
        """A ``with`` block in which this clock writes to parameters, and no optimizer."""
        before = self._versions()
        try:
            yield
        finally:
            now = self._versions()
            self._written = {n: noted + now[n] - before[n] for n, noted in self._written.items()}

    def disregard(self) -> None:
        """Let nothing count that was written so far; see `warn_of_idle`."""
        self._written = self._versions()

    def _idle(self) -> list[str]:
        """What messages call the optimizers that took no step while their parameters changed."""
        before, self._written = self._written, self._versions()
        changed = {name for name, version in self._written.items() if version != before[name]}
        found = []
        for number, (name, watch) in enumerate(zip(self._names, self._watches, strict=True)):
            worked = watch.worked([tensor for _, _, tensor in self._state_of(number)])
            if not worked and changed & self._moved_by(number):
                found.append(name)
        return found

    def _moved_by(self, number: int) -> set[str]:
        """Names of the parameters that an optimizer moves: all, where there is no other one."""
        if len(self._held) == 1:
            return set(self._replica.parameters)
        return set(self._known(self._held[number]))

    def _versions(self) -> dict[str, int]:
        return {name: version_of(tensor) for name, tensor in self._replica.parameters.items()}

    def close(self) -> None:
        """Leave the optimizers as they were before."""
        for watch in self._watches:
            watch.close()

    def __str__(self) -> str:
        total = len(self._replica.parameters)
        each = [
            f"{type(optimizer).__name__} of {len(self._known(held))}"
            for optimizer, held in zip(self.optimizers, self._held, strict=True)
        ]
        return f"{' and '.join(each)} of the {total} parameters"

    def kinds(self) -> list[str]:
        """One line for each parameter that an optimizer holds, with the optimizer's class."""
        held = self._parameters.items()
        return [f"{type(optimizer).__name__} of {name}" for name, (_, optimizer) in held]

    def refresh(self) -> str | None:
        """Follow parameters that were added to an optimizer, if the model has them.

        Returns:
            None; or, in words, a change that cannot be followed, and the fix.
        """
        before, held = self._held, self._ids()
        if held == before:
            return None
        for name, optimizer, old, new in zip(
            self._names, self.optimizers, before, held, strict=True
        ):
            if strangers := self._strangers(optimizer):
                return f"{name} must hold parameters of model only, {strangers}"
            known = self._known(new)
            if lost := [parameter for parameter in self._known(old) if parameter not in known]:
                return f"{name} held parameter {lost[0]!r} at attach and does not any more; {_FIX}"
        if problem := self._shared():
            return problem
        self._held = held
        self._parameters = self._all_known()
        return None

    def _ids(self) -> list[list[int]]:
        """What parameters each optimizer holds."""
        return [
            [id(p) for group in optimizer.param_groups for p in group["params"]]
            for optimizer in self.optimizers
        ]

    def _known(self, held: Sequence[int]) -> dict[str, Tensor]:
        chosen = set(held)
        return {n: p for n, p in self._replica.parameters.items() if id(p) in chosen}

    def _all_known(self) -> dict[str, tuple[Tensor, Optimizer]]:
        """Parameters that an optimizer holds, with it, in the order of the replica."""
        owner = {
            key: optimizer
            for optimizer, held in zip(self.optimizers, self._held, strict=True)
            for key in held
        }
        parameters = self._replica.parameters.items()
        return {n: (p, owner[id(p)]) for n, p in parameters if id(p) in owner}

    def _shared(self) -> str | None:
        """A parameter that two optimizers hold, in words."""
        owner: dict[int, str] = {}
        for name, held in zip(self._names, self._ids(), strict=True):
            for key in set(held):
                if key in owner:
                    both = next(iter(self._known([key])), "that is not trained")
                    return (
                        f"optimizers must hold parameters of their own, and {owner[key]} and "
                        f"{name} both hold {both!r}: give each parameter to one of them"
                    )
                owner[key] = name
        return None

    def _strangers(self, optimizer: Optimizer) -> str | None:
        """Parameters that the model does not have, in words."""
        known = {id(tensor) for tensor in self._replica.every_parameter()}
        params = [p for group in optimizer.param_groups for p in group["params"]]
        shapes = [tuple(p.shape) for p in params if id(p) not in known]
        if not shapes:
            return None
        return (
            f"got {len(shapes)} that it lacks (the first has shape {shapes[0]}): nothing would "
            "synchronize them. Make one module of all that is trained, such as "
            "nn.ModuleList([model, head]), and attach to that"
        )

    @property
    def lr(self) -> float:
        """The greatest learning rate of all parameter groups; NaN where none has a number."""
        groups = (group for optimizer in self.optimizers for group in optimizer.param_groups)
        given = (group.get("lr") for group in groups)
        known = [float(lr) for lr in given if isinstance(lr, Real | Tensor)]
        return max(known, default=math.nan)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors of its state, by what they are and the parameter's name."""
        return {f"{key} of {name}": tensor for name, key, tensor in self._state()}

    def describe(self) -> list[str]:
        """One line for each tensor of its state, in the order in which `average_` takes them."""
        return [
            f"{name}|{key}|{tuple(tensor.shape)}|{str(tensor.dtype).removeprefix('torch.')}"
            for name, key, tensor in self._state()
        ]

    def layout(self) -> int:
        """A number that tells descriptions apart."""
        return layout_number(self.describe())

    def reset(self) -> None:
        """Drop all state, as new optimizers would start."""
        for optimizer in self.optimizers:
            optimizer.state.clear()

    def zero_nonfinite_(self) -> None:
        """Zero every tensor of the state that holds infinities or NaN."""
        for _, _, tensor in self._state():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                tensor.zero_()

    def average_(self, group: Group, weight: float, divisor: Divisor, unanimous: bool) -> int:
        """Replace the state by its mean over a group, counters of steps by the largest.

        A tensor that a rank does not have yet, since its parameter never had a gradient there,
        counts as zeros.

        Args:
            group: who takes part.
            weight: of this rank in the mean.
            divisor: gives the sum of the weights.
            unanimous: whether all ranks have the same `layout`.

        Returns:
            Bytes of payload that this rank sent.
        """
        if not unanimous:
            self._complete(group)
        tensors = [tensor for _, _, tensor in self._state()]
        moments = [t for t in tensors if t.dim() and t.is_floating_point()]
        counters = [t for t in tensors if not (t.dim() and t.is_floating_point())]
        weigh_(moments, weight)
        sent = mean_(moments, group, fp32(), divisor)
        return sent + maximum_(counters, group, moments[0].device if moments else None)

    def _state(self) -> Iterator[tuple[str, str, Tensor]]:
        for name, (parameter, optimizer) in self._parameters.items():
            yield from _tensors_of(name, optimizer.state.get(parameter, {}))

    def _state_of(self, number: int) -> Iterator[tuple[str, str, Tensor]]:
        """The same of one optimizer."""
        for name, parameter in self._known(self._held[number]).items():
            yield from _tensors_of(name, self.optimizers[number].state.get(parameter, {}))

    def _complete(self, group: Group) -> None:
        lines = {line for theirs in group.all_gather_object(self.describe()) for line in theirs}
        for line in lines.difference(self.describe()):
            name, key, shape, dtype = line.rsplit("|", 3)
            parameter, optimizer = self._parameters[name]
            lengths = [int(length) for length in shape.strip("()").split(",") if length.strip()]
            device = parameter.device if lengths else torch.device("cpu")
            zeros = torch.zeros(lengths, dtype=getattr(torch, dtype), device=device)
            optimizer.state[parameter][key] = zeros


def _tensors_of(name: str, state: Mapping[str, Any]) -> Iterator[tuple[str, str, Tensor]]:
    for key in sorted(state):
        if isinstance(state[key], Tensor):
            yield name, key, state[key]


class _Watch:
    """Counts the steps of an optimizer, where it has a hook for that.

    Args:
        optimizer: the user's.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._calls: int | None = None
        self._seen: object = None
        self._hook: RemovableHandle | None = None

    def open(self) -> None:
        """Count from here on."""
        register = getattr(innermost(self._optimizer), "register_step_post_hook", None)
        if register is not None:
            self._calls = 0
            self._hook = register(self._count)

    def worked(self, state: Sequence[Tensor]) -> bool:
        """Whether the optimizer took a step since this was asked before, as far as can be seen.

        Args:
            state: tensors of its state, which a step that calls no hook may write to.
        """
        before, self._seen = self._seen, (self._calls, [version_of(tensor) for tensor in state])
        return self._calls is None or before != self._seen

    def close(self) -> None:
        """Count no more."""
        if self._hook is not None:
            self._hook.remove()

    def _count(self, *_: object) -> None:
        assert self._calls is not None
        self._calls += 1
