"""Tensors as flat chunks: the size of chunks, their content, and the memory for them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from postlocal.codec import Codec
from postlocal.tensors import end_to_end, flat_view, weigh_, whole_storage

# Sizes. An exchange costs milliseconds before the first byte moves (gloo, a few ranks on a few
# cores), so as much is under way as memory for it allows.
CHUNK = 2**22
"""Greatest number of fp32 elements of a chunk; a lossy wire, which copies more, takes half."""
SCATTER_BYTES = 12 * CHUNK
"""Staging of the chunks under way: 48 MiB, and some more for what is small."""
GATHER_BYTES = 16 * CHUNK
"""Values of the chunks whose means are on their way back, which may need no staging."""
STAGING_BYTES = 2**26
"""Most staging that a mean takes in all."""
_SHARES = 4  # chunks of what is not large, at least: means of one return while others go out
_LEAST, _LEAST_BYTES = 2**17, 2**18  # elements of a chunk, and bytes on the wire, that are worth it
_IN_PLACE = 2**16  # tensors of at least so many elements are worth messages of their own


def chunk_size(numel: int, value_bytes: float = 4.0, most: int = CHUNK) -> int:
    """Elements of a chunk such that several of ``numel`` are under way.

    While one chunk alone is under way, its links are idle from the end of the fastest contribution
    to the end of the slowest one, and again on the way back.

    Args:
        numel: elements in all.
        value_bytes: of each element on the wire.
        most: the greatest size.

    Example:
        >>> chunk_size(10**6), chunk_size(10**6, value_bytes=0.5), chunk_size(10**8)
        (250000, 524288, 4194304)
    """
    return min(most, max(_LEAST, int(_LEAST_BYTES / value_bytes), -(-numel // _SHARES)))


def coded_chunk_size(numel: int, codec: Codec) -> int:
    """The same where codes are sent, for which whole chunks are copied."""
    most = CHUNK // 2
    return chunk_size(numel, codec.nbytes(most) / most, most)


def gathered_chunk_size(size: int, codec: Codec) -> int:
    """The same where codes of ``size`` ranks arrive: together they take the memory of a chunk."""
    most = CHUNK // 2
    fitting = most * 4 * CHUNK // (size * codec.nbytes(most))
    return max(1, min(most, fitting) // codec.block) * codec.block


def sent_as(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which means of tensors of ``dtype`` are taken.

    Example:
        >>> sent_as(torch.bfloat16)
        torch.float32
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Weighting:
    """How a contribution counts, and what becomes of its residual.

    Attributes:
        weight: that the tensor is multiplied by; 0: zeros are sent, and the residual is kept.
        decay: share of the residual that is kept from one mean to the next.
        drop_residual: whether the residual of this rank's values is dropped first; that of means
            which this rank encoded is kept.
    """

    weight: float = 1.0
    decay: float = 1.0
    drop_residual: bool = False


PLAIN = Weighting()


@dataclass(frozen=True)
class WeightedTensor:
    """A tensor, or a part of one, with its weighting.

    Attributes:
        tensor: takes the mean.
        residual: what a lossy wire lost of it, in the dtype that it is sent in: of the tensor's
            shape and strides, or contiguous where that has gaps. None: no residual is kept.
        weighting: its weight, and what becomes of its residual.
    """

    tensor: Tensor
    residual: Tensor | None = None
    weighting: Weighting = PLAIN


class Staging:
    """Buffers that are used again: the memory of one chunk serves the next.

    It holds no more than what was in use at once: a buffer that has become too small is dropped
    where a larger one is made.

    Example:
        >>> staging = Staging()
        >>> first = staging.allocate(4, torch.zeros(()))
        >>> staging.free(first)
        >>> staging.allocate(3, torch.zeros(())).data_ptr() == first.data_ptr()
        True
    """

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def allocate(self, numel: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A flat tensor of ``numel`` elements on the device of ``like``, with any content."""
        dtype = dtype or like.dtype
        # Payloads and values are of such different sizes that they do not serve for each other.
        alike = [
            index
            for index, buffer in enumerate(self._free)
            if buffer.is_floating_point() == dtype.is_floating_point
            and buffer.device == like.device
        ]
        needed = numel * dtype.itemsize
        fitting = [index for index in alike if self._free[index].nbytes >= needed]
        if fitting:
            best = min(fitting, key=lambda index: self._free[index].nbytes)
            return self._free.pop(best).view(torch.uint8)[:needed].view(dtype)
        self._free = [b for index, b in enumerate(self._free) if index not in alike]
        return like.new_empty(numel, dtype=dtype)

    def free(self, *buffers: Tensor) -> None:
        """Take buffers back; their content is no longer needed."""
        # A buffer allocated for a small chunk was cut to its size, and comes back whole.
        self._free.extend(whole_storage(buffer) for buffer in buffers)


