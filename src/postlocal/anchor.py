"""The parameters last agreed on, and the outer optimizer that moves them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from postlocal.outer import Outer


class Anchor:
    """An fp32 copy of the parameters (fp64 for fp64 ones), and the outer optimizer's state.

    Pseudo-gradients of parameters that are as precise as the anchor need no memory: they take the
    parameters' own place until the outer step gives new ones.

    Args:
        parameters: the replica's, by name; they are changed in place.
        outer: makes the outer optimizer.
    """

    def __init__(self, parameters: Mapping[str, Tensor], outer: Outer) -> None:
        self._parameters = [parameter.detach() for parameter in parameters.values()]
        self.tensors = {
            name: parameter.detach().to(_wide(parameter), copy=True)
            for name, parameter in parameters.items()
        }
        self._outer = outer(list(self.tensors.values()))

    def pseudo_gradients(self) -> list[Tensor]:
        """Anchor minus parameters. What the parameters held is lost until `step` or `restore`."""
        return [
            torch.sub(anchor, parameter, out=parameter)
            if parameter.dtype == anchor.dtype
            else anchor - parameter
            for anchor, parameter in zip(self.tensors.values(), self._parameters, strict=True)
        ]

    def step(self, pseudo_gradients: Sequence[Tensor], inner_lr: float) -> None:
        """Take one outer step, and give the parameters the anchor's new values."""
        for group in self._outer.param_groups:
            if "inner_lr" in group:
                group["inner_lr"] = inner_lr
        for anchor, gradient in zip(self.tensors.values(), pseudo_gradients, strict=True):
            anchor.grad = gradient
        self._outer.step()
        self._outer.zero_grad(set_to_none=True)
        self.restore()

    def restore(self) -> None:
        """Give the parameters the anchor's values."""
        torch._foreach_copy_(self._parameters, list(self.tensors.values()))

    def state_dict(self) -> dict[str, Any]:
        """The anchor's tensors, not copied, and the outer optimizer's state."""
        return {"tensors": dict(self.tensors), "outer": self._outer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take values from a saved state; the parameters are left alone."""
        with torch.no_grad():
            for name, anchor in self.tensors.items():
                anchor.copy_(state["tensors"][name])
        self._outer.load_state_dict(state["outer"])


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
