"""Means of many tensors over a group, in place: chunk by chunk, several under way at a time."""

from abc import abstractmethod
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from postlocal.checks import settle
from postlocal.codec import Codec
from postlocal.codec.protocol import is_codec
from postlocal.comm.group import Group
from postlocal.comm.groups import LevelGroups
from postlocal.tensors import weigh_
from postlocal.topology import WORLD
from postlocal.wire.api import (
    Divisor,
    Leg,
    Reducer,
    Tensors,
    Weights,
    Wire,
    ring_bytes,
    sent_bytes,
    total,
)
from postlocal.wire.chunks import (
    GATHER_BYTES,
    SCATTER_BYTES,
    Chunk,
    Staging,
    WeightedTensor,
    Weighting,
    chunks,
)


class Exchange(Protocol):
    """A mean of a chunk under way: contributions are sent and reduced, and means are gathered."""

    def reduce(self) -> None:
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


class Staged(NamedTuple):
    """Staging memory of a chunk, in bytes, before and after its contributions are reduced."""

    scatter: int
    gather: int


class ChunkWire(Wire):
    """A wire that takes the mean of values chunk by chunk, and is stateless.

    One of one's own is a frozen dataclass that implements `lossy`, `legs`, `limit`, `staged` and
    `start`. For error feedback it encodes by `CompensatedValues`, and sets `takes_residuals`.

    Attributes:
        takes_residuals: whether `start` encodes values by ``CompensatedValues(chunk).encode``,
            which adds residuals and keeps what is lost. `error_feedback` refuses other wires.
    """

    by_bucket = True
    takes_residuals: ClassVar[bool] = False

    @abstractmethod
    def legs(self, numel: int, rank: int, size: int, dtype: torch.dtype) -> Sequence[Leg]:
        """What rank ``rank`` of ``size`` sends for a chunk of ``numel`` elements.

        As many legs, of the same patterns, for all chunks.
        """

    @abstractmethod
    def limit(self, size: int, numel: int) -> int:
        """Greatest number of fp32 elements of a chunk, where ``size`` ranks exchange ``numel``."""

    @abstractmethod
    def staged(self, chunk: Chunk, size: int) -> Staged:
        """Memory that a chunk takes on its way between ``size`` ranks."""

    @abstractmethod
    def start(self, chunk: Chunk, group: Group, divisor: Divisor, staging: Staging) -> Exchange:
        """Start to replace values by the weighted sum over the group divided by ``divisor()``.

        All ranks end with identical bits.

        Args:
            chunk: the values with this rank's weights, of the same sizes on all ranks.
            group: who takes part.
            divisor: gives the sum of the weights of all contributions.
            staging: where memory for what is sent comes from.
        """

    def messages(self, tensors: Tensors, groups: LevelGroups, level: str) -> Sequence[Leg]:
        return chunk_legs(tensors.values(), groups[level], self, level)

    def payload_bytes(self, numel: int, size: int, dtype: torch.dtype = torch.float32) -> int:
        return sent_bytes(self.legs(numel, 0, size, dtype))

    def open(self, groups: LevelGroups, level: str, staging: Staging | None = None) -> Reducer:
        return StatelessReducer(self, groups[level], staging)


@dataclass(frozen=True)
class CodecWire(ChunkWire):
    """What wires share that send the codes of one codec.

    Args:
        codec: one of `postlocal.codec`.

    Raises:
        TypeError: if ``codec`` is none.
    """

    codec: Codec
    lossy = True
    takes_residuals = True

    def __post_init__(self) -> None:
        settle(self, codec=is_codec)

    @property
    def codecs(self) -> Sequence[Codec]:
        return (self.codec,)


class StatelessReducer:
    """A reducer that takes means chunk by chunk, and keeps nothing.

    Args:
        wire: how values are sent.
        group: whose mean is taken.
        staging: memory for what is sent.
    """

    def __init__(self, wire: ChunkWire, group: Group, staging: Staging | None = None) -> None:
        self.group = group
        self._wire = wire
        self._staging = staging or Staging()

    def mean_(
        self, tensors: Tensors, divisor: Divisor | None = None, weights: Weights | None = None
    ) -> int:
        weighted = [
            WeightedTensor(tensor, weighting=Weighting(weight_of(name, weights)))
            for name, tensor in tensors.items()
        ]
        return weighted_mean_(weighted, self.group, self._wire, divisor, self._staging)

    def drop_residuals(self, names: Iterable[str] | None = None) -> None:
        return None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        return None


def weight_of(name: str, weights: Weights | None) -> float:
    """The weight of a tensor of this rank."""
    return 1.0 if weights is None else weights[name]


def check_takes_residuals(name: str, wire: ChunkWire) -> None:
    """Refuse a wire that would not send residuals.

    Raises:
        ValueError: naming what it has to implement.
    """
    if not wire.takes_residuals:
        raise ValueError(
            f"{name} must be a wire that takes residuals, got {wire!r}: encode values by "
            "wire.CompensatedValues(chunk).encode in its start, and set takes_residuals = True in "
            "its class"
        )


