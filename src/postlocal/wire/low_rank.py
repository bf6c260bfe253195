"""Means of matrices by low-rank approximation: PowerSGD (arXiv 1905.13727, Algorithm 1).

One step of power iteration a call, from where the last one ended: two all-reduces in all, whatever
the number of matrices.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from postlocal.comm.group import Group


def mean_(
    matrices: Sequence[Tensor],
    starts: Sequence[Tensor],
    outputs: Sequence[Tensor],
    exact: Sequence[Tensor],
    group: Group,
    epsilon: float = 0.0,
    divisor: Callable[[], float] | None = None,
    residuals: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Write low-rank means of matrices to ``outputs``, and replace ``exact`` by their means.

    With ``M`` a matrix of this rank, ``mean`` over all ranks: ``P = orthogonal(mean(M Q))``, then
    ``Q = mean(M^T P)``, and the output is ``P Q^T``.

    Args:
        matrices: batches of matrices, each of shape ``(b, n, m)``, all of one dtype and device.
        starts: ``Q`` to start from, of shapes ``(b, m, r)`` with ``r`` at most ``n`` and ``m``;
            equal on all ranks. Orthogonalised in place.
        outputs: of the matrices' shapes; they may be the matrices themselves.
        exact: tensors of the same dtype that are averaged as they are, along with ``P``.
        group: who takes part.
        epsilon: added to the norms of columns that are divided by them.
        divisor: gives the sum of the weights of all ranks' matrices, called when the first sums
            are here; None: the size of the group.
        residuals: take ``M - P P^T M``, what the mean lacks of this rank's matrices; of their
            shapes, and they may be the matrices themselves.

    Returns:
        ``Q`` of each batch, equal on all ranks: where to start from next time.

    Raises:
        PeerError: if a rank did not take part in time.

    Example:
        >>> from postlocal.comm.group import Alone
        >>> matrix = torch.outer(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0, 5.0]))[None]
        >>> output = torch.empty_like(matrix)
        >>> _ = mean_([matrix], [torch.ones(1, 3, 1)], [output], [], Alone())
        >>> torch.allclose(output, matrix)  # its rank is 1
        True
    """
    shapes = [(len(m), m.shape[1], q.shape[2]) for m, q in zip(matrices, starts, strict=True)]
    sizes = [b * n * r for b, n, r in shapes] + [tensor.numel() for tensor in exact]
    like = exact[0] if exact else matrices[0]
    flat = like.new_empty(sum(sizes))
    parts = torch.split(flat, sizes)
    ps = [part.view(shape) for part, shape in zip(parts, shapes, strict=False)]
    for matrix, q, p in zip(matrices, starts, ps, strict=True):
        orthogonalise_(q, epsilon)
        torch.bmm(matrix, q, out=p)
    for tensor, part in zip(exact, parts[len(ps) :], strict=True):
        part.copy_(tensor.reshape(-1))
    group.all_reduce(flat).wait()
    total = float(group.size) if divisor is None else divisor()
    for tensor, part in zip(exact, parts[len(ps) :], strict=True):
        torch.div(part.view(tensor.shape), total, out=tensor)
    if not matrices:
        return []
    for p in ps:
        orthogonalise_(p, epsilon)
    return _second_leg(matrices, ps, outputs, group, total, residuals)


def _second_leg(
    matrices: Sequence[Tensor],
    ps: Sequence[Tensor],
    outputs: Sequence[Tensor],
    group: Group,
    total: float,
    residuals: Sequence[Tensor] | None,
) -> list[Tensor]:
    shapes = [(len(m), m.shape[2], p.shape[2]) for m, p in zip(matrices, ps, strict=True)]
    flat = ps[0].new_empty(sum(b * m * r for b, m, r in shapes))
    parts = torch.split(flat, [b * m * r for b, m, r in shapes])
    qs = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
    for matrix, p, q in zip(matrices, ps, qs, strict=True):
        torch.bmm(matrix.transpose(1, 2), p, out=q)
    for matrix, p, q, residual in zip(matrices, ps, qs, residuals or (), strict=False):
        torch.baddbmm(matrix, p, q.transpose(1, 2), alpha=-1, out=residual)
    group.all_reduce(flat).wait()
    flat.div_(total)
    for p, q, output in zip(ps, qs, outputs, strict=True):
        torch.bmm(p, q.transpose(1, 2), out=output)
    return qs


