"""The inner optimizer, the user's: its learning rate, and its state at a synchronization."""

import math
from collections.abc import Iterator, Sequence
from numbers import Real

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from postlocal.comm.group import Group
from postlocal.sync.parameters import Replica
from postlocal.sync.status import layout_number
from postlocal.sync.wrappers import innermost
from postlocal.tensors import weigh_
from postlocal.wire import Divisor, fp32, maximum_, mean_

_FIX = "call sync.finish() and sync.close() before such a change, and attach again after it"


class Inner:
    """View of an optimizer by the names of a replica's parameters.

    Args:
        optimizer: the user's.
        replica: the parameters that are synchronized.

    Raises:
        ValueError: if it holds none of them, or parameters of other modules.
    """

    def __init__(self, optimizer: Optimizer, replica: Replica) -> None:
        self.optimizer = optimizer
        self._replica = replica
        self._held = self._ids()
        self._parameters = self._known(self._held)
        if not self._parameters:
            raise ValueError(
                "optimizer must hold parameters of model, got one that holds none of them: make it "
                "from model.parameters()"
            )
        if strangers := self._strangers(self._held):
            raise ValueError(f"optimizer must hold parameters of model only, {strangers}")
        self._calls: int | None = None
        self._seen: object = None
        self._hook: RemovableHandle | None = None

    def watch(self) -> None:
        """Count the optimizer's steps from here on, until `close`; see `worked`."""
        register = getattr(innermost(self.optimizer), "register_step_post_hook", None)
        if register is not None:
            self._calls = 0
            self._hook = register(self._count_call)
        self.worked()

    def worked(self) -> bool:
        """Whether the optimizer took a step since this was asked before, as far as can be seen."""
        before, self._seen = self._seen, (self._calls, [t._version for _, _, t in self._state()])
        return self._calls is None or before != self._seen

    def close(self) -> None:
        """Leave the optimizer as it was before."""
        if self._hook is not None:
            self._hook.remove()

    def _count_call(self, *_: object) -> None:
        assert self._calls is not None
        self._calls += 1

    def __str__(self) -> str:
        held, total = len(self._parameters), len(self._replica.parameters)
        return f"{type(self.optimizer).__name__} of {held} of the {total} parameters"

    def refresh(self) -> str | None:
        """Follow parameters that were added to the optimizer, if the model has them.

        Returns:
            None; or, in words, a change that cannot be followed, and the fix.
        """
        held = self._ids()
        if held == self._held:
            return None
        if strangers := self._strangers(held):
            return f"optimizer must hold parameters of model only, {strangers}"
        known = self._known(held)
        if lost := [name for name in self._parameters if name not in known]:
            return f"optimizer held parameter {lost[0]!r} at attach and does not any more; {_FIX}"
        self._held, self._parameters = held, known
        return None

    def _ids(self) -> list[int]:
        return [id(p) for group in self.optimizer.param_groups for p in group["params"]]

    def _known(self, held: Sequence[int]) -> dict[str, Tensor]:
        chosen = set(held)
        return {n: p for n, p in self._replica.parameters.items() if id(p) in chosen}

    def _strangers(self, held: Sequence[int]) -> str | None:
        """Parameters that the model does not have, in words."""
        known = {id(tensor) for tensor in self._replica.every_parameter()}
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
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
        """The greatest learning rate of the parameter groups; NaN where none has a number."""
        given = (group.get("lr") for group in self.optimizer.param_groups)
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
        """Forget all state, as a new optimizer would."""
        self.optimizer.state.clear()

    def heal(self) -> None:
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
        for name, parameter in self._parameters.items():
            state = self.optimizer.state.get(parameter, {})
            for key in sorted(state):
                if isinstance(state[key], Tensor):
                    yield name, key, state[key]

    def _complete(self, group: Group) -> None:
        lines = {line for theirs in group.all_gather_object(self.describe()) for line in theirs}
        for line in lines.difference(self.describe()):
            name, key, shape, dtype = line.rsplit("|", 3)
            parameter = self._parameters[name]
            lengths = [int(length) for length in shape.strip("()").split(",") if length.strip()]
            device = parameter.device if lengths else torch.device("cpu")
            zeros = torch.zeros(lengths, dtype=getattr(torch, dtype), device=device)
            self.optimizer.state[parameter][key] = zeros
