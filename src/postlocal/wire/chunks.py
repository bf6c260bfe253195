"""Tensors as flat chunks: small ones share a chunk, large ones travel from where they lie."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from postlocal.tensors import end_to_end, flat_view, weigh_
from postlocal.wire.cargo import PLAIN, Cargo, Terms
from postlocal.wire.staging import Staging

# An exchange costs milliseconds before the first byte moves (gloo, a few ranks on a few cores), so
# as much is under way as memory for it allows.
CHUNK = 2**22
"""Greatest number of fp32 elements of a chunk; a lossy wire, which copies more, takes half."""
_SHARES = 4  # chunks of what is not large, at least: means of one return while others go out
_LEAST, _LEAST_BYTES = 2**17, 2**18  # elements of a chunk, and bytes on the wire, that are worth it
_IN_PLACE = 2**16  # tensors of at least so many elements are worth messages of their own


@dataclass(frozen=True)
class Parcel:
    """A tensor that travels, or a part of one.

    Attributes:
        tensor: takes the mean.
        residual: what a lossy wire lost of it, in the dtype that it travels in: of the tensor's
            shape and strides, or contiguous where that has gaps. None: that is not kept.
        terms: its weight, and what becomes of its residual.
    """

    tensor: Tensor
    residual: Tensor | None = None
    terms: Terms = PLAIN


class Chunk:
    """Values that travel together.

    Attributes:
        numel: how many there are.
        dtype: what they travel as, before any coding: fp32, or fp64 for fp64 tensors.
        copied: how many have to be copied, at the least, since they are no large flat tensors.
        packed: how many `pack` copies at most, those of residuals included.
    """

    def __init__(self, parcels: Sequence[Parcel], dtype: torch.dtype, staging: Staging) -> None:
        self._parcels = parcels
        self.numel = sum(parcel.tensor.numel() for parcel in parcels)
        self.dtype = dtype
        self._values = _Packed([parcel.tensor for parcel in parcels], dtype, staging)
        residuals = [parcel.residual for parcel in parcels if parcel.residual is not None]
        self._residual = _Packed(residuals, dtype, staging) if residuals else None
        self.copied = self._values.copied(_IN_PLACE)
        self.packed = self.numel * (2 if residuals else 1)

    def pieces(self) -> list[Tensor]:
        """The values times their weights, flat: large ones where they lie, small ones packed."""
        pieces = self._values.pack(_IN_PLACE)
        for parcel, values in zip(self._parcels, self._values.placed, strict=True):
            weigh_([values], parcel.terms.weight)
        return pieces

    def pack(self) -> Cargo:
        """All values in one flat tensor, and all residuals."""
        values = self._values.whole()
        residual = None if self._residual is None else self._residual.whole()
        terms = [(parcel.tensor.numel(), parcel.terms) for parcel in self._parcels]
        return Cargo(values, residual, terms)

    def unpack(self) -> None:
        """Give the tensors what has come, where it is not theirs already."""
        self._values.unpack()
        if self._residual is not None:
            self._residual.unpack()


class _Packed:
    """Tensors laid end to end, those copied that have to be.

    Attributes:
        placed: where each one is.
    """

    def __init__(self, tensors: Sequence[Tensor], dtype: torch.dtype, staging: Staging) -> None:
        self._tensors = tensors
        self._dtype = dtype
        self._staging = staging
        self._flat: Tensor | None = None
        self.placed = list(tensors)

    def copied(self, in_place: int) -> int:
        return sum(t.numel() for t in self._tensors if not self._stays(t, in_place))

    def pack(self, in_place: int) -> list[Tensor]:
        """Those of at least ``in_place`` elements as they are, and the rest as one tensor."""
        flats = [tensor.view(-1) for tensor in self._tensors if self._stays(tensor, in_place)]
        numel = self.copied(in_place)
        if numel:
            self._flat = self._staging.take(numel, self._tensors[0], self._dtype)
            self._place(self._flat, in_place)
            flats.append(self._flat)
        return flats

    def whole(self) -> Tensor:
        """All in one flat tensor: where they lie, if that is end to end in the chunk's dtype."""
        if self._tensors[0].dtype == self._dtype:
            flat = end_to_end(self._tensors)
            if flat is not None:
                return flat
        (flat,) = self.pack(sum(map(torch.numel, self._tensors)) + 1)
        return flat

    def unpack(self) -> None:
        if self._flat is not None:
            for tensor, part in zip(self._tensors, self.placed, strict=True):
                if part is not tensor:
                    tensor.copy_(part)
            self.placed = list(self._tensors)
            self._staging.give(self._flat)
            self._flat = None

    def _place(self, flat: Tensor, in_place: int) -> None:
        start = 0
        for index, tensor in enumerate(self._tensors):
            if not self._stays(tensor, in_place):
                stop = start + tensor.numel()
                self.placed[index] = flat[start:stop].view(tensor.shape).copy_(tensor)
                start = stop

    def _stays(self, tensor: Tensor, in_place: int) -> bool:
        fits = tensor.dtype == self._dtype and tensor.is_contiguous()
        return fits and tensor.numel() >= in_place


