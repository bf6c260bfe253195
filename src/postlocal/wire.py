"""How tensors travel: the mean of many tensors over a group, in place, with bounded memory.

`mean_` cuts tensors into flat chunks of fp32 (small ones share a chunk, large ones travel from
where they lie), and a `Wire` takes the mean of each chunk. Two chunks are under way at a time.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from postlocal.group import Group, Work
from postlocal.tensors import flat_view, weigh_, whole_storage

# A collective costs milliseconds before the first byte moves (gloo, a few ranks on a few cores), so
# chunks are as large as memory for two of them under way allows: at most 64 MiB in all.
_REDUCED = 2**22  # elements in one all-reduce
_OWNED = 2**21  # elements in one exchange of parts, which needs staging both ways
_IN_PLACE = 2**20  # tensors of at least so many elements are worth a collective of their own
_UNDER_WAY = 2

Divisor = Callable[[], float]
"""The sum of the weights of all contributions; called when the first sums arrive, not before."""


class Exchange(Protocol):
    """A mean under way."""

    def wait(self) -> None:
        """Block until the chunk holds the mean.

        Raises:
            PeerError: if a rank did not take part in time.
        """
        ...


class Wire(Protocol):
    """Takes the mean of a chunk over a group."""

    @property
    def lossy(self) -> bool:
        """Whether values lose precision on the way, so that differences should be sent."""
        ...

    def payload_bytes(self, numel: int, size: int, dtype: torch.dtype = torch.float32) -> int:
        """Bytes each of ``size`` ranks sends for the mean of ``numel`` elements of ``dtype``."""
        ...

    def chunk(self, size: int) -> int:
        """Greatest number of elements of a chunk that ``size`` ranks exchange."""
        ...

    def launch(self, chunk: Tensor, group: Group, divisor: Divisor, staging: "Staging") -> Exchange:
        """Start to replace ``chunk`` by the sum over the group divided by ``divisor()``.

        All ranks end with identical bits.

        Args:
            chunk: contiguous, fp32 (fp64 where the tensors are), shape ``(n,)``, ``n`` at least 1
                and the same on all ranks.
            group: who takes part.
            divisor: gives the sum of the weights of all contributions.
            staging: where memory for what travels comes from.
        """
        ...


class Staging:
    """Buffers that are used again: what one chunk travelled in serves the next.

    Example:
        >>> staging = Staging()
        >>> first = staging.take(4, torch.zeros(()))
        >>> staging.give(first)
        >>> staging.take(3, torch.zeros(())).data_ptr() == first.data_ptr()
        True
    """

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def take(self, numel: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A flat tensor of ``numel`` elements on the device of ``like``, with any content."""
        dtype = dtype or like.dtype
        for index, buffer in enumerate(self._free):
            if buffer.dtype == dtype and buffer.device == like.device and buffer.numel() >= numel:
                return self._free.pop(index)[:numel]
        return like.new_empty(numel, dtype=dtype)

    def give(self, *buffers: Tensor) -> None:
        """Take buffers back; their content is no longer needed."""
        # A buffer taken for a small chunk was cut to its size, and comes back whole.
        self._free.extend(whole_storage(buffer) for buffer in buffers)


# The numbers of ranks for which the sum of equal fp32 values, divided again, is the value itself.
_ALL_REDUCED = (2, 4)


@dataclass(frozen=True)
class _Exact:
    lossy = False

    def payload_bytes(self, numel: int, size: int, dtype: torch.dtype = torch.float32) -> int:
        return _exchanged_bytes(numel, size, dtype)

    def chunk(self, size: int) -> int:
        return _REDUCED if size in _ALL_REDUCED else _OWNED

    def launch(self, chunk: Tensor, group: Group, divisor: Divisor, staging: Staging) -> Exchange:
        if group.size in _ALL_REDUCED:
            return _AllReduced(chunk, group, divisor)
        return _Owned(chunk, group, divisor, chunk.dtype, staging)


