"""How tensors travel: the mean of many tensors over a group, in place, with bounded memory.

`mean_` cuts tensors into flat chunks of fp32 (small ones share a chunk, large ones travel from
where they lie), and a `Wire` takes the mean of each chunk: each rank owns a part of it, gets the
contributions to it and sends their mean back. Three chunks are under way at a time.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Protocol

import torch
from torch import Tensor

from postlocal.codec import Codec, cast, exact
from postlocal.group import Group, Work
from postlocal.tensors import flat_view, weigh_, whole_storage

# An exchange costs milliseconds before the first byte moves (gloo, a few ranks on a few cores), so
# chunks are as large as memory for three of them under way allows: at most 64 MiB in all.
CHUNK = 2**22
"""Greatest number of elements of a chunk."""
_IN_PLACE = 2**20  # tensors of at least so many elements are worth an exchange of their own
_TILE = 2**18  # elements summed at a time
# The numbers of ranks for which the sum of equal fp32 values, divided again, is the value itself.
_EXACT_IN_FP32 = (2, 4)

Divisor = Callable[[], float]
"""The sum of the weights of all contributions; called when the first sums arrive, not before."""


class Exchange(Protocol):
    """A mean under way."""

    def turn(self) -> None:
        """Block until all contributions are here, take the mean, and send it on its way back.

        Raises:
            PeerError: if a rank did not take part in time.
        """
        ...

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
        """Bytes each of ``size`` ranks sends for the mean of ``numel`` elements of ``dtype``.

        Parts that do not divide evenly count as the greatest of them.
        """
        ...

    def launch(
        self,
        chunk: Tensor,
        group: Group,
        divisor: Divisor,
        staging: "Staging",
        residual: Tensor | None = None,
    ) -> Exchange:
        """Start to replace ``chunk`` by the sum over the group divided by ``divisor()``.

        All ranks end with identical bits.

        Args:
            chunk: contiguous, fp32 (fp64 where the tensors are), shape ``(n,)``, ``n`` at least 1
                and the same on all ranks.
            group: who takes part.
            divisor: gives the sum of the weights of all contributions.
            staging: where memory for what travels comes from.
            residual: shape and dtype of ``chunk``; takes what this rank's values lost on the way.
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


@dataclass(frozen=True)
class _Exact:
    lossy = False

    def payload_bytes(self, numel: int, size: int, dtype: torch.dtype = torch.float32) -> int:
        return _exchanged_bytes(exact(), numel, size, dtype)

    def launch(
        self,
        chunk: Tensor,
        group: Group,
        divisor: Divisor,
        staging: Staging,
        residual: Tensor | None = None,
    ) -> Exchange:
        return _Direct(chunk, group, divisor, staging)


@dataclass(frozen=True)
class _Coded:
    codec: Codec
    lossy = True

    def payload_bytes(self, numel: int, size: int, dtype: torch.dtype = torch.float32) -> int:
        return _exchanged_bytes(self.codec, numel, size, dtype)

    def launch(
        self,
        chunk: Tensor,
        group: Group,
        divisor: Divisor,
        staging: Staging,
        residual: Tensor | None = None,
    ) -> Exchange:
        return _Encoded(chunk, group, divisor, self.codec, staging, residual)


def _exchanged_bytes(codec: Codec, numel: int, size: int, dtype: torch.dtype) -> int:
    return 2 * (size - 1) * codec.nbytes(_part(numel, size, codec.block), dtype)


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
    return _Coded(cast(torch.bfloat16))


def fp16() -> Wire:
    """2 bytes a value, 11 bits of precision; values beyond 65504 are sent as 65504.

    Example:
        >>> fp16().lossy
        True
    """
    return _Coded(cast(torch.float16))


def quantised(codec: Codec) -> Wire:
    """Codes of a codec, 8 bits a value: each is encoded once on the way out and once back.

    Args:
        codec: such as `postlocal.codec.symmetric`.

    Example:
        >>> from postlocal import codec
        >>> quantised(codec.symmetric(block=256)).payload_bytes(numel=2**20, size=2)
        1064960
    """
    return _Coded(codec)


class _Direct:
    """Parts travel from where they lie: to their owners, which take the means, and back.

    Each rank sends as many bytes as in a ring all-reduce, and touches each value once for the sum
    and the division together.
    """

    def __init__(self, chunk: Tensor, group: Group, divisor: Divisor, staging: Staging) -> None:
        self._group = group
        self._divisor = divisor
        self._staging = staging
        self._parts = _split(chunk, group.size)
        own = self._parts[group.rank].numel()
        self._received = staging.take((group.size - 1) * own, chunk)
        others = list(torch.split(self._received, own)) if own else []
        self._contributions = [others.pop() if others else chunk[:0] for _ in range(group.size - 1)]
        self._work: Work = group.exchange(self._parts, _around(group, self._contributions))

    def turn(self) -> None:
        self._work.wait()
        mean = self._parts[self._group.rank]
        _take_mean(mean, self._contributions, self._divisor())
        self._staging.give(self._received)
        self._work = self._group.exchange([mean] * self._group.size, self._parts)

    def wait(self) -> None:
        self._work.wait()


