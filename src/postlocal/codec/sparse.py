"""Codecs that keep a few values of each chunk, and decode the others to zeros."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from postlocal.checks import count, settle, whole
from postlocal.codec.protocol import round_up
from postlocal.codec.rounding import GOLDEN, mixed

_TILE = 2**18  # elements worked on at a time


@dataclass(frozen=True)
class _Run:
    """Chunks of one size that follow one another.

    Attributes:
        index: of the first of them.
        values: what they consist of, shape ``(n, size)``.
        records: what is kept of them, shape ``(n, bytes)``.
        kept: how many values each keeps.
    """

    index: int
    values: Tensor
    records: Tensor
    kept: int


@dataclass(frozen=True)
class _Sparse(ABC):
    """Chunks and records: of each chunk numbers in fp32, positions, codes, and zeros to 4 bytes."""

    k: int = 64
    chunk: int = 4096
    bits: int = 2
    header = 0

    def __post_init__(self) -> None:
        settle(self, k=whole, chunk=partial(count, unit="element"), bits=whole)
        check_kept("k", self.k, self.chunk)
        if self.bits not in (*range(2, 9), 32):
            raise ValueError(f"bits must be from 2 to 8, or 32 for exact values, got {self.bits}")

    @property
    def block(self) -> int:
        """Elements of a chunk."""
        return self.chunk

    def nbytes(self, numel: int, dtype: torch.dtype = torch.float32) -> int:
        whole, tail = divmod(numel, self.chunk)
        size = whole * self._record(self.k) + (self._record(self._kept(tail)) if tail else 0)
        return self.header + size if numel else 0

    def encode(self, values: Tensor, payload: Tensor) -> None:
        for run in self._runs(values, payload):
            chunks = run.values.float()
            positions = self._choose(chunks, run, payload)
            finite = chunks.abs().amax(dim=1, keepdim=True).isfinite()
            kept = torch.where(finite, chunks.gather(1, positions), torch.nan)
            self._write(run, positions, kept)

    def decode(self, payload: Tensor, values: Tensor) -> None:
        values.zero_()
        self.accumulate(payload, values)

    def accumulate(self, payload: Tensor, values: Tensor, alpha: float = 1.0) -> None:
        for run in self._runs(values, payload):
            kept = self._read(run).to(values.dtype).mul_(alpha)
            run.values.scatter_add_(1, self._positions(run, payload), kept)

    @property
    @abstractmethod
    def _position_bits(self) -> int:
        """Bits of a position in a record."""

    @abstractmethod
    def _choose(self, chunks: Tensor, run: _Run, payload: Tensor) -> Tensor:
        """Which positions to keep, int64, shape ``(n, kept)``."""

    @abstractmethod
    def _positions(self, run: _Run, payload: Tensor) -> Tensor:
        """Which positions were kept, int64, shape ``(n, kept)``."""

    def _kept(self, size: int) -> int:
        return max(1, self.k * size // self.chunk)

    def _parts(self, kept: int) -> list[int]:
        """Bytes of the three parts of a record, and of the zeros after them."""
        numbers = 4 * numbers_in_fp32(kept, self.bits)
        positions = packed_bytes(kept, self._position_bits)
        codes = 0 if self.bits == 32 else packed_bytes(kept, self.bits)
        used = positions + codes
        return [numbers, positions, codes, round_up(used, 4) - used]

    def _record(self, kept: int) -> int:
        return sum(self._parts(kept))

    def _runs(self, values: Tensor, payload: Tensor) -> Iterator[_Run]:
        """Whole chunks in tiles, and the short one at the end."""
        rows = max(1, _TILE // self.chunk)
        offset = self.header
        for start in range(0, values.numel(), rows * self.chunk):
            tile = values[start : start + rows * self.chunk]
            whole = len(tile) // self.chunk * self.chunk
            for part, size in ((tile[:whole], self.chunk), (tile[whole:], len(tile) - whole)):
                if len(part):
                    kept = self._kept(size)
                    length = len(part) // size * self._record(kept)
                    records = payload[offset : offset + length].view(-1, self._record(kept))
                    first = (start + (0 if size == self.chunk else whole)) // self.chunk
                    yield _Run(first, part.view(-1, size), records, kept)
                    offset += length

    def _write(self, run: _Run, positions: Tensor, kept: Tensor) -> None:
        parts = torch.split(run.records, self._parts(run.kept), dim=1)
        numbers, codes = (kept, None) if self.bits == 32 else to_levels(kept, self.bits)
        parts[0].view(torch.float32).copy_(numbers)
        if self._position_bits:
            parts[1].copy_(pack(positions, self._position_bits))
        if codes is not None:
            parts[2].copy_(pack(codes, self.bits))
        parts[3].zero_()

    def _read(self, run: _Run) -> Tensor:
        numbers, _, codes, _ = torch.split(run.records, self._parts(run.kept), dim=1)
        if self.bits == 32:
            return numbers.view(torch.float32).clone()
        return from_levels(numbers.view(torch.float32), unpack(codes, self.bits, run.kept))


@dataclass(frozen=True)
class top_k(_Sparse):
    """The values of greatest magnitude of each chunk (SparseLoCo: arXiv 2508.15706, section 3).

    A last chunk that is short keeps proportionally fewer, but one at least. Positions take as many
    bits as the chunk needs. Kept values of a chunk that holds an infinity or NaN, or what fp32
    cannot hold, decode to NaN, the others to zeros. Meant for use with error feedback.

    Args:
        k: values kept of a chunk.
        chunk: elements of a chunk.
        bits: 2 to 8: a sign, and a level of magnitude, evenly spaced between the extremes of what
            the chunk keeps; 32: values as they are, in fp32.

    Raises:
        TypeError: if an argument is no whole number.
        ValueError: if ``k`` is not from 1 to ``chunk``, or ``bits`` not one of these.

    Example:
        >>> codec = top_k(k=2, chunk=4, bits=32)
        >>> payload, values = torch.zeros(codec.nbytes(4), dtype=torch.uint8), torch.empty(4)
        >>> codec.encode(torch.tensor([1.0, -3.0, 0.5, 2.0]), payload)
        >>> codec.decode(payload, values)
        >>> values
        tensor([ 0., -3.,  0.,  2.])
    """

    @property
    def _position_bits(self) -> int:
        return (self.chunk - 1).bit_length()

    def _choose(self, chunks: Tensor, run: _Run, payload: Tensor) -> Tensor:
        # Ascending positions are neighbours in memory when they are read.
        return chunks.abs().topk(run.kept, dim=1, sorted=False).indices.sort(dim=1).values

    def _positions(self, run: _Run, payload: Tensor) -> Tensor:
        _, positions, _, _ = torch.split(run.records, self._parts(run.kept), dim=1)
        if not self._position_bits:
            return positions.new_zeros((len(positions), run.kept), dtype=torch.int64)
        return unpack(positions, self._position_bits, run.kept)


@dataclass(frozen=True)
class random_k(_Sparse):
    """Values at random positions of each chunk, which follow from 8 bytes at the payload's start.

    A chunk is cut into ``k`` runs of equal size, and one value of each is kept: all are as likely.
    The choice is a hash of all values, so that encoding has no state. Values are not scaled up:
    use error feedback, or for an unbiased mean ``accumulate`` with ``alpha = chunk / k``.

    A last chunk that is short keeps proportionally fewer, but one at least. Kept values of a chunk
    that holds an infinity or NaN, or what fp32 cannot hold, decode to NaN, the others to zeros.

    Args:
        k: values kept of a chunk.
        chunk: elements of a chunk.
        bits: 2 to 8: a sign, and a level of magnitude, evenly spaced between the extremes of what
            the chunk keeps; 32: values as they are, in fp32.

    Raises:
        TypeError: if an argument is no whole number.
        ValueError: if ``k`` is not from 1 to ``chunk``, or ``bits`` not one of these.

    Example:
        >>> random_k(k=64, chunk=4096).nbytes(4096)  # 8 and 64 values of 4 bytes
        264
    """

    bits: int = 32
    header = 8
    _position_bits = 0

    def encode(self, values: Tensor, payload: Tensor) -> None:
        if len(values):
            payload[:8].view(torch.int32).copy_(_digest(values))
            super().encode(values, payload)

    def _choose(self, chunks: Tensor, run: _Run, payload: Tensor) -> Tensor:
        return self._positions(run, payload)

    def _positions(self, run: _Run, payload: Tensor) -> Tensor:
        count, size = run.values.shape
        device = payload.device
        low, high = payload[:8].view(torch.int32)
        row = torch.arange(run.index, run.index + count, dtype=torch.int32, device=device)
        column = torch.arange(run.kept, dtype=torch.int32, device=device)
        salt = mixed(mixed(row * GOLDEN ^ low) ^ high).unsqueeze(1)
        random = (mixed(salt + mixed(column + 1)) & 0x7FFFFFFF).long()
        edges = torch.arange(run.kept + 1, device=device) * size // run.kept
        return edges[:-1] + (random * edges.diff() >> 31)


def check_kept(name: str, kept: int, chunk: int) -> None:
    """Refuse to keep nothing of a chunk, or more than it has.

    Raises:
        ValueError: naming the argument that says how many values are kept.
    """
    if not 1 <= kept <= chunk:
        raise ValueError(f"{name} must be from 1 to chunk ({chunk}) elements, got {kept}")


def _digest(values: Tensor) -> Tensor:
    """A hash of all values and their positions, two numbers of int32."""
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for start in range(0, len(values), _TILE):
        bits = values[start : start + _TILE].float().view(torch.int32)
        place = torch.arange(start, start + len(bits), device=values.device).to(torch.int32)
        total += mixed(bits ^ mixed(place)).sum(dtype=torch.int64)
    return torch.stack([total, total >> 32]).to(torch.int32)


# How kept values are written: exactly, or as sign and level of magnitude. Magnitudes between the
# least and the greatest kept are cut into equal bins, and decode to the middle of theirs. Numbers
# in fp32 come first: the values, or the least magnitude and a bin's width.


def numbers_in_fp32(kept: int, bits: int) -> int:
    """How many numbers in fp32 there are.

    Example:
        >>> numbers_in_fp32(kept=64, bits=2), numbers_in_fp32(kept=64, bits=32)
        (2, 64)
    """
    return kept if bits == 32 else 2


def to_levels(kept: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Least magnitude and width of bins, fp32, shape ``(n, 2)``, and codes, int64, ``(n, kept)``.

    Args:
        kept: fp32, finite or all NaN in a row, shape ``(n, kept)``.
        bits: of a code, from 2 to 8; the lowest is the sign.

    Example:
        >>> to_levels(torch.tensor([[1.0, -5.0, 2.9]]), bits=2)
        (tensor([[1., 2.]]), tensor([[0, 3, 0]]))
    """
    levels = 2 ** (bits - 1)
    magnitudes = kept.abs()
    low, high = magnitudes.aminmax(dim=1, keepdim=True)
    widths = (high - low) / levels
    numbers = torch.cat([low, widths], dim=1)
    fractions = (magnitudes - low) / torch.where(widths == 0, 1.0, widths)
    level = fractions.nan_to_num(0.0).clamp_(0, levels - 1).long()
    return numbers, (level << 1) | (kept < 0)