@dataclass(frozen=True)
class _Cast:
    dtype: torch.dtype
    lossy = True

    def payload_bytes(self, numel: int, size: int, dtype: torch.dtype = torch.float32) -> int:
        return _exchanged_bytes(numel, size, self.dtype)

    def chunk(self, size: int) -> int:
        return _OWNED

    def launch(self, chunk: Tensor, group: Group, divisor: Divisor, staging: Staging) -> Exchange:
        return _Owned(chunk, group, divisor, self.dtype, staging)


def _exchanged_bytes(numel: int, size: int, dtype: torch.dtype) -> int:
    return 2 * (size - 1) * math.ceil(numel / size) * dtype.itemsize


def fp32() -> Wire:
    """Exact: 4 bytes a value (8 for fp64 tensors).

    Identical replicas stay as they are to the last bit, whatever their number.

    Example:
        >>> fp32().payload_bytes(numel=1000, size=2)
        4000
    """
    return _Exact()


def bf16() -> Wire:
    """2 bytes a value, 8 bits of precision, the range of fp32; sums are taken in fp64.

    Example:
        >>> bf16().payload_bytes(numel=1000, size=2)
        2000
    """
    return _Cast(torch.bfloat16)


def fp16() -> Wire:
    """2 bytes a value, 11 bits of precision; values beyond 65504 are sent as 65504.

    Example:
        >>> fp16().lossy
        True
    """
    return _Cast(torch.float16)


class _AllReduced:
    """One all-reduce, then a division.

    Used where the sum of that many equal fp32 values, divided again, is the value itself: for 2
    and 4 ranks. For others it can differ in the last bit, and replicas that agree would move.
    """

    def __init__(self, chunk: Tensor, group: Group, divisor: Divisor) -> None:
        self._chunk = chunk
        self._divisor = divisor
        self._work = group.all_reduce(chunk)

    def wait(self) -> None:
        self._work.wait()
        self._chunk.div_(self._divisor())


class _Owned:
    """All-to-all of parts, mean of each part by the rank that owns it, all-gather of the means.

    Each rank sends as many bytes as in a ring all-reduce of the same dtype, each value is rounded
    once on the way out and once on the way back, and all take the owner's bits.
    """

    def __init__(
        self, chunk: Tensor, group: Group, divisor: Divisor, dtype: torch.dtype, staging: Staging
    ) -> None:
        self._chunk = chunk
        self._group = group
        self._divisor = divisor
        self._staging = staging
        padded = math.ceil(chunk.numel() / group.size) * group.size
        self._sent = staging.take(padded, chunk, dtype)
        self._received = staging.take(padded, chunk, dtype)
        self._sent[chunk.numel() :].zero_()
        _cast(chunk, self._sent[: chunk.numel()])
        self._work: Work = group.all_to_all(self._received, self._sent)

    def wait(self) -> None:
        self._work.wait()
        parts = self._received.view(self._group.size, -1)
        total = self._staging.take(parts.shape[1], parts, torch.float64)
        total.copy_(parts[0])
        for part in parts[1:]:
            total.add_(part)
        owned = _cast(total.div_(self._divisor()), parts[0])
        self._group.all_gather(self._sent, owned).wait()
        self._chunk.copy_(self._sent[: self._chunk.numel()])
        self._staging.give(self._sent, self._received, total)


def _cast(values: Tensor, out: Tensor) -> Tensor:
    if out.dtype == torch.float16:
        limit = torch.finfo(torch.float16).max
        values = values.clamp(-limit, limit)
    return out.copy_(values)


def mean_(
    tensors: Sequence[Tensor], group: Group, wire: Wire, divisor: Divisor | None = None
) -> int:
    """Replace tensors by their mean over a group; all ranks end with identical bits.

    Sums are taken in fp32 or better and divided after. Storage, strides and aliases of the tensors
    stay as they are. Beside them it needs staging for two chunks at most.

    Args:
        tensors: floating point, of the same shapes, dtypes and strides on all ranks; no two
            overlap in memory.
        group: who takes part.
        wire: how values travel.
        divisor: gives the sum of the weights; None: the size of the group.

    Returns:
        Bytes of payload that this rank sent.

    Raises:
        PeerError: if a rank did not take part in time.
    """
    divisor = divisor or (lambda: float(group.size))
    if group.size == 1:
        weigh_(tensors, 1 / divisor())
        return 0
    sent = 0
    staging = Staging()
    under_way: deque[tuple[_Chunk, Exchange]] = deque()
    pieces = [tensor.detach() for tensor in tensors if tensor.numel()]
    for chunk in _chunks(pieces, wire.chunk(group.size), staging):
        if len(under_way) == _UNDER_WAY:
            _land(*under_way.popleft())
        flat = chunk.pack()
        under_way.append((chunk, wire.launch(flat, group, divisor, staging)))
        sent += wire.payload_bytes(flat.numel(), group.size, flat.dtype)
    while under_way:
        _land(*under_way.popleft())
    return sent


