"""Nested state as JSON and tensors, the tensors under keys made from their content.

A container is ``{"kind": [...]}``, a tensor ``{"tensor": key}``, and other values are themselves.
Unlike plain JSON, the format keeps tuples and numbers as keys. Unlike pickle, reading runs no code.

Example:
    >>> packed, tensors = pack({0: (torch.zeros(2), 0.5)})
    >>> packed
    {'dict': [[0, {'tuple': [{'tensor': 'float32:2:...'}, 0.5]}]]}
    >>> unpack(packed, tensors)
    {0: (tensor([0., 0.]), 0.5)}
"""

import base64
import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

ALLOWED = (
    "dicts, lists, tuples and sets of tensors, numpy arrays, numbers, strings, bytes, paths and "
    "None"
)
"""Types that `pack` takes, for messages."""

_DTYPES = {
    np.dtype(name)
    for name in (
        "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
        "float16", "float32", "float64", "complex64", "complex128",
    )
}  # fmt: skip
_PLAIN = (bool, int, float, str)  # a subclass of int or float comes back as int or float


def pack(state: Any, name: str = "state") -> tuple[Any, dict[str, Tensor]]:
    """State as plain values, and its tensors by key; equal tensors share one.

    A subclass of a container or a number is restored as the plain type.

    Args:
        state: values of the types in `ALLOWED`, nested in any way.
        name: of the state, for messages.

    Raises:
        TypeError: if it contains any other value; the message names the place.
        ValueError: if it contains itself.

    Example:
        >>> pack({"rng": [0, object()]}, "extra")
        Traceback (most recent call last):
        TypeError: extra['rng'][1] must be one of what a checkpoint can hold, got object: ...
    """
    tensors: dict[str, Tensor] = {}
    try:
        return _pack(state, name, tensors), tensors
    except RecursionError:
        raise ValueError(
            f"{name} must not contain itself, nor be nested too deeply to store"
        ) from None


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    match value:
        case np.str_() | np.bytes_():
            return _pack(value.item(), name, tensors)
        case np.generic() | np.ndarray():
            return _pack_numpy(value, name, tensors)
        case None | bool() | int() | float() | str():
            return _plain(value)
        case Tensor():
            return {"tensor": _keep(_checked(value, name), tensors)}
        case Mapping():
            return {"dict": _pack_items(value, name, tensors)}
        case list() | tuple() | set() | frozenset():
            kind = "list" if isinstance(value, list) else "tuple"
            kind = "set" if isinstance(value, set | frozenset) else kind
            return {kind: [_pack(v, f"{name}[{i}]", tensors) for i, v in enumerate(value)]}
    return _pack_other(value, name)


def _pack_items(value: Mapping[Any, Any], name: str, tensors: dict[str, Tensor]) -> list[Any]:
    items = []
    for key, inner in value.items():
        place = f"{name}[{_short(key)}]"
        if isinstance(key, Tensor):
            raise _refusal(f"the key {place}", key)
        items.append([_pack(key, f"the key {place}", tensors), _pack(inner, place, tensors)])
    return items


def _pack_other(value: Any, name: str) -> Any:
    match value:
        case complex():
            return {"complex": [value.real, value.imag]}
        case bytes() | bytearray():
            return {"bytes": base64.b64encode(value).decode()}
        case PurePath():
            return {"path": str(value)}
    raise _refusal(name, value)


def _pack_numpy(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    plain = type(value) is np.ndarray or isinstance(value, np.generic)
    native = value.dtype.newbyteorder("=")
    if not plain or native not in _DTYPES:
        raise _refusal(name, value, f" of {value.dtype}")
    array = np.array(value, dtype=native, order="C")  # a copy that torch can share and write
    kind = "array" if isinstance(value, np.ndarray) else "scalar"
    return {kind: _keep(torch.from_numpy(array), tensors)}


def _plain(value: Any) -> Any:
    """A value of the plain type, because JSON may write a subclass differently."""
    for kind in _PLAIN:
        if isinstance(value, kind):
            return kind(value) if kind is not str else str.__str__(value)
    return value


def _keep(tensor: Tensor, tensors: dict[str, Tensor]) -> str:
    key = key_of(tensor)
    tensors[key] = tensor
    return key


def _checked(tensor: Tensor, name: str) -> Tensor:
    odd = (
        "sharded" if isinstance(tensor, DTensor)
        else "without memory" if tensor.is_meta
        else "nested" if tensor.is_nested
        else "quantized" if tensor.is_quantized
        else "sparse" if tensor.layout != torch.strided
        else None
    )  # fmt: skip
    if odd is not None:
        raise TypeError(f"{name} must be a plain tensor to be stored, got one that is {odd}")
    return tensor.detach().resolve_conj().resolve_neg()


def _refusal(name: str, value: Any, more: str = "") -> TypeError:
    kind = type(value).__name__
    hint = ""
    if hasattr(value, "bit_generator"):
        hint = "; store its .bit_generator.state"
    elif isinstance(value, torch.Generator):
        hint = "; store its .get_state()"
    elif hasattr(value, "state_dict"):
        hint = "; store its .state_dict()"
    return TypeError(
        f"{name} must be one of what a checkpoint can hold, got {kind}{more}: {ALLOWED}{hint}"
    )


def _short(key: Any) -> str:
    text = repr(key)
    return text if len(text) <= 40 else f"{text[:37]}..."


_MAKE: Mapping[str, Callable[[Any], Any]] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "complex": lambda parts: complex(*parts),
    "bytes": base64.b64decode,
    "path": Path,
}


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The state that `pack` got; each tensor has its own memory."""
    if not isinstance(packed, dict):
        return packed
    ((kind, content),) = packed.items()
    match kind:
        case "tensor":
            return tensors[content].clone()  # equal tensors share a key, not their memory
        case "array":
            return tensors[content].clone().numpy()
        case "scalar":
            return tensors[content].numpy()[()]
        case "dict":
            return {unpack(key, tensors): unpack(value, tensors) for key, value in content}
        case "list" | "tuple" | "set":
            return _MAKE[kind](unpack(value, tensors) for value in content)
    return _MAKE[kind](content)


def keys(packed: Any) -> Iterator[str]:
    """Keys of all tensors in a packed state."""
    if isinstance(packed, dict):
        ((kind, content),) = packed.items()
        if kind in ("tensor", "array", "scalar"):
            yield content
        else:
            yield from keys(content)
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
