"""What a wire lost of this rank's values, by the tensors' names."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from postlocal.tensors import flat_view
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
        """The residual of a tensor, of its shape, in the dtype that it travels in.

        It has the tensor's strides, or is contiguous where the tensor has gaps in memory.

        Raises:
            ValueError: if what was loaded for the name has another shape.
        """
        known = self._residuals.get(name)
        if known is None:
            gaps = flat_view(like.detach()) is None
            layout = torch.contiguous_format if gaps else torch.preserve_format
            known = torch.zeros_like(like, dtype=travels_as(like.dtype), memory_format=layout)
            if name in self._loaded:
                _check_shape(name, self._loaded[name], like)
                known.copy_(self._loaded.pop(name))
            self._residuals[name] = known
        return known

    @property
    def names(self) -> set[str]:
        """Of which tensors there are residuals."""
        return {*self._residuals, *self._loaded}

    def forget(self, names: Iterable[str] | None = None) -> None:
        """Drop residuals; all for None."""
        for name in self.names if names is None else names:
            self._residuals.pop(name, None)
            self._loaded.pop(name, None)

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
