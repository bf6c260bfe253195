"""What a wire lost of this rank's values, by the tensors' names."""

from collections.abc import Mapping

import torch
from torch import Tensor

from postlocal.wire.chunks import travels_as


class Memory:
    """A residual for each tensor, zeros at first.

    Example:
        >>> memory = Memory()
        >>> memory.residual("weight", torch.ones(2, dtype=torch.bfloat16))
        tensor([0., 0.])
        >>> list(memory.state_dict())
        ['weight']
    """

    def __init__(self) -> None:
        self._residuals: dict[str, Tensor] = {}
        self._loaded: dict[str, Tensor] = {}

    def residual(self, name: str, like: Tensor) -> Tensor:
        """The residual of a tensor, of its shape and strides, in the dtype that it travels in.

        Raises:
            ValueError: if what was loaded for the name has another shape.
        """
        known = self._residuals.get(name)
        if known is None:
            known = torch.zeros_like(like, dtype=travels_as(like.dtype))
            if name in self._loaded:
                _check_shape(name, self._loaded[name], like)
                known.copy_(self._loaded.pop(name))
            self._residuals[name] = known
        return known

    def forget(self) -> None:
        """Drop all residuals."""
        self._residuals.clear()
        self._loaded.clear()

    def state_dict(self) -> dict[str, Tensor]:
        """The residuals, not copied."""
        return self._loaded | self._residuals

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on with copies of what `state_dict` gave."""
        self.forget()
        # They take the strides of their tensors, which a file does not keep, where these come.
        self._loaded = {name: residual.clone() for name, residual in state.items()}


def _check_shape(name: str, loaded: Tensor, like: Tensor) -> None:
    if loaded.shape != like.shape:
        raise ValueError(
            f"the state that was loaded has shape {tuple(loaded.shape)} for {name!r}, the tensor "
            f"has {tuple(like.shape)}: load the state of the same model"
        )
