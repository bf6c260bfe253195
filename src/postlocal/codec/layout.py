"""Where parameters and codes lie in a payload."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from postlocal.checks import count


@dataclass(frozen=True)
class Layout:
    """Parameters of all blocks, in fp32, then their codes, then zeros up to a multiple of 4 bytes.

    A last block that is short is one of its own size: only what its bytes cannot fill is padded.

    Args:
        numel: how many values there are.
        block: values that share parameters.
        parameters: how many fp32 numbers a block has.
        packed: how many codes share a byte.

    Example:
        >>> Layout(numel=10, block=4, packed=2).nbytes  # 3 scales, 2 + 2 + 1 bytes of codes
        20
    """

    numel: int
    block: int
    parameters: int = 1
    packed: int = 1

    @property
    def whole(self) -> int:
        """How many blocks are whole."""
        return self.numel // self.block

    @property
    def tail(self) -> int:
        """How many values are in the short block at the end."""
        return self.numel % self.block

    @property
    def tail_width(self) -> int:
        """Size of the short block at the end, padded to whole bytes."""
        return round_up(self.tail, self.packed)

    @property
    def nbytes(self) -> int:
        """Size of the payload."""
        return round_up(self._size, 4)

    @property
    def _start(self) -> int:
        return 4 * self.parameters * (self.whole + (self.tail > 0))

    @property
    def _middle(self) -> int:
        return self._start + self.whole * self.block // self.packed

    @property
    def _size(self) -> int:
        return self._middle + self.tail_width // self.packed

    def whole_blocks(self, payload: Tensor) -> tuple[Tensor, Tensor]:
        """Parameters, shape ``(n, parameters)``, and codes, ``(n, block / packed)``."""
        codes = payload[self._start : self._middle]
        return self._parameters(payload)[: self.whole], codes.view(
            self.whole, self.block // self.packed
        )

    def short_block(self, payload: Tensor) -> tuple[Tensor, Tensor]:
        """Parameters, shape ``(1, parameters)``, and codes, ``(1, tail_width / packed)``."""
        codes = payload[self._middle : self._size]
        return self._parameters(payload)[self.whole :], codes.view(1, -1)

    def clear_padding(self, payload: Tensor) -> None:
        """Make the bytes that hold nothing zeros."""
        payload[self._size : self.nbytes].zero_()

    def _parameters(self, payload: Tensor) -> Tensor:
        return payload[: self._start].view(torch.float32).view(-1, self.parameters)


def round_up(number: int, multiple: int) -> int:
    """The least multiple that is not below a number.

    Example:
        >>> round_up(5, 4)
        8
    """
    return -(-number // multiple) * multiple


def block_of(name: str, value: Any, packed: int = 1) -> int:
    """The rule for a number of elements that share parameters, and fill whole bytes.

    Raises:
        TypeError: if it is no whole number.
        ValueError: if it is below 1, or no multiple of ``packed``.
    """
    block = count(name, value, "element")
    if block % packed:
        raise ValueError(
            f"{name} must be a multiple of {packed}, so that codes fill whole bytes, got {block}"
        )
    return block
