"""What every codec can do, and what every payload is."""

from typing import Any, Protocol

import torch
from torch import Tensor

from postlocal.checks import made


class Codec(Protocol):
    """Turns values into a payload and a payload into values, as pure functions of both.

    A payload starts at an address that is a multiple of 4 bytes and its size is one, so that
    payloads can follow one another in one buffer.
    """

    @property
    def block(self) -> int:
        """Elements that share parameters; parts of a tensor are best cut at multiples of it."""
        ...

    def nbytes(self, numel: int, dtype: torch.dtype = torch.float32) -> int:
        """Exact size of the payload of ``numel`` values of ``dtype``."""
        ...

    def encode(self, values: Tensor, payload: Tensor) -> None:
        """Write values to a payload.

        Args:
            values: contiguous, floating point, shape ``(n,)``.
            payload: uint8, shape ``(m,)``, of at least ``nbytes(n, values.dtype)`` bytes.
        """
        ...

    def decode(self, payload: Tensor, values: Tensor) -> None:
        """Read values, shape ``(n,)``, from the payload that ``n`` values of their dtype gave."""
        ...

    def accumulate(self, payload: Tensor, values: Tensor, alpha: float = 1.0) -> None:
        """Add ``alpha`` times what a payload stands for to values, shape ``(n,)``, in place."""
        ...


def is_codec(name: str, value: Any) -> Any:
    """The rule for an argument that takes a codec.

    Raises:
        TypeError: if it lacks what `Codec` has, or has to be called to make a codec.
    """
    needs = ("block", "nbytes", "encode", "decode", "accumulate")
    return made(name, value, needs, "codec.int8(block=256)")


def round_up(number: int, multiple: int) -> int:
    """The least multiple that is not below a number.

    Example:
        >>> round_up(5, 4)
        8
    """
    return -(-number // multiple) * multiple
