"""The tensors of one replica, in the order and under the names that all ranks share."""

from collections.abc import Iterable, Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel


class Replica:
    """What has to be equal where replicas agree.

    Tied tensors, the same memory under several names, count once, under their first name.

    Args:
        model: a module, possibly wrapped by DistributedDataParallel or torch.compile.

    Attributes:
        parameters: those that require grad, by name. Fixed from here on, whether or not a
            parameter has a gradient at some moment.
        frozen: the other parameters.
        buffers: all buffers.

    Raises:
        ValueError: if nothing requires grad, or tensors overlap in memory without being the same.
        TypeError: if a parameter is sharded, complex, or has no memory yet.
    """

    def __init__(self, model: nn.Module) -> None:
        module = unwrap(model)
        parameters = once(module.named_parameters())
        self.parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        self.frozen = {name: p for name, p in parameters.items() if not p.requires_grad}
        self.buffers = once(module.named_buffers())
        if not self.parameters:
            raise ValueError("model must have a parameter that requires grad, got none")
        for name, parameter in parameters.items():
            _check_kind(name, parameter)
        _check_apart(parameters)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Everything: parameters, frozen ones and buffers."""
        return self.parameters | self.frozen | self.buffers

    def float_buffers(self) -> list[Tensor]:
        """Buffers of floating point; complex ones as pairs of floats, in their memory."""
        return [
            torch.view_as_real(buffer) if buffer.is_complex() else buffer
            for buffer in self.buffers.values()
            if buffer.is_floating_point() or buffer.is_complex()
        ]

    def other_buffers(self) -> list[Tensor]:
        """Buffers of integers and booleans."""
        floats = (torch.is_floating_point, torch.is_complex)
        return [b for b in self.buffers.values() if not any(kind(b) for kind in floats)]

    def has_nan_buffer(self) -> bool:
        """Whether a buffer holds NaN; infinities are what masks are made of."""
        return any(bool(torch.isnan(buffer).any()) for buffer in self.float_buffers())

    def describe(self) -> list[str]:
        """One line a tensor, equal on all ranks that hold the same model."""
        return [
            f"{name}: shape {tuple(tensor.shape)}, stride {tensor.stride()}, {tensor.dtype}, "
            f"{'trained' if tensor.requires_grad else 'not trained'}"
            for name, tensor in self.tensors.items()
        ]


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside DistributedDataParallel and torch.compile."""
    for inner in _layers(model):
        model = inner
    return model


def find_ddp(model: nn.Module) -> DistributedDataParallel | None:
    """The DistributedDataParallel around a model, or None."""
    for layer in _layers(model):
        if isinstance(layer, DistributedDataParallel):
            return layer
    return None


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    yield model
    inner = (
        model.module
        if isinstance(model, DistributedDataParallel)
        else getattr(model, "_orig_mod", None)  # what torch.compile wrapped
    )
    if isinstance(inner, nn.Module):
        yield from _layers(inner)


def once(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors by name, those in the same memory once, under their first name."""
    seen = set()
    tensors = {}
    for name, tensor in named:
        place = (_address(tensor), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() == 0 or place not in seen:
            tensors[name] = tensor
            seen.add(place)
    return tensors


def _check_kind(name: str, parameter: Tensor) -> None:
    if isinstance(parameter, DTensor):
        raise TypeError(
            f"parameter {name!r} is a DTensor: sharded models (FSDP2) are not supported yet; "
            "wrap the model in DistributedDataParallel"
        )
    if parameter.is_meta:
        raise TypeError(f"parameter {name!r} is on the meta device: materialize the model first")
    if parameter.is_complex():
        raise TypeError(f"parameter {name!r} is complex: keep it as two real parameters")


def _check_apart(parameters: dict[str, Tensor]) -> None:
    spans = sorted(
        (_address(tensor), _address(tensor) + _extent(tensor), name)
        for name, tensor in parameters.items()
        if tensor.numel()
    )
    for (_, end, before), (start, _, name) in pairwise(spans):
        if start < end:
            raise ValueError(
                f"parameters {before!r} and {name!r} overlap in memory and are not the same: "
                "give each its own memory"
            )


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr()


def _extent(tensor: Tensor) -> int:
    last = sum(
        (length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return (last + 1) * tensor.element_size()
