"""What a hook remembers of each parameter's gradient, through new buckets and new processes.

DDP makes its buckets anew in the second backward pass of each process, so nothing can be kept by
bucket. Parameters have no names here: they count in the order in which the first backward pass of
a process hands them over, which is the same each time if the hook is registered before it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import GradBucket

from postlocal.sync.supported_tensors import dense


class Memory:
    """One flat tensor a bucket, zeros at first, of which each parameter has its part."""

    def __init__(self) -> None:
        self._index: dict[Tensor, int] = {}
        self._parts: dict[int, Tensor] = {}
        self._flats: dict[tuple[int, ...], Tensor] = {}

    @property
    def parts(self) -> Mapping[int, Tensor]:
        """Flat memory of each parameter, in the order in which they were first seen."""
        return self._parts

    def keys(self, bucket: GradBucket) -> tuple[int, ...]:
        """The parameters of a bucket, by the order in which they were first seen."""
        return tuple(
            self._index.setdefault(parameter, len(self._index)) for parameter in bucket.parameters()
        )

    def flat(self, bucket: GradBucket, dtype: torch.dtype) -> Tensor:
        """The memory of a bucket, of its buffer's length.

        Raises:
            ValueError: if what was loaded is not of this model's parameters.
        """
        keys = self.keys(bucket)
        known = self._flats.get(keys)
        if known is None or known.dtype != dtype:
            known = self._flats[keys] = self._assemble(keys, bucket, dtype)
        return known

    def state_dict(self) -> dict[int, Tensor]:
        """Copies of the parts."""
        return {key: part.clone() for key, part in self._parts.items()}

    def load_state_dict(self, state: Mapping[int, Tensor]) -> None:
        """Go on with what `state_dict` gave."""
        self._parts = {key: part.clone() for key, part in state.items()}
        self._flats = {}

    def __getstate__(self) -> dict[Any, Any]:
        return self.state_dict()

    def __setstate__(self, state: Mapping[int, Tensor]) -> None:
        Memory.__init__(self)
        self.load_state_dict(state)

    def _assemble(self, keys: Sequence[int], bucket: GradBucket, dtype: torch.dtype) -> Tensor:
        buffer = dense(bucket)
        flat = torch.zeros_like(buffer, dtype=dtype)
        sizes = [gradient.numel() for gradient in bucket.gradients()]
        for key, part in zip(keys, torch.split(flat, sizes), strict=True):
            before = self._parts.get(key)
            if before is not None:
                _check_size(key, before, part)
                part.copy_(before)
            self._parts[key] = part
        for old in [old for old in self._flats if set(old) & set(keys)]:
            del self._flats[old]
        return flat


def _check_size(key: int, before: Tensor, part: Tensor) -> None:
    if before.numel() != part.numel():
        raise ValueError(
            f"the state that was loaded has {before.numel()} elements for parameter {key} in the "
            f"order of the first backward pass, the model has {part.numel()}: load it for the "
            "same model, and register the hook before the first backward pass of both runs"
        )
