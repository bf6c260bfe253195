"""How tensors travel: the mean of many tensors over a group, in place, with bounded memory.

`mean_` cuts tensors into flat chunks of fp32 (small ones share a chunk, large ones travel from
where they lie), and a `Wire` takes the mean of each chunk: each rank owns a part of it, gets the
contributions to it and sends their mean back. Several chunks are under way at a time.
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
# as much is under way as memory for it allows.
CHUNK = 2**22
"""Greatest number of elements of a chunk; a lossy wire, which copies more, takes half of it."""
_STAGED = 3 * CHUNK  # elements in memory of ours: 48 MiB, and some more for what is small
_HOMEBOUND = 4 * CHUNK  # elements on their way back, which may need no memory
_IN_PLACE = 2**16  # tensors of at least so many elements are worth messages of their own
_TILE = 2**17  # elements summed at a time, that stay in a processor's cache
# The numbers of ranks for which the sum of equal fp32 values, divided again, is the value itself.
_EXACT_IN_FP32 = (2, 4)

Divisor = Callable[[], float]
"""The sum of the weights of all contributions; called when the first sums arrive, not before."""


Repair = Callable[[Tensor, Sequence[Tensor]], None]
"""Replaces a contribution, given those of the others in their order, by a mean."""


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
        self, chunk: "Chunk", group: Group, divisor: Divisor, staging: "Staging"
    ) -> Exchange:
        """Start to replace values by the sum over the group divided by ``divisor()``.

        All ranks end with identical bits.

        Args:
            chunk: the values, of the same sizes on all ranks.
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


@dataclass(frozen=True)
class _Exact:
    lossy = False

    def payload_bytes(self, numel: int, size: int, dtype: torch.dtype = torch.float32) -> int:
        return _exchanged_bytes(exact(), numel, size, dtype)

    def launch(self, chunk: "Chunk", group: Group, divisor: Divisor, staging: Staging) -> Exchange:
        return Direct(chunk.pieces, group, divisor, staging)


@dataclass(frozen=True)
class _Coded:
    codec: Codec
    lossy = True

    def payload_bytes(self, numel: int, size: int, dtype: torch.dtype = torch.float32) -> int:
        return _exchanged_bytes(self.codec, numel, size, dtype)

    def launch(self, chunk: "Chunk", group: Group, divisor: Divisor, staging: Staging) -> Exchange:
        flat, residual = chunk.pack()
        return _Encoded(flat, group, divisor, self.codec, staging, residual)


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
    """Codes of a codec: each value is encoded once on the way out and once back.

    Args:
        codec: such as `postlocal.codec.int8`.

    Example:
        >>> from postlocal import codec
        >>> quantised(codec.int8(block=256)).payload_bytes(numel=2**20, size=2)
        1064960
    """
    return _Coded(codec)


class Direct:
    """Parts travel from where they lie: to their owners, which take the means, and back.

    Each rank sends as many bytes as in a ring all-reduce, and touches each value once for the sum
    and the division together.

    Args:
        pieces: the values, flat.
        group: who takes part.
        divisor: gives the sum of the weights.
        staging: where memory for contributions comes from.
        repair: takes the mean instead, where the sum is not finite.
    """

    def __init__(
        self,
        pieces: Sequence[Tensor],
        group: Group,
        divisor: Divisor,
        staging: Staging,
        repair: Repair | None = None,
    ) -> None:
        self._group = group
        self._repair = repair
        self._divisor = divisor
        self._staging = staging
        self._parts = _divide(pieces, group.size)
        own = self._parts[group.rank]
        numel = sum(map(torch.numel, own))
        self._received = staging.take((group.size - 1) * numel, pieces[0])
        rows = iter(self._received.view(group.size - 1, numel))
        sizes = [piece.numel() for piece in own]
        self._contributions = [
            () if rank == group.rank else torch.split(next(rows), sizes)
            for rank in range(group.size)
        ]
        self._work: Work = group.exchange(self._parts, self._contributions)

    def turn(self) -> None:
        self._work.wait()
        own = self._parts[self._group.rank]
        divisor = self._divisor()
        others = [pieces for pieces in self._contributions if pieces]
        for index, mean in enumerate(own):
            _take_mean(mean, [pieces[index] for pieces in others], divisor, self._repair)
        self._staging.give(self._received)
        self._work = self._group.exchange([own] * self._group.size, self._parts)

    def wait(self) -> None:
        self._work.wait()


def _divide(pieces: Sequence[Tensor], size: int) -> list[list[Tensor]]:
    """What each of ``size`` ranks owns of pieces laid end to end, the last ones perhaps less."""
    part = math.ceil(sum(map(torch.numel, pieces)) / size)
    parts: list[list[Tensor]] = [[] for _ in range(size)]
    position = 0
    for piece in pieces:
        start = 0
        while start < piece.numel():
            rank = position // part
            stop = min(piece.numel(), start + (rank + 1) * part - position)
            parts[rank].append(piece[start:stop])
            position += stop - start
            start = stop
    return parts


