"""PowerSGD as a wire: matrices travel as two factors, and what these lack is sent later."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from postlocal import powersgd as mathematics
from postlocal.codec import exact
from postlocal.group import Group
from postlocal.tensors import flat_view, weigh_
from postlocal.topology import Layout
from postlocal.wire.carrier import Carrier
from postlocal.wire.chunks import travels_as
from postlocal.wire.encoded import exchanged_bytes
from postlocal.wire.exchange import Divisor
from postlocal.wire.mean import mean_, payload_bytes
from postlocal.wire.memory import Memory
from postlocal.wire.recipes import fp32
from postlocal.wire.staging import Staging


@dataclass(frozen=True)
class powersgd:
    """Matrices as two factors of low rank, with error feedback; all else travels exactly.

    A matrix of shape ``(n, m)`` travels as ``rank * (n + m)`` values, in two all-reduces for all of
    them together. Each rank remembers the second factor, from where the next mean starts, and
    what the mean lacks of its own matrices, one fp32 copy.

    `payload_bytes` is that of a square matrix.

    Args:
        rank: columns of a factor; 1 to 4 is usual, 32 for some language models.
        min_compression: matrices travel as factors where these are so many times smaller.
        seed: of the first factors, the same on all ranks.

    Raises:
        ValueError: if ``rank`` is below 1, or ``min_compression`` not above 0.

    Example:
        >>> powersgd(rank=4).payload_bytes(numel=2**20, size=2)
        32768

    Source: arXiv 1905.13727, Algorithms 1 and 2. The error here is ``M - P P^T M`` rather than
    ``M - P Q^T``: it has the same mean over ranks, does not grow with what ranks differ in, and
    holds for any weights.
    """

    rank: int = 4
    min_compression: float = 2.0
    seed: int = 0
    lossy = True

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1 column, got {self.rank}")
        if not self.min_compression > 0:
            raise ValueError(f"min_compression must be above 0, got {self.min_compression}")

    def payload_bytes(self, numel: int, size: int, dtype: torch.dtype = torch.float32) -> int:
        side = round(numel**0.5)
        if not mathematics.is_compressed(side, side, self.rank, self.min_compression):
            return fp32().payload_bytes(numel, size, dtype)
        factor = side * min(side, self.rank)
        return 2 * exchanged_bytes(exact(), factor, size, travels_as(dtype))

    def open(self, layout: Layout, level: str, staging: Staging | None = None) -> Carrier:
        return _LowRank(self, layout[level], staging)


@dataclass
class _Matrix:
    """A tensor seen as a matrix.

    Attributes:
        name: the tensor's.
        tensor: takes the mean.
        values: contribution and what was lost before, shape ``(1, n, m)``; then what is lost now.
    """

    name: str
    tensor: Tensor
    values: Tensor

    @property
    def output(self) -> Tensor:
        """Where the mean comes to: the tensor's own memory, if it is of the dtype."""
        if self.tensor.dtype != self.values.dtype:
            return torch.empty_like(self.values)
        return _flat(self.tensor).view(self.values.shape)


class _LowRank:
    """A carrier by low-rank approximation.

    Args:
        wire: the recipe.
        group: whose mean is taken.
        staging: memory for what travels exactly.
    """

    def __init__(self, wire: powersgd, group: Group, staging: Staging | None) -> None:
        self.group = group
        self._wire = wire
        self._staging = staging or Staging()
        self._memory = Memory()
        self._qs: dict[str, Tensor] = {}

    def mean_(self, tensors: Mapping[str, Tensor], divisor: Divisor | None = None) -> int:
        if self.group.size == 1:
            weigh_(tensors.values(), 1.0 if divisor is None else 1 / divisor())
            return 0
        sent = self.payload_bytes(tensors)
        plain = [tensor for tensor in tensors.values() if not self._is_compressed(tensor)]
        mean_(plain, self.group, fp32(), divisor, staging=self._staging)
        for dtype in (torch.float32, torch.float64):
            self._approximate(self._matrices(tensors, dtype), divisor)
        return sent

    def payload_bytes(self, tensors: Mapping[str, Tensor]) -> int:
        size = self.group.size
        plain = [tensor for tensor in tensors.values() if not self._is_compressed(tensor)]
        total = payload_bytes(plain, size, fp32())
        for dtype in (torch.float32, torch.float64):
            first, second = 0, 0
            for tensor in tensors.values():
                if travels_as(tensor.dtype) == dtype and self._is_compressed(tensor):
                    n, m = mathematics.matrix_shape(tensor)
                    first += n * min(n, m, self._wire.rank)
                    second += m * min(n, m, self._wire.rank)
            total += exchanged_bytes(exact(), first, size, dtype)
            total += exchanged_bytes(exact(), second, size, dtype)
        return total

    def forget(self) -> None:
        # Where to start from stays: it is equal on all ranks.
        self._memory.forget()

    def state_dict(self) -> dict[str, Any]:
        if not self._qs:
            return {}
        return {"errors": self._memory.state_dict(), "starts": dict(self._qs)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._memory.load_state_dict(state.get("errors", {}))
        self._qs = {name: q.clone() for name, q in state.get("starts", {}).items()}

    def _is_compressed(self, tensor: Tensor) -> bool:
        n, m = mathematics.matrix_shape(tensor)
        fits = mathematics.is_compressed(n, m, self._wire.rank, self._wire.min_compression)
        return fits and flat_view(tensor) is not None

    def _matrices(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> list[_Matrix]:
        matrices = []
        for name, tensor in tensors.items():
            if travels_as(tensor.dtype) == dtype and self._is_compressed(tensor):
                values = _flat(self._memory.residual(name, tensor).add_(tensor))
                shape = mathematics.matrix_shape(tensor)
                matrices.append(_Matrix(name, tensor, values.view(1, *shape)))
        return matrices

    def _approximate(self, matrices: Sequence[_Matrix], divisor: Divisor | None) -> None:
        if not matrices:
            return
        values = [matrix.values for matrix in matrices]
        outputs = [matrix.output for matrix in matrices]
        starts = [self._start(matrix) for matrix in matrices]
        qs = mathematics.mean_(
            values, starts, outputs, [], self.group, divisor=divisor, residuals=values
        )
        for matrix, output, q in zip(matrices, outputs, qs, strict=True):
            if matrix.tensor.dtype != output.dtype:
                _flat(matrix.tensor).copy_(output.view(-1))
            self._qs[matrix.name] = q
        self._heal(matrices, qs)

    def _start(self, matrix: _Matrix) -> Tensor:
        """``Q`` to start from, the same on all ranks: where the last mean ended, or random."""
        known = self._qs.get(matrix.name)
        if known is not None:
            return known.to(matrix.values)
        _, n, m = matrix.values.shape
        seed = zlib.crc32(matrix.name.encode()) ^ self._wire.seed
        generator = torch.Generator().manual_seed(seed)
        shape = (1, m, min(n, m, self._wire.rank))
        return mathematics.random_start(shape, generator, matrix.values)

    def _heal(self, matrices: Sequence[_Matrix], qs: Sequence[Tensor]) -> None:
        """Begin anew, on all ranks, with what a value that is not finite has spoilt."""
        finite = torch.stack([q.sum() for q in qs]).isfinite().tolist()
        for matrix, fine in zip(matrices, finite, strict=True):
            if not fine:
                matrix.values.zero_()
                del self._qs[matrix.name]


def _flat(tensor: Tensor) -> Tensor:
    flat = flat_view(tensor)
    assert flat is not None
    return flat
