"""PowerSGD as a wire: matrices are sent as two factors, with error feedback."""

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from postlocal.checks import count, positive, settle, whole
from postlocal.comm.group import Group
from postlocal.comm.groups import LevelGroups
from postlocal.tensors import flat_view, weigh_
from postlocal.topology import WORLD
from postlocal.wire import low_rank as mathematics
from postlocal.wire.api import Divisor, Leg, Reducer, Tensors, Weights, Wire, ring_bytes, sent_bytes
from postlocal.wire.chunks import Staging, WeightedTensor, Weighting, sent_as
from postlocal.wire.exact import exact
from postlocal.wire.mean import weight_of, weighted_mean_
from postlocal.wire.residuals import Residuals


@dataclass(frozen=True)
class powersgd(Wire):
    """Matrices as two factors of low rank, with error feedback; all else is sent exactly.

    A matrix of shape ``(n, m)`` is sent as ``rank * (n + m)`` values, in two all-reduces for all of
    them together. Each rank keeps the second factor, from where the next mean starts, and what the
    mean lacks of its own matrices, for a weight of 1: one fp32 copy. Means of matrices of 16 bits
    take another one, of all of them at once, until they have come.

    `payload_bytes` is that of a square matrix.

    Args:
        rank: columns of a factor; 1 to 4 is usual, 32 for some language models.
        min_compression: matrices are sent as factors where these are so many times smaller.
        seed: of the first factors, the same on all ranks.

    Raises:
        TypeError: if an argument is of another type.
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
    keeps_residuals = True

    def __post_init__(self) -> None:
        settle(self, rank=partial(count, unit="column"), min_compression=positive, seed=_seed)

    def messages(self, tensors: Tensors, groups: LevelGroups, level: str) -> Sequence[Leg]:
        plain = {name: t for name, t in tensors.items() if not self.compresses(t)}
        legs = [*exact().messages(plain, groups, level)]
        for dtype in (torch.float32, torch.float64):
            shapes = [
                mathematics.matrix_shape(tensor)
                for tensor in tensors.values()
                if sent_as(tensor.dtype) == dtype and self.compresses(tensor)
            ]
            legs += self.factor_legs(shapes, groups[level].size, dtype, level)
        return legs

    def payload_bytes(self, numel: int, size: int, dtype: torch.dtype = torch.float32) -> int:
        side = round(numel**0.5)
        if not self.compresses(torch.empty(side, side, device="meta")):
            return exact().payload_bytes(numel, size, dtype)
        return sent_bytes(self.factor_legs([(side, side)], size, sent_as(dtype)))

    def open(self, groups: LevelGroups, level: str, staging: Staging | None = None) -> Reducer:
        return LowRankReducer(self, groups[level], staging)

    def compresses(self, tensor: Tensor) -> bool:
        """Whether a tensor is sent as factors."""
        n, m = mathematics.matrix_shape(tensor)
        fits = mathematics.is_compressed(n, m, self.rank, self.min_compression)
        return fits and flat_view(tensor) is not None

    def factor_legs(
        self, shapes: Sequence[tuple[int, int]], size: int, dtype: torch.dtype, level: str = WORLD
    ) -> Iterator[Leg]:
        """The all-reduces of both factors of matrices of shapes ``(n, m)``; none of no matrix."""
        ranks = [min(n, m, self.rank) for n, m in shapes]
        for side in (0, 1) if shapes and size > 1 else ():
            numel = sum(shape[side] * rank for shape, rank in zip(shapes, ranks, strict=True))
            yield Leg(ring_bytes(numel, size, dtype), size, "ring", level=level)


@dataclass
class _Matrix:
    """A tensor seen as a matrix.

    Attributes:
        name: the tensor's.
        tensor: takes the mean.
        output: where the mean comes to, shape ``(1, n, m)``: the tensor's own memory, if it is of
            the dtype in which it is sent.
        values: contribution and what was lost before; then what is lost now, if its weight is
            above 0.
        weight: of the contribution.
    """

    name: str
    tensor: Tensor
    output: Tensor
    values: Tensor
    weight: float

    def settle(self, *, finite: bool) -> None:
        """Give the tensor its mean, and keep what was lost for a weight of 1."""
        if self.tensor.dtype != self.output.dtype:
            _flat(self.tensor).copy_(self.output.view(-1))
        if self.weight:
            weigh_([self.values], 1 / self.weight if finite else 0.0)


class LowRankReducer:
    """A reducer by low-rank approximation.

    Args:
        wire: the recipe.
        group: whose mean is taken.
        staging: memory for what is sent exactly.
    """

    def __init__(self, wire: powersgd, group: Group, staging: Staging | None) -> None:
        self.group = group
        self._wire = wire
        self._staging = staging or Staging()
        self._residuals = Residuals()
        self._qs: dict[str, Tensor] = {}

    def mean_(
        self, tensors: Tensors, divisor: Divisor | None = None, weights: Weights | None = None
    ) -> int:
        alone = self.group.size == 1
        plain = [
            WeightedTensor(tensor, weighting=Weighting(weight_of(name, weights)))
            for name, tensor in tensors.items()
            if alone or not self._wire.compresses(tensor)
        ]
        sent = weighted_mean_(plain, self.group, exact(), divisor, self._staging)
        if not alone:
            for dtype in (torch.float32, torch.float64):
                sent += self._approximate(self._matrices(tensors, dtype, weights), divisor)
        return sent

    def drop_residuals(self, names: Iterable[str] | None = None) -> None:
        # Where to start from stays: it is equal on all ranks.
        self._residuals.drop(names)

    def state_dict(self) -> dict[str, Any]:
        if not self._qs:
            return {}
        return {"errors": self._residuals.state_dict(), "starts": dict(self._qs)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._residuals.load_state_dict(state.get("errors", {}))
        self._qs = {name: q.clone() for name, q in state.get("starts", {}).items()}

    def _matrices(
        self, tensors: Tensors, dtype: torch.dtype, weights: Weights | None
    ) -> list[_Matrix]:
        return [
            self._matrix(name, tensor, dtype, weight_of(name, weights))
            for name, tensor in tensors.items()
            if sent_as(tensor.dtype) == dtype and self._wire.compresses(tensor)
        ]

    def _matrix(self, name: str, tensor: Tensor, dtype: torch.dtype, weight: float) -> _Matrix:
        shape = (1, *mathematics.matrix_shape(tensor))
        flat = _flat(tensor.detach())
        output = (flat if tensor.dtype == dtype else torch.empty_like(flat, dtype=dtype)).view(
            shape
        )
        if weight == 0:  # the residual is kept, and zeros are sent
            return _Matrix(name, tensor, output, output.zero_(), weight)
        values = _flat(self._residuals.of(name, tensor).add_(tensor)).view(shape)
        weigh_([values], weight)
        return _Matrix(name, tensor, output, values, weight)

    def _approximate(self, matrices: Sequence[_Matrix], divisor: Divisor | None) -> int:
        """Replace matrices by their low-rank means; returns the bytes that this rank sent."""
        if not matrices:
            return 0
        values = [matrix.values for matrix in matrices]
        outputs = [matrix.output for matrix in matrices]
        starts = [self._start(matrix) for matrix in matrices]
        qs = mathematics.mean_(
            values, starts, outputs, [], self.group, divisor=divisor, residuals=values
        )
        finite = torch.stack([q.sum() for q in qs]).isfinite().tolist()
        for matrix, q, fine in zip(matrices, qs, finite, strict=True):
            matrix.settle(finite=fine)
            # What a value that is not finite has spoilt begins anew, on all ranks.
            self._qs.pop(matrix.name, None)
            if fine:
                self._qs[matrix.name] = q
        shapes = [(matrix.values.shape[1], matrix.values.shape[2]) for matrix in matrices]
        return sent_bytes(self._wire.factor_legs(shapes, self.group.size, values[0].dtype))

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


def _seed(name: str, value: Any) -> int:
    seed = whole(name, value)
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"{name} must be a number of 64 bits, got {seed}")
    return seed


def _flat(tensor: Tensor) -> Tensor:
    flat = flat_view(tensor)
    assert flat is not None
    return flat
