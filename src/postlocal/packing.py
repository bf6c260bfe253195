"""Nested state as JSON and tensors, the tensors under keys made from their content.

A container is ``{"kind": [...]}``, a tensor ``{"tensor": key}``, all else stands for itself. Unlike
plain JSON it keeps tuples, and keys that are numbers; unlike pickle it runs nothing when read.

Example:
    >>> packed, tensors = pack({0: (torch.zeros(2), 0.5)})
    >>> packed
    {'dict': [[0, {'tuple': [{'tensor': 'float32:2:...'}, 0.5]}]]}
    >>> unpack(packed, tensors)
    {0: (tensor([0., 0.]), 0.5)}
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def pack(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """State as plain values, and its tensors by key; equal tensors share one.

    Raises:
        TypeError: if it holds anything but dicts, lists, tuples, tensors, numbers, strings, None.
    """
    tensors: dict[str, Tensor] = {}

    def pack(value: Any) -> Any:
        match value:
            case Tensor():
                key = key_of(value)
                tensors[key] = value
                return {"tensor": key}
            case dict():
                return {"dict": [[pack(key), pack(inner)] for key, inner in value.items()]}
            case list() | tuple():
                return {type(value).__name__: [pack(inner) for inner in value]}
            case bool() | int() | float() | str() | None:
                return value
        raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}: {value!r}")

    return pack(state), tensors


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `pack` was given; each tensor has memory of its own."""
    if not isinstance(packed, dict):
        return packed
    ((kind, content),) = packed.items()
    if kind == "tensor":
        return tensors[content].clone()  # equal tensors share a key, not their memory
    if kind == "dict":
        return {unpack(key, tensors): unpack(value, tensors) for key, value in content}
    items = [unpack(value, tensors) for value in content]
    return tuple(items) if kind == "tuple" else items


def keys(packed: Any) -> Iterator[str]:
    """Keys of all tensors in a packed state."""
    if isinstance(packed, dict):
        if "tensor" in packed:
            yield packed["tensor"]
        else:
            yield from keys(next(iter(packed.values())))
    elif isinstance(packed, list):
        for inner in packed:
            yield from keys(inner)


def key_of(tensor: Tensor) -> str:
    """A tensor's key: dtype, shape and digest of the content."""
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    dtype = str(tensor.dtype).removeprefix("torch.")
    shape = "x".join(map(str, tensor.shape))
    return f"{dtype}:{shape}:{digest(content.numpy().data)}"


def empty(key: str) -> Tensor:
    """A tensor of the key's dtype and shape, on CPU."""
    dtype, shape, _ = key.split(":")
    return torch.empty(
        [int(length) for length in shape.split("x") if length], dtype=getattr(torch, dtype)
    )


def digest(content: bytes | memoryview) -> str:
    """BLAKE2b of 16 bytes, as hexadecimal digits."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()