def chunks(parcels: Iterable[Parcel], limit: int, staging: Staging) -> Iterator[Chunk]:
    """Tensors in chunks of one dtype, cut where a chunk is full; in one order on all ranks.

    Args:
        parcels: the tensors.
        limit: greatest number of fp32 elements of a chunk; it holds half as many of fp64.
        staging: where memory for copies comes from.
    """
    known = [parcel for parcel in parcels if parcel.tensor.numel()]
    for dtype in (torch.float32, torch.float64):
        most = max(1, limit * torch.float32.itemsize // dtype.itemsize)
        together: list[Parcel] = []
        room = most
        for parcel in known:
            if travels_as(parcel.tensor.dtype) != dtype:
                continue
            for piece in _cut(parcel, room, most):
                if together and piece.tensor.numel() > room:
                    yield Chunk(together, dtype, staging)
                    together, room = [], most
                together.append(piece)
                room -= piece.tensor.numel()
                if room <= 0:
                    yield Chunk(together, dtype, staging)
                    together, room = [], most
        if together:
            yield Chunk(together, dtype, staging)


def _cut(parcel: Parcel, room: int, limit: int) -> Iterator[Parcel]:
    """A tensor in pieces: one that fills ``room`` elements, then of ``limit`` elements."""
    tensor, lost = parcel.tensor.detach(), parcel.residual
    lost = None if lost is None else lost.as_strided((lost.numel(),), (1,))
    start = 0
    for piece in _pieces(tensor, room, limit):
        stop = start + piece.numel()
        yield Parcel(piece, None if lost is None else lost[start:stop], parcel.terms)
        start = stop


def _pieces(tensor: Tensor, room: int, limit: int) -> Iterator[Tensor]:
    flat = flat_view(tensor)
    if flat is None:
        yield from _slices(tensor, limit)
        return
    start = 0
    while start < flat.numel():
        stop = start + (room if start == 0 else limit)
        yield flat[start:stop]
        start = stop


def _slices(tensor: Tensor, limit: int) -> Iterator[Tensor]:
    """A tensor with gaps in memory along its first dimension, or along later ones if need be."""
    if tensor.numel() <= limit:
        yield tensor
        return
    row = tensor.numel() // len(tensor)
    for rows in torch.split(tensor, max(1, limit // row)):
        yield from _slices(rows if row <= limit else rows[0], limit)


def share_of(numel: int, limit: int, value_bytes: float) -> int:
    """Elements of a chunk, at most ``limit``, such that several of ``numel`` are under way.

    While one chunk alone is under way, its links are idle from the end of the fastest contribution
    to the end of the slowest one, and again on the way back.

    Args:
        numel: elements in all.
        limit: of a chunk.
        value_bytes: of each element on the wire.

    Example:
        >>> share_of(10**6, 2**22, 4), share_of(10**6, 2**22, 0.5), share_of(10**8, 2**22, 4)
        (250000, 524288, 4194304)
    """
    return min(limit, max(_LEAST, int(_LEAST_BYTES / value_bytes), -(-numel // _SHARES)))


def travels_as(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which means of tensors of ``dtype`` are taken.

    Example:
        >>> travels_as(torch.bfloat16)
        torch.float32
    """
    return torch.float64 if dtype == torch.float64 else torch.float32