def _around(group: Group, others: Sequence[Tensor]) -> list[Tensor]:
    """Tensors for the other ranks, in their order, with an empty one for this rank."""
    return [*others[: group.rank], others[0][:0], *others[group.rank :]]


def _take_mean(own: Tensor, others: Sequence[Tensor], divisor: float) -> None:
    """Add contributions to one of them and divide, piece by piece within a processor's cache."""
    exact = own.dtype == torch.float64 or len(others) + 1 in _EXACT_IN_FP32
    total = own.new_empty(0 if exact else _TILE, dtype=torch.float64)
    for start in range(0, own.numel(), _TILE):
        mean = own[start : start + _TILE]
        wide = mean if exact else total[: mean.numel()].copy_(mean)
        for other in others:
            wide.add_(other[start : start + _TILE])
        torch.div(wide, divisor, out=mean)


class _Encoded:
    """Codes of parts travel: to their owners, which take the means, and codes of the means back.

    Each value is coded once on the way out, unless its own rank owns it, and once on the way back.
    All ranks take what the owner's codes stand for.

    What coding loses is left in ``residual``, if there is one: by this rank on the way out, and by
    all ranks on the way back with the one that owns the part, so that the mean over ranks of
    contribution minus residual is what all received.
    """

    def __init__(
        self,
        chunk: Tensor,
        group: Group,
        divisor: Divisor,
        codec: Codec,
        staging: Staging,
        residual: Tensor | None = None,
    ) -> None:
        self._group = group
        self._divisor = divisor
        self._codec = codec
        self._staging = staging
        self._parts = _split(chunk, group.size, codec.block)
        self._residuals = None if residual is None else _split(residual, group.size, codec.block)
        sizes = [codec.nbytes(part.numel(), chunk.dtype) for part in self._parts]
        self._sent = staging.take(sum(sizes), chunk, torch.uint8)
        self._received = staging.take(group.size * sizes[group.rank], chunk, torch.uint8)
        self._outgoing = torch.split(self._sent, sizes)
        self._incoming = self._received.chunk(group.size)
        for rank, (part, payload) in enumerate(zip(self._parts, self._outgoing, strict=True)):
            self._send(rank, part, payload)
        self._work: Work = group.exchange(self._outgoing, self._incoming)

    def turn(self) -> None:
        self._work.wait()
        rank = self._group.rank
        mean, payload = self._parts[rank], self._outgoing[rank]
        divisor = self._divisor()
        decoded = self._staging.take(mean.numel(), mean)
        for other, incoming in enumerate(self._incoming):
            if other != rank:
                self._codec.decode(incoming, decoded)
                mean.add_(decoded)
        self._staging.give(decoded, self._received)
        mean.div_(divisor)
        self._codec.encode(mean, payload)
        if self._residuals is not None:
            self._residuals[rank].copy_(self._lost(mean, payload)).mul_(divisor)
        self._work = self._group.exchange([payload] * self._group.size, self._outgoing)

    def wait(self) -> None:
        self._work.wait()
        for part, payload in zip(self._parts, self._outgoing, strict=True):
            self._codec.decode(payload, part)
        self._staging.give(self._sent)

    def _send(self, rank: int, part: Tensor, payload: Tensor) -> None:
        if rank != self._group.rank:
            self._codec.encode(part, payload)
            if self._residuals is not None:
                self._residuals[rank].copy_(self._lost(part, payload))

    def _lost(self, values: Tensor, payload: Tensor) -> Tensor:
        decoded = torch.empty_like(values)
        self._codec.decode(payload, decoded)
        return torch.sub(values, decoded, out=decoded)


def _split(flat: Tensor, size: int, block: int = 1) -> list[Tensor]:
    """The parts of a chunk that ``size`` ranks own, the last ones perhaps shorter or empty."""
    part = _part(flat.numel(), size, block)
    return [flat[rank * part : (rank + 1) * part] for rank in range(size)]


def _part(numel: int, size: int, block: int) -> int:
    return math.ceil(math.ceil(numel / size) / block) * block


