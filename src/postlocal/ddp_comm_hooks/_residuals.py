"""Residuals of gradients, by parameter: what a lossy hook has not sent yet.

DDP makes its buckets anew in the second backward pass of each process, so residuals cannot be kept
by bucket. Parameters have no names here: they are numbered in the order in which the first backward
pass of a process hands them over. That order is the same each time if the hook is registered before
the first pass.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from postlocal.sync.supported_tensors import dense
from postlocal.torch_versions import GradBucket


class Residuals:
    """One flat tensor a bucket, zeros at first; each parameter's residual is a slice of it."""

    def __init__(self) -> None:
        self._index: dict[Tensor, int] = {}
        self._by_parameter: dict[int, Tensor] = {}
        self._flats: dict[tuple[int, ...], Tensor] = {}

    @property
    def by_parameter(self) -> Mapping[int, Tensor]:
        """The flat residual of each parameter, in the order in which they were first seen."""
        return self._by_parameter

    def keys(self, bucket: GradBucket) -> tuple[int, ...]:
        """The parameters of a bucket, by the order in which they were first seen."""
        return tuple(
            self._index.setdefault(parameter, len(self._index)) for parameter in bucket.parameters()
        )

    def flat(self, bucket: GradBucket, dtype: torch.dtype) -> Tensor:
        """The residuals of a bucket, of its buffer's length.

        Raises:
            ValueError: if what was loaded is not of this model's parameters.
        """
        keys = self.keys(bucket)
        known = self._flats.get(keys)
        if known is None or known.dtype != dtype:
            known = self._flats[keys] = self._assemble(keys, bucket, dtype)
        return known

    def state_dict(self) -> dict[int, Tensor]:
        """Copies of the residuals."""
        return {key: residual.clone() for key, residual in self._by_parameter.items()}

    def load_state_dict(self, state: Mapping[int, Tensor]) -> None:
        """Go on with what `state_dict` gave."""
        self._by_parameter = {key: residual.clone() for key, residual in state.items()}
        self._flats = {}

    def __getstate__(self) -> dict[Any, Any]:
        return self.state_dict()

    def __setstate__(self, state: Mapping[int, Tensor]) -> None:
        Residuals.__init__(self)
        self.load_state_dict(state)

    def _assemble(self, keys: Sequence[int], bucket: GradBucket, dtype: torch.dtype) -> Tensor:
        buffer = dense(bucket)
        flat = torch.zeros_like(buffer, dtype=dtype)
        sizes = [gradient.numel() for gradient in bucket.gradients()]
        for key, residual in zip(keys, torch.split(flat, sizes), strict=True):
            before = self._by_parameter.get(key)
            if before is not None:
                _check_size(key, before, residual)
                residual.copy_(before)
            self._by_parameter[key] = residual
        for old in [old for old in self._flats if set(old) & set(keys)]:
            del self._flats[old]
        return flat


def _check_size(key: int, before: Tensor, residual: Tensor) -> None:
    if before.numel() != residual.numel():
        raise ValueError(
            f"the state that was loaded has {before.numel()} elements for parameter {key} in the "
            f"order of the first backward pass, the model has {residual.numel()}: load it for the "
            "same model, and register the hook before the first backward pass of both runs"
        )