def matrix_shape(tensor: Tensor) -> tuple[int, int]:
    """A tensor as a matrix, as it lies in memory: rows are its slowest dimension.

    Example:
        >>> matrix_shape(torch.zeros(8, 4, 3, 3))
        (8, 36)
    """
    if tensor.ndim == 0 or tensor.numel() == 0:
        return 1, tensor.numel()
    slowest = max(range(tensor.ndim), key=tensor.stride)
    rows = tensor.shape[slowest]
    return rows, tensor.numel() // rows


def factors_numel(n: int, m: int, rank: int) -> int:
    """Elements of both factors of a matrix of shape ``(n, m)``.

    Example:
        >>> factors_numel(1000, 100, rank=4)
        4400
    """
    return (n + m) * min(n, m, rank)


def is_compressed(n: int, m: int, rank: int, min_compression: float) -> bool:
    """Whether a matrix is sent as factors: where they are so many times smaller than it.

    Example:
        >>> is_compressed(1000, 100, rank=4, min_compression=2.0)
        True
    """
    return factors_numel(n, m, rank) * min_compression < n * m


def random_start(shape: Sequence[int], generator: torch.Generator, like: Tensor) -> Tensor:
    """A random ``Q``, the same for the same state of a CPU generator; of the dtype of ``like``."""
    return torch.randn(*shape, generator=generator, dtype=like.dtype).to(like.device)


def orthogonalise_(matrices: Tensor, epsilon: float = 0.0) -> None:
    """Replace columns by orthonormal ones that span the same space.

    By QR, or by Gram-Schmidt where that is faster (at most 2 columns) or QR is missing (16 bits). A
    column that depends on those before it, such as one of zeros, becomes another direction: power
    iteration that starts from zero would never leave it.

    Args:
        matrices: shape ``(b, n, r)`` with ``r`` at most ``n``.
        epsilon: added to the norms that columns are divided by, in Gram-Schmidt.

    Example:
        >>> columns = torch.tensor([[[3.0, 1.0], [4.0, 1.0]]])
        >>> orthogonalise_(columns)
        >>> torch.allclose(columns[0].T @ columns[0], torch.eye(2), atol=1e-6)
        True
    """
    rows, columns = matrices.shape[1:]
    if columns > 2 and matrices.dtype not in (torch.float16, torch.bfloat16):
        for index in range(columns):  # of zeros QR makes unit vectors, which many matrices miss
            column = matrices[:, :, index : index + 1]
            _replace(column, ~column.any(dim=1, keepdim=True), index)
        matrices.copy_(torch.linalg.qr(matrices).Q)
        return
    negligible = min(0.05, torch.finfo(matrices.dtype).eps * rows**0.5)
    for index in range(columns):
        before, column = matrices[:, :, :index], matrices[:, :, index : index + 1]
        greatest = torch.linalg.vector_norm(column, dim=1, keepdim=True) * negligible
        norm = _remove(before, column)
        if _replace(column, (norm < greatest) | (norm == 0), index):  # never where it is infinite
            norm = _remove(before, column)
        column.div_(norm.add_(epsilon))


def _remove(before: Tensor, column: Tensor) -> Tensor:
    """Make columns orthogonal to those before them; returns the norms that are left."""
    for _ in range(2):  # what rounding leaves of nearly parallel ones goes the second time
        column.sub_(before @ (before.transpose(1, 2) @ column))
    norms: Tensor = torch.linalg.vector_norm(column, dim=1, keepdim=True)
    return norms


def _replace(column: Tensor, lost: Tensor, index: int) -> bool:
    """Put a direction that looks random, and is the same anywhere, where columns are lost."""
    if not lost.any():
        return False
    golden = 0.6180339887498949
    turns = torch.arange(1, column.shape[1] + 1, dtype=torch.float64) * (golden * (index + 1))
    direction = (turns % 1 - 0.5).view(1, -1, 1).to(column)
    column.copy_(torch.where(lost, direction, column))
    return True