def mean_(
    tensors: Sequence[Tensor],
    group: Group,
    wire: Wire,
    divisor: Divisor | None = None,
    residuals: Sequence[Tensor] | None = None,
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
        residuals: error feedback: what a lossy wire lost of this rank's values, added to them
            before they travel, and then replaced by what is lost this time. Of the tensors'
            shapes and strides, in the dtype that they travel in: fp32, or fp64 for fp64 tensors.

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
    outbound: deque[tuple[_Chunk, Exchange]] = deque()
    homebound: deque[tuple[_Chunk, Exchange]] = deque()
    pairs = zip(tensors, residuals if residuals else repeat(None), strict=residuals is not None)
    for chunk in _chunks(pairs, staging):
        if len(outbound) == 2:
            _turn(outbound, homebound)
        flat, residual = chunk.pack()
        outbound.append((chunk, wire.launch(flat, group, divisor, staging, residual)))
        sent += wire.payload_bytes(flat.numel(), group.size, flat.dtype)
    while outbound:
        _turn(outbound, homebound)
    _land(homebound)
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


def _turn(
    outbound: deque[tuple["_Chunk", Exchange]], homebound: deque[tuple["_Chunk", Exchange]]
) -> None:
    """Send the first means back, once those sent before have landed."""
    chunk, exchange = outbound.popleft()
    exchange.turn()
    _land(homebound)
    homebound.append((chunk, exchange))


def _land(homebound: deque[tuple["_Chunk", Exchange]]) -> None:
    while homebound:
        chunk, exchange = homebound.popleft()
        exchange.wait()
        chunk.unpack()


Piece = tuple[Tensor, Tensor | None]
"""Part of a tensor, and of its residual."""


class _Chunk:
    """Pieces of tensors that travel together, as ``dtype``."""

    def __init__(self, pieces: Sequence[Piece], dtype: torch.dtype, staging: Staging) -> None:
        self._values = _Packed([values for values, _ in pieces], dtype, staging)
        residuals = [residual for _, residual in pieces if residual is not None]
        self._residual = _Packed(residuals, dtype, staging) if residuals else None

    def pack(self) -> tuple[Tensor, Tensor | None]:
        """Values to send, residual added; and the flat residual that takes the loss."""
        if self._residual is None:
            return self._values.pack(), None
        residual = self._residual.pack()
        return self._values.pack().add_(residual), residual

    def unpack(self) -> None:
        """Give the pieces what has come."""
        self._values.unpack()
        if self._residual is not None:
            self._residual.unpack()


class _Packed:
    """Pieces as one flat tensor: where they lie, if that is one already."""

    def __init__(self, pieces: Sequence[Tensor], dtype: torch.dtype, staging: Staging) -> None:
        self._pieces = pieces
        self._dtype = dtype
        self._staging = staging
        self._flat: Tensor | None = None

    def pack(self) -> Tensor:
        first = self._pieces[0]
        if len(self._pieces) == 1 and first.dtype == self._dtype and first.is_contiguous():
            return first.view(-1)
        numel = sum(piece.numel() for piece in self._pieces)
        self._flat = self._staging.take(numel, first, self._dtype)
        for piece, part in self._parts(self._flat):
            part.copy_(piece)
        return self._flat

    def unpack(self) -> None:
        if self._flat is not None:
            for piece, part in self._parts(self._flat):
                piece.copy_(part)
            self._staging.give(self._flat)
            self._flat = None

    def _parts(self, flat: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        parts = torch.split(flat, [piece.numel() for piece in self._pieces])
        for piece, part in zip(self._pieces, parts, strict=True):
            yield piece, part.view(piece.shape)


def _chunks(pairs: Iterable[Piece], staging: Staging) -> Iterator[_Chunk]:
    """Large tensors in parts of their own, small ones packed; in one order on all ranks."""
    known = [(tensor.detach(), residual) for tensor, residual in pairs if tensor.numel()]
    for dtype in (torch.float32, torch.float64):
        packed: list[Piece] = []
        numel = 0
        for piece, residual in _pieces(known, dtype):
            if piece.numel() >= _IN_PLACE and piece.dtype == dtype:
                yield _Chunk([(piece, residual)], dtype, staging)
                continue
            if packed and numel + piece.numel() > CHUNK:
                yield _Chunk(packed, dtype, staging)
                packed, numel = [], 0
            packed.append((piece, residual))
            numel += piece.numel()
        if packed:
            yield _Chunk(packed, dtype, staging)


def _pieces(pairs: Iterable[Piece], dtype: torch.dtype) -> Iterator[Piece]:
    for tensor, residual in pairs:
        if travels_as(tensor.dtype) != dtype:
            continue
        flat = flat_view(tensor)
        if flat is None:  # gaps in memory are rare: the tensor is copied whole
            yield tensor, residual
        elif residual is None:
            yield from ((part, None) for part in torch.split(flat, CHUNK))
        else:
            lost = residual.as_strided((residual.numel(),), (1,))
            yield from zip(torch.split(flat, CHUNK), torch.split(lost, CHUNK), strict=True)


def travels_as(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which means of tensors of ``dtype`` are taken.

    Example:
        >>> travels_as(torch.bfloat16)
        torch.float32
    """
    return torch.float64 if dtype == torch.float64 else torch.float32
