"""What codecs share whose blocks have parameters of their own: payloads, and how they are run."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from postlocal.checks import count
from postlocal.codec import kernels
from postlocal.codec.protocol import round_up

_TINY = torch.finfo(torch.float32).tiny
_HUGE = torch.finfo(torch.float32).max * (1 - 2.0**-22)  # rounding may add half of 2^-23, twice


@dataclass(frozen=True)
class PayloadLayout:
    """Where things lie in a payload.

    Parameters of all blocks, in fp32, then their codes, then zeros up to a multiple of 4 bytes.

    A last block that is short is one of its own size: only what its bytes cannot fill is padded.

    Args:
        numel: how many values there are.
        block: values that share parameters.
        parameters: how many fp32 numbers a block has.
        packed: how many codes share a byte.

    Example:
        >>> PayloadLayout(numel=10, block=4, packed=2).nbytes  # 3 scales, 2 + 2 + 1 bytes of codes
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


class Blockwise(ABC):
    """A codec that is arithmetic on blocks, ``quantise`` and ``restore``, run by `kernels`.

    A block is cut into ``packed`` sections of equal size; the codes of one byte come one from each,
    so that processors that work on many neighbours at a time can pack and unpack them.

    Attributes:
        parameters: fp32 numbers that a block has.
        packed: codes that share a byte.
        compiled: whether `kernels` may compile the arithmetic.
    """

    parameters: int = 1
    packed: int = 1
    compiled: bool = True

    @property
    @abstractmethod
    def block(self) -> int:
        """Elements that share parameters."""
        ...

    @abstractmethod
    def quantise(self, blocks: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Parameters and codes of blocks.

        Args:
            blocks: fp32, shape ``(n, block)``; stays as it is.
            first: index of the first of these blocks among all that are encoded together.
            count: how many values of each block are no padding.

        Returns:
            fp32, shape ``(n, parameters)``, and uint8, shape ``(n, block / packed)``. Parameters
            that are not finite are sent as NaN.
        """
        ...

    @abstractmethod
    def restore(self, parameters: Tensor, codes: Tensor) -> tuple[list[Tensor], Tensor]:
        """What codes stand for.

        Returns:
            Numbers of any dtype that fp32 holds, one tensor of shape ``(n, block / packed)`` for
            each section; and the scales, fp32, shape ``(n, 1)``, to multiply them by.
        """
        ...

    def sections(self, blocks: Tensor) -> tuple[Tensor, ...]:
        """The parts of blocks, shape ``(n, block / packed)``, whose codes share bytes."""
        return blocks.view(len(blocks), self.packed, -1).unbind(1)

    def layout(self, numel: int) -> PayloadLayout:
        """Where things lie in a payload."""
        return PayloadLayout(numel, self.block, self.parameters, self.packed)

    def nbytes(self, numel: int, dtype: torch.dtype = torch.float32) -> int:
        return self.layout(numel).nbytes

    def encode(self, values: Tensor, payload: Tensor) -> None:
        layout = self.layout(values.numel())
        if layout.whole:
            blocks = values[: layout.whole * layout.block].view(-1, layout.block)
            kernels.encode(self, blocks, *layout.whole_blocks(payload))
        if layout.tail:
            short = _padded(values[-layout.tail :], layout)
            parameters, codes = layout.short_block(payload)
            measured, codes[:] = self.quantise(short, layout.whole, layout.tail)
            parameters[:] = kernels.finite_or_nan(measured)
        layout.clear_padding(payload)

    def decode(self, payload: Tensor, values: Tensor) -> None:
        layout = self.layout(values.numel())
        if layout.whole:
            blocks = values[: layout.whole * layout.block].view(-1, layout.block)
            kernels.decode(self, *layout.whole_blocks(payload), blocks)
        if layout.tail:
            values[-layout.tail :].copy_(self._short(payload, layout, weight=1.0))

    def accumulate(self, payload: Tensor, values: Tensor, alpha: float = 1.0) -> None:
        layout = self.layout(values.numel())
        weight = torch.tensor(alpha, dtype=torch.float32, device=values.device)
        if layout.whole:
            blocks = values[: layout.whole * layout.block].view(-1, layout.block)
            kernels.accumulate(self, *layout.whole_blocks(payload), blocks, weight)
        if layout.tail:
            values[-layout.tail :].add_(self._short(payload, layout, weight))

    def _short(self, payload: Tensor, layout: PayloadLayout, weight: Tensor | float) -> Tensor:
        numbers, scales = self.restore(*layout.short_block(payload))
        block = torch.cat([part.float() for part in numbers], dim=1).mul_(scales * weight)
        return block.view(-1)[: layout.tail]


def _padded(values: Tensor, layout: PayloadLayout) -> Tensor:
    short = values.new_zeros((1, layout.tail_width), dtype=torch.float32)
    short[0, : layout.tail] = values
    return short


def scales_of(greatest: Tensor, code: int) -> Tensor:
    """Scales of blocks: what code 1 stands for.

    They follow from what the payload keeps, the greatest magnitude, rather than being kept
    themselves: a compiled encoder then passes through memory once.

    Args:
        greatest: magnitude of each block, fp32, shape ``(n, 1)``.
        code: the greatest.

    Returns:
        fp32, shape ``(n, 1)``; never below 2^-126, since subnormal numbers are too coarse, and
        never so great that the greatest code overflows.

    Example:
        >>> scales_of(torch.tensor([[254.0], [torch.nan]]), 127)
        tensor([[2.],
                [nan]])
    """
    return (greatest / code).clamp(_TINY, _HUGE / code)


def zero_unless(finite: Tensor, codes: Tensor) -> Tensor:
    """Codes, shape ``(n, m)``, zeros in rows that are not finite: what NaN is cast to is undefined.

    Args:
        finite: bool, shape ``(n, 1)``.
        codes: uint8; changed in place.
    """
    return codes.bitwise_and_(finite.to(torch.uint8).neg_())


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
