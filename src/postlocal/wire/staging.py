"""Memory that values travel in, used again."""

import torch
from torch import Tensor

from postlocal.tensors import whole_storage


class Staging:
    """Buffers that are used again: what one chunk travelled in serves the next.

    It holds no more than what was in use at once: a buffer that has become too small is dropped
    where a larger one is made.

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
        # Payloads and values are of such different sizes that they do not serve for each other.
        alike = [
            index
            for index, buffer in enumerate(self._free)
            if buffer.is_floating_point() == dtype.is_floating_point
            and buffer.device == like.device
        ]
        needed = numel * dtype.itemsize
        fitting = [index for index in alike if self._free[index].nbytes >= needed]
        if fitting:
            best = min(fitting, key=lambda index: self._free[index].nbytes)
            return self._free.pop(best).view(torch.uint8)[:needed].view(dtype)
        self._free = [b for index, b in enumerate(self._free) if index not in alike]
        return like.new_empty(numel, dtype=dtype)

    def give(self, *buffers: Tensor) -> None:
        """Take buffers back; their content is no longer needed."""
        # A buffer taken for a small chunk was cut to its size, and comes back whole.
        self._free.extend(whole_storage(buffer) for buffer in buffers)