class Chunk:
    """Values that are sent together.

    Attributes:
        numel: how many there are.
        dtype: what they are sent as, before any coding: fp32, or fp64 for fp64 tensors.
        copied: how many have to be copied, at the least, since they are no large flat tensors.
        packed: how many `pack` copies at most, those of residuals included.
        weightings: numbers of values and their weightings, in the order of the values.
        residual_left: whether it has a residual that the wire has not replaced yet.
    """

    def __init__(
        self, tensors: Sequence[WeightedTensor], dtype: torch.dtype, staging: Staging
    ) -> None:
        self.weightings = [(each.tensor.numel(), each.weighting) for each in tensors]
        self.numel = sum(numel for numel, _ in self.weightings)
        self.dtype = dtype
        self._values = _Packed([each.tensor for each in tensors], dtype, staging)
        residuals = [each.residual for each in tensors if each.residual is not None]
        self._residual = _Packed(residuals, dtype, staging) if residuals else None
        self.copied = self._values.copied(_IN_PLACE)
        self.packed = self.numel * (2 if residuals else 1)
        self.residual_left = bool(residuals)

    def pieces(self) -> list[Tensor]:
        """The values times their weights, flat: large ones where they lie, small ones packed.

        Residuals are left out, so this is for wires that lose nothing.
        """
        pieces = self._values.pack(_IN_PLACE)
        for (_, weighting), values in zip(self.weightings, self._values.placed, strict=True):
            weigh_([values], weighting.weight)
        return pieces

    def pack(self) -> tuple[Tensor, Tensor | None]:
        """All values in one flat tensor, and all residuals, if there are any."""
        values = self._values.whole()
        return values, None if self._residual is None else self._residual.whole()

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
            self._flat = self._staging.allocate(numel, self._tensors[0], self._dtype)
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
            self._staging.free(self._flat)
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


def chunks(tensors: Iterable[WeightedTensor], limit: int, staging: Staging) -> Iterator[Chunk]:
    """Tensors in chunks of one dtype, cut where a chunk is full; in one order on all ranks.

    Args:
        tensors: what is sent.
        limit: greatest number of fp32 elements of a chunk; it holds half as many of fp64.
        staging: where memory for copies comes from.
    """
    known = [each for each in tensors if each.tensor.numel()]
    for dtype in (torch.float32, torch.float64):
        most = max(1, limit * torch.float32.itemsize // dtype.itemsize)
        together: list[WeightedTensor] = []
        room = most
        for each in known:
            if sent_as(each.tensor.dtype) != dtype:
                continue
            for piece in _cut(each, room, most):
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


def _cut(each: WeightedTensor, room: int, limit: int) -> Iterator[WeightedTensor]:
    """A tensor in pieces: one that fills ``room`` elements, then of ``limit`` elements."""
    tensor, lost = each.tensor.detach(), each.residual
    lost = None if lost is None else lost.as_strided((lost.numel(),), (1,))
    start = 0
    for piece in _pieces(tensor, room, limit):
        stop = start + piece.numel()
        yield WeightedTensor(piece, None if lost is None else lost[start:stop], each.weighting)
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