def from_levels(numbers: Tensor, codes: Tensor) -> Tensor:
    """Values, fp32, shape ``(n, kept)``.

    Example:
        >>> from_levels(torch.tensor([[1.0, 2.0]]), torch.tensor([[0, 3]]))
        tensor([[ 2., -4.]])
    """
    low, widths = torch.split(numbers, 1, dim=1)
    magnitudes = ((codes >> 1) + 0.5) * widths + low
    return torch.where((codes & 1).bool(), -magnitudes, magnitudes)


# Whole numbers of a few bits each, one after the other without gaps.


def packed_bytes(numel: int, bits: int) -> int:
    """Bytes that ``numel`` numbers of ``bits`` bits take.

    Example:
        >>> packed_bytes(64, bits=12)
        96
    """
    return -(-numel * bits // 8)


def pack(numbers: Tensor, bits: int) -> Tensor:
    """Rows of numbers as rows of bytes, the lowest bits first.

    Args:
        numbers: int64, shape ``(n, k)``, each from 0 to ``2^bits - 1``.
        bits: how many each takes.

    Returns:
        uint8, shape ``(n, packed_bytes(k, bits))``.

    Example:
        >>> pack(torch.tensor([[1, 2, 3]]), bits=4)
        tensor([[33,  3]], dtype=torch.uint8)
    """
    flat = _bits_of(numbers, bits)
    padded = torch.nn.functional.pad(flat, (0, -flat.shape[1] % 8))
    return _numbers_of(padded, 8).to(torch.uint8)


def unpack(packed: Tensor, bits: int, numel: int) -> Tensor:
    """The numbers that `pack` was given, int64, shape ``(n, numel)``.

    Example:
        >>> unpack(torch.tensor([[33, 3]], dtype=torch.uint8), bits=4, numel=3)
        tensor([[1, 2, 3]])
    """
    return _numbers_of(_bits_of(packed, 8)[:, : numel * bits], bits)


def _bits_of(numbers: Tensor, bits: int) -> Tensor:
    shifts = torch.arange(bits, device=numbers.device, dtype=numbers.dtype)
    return ((numbers.unsqueeze(2) >> shifts) & 1).to(torch.uint8).flatten(1)


def _numbers_of(flat: Tensor, bits: int) -> Tensor:
    shifts = torch.arange(bits, device=flat.device)
    return (flat.view(len(flat), flat.shape[1] // bits, bits).long() << shifts).sum(dim=2)
