"""The parameters last agreed on, and the outer optimizer that moves them."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from postlocal.outer import Outer, rate
from postlocal.torch_versions import copy_all_


class Anchor:
    """An fp32 copy of parameters (fp64 for fp64 ones), and the outer optimizer's state.

    Args:
        parameters: those of a replica, or some of them, by name; they are changed in place.
        outer: makes the outer optimizer.

    Attributes:
        tensors: the copies, by name.
    """

    def __init__(self, parameters: Mapping[str, Tensor], outer: Outer) -> None:
        self._trained = list(parameters.values())
        self.tensors = {
            name: parameter.detach().to(_wide(parameter), copy=True)
            for name, parameter in parameters.items()
        }
        self._recipe = outer
        self._outer = outer(list(self.tensors.values()))
        self._base_lrs = [group["lr"] for group in self._outer.param_groups]

    def pseudo_gradients(self, out: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Anchor minus parameters.

        Args:
            out: where to write them, in the anchor's shapes and dtypes. None: pseudo-gradients of
                parameters that are as precise as the anchor take the parameters' own memory, and
                what these held is lost until `restore`.
        """
        if out is None:
            out = [
                parameter if parameter.dtype == anchor.dtype else torch.empty_like(anchor)
                for anchor, parameter in self._pairs()
            ]
        for (anchor, parameter), difference in zip(self._pairs(), out, strict=True):
            torch.sub(anchor, parameter, out=difference)
        return list(out)

    def step(
        self,
        pseudo_gradients: Sequence[Tensor],
        step: int,
        inner_lr: float,
        resting: Collection[str] = (),
    ) -> None:
        """Take one outer step; the parameters are left alone.

        Args:
            pseudo_gradients: in the order of the parameters.
            step: the clock's, for outer learning rates that follow it.
            inner_lr: the inner optimizer's learning rate.
            resting: names of parameters whose anchor stays where it is, momentum and all.
        """
        factor = rate(self._recipe, step)
        for group, lr in zip(self._outer.param_groups, self._base_lrs, strict=True):
            group["lr"] = lr * factor
            if "inner_lr" in group:
                group["inner_lr"] = inner_lr
        for (name, anchor), gradient in zip(self.tensors.items(), pseudo_gradients, strict=True):
            anchor.grad = None if name in resting else gradient
        self._outer.step()
        self._outer.zero_grad(set_to_none=True)

    def restore(
        self,
        mix: float = 0.0,
        wholly: Collection[str] = (),
        moves_from: Sequence[Tensor] | None = None,
    ) -> None:
        """Give the parameters the anchor's values, and keep a share ``mix`` of their own.

        Args:
            mix: share of its own value that a parameter keeps, 0 to 1.
            wholly: names of parameters that keep none of it, nor what they moved.
            moves_from: what parameters were when they were sent, in the anchor's dtypes: how far
                they moved since is added to the anchor's values. Overwritten.
        """
        targets, parameters = list(self.tensors.values()), self._parameters()
        if moves_from is not None:
            for index, (name, moves) in enumerate(zip(self.tensors, moves_from, strict=True)):
                if name not in wholly:
                    torch.sub(parameters[index], moves, out=moves)
                    targets[index] = moves.add_(targets[index])
        if mix == 0:
            copy_all_(parameters, targets)
            return
        for name, target, parameter in zip(self.tensors, targets, parameters, strict=True):
            if name in wholly:
                parameter.copy_(target)
            elif parameter.dtype == target.dtype:
                parameter.lerp_(target, 1 - mix)
            else:
                parameter.copy_(target.lerp(parameter.to(target.dtype), mix))

    def snapshot(self) -> None:
        """Take the parameters' present values."""
        copy_all_(list(self.tensors.values()), self._parameters())

    def state_dict(self) -> dict[str, Any]:
        """The anchor's tensors, not copied, and the outer optimizer's state."""
        return {"tensors": dict(self.tensors), "outer": self._outer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take values from a saved state; the parameters are left alone."""
        with torch.no_grad():
            for name, anchor in self.tensors.items():
                anchor.copy_(state["tensors"][name])
        self._outer.load_state_dict(state["outer"])

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.tensors.values(), self._parameters(), strict=True))

    def _parameters(self) -> list[Tensor]:
        # Taken anew each time: a loop may have moved a parameter to other memory.
        return [parameter.detach() for parameter in self._trained]


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