def maximum_(tensors: Sequence[Tensor], group: Group, device: torch.device | None = None) -> int:
    """Replace tensors, of integers or small ones of floats, by their maximum over a group.

    Args:
        tensors: of the same shapes and dtypes on all ranks.
        group: who takes part.
        device: where the group's collectives take tensors from; None: the first tensor's.

    Returns:
        Bytes of payload that this rank sent.
    """
    sent = 0
    for dtype in (torch.int64, torch.float64):
        chosen = [t.detach() for t in tensors if t.is_floating_point() == dtype.is_floating_point]
        if not chosen or group.size == 1:
            continue
        device = device or chosen[0].device
        flat = torch.cat([tensor.flatten().to(device, dtype) for tensor in chosen])
        group.all_reduce(flat, "max").wait()
        parts = torch.split(flat, [tensor.numel() for tensor in chosen])
        for tensor, part in zip(chosen, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))
        sent += fp32().payload_bytes(flat.numel(), group.size, dtype)
    return sent


def _land(chunk: "_Chunk", exchange: Exchange) -> None:
    exchange.wait()
    chunk.unpack()


class _Chunk:
    """Pieces of tensors that travel together, as ``dtype``."""

    def __init__(self, pieces: Sequence[Tensor], dtype: torch.dtype, staging: Staging) -> None:
        self._pieces = pieces
        self._dtype = dtype
        self._staging = staging
        self._flat: Tensor | None = None

    def pack(self) -> Tensor:
        """The pieces as one flat tensor: where they lie, if that is one already."""
        first = self._pieces[0]
        if len(self._pieces) == 1 and first.dtype == self._dtype and first.is_contiguous():
            return first.view(-1)
        numel = sum(piece.numel() for piece in self._pieces)
        self._flat = self._staging.take(numel, first, self._dtype)
        for piece, part in self._parts(self._flat):
            part.copy_(piece)
        return self._flat

    def unpack(self) -> None:
        """Give the pieces what the flat tensor holds."""
        if self._flat is not None:
            for piece, part in self._parts(self._flat):
                piece.copy_(part)
            self._staging.give(self._flat)
            self._flat = None

    def _parts(self, flat: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        parts = torch.split(flat, [piece.numel() for piece in self._pieces])
        for piece, part in zip(self._pieces, parts, strict=True):
            yield piece, part.view(piece.shape)


def _chunks(tensors: Sequence[Tensor], limit: int, staging: Staging) -> Iterator[_Chunk]:
    """Large tensors in parts of their own, small ones packed; in one order on all ranks."""
    for dtype in (torch.float32, torch.float64):
        packed: list[Tensor] = []
        for piece in _pieces(tensors, limit, dtype):
            if piece.numel() >= _IN_PLACE and piece.dtype == dtype:
                yield _Chunk([piece], dtype, staging)
                continue
            if packed and sum(map(torch.numel, packed)) + piece.numel() > limit:
                yield _Chunk(packed, dtype, staging)
                packed = []
            packed.append(piece)
        if packed:
            yield _Chunk(packed, dtype, staging)


def _pieces(tensors: Sequence[Tensor], limit: int, dtype: torch.dtype) -> Iterator[Tensor]:
    for tensor in tensors:
        if _exact_dtype(tensor.dtype) == dtype:
            flat = flat_view(tensor)
            # A tensor with gaps in memory is rare: it is copied whole.
            yield from [tensor] if flat is None else torch.split(flat, limit)


def _exact_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