def mean_(
    tensors: Sequence[Tensor],
    group: Group,
    wire: ChunkWire,
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
        wire: how values are sent.
        divisor: gives the sum of the weights; None: the size of the group.
        residuals: error feedback: what a lossy wire lost, added to what is sent next, and then
            replaced by what is lost this time; see `WeightedTensor`. The wire has to take them.
        staging: memory to use; give the same one again to save its allocation.

    Returns:
        Bytes of payload that this rank sent.

    Raises:
        ValueError: if there are residuals, and the wire would not send them.
        PeerError: if a rank did not take part in time.
    """
    if residuals is not None:
        check_takes_residuals("wire", wire)
    kept = [None] * len(tensors) if residuals is None else residuals
    weighted = [WeightedTensor(*pair) for pair in zip(tensors, kept, strict=True)]
    return weighted_mean_(weighted, group, wire, divisor, staging)


def weighted_mean_(
    tensors: Sequence[WeightedTensor],
    group: Group,
    wire: ChunkWire,
    divisor: Divisor | None = None,
    staging: Staging | None = None,
) -> int:
    """As `mean_`, of tensors with weights and residuals: their weighted sum over the divisor."""
    divisor = divisor or (lambda: float(group.size))
    if group.size == 1:
        whole = divisor()
        for each in tensors:
            weigh_([each.tensor], each.weighting.weight / whole)
        return 0
    staging = staging or Staging()
    pipeline = _Pipeline(wire, group.size)
    sizes: Counter[tuple[int, torch.dtype]] = Counter()
    for chunk in _cut(tensors, wire, group.size, staging):
        pipeline.make_room(chunk)
        pipeline.add(chunk, wire.start(chunk, group, divisor, staging))
        sizes[chunk.numel, chunk.dtype] += 1
    pipeline.drain()
    return sent_bytes(_legs(sizes, group, wire))


def chunk_legs(
    tensors: Iterable[Tensor], group: Group, wire: ChunkWire, level: str
) -> tuple[Leg, ...]:
    """What `mean_` of tensors makes this rank of a group send."""
    if group.size == 1:
        return ()
    cut = _cut(list(map(WeightedTensor, tensors)), wire, group.size, Staging())
    return _legs(Counter((chunk.numel, chunk.dtype) for chunk in cut), group, wire, level)


def _legs(
    sizes: Counter[tuple[int, torch.dtype]], group: Group, wire: ChunkWire, level: str = WORLD
) -> tuple[Leg, ...]:
    """The legs of chunks, of which most have one size."""
    several = [
        [(times, leg) for leg in wire.legs(numel, group.rank, group.size, dtype)]
        for (numel, dtype), times in sizes.items()
    ]
    return tuple(total(alike, level) for alike in zip(*several, strict=True))


def _cut(
    tensors: Sequence[WeightedTensor], wire: ChunkWire, size: int, staging: Staging
) -> Iterator[Chunk]:
    numel = sum(each.tensor.numel() for each in tensors)
    return chunks(tensors, wire.limit(size, numel), staging)


class _Pipeline:
    """Chunks under way, several at a time, which go on in one order on all ranks.

    What it decides follows from the chunks alone, so that all ranks decide the same.

    Args:
        wire: tells how much memory a chunk takes.
        size: number of ranks.
    """

    def __init__(self, wire: ChunkWire, size: int) -> None:
        self._wire = wire
        self._size = size
        self._scattered: deque[tuple[Chunk, Exchange]] = deque()
        self._gathered: deque[tuple[Chunk, Exchange]] = deque()

    def add(self, chunk: Chunk, exchange: Exchange) -> None:
        """Take in an exchange that was started."""
        self._scattered.append((chunk, exchange))

    def make_room(self, chunk: Chunk) -> None:
        """Let exchanges go on until there is memory for one more."""
        while self._gathered and self._bytes_back() > GATHER_BYTES:
            self._finish()
        while self._staged() + self._scatter_cost(chunk) > SCATTER_BYTES:
            costs = self._gathered and self._gather_cost(self._gathered[0][0])
            if self._gathered and (costs or not self._scattered):
                self._finish()
            elif self._scattered:
                self._reduce()
            else:
                return

    def drain(self) -> None:
        """Let all exchanges end."""
        while self._scattered:
            self._reduce()
        while self._gathered:
            self._finish()

    def _staged(self) -> int:
        out = sum(self._scatter_cost(chunk) for chunk, _ in self._scattered)
        return out + sum(self._gather_cost(chunk) for chunk, _ in self._gathered)

    def _scatter_cost(self, chunk: Chunk) -> int:
        return self._wire.staged(chunk, self._size).scatter

    def _gather_cost(self, chunk: Chunk) -> int:
        return self._wire.staged(chunk, self._size).gather

    def _bytes_back(self) -> int:
        return sum(chunk.numel * chunk.dtype.itemsize for chunk, _ in self._gathered)

    def _reduce(self) -> None:
        chunk, exchange = self._scattered.popleft()
        exchange.reduce()
        self._gathered.append((chunk, exchange))

    def _finish(self) -> None:
        chunk, exchange = self._gathered.popleft()
        exchange.wait()
        chunk.unpack()
        if chunk.residual_left:
            raise RuntimeError(
                f"{self._wire!r} has takes_residuals = True, but its start left the residuals of a "
                "chunk out: encode all values by wire.CompensatedValues(chunk).encode"
            )


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
        sent += ring_bytes(flat.numel(), group.size, dtype)
    return sent
