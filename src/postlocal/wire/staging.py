"""Memory that values travel in, used again."""

import torch
from torch import Tensor

from postlocal.tensors import whole_storage


class Staging:
    """Buffers that are used again: what one chunk travelled in serves the next.

    Example:
        >>> staging = Staging()
        >>> first = staging.take(4, torch.zeros(()))
        >>> staging.give(first)
        >>> staging.take(3, torch.zeros(())).data_ptr() == first.data_ptr()
        True
    """

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def take(self, numel: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A flat tensor of ``numel`` elements on the device of ``like``, with any content."""
        dtype = dtype or like.dtype
        for index, buffer in enumerate(self._free):
            if buffer.dtype == dtype and buffer.device == like.device and buffer.numel() >= numel:
                return self._free.pop(index)[:numel]
        return like.new_empty(numel, dtype=dtype)

    def give(self, *buffers: Tensor) -> None:
        """Take buffers back; their content is no longer needed."""
        # A buffer taken for a small chunk was cut to its size, and comes back whole.
        self._free.extend(whole_storage(buffer) for buffer in buffers)
