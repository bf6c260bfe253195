"""Tensors as flat chunks: small ones share a chunk, large ones travel from where they lie."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from postlocal.tensors import flat_view
from postlocal.wire.staging import Staging

# An exchange costs milliseconds before the first byte moves (gloo, a few ranks on a few cores), so
# as much is under way as memory for it allows.
CHUNK = 2**22
"""Greatest number of elements of a chunk; a lossy wire, which copies more, takes half of it."""
_IN_PLACE = 2**16  # tensors of at least so many elements are worth messages of their own

_Pair = tuple[Tensor, Tensor | None]
"""A tensor, or a part of it, and its residual."""


class Chunk:
    """Values that travel together.

    Attributes:
        numel: how many there are.
        dtype: what they travel as, before any coding: fp32, or fp64 for fp64 tensors.
        copied: how many have to be copied, at the least, since they are no large flat tensors.
        packed: how many `pack` copies at most, those of residuals included.
    """

    def __init__(self, pairs: Sequence[_Pair], dtype: torch.dtype, staging: Staging) -> None:
        self.numel = sum(values.numel() for values, _ in pairs)
        self.dtype = dtype
        self._values = _Packed([values for values, _ in pairs], dtype, staging)
        residuals = [residual for _, residual in pairs if residual is not None]
        self._residual = _Packed(residuals, dtype, staging) if residuals else None
        self.copied = self._values.copied(_IN_PLACE)
        self.packed = self.numel * (2 if residuals else 1)

    @property
    def pieces(self) -> list[Tensor]:
        """The values, flat: large ones where they lie, small ones packed."""
        return self._values.pack(_IN_PLACE)

    def pack(self) -> tuple[Tensor, Tensor | None]:
        """All values in one flat tensor, residual added; and a flat one that takes the loss."""
        (values,) = self._values.pack(self.numel)
        if self._residual is None:
            return values, None
        (residual,) = self._residual.pack(self.numel)
        return values.add_(residual), residual

    def unpack(self) -> None:
        """Give the tensors what has come, where it is not theirs already."""
        self._values.unpack()
        if self._residual is not None:
            self._residual.unpack()


class _Packed:
    """Tensors laid end to end, those copied that have to be."""

    def __init__(self, tensors: Sequence[Tensor], dtype: torch.dtype, staging: Staging) -> None:
        self._tensors = tensors
        self._dtype = dtype
        self._staging = staging
        self._copied: list[Tensor] = []
        self._flat: Tensor | None = None

    def copied(self, in_place: int) -> int:
        return sum(t.numel() for t in self._tensors if not self._stays(t, in_place))

    def pack(self, in_place: int) -> list[Tensor]:
        """Those of at least ``in_place`` elements as they are, and the rest as one tensor."""
        flats = [tensor.view(-1) for tensor in self._tensors if self._stays(tensor, in_place)]
        self._copied = [tensor for tensor in self._tensors if not self._stays(tensor, in_place)]
        if self._copied:
            numel = sum(map(torch.numel, self._copied))
            self._flat = self._staging.take(numel, self._copied[0], self._dtype)
            for tensor, part in self._parts(self._flat):
                part.copy_(tensor)
            flats.append(self._flat)
        return flats

    def unpack(self) -> None:
        if self._flat is not None:
            for tensor, part in self._parts(self._flat):
                tensor.copy_(part)
            self._staging.give(self._flat)
            self._flat = None

    def _stays(self, tensor: Tensor, in_place: int) -> bool:
        fits = tensor.dtype == self._dtype and tensor.is_contiguous()
        return fits and tensor.numel() >= in_place

    def _parts(self, flat: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        parts = torch.split(flat, [tensor.numel() for tensor in self._copied])
        for tensor, part in zip(self._copied, parts, strict=True):
            yield tensor, part.view(tensor.shape)


def chunks(pairs: Iterable[_Pair], limit: int, staging: Staging) -> Iterator[Chunk]:
    """Tensors in chunks of one dtype, cut where a chunk is full; in one order on all ranks."""
    known = [(tensor.detach(), residual) for tensor, residual in pairs if tensor.numel()]
    for dtype in (torch.float32, torch.float64):
        together: list[_Pair] = []
        room = limit
        for pair in known:
            if travels_as(pair[0].dtype) != dtype:
                continue
            for piece in _cut(pair, room, limit):
                together.append(piece)
                room -= piece[0].numel()
                if room <= 0:
                    yield Chunk(together, dtype, staging)
                    together, room = [], limit
        if together:
            yield Chunk(together, dtype, staging)


def _cut(pair: _Pair, room: int, limit: int) -> Iterator[_Pair]:
    """A tensor as flat pieces: one that fills ``room`` elements, then of ``limit`` elements."""
    tensor, residual = pair
    flat = flat_view(tensor)
    if flat is None:  # gaps in memory are rare: the tensor is copied whole
        yield pair
        return
    lost = None if residual is None else residual.as_strided((residual.numel(),), (1,))
    start = 0
    while start < flat.numel():
        stop = start + (room if start == 0 else limit)
        yield flat[start:stop], None if lost is None else lost[start:stop]
        start = stop


def travels_as(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which means of tensors of ``dtype`` are taken.

    Example:
        >>> travels_as(torch.bfloat16)
        torch.float32
    """
    return torch.float64 if dtype == torch.float64 else torch.float32