def _take_mean(
    own: Tensor, others: Sequence[Tensor], divisor: float, repair: Repair | None
) -> None:
    """Replace a contribution by the mean of all, tile by tile within a processor's cache."""
    exact = own.dtype == torch.float64 or len(others) + 1 in _EXACT_IN_FP32
    total = own.new_empty(min(_TILE, own.numel()), dtype=own.dtype if exact else torch.float64)
    for start in range(0, own.numel(), _TILE):
        mean, first, *rest = (values[start : start + _TILE] for values in (own, *others))
        summed = total[: mean.numel()]
        if exact:
            torch.add(mean, first, out=summed)
        else:
            summed.copy_(mean).add_(first)
        for other in rest:
            summed.add_(other)
        if repair is not None and not math.isfinite(summed.sum()):
            repair(mean, [first, *rest])
        else:
            torch.div(summed, divisor, out=mean)


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
        self._work: Work = group.exchange(_single(self._outgoing), _single(self._incoming))

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
        sent = [[payload]] * self._group.size
        self._work = self._group.exchange(sent, _single(self._outgoing))

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


def _single(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    return [[tensor] for tensor in tensors]


def _split(flat: Tensor, size: int, block: int) -> list[Tensor]:
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
    staging: Staging | None = None,
) -> int:
    """Replace tensors by their mean over a group; all ranks end with identical bits.

    Sums are taken in fp32 or better and divided after. Storage, strides and aliases of the tensors
    stay as they are. Beside them it needs at most 64 MiB of staging.

    Args:
        tensors: floating point, of the same shapes, dtypes and strides on all ranks; no two
            overlap in memory.
        group: who takes part.
        wire: how values travel.
        divisor: gives the sum of the weights; None: the size of the group.
        residuals: error feedback: what a lossy wire lost of this rank's values, added to them
            before they travel, and then replaced by what is lost this time. Of the tensors'
            shapes and strides, in the dtype that they travel in: fp32, or fp64 for fp64 tensors.
        staging: memory to use; give the same one again to save its allocation.

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
    staging = staging or Staging()
    convoy = _Convoy(wire.lossy)
    pairs = zip(tensors, repeat(None) if residuals is None else residuals, strict=False)
    for chunk in _chunks(pairs, CHUNK // 2 if wire.lossy else CHUNK, staging):
        convoy.make_room(chunk)
        convoy.add(chunk, wire.launch(chunk, group, divisor, staging))
        sent += wire.payload_bytes(chunk.numel, group.size, chunk.dtype)
    convoy.arrive()
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


class _Convoy:
    """Exchanges under way, which go on in one order on all ranks.

    What it decides follows from the chunks alone, so that all ranks decide the same.

    Args:
        coded: whether codes take memory on the way back, too.
    """

    def __init__(self, coded: bool) -> None:
        self._coded = coded
        self._outbound: deque[tuple[Chunk, Exchange]] = deque()
        self._homebound: deque[tuple[Chunk, Exchange]] = deque()

    def add(self, chunk: "Chunk", exchange: Exchange) -> None:
        """Take along an exchange that was launched."""
        self._outbound.append((chunk, exchange))

    def make_room(self, chunk: "Chunk") -> None:
        """Let exchanges go on until there is memory for one more."""
        while self._homebound and self._numel_back() > _HOMEBOUND:
            self._land()
        while self._staged() + self._outbound_cost(chunk) > _STAGED:
            costs = self._homebound and self._homebound_cost(self._homebound[0][0])
            if self._homebound and (costs or not self._outbound):
                self._land()
            elif self._outbound:
                self._turn()
            else:
                return

    def arrive(self) -> None:
        """Let all exchanges end."""
        while self._outbound:
            self._turn()
        while self._homebound:
            self._land()

    def _staged(self) -> int:
        out = sum(self._outbound_cost(chunk) for chunk, _ in self._outbound)
        return out + sum(self._homebound_cost(chunk) for chunk, _ in self._homebound)

    def _outbound_cost(self, chunk: "Chunk") -> int:
        # Codes are of 16 bits at most, sent and received; contributions are of 32.
        return chunk.numel + self._homebound_cost(chunk)

    def _homebound_cost(self, chunk: "Chunk") -> int:
        return chunk.numel if self._coded else chunk.copied

    def _numel_back(self) -> int:
        return sum(chunk.numel for chunk, _ in self._homebound)

    def _turn(self) -> None:
        chunk, exchange = self._outbound.popleft()
        exchange.turn()
        self._homebound.append((chunk, exchange))

    def _land(self) -> None:
        chunk, exchange = self._homebound.popleft()
        exchange.wait()
        chunk.unpack()


_Pair = tuple[Tensor, Tensor | None]
"""A tensor, or a part of it, and its residual."""


class Chunk:
    """Values that travel together.

    Attributes:
        numel: how many there are.
        dtype: what they travel as, before any coding: fp32, or fp64 for fp64 tensors.
        copied: how many have to be copied, at the least, since they are no large flat tensors.
    """

    def __init__(self, pairs: Sequence[_Pair], dtype: torch.dtype, staging: Staging) -> None:
        self.numel = sum(values.numel() for values, _ in pairs)
        self.dtype = dtype
        self._values = _Packed([values for values, _ in pairs], dtype, staging)
        residuals = [residual for _, residual in pairs if residual is not None]
        self._residual = _Packed(residuals, dtype, staging) if residuals else None
        self.copied = self._values.copied(_IN_PLACE)

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


def _chunks(pairs: Iterable[_Pair], limit: int, staging: Staging) -> Iterator[Chunk]:
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
