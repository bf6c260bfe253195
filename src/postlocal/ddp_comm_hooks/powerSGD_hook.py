"""PowerSGD: gradients by low-rank approximation with error feedback (arXiv 1905.13727).

Each gradient matrix of shape ``(n, m)`` is sent as two factors of ``r (n + m)`` values in all, and
what the approximation lost is added to the next gradients. One all-reduce a step carries the first
factors of all matrices with all that is not compressed, a second one the other factors.

Example:
    >>> import torch
    >>> import torch.distributed as dist
    >>> from torch.nn.parallel import DistributedDataParallel
    >>> from postlocal.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> model = DistributedDataParallel(torch.nn.Linear(2, 1))
    >>> state = PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=1000)
    >>> model.register_comm_hook(state, powerSGD_hook)
    >>> model(torch.ones(3, 2)).sum().backward()
    >>> model.module.weight.grad, state.iter
    (tensor([[3., 3.]]), 1)
"""

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from postlocal.comm.background import promise
from postlocal.comm.group import Processes, torch_group
from postlocal.ddp_comm_hooks._residuals import Residuals
from postlocal.ddp_comm_hooks.default_hooks import allreduce_hook
from postlocal.sync.supported_tensors import dense
from postlocal.torch_versions import GradBucket
from postlocal.wire import low_rank

__all__ = ["PowerSGDState", "batched_powerSGD_hook", "powerSGD_hook"]

logger = logging.getLogger(__name__)

_RandomState = tuple[str, np.ndarray[Any, Any], int, int, float]
_UNSAVED = ("process_group", "_group", "_pending")


class PowerSGDState:
    """Settings and residuals of PowerSGD, for all buckets of one model.

    Args:
        process_group: who takes part; None: torch's default group.
        matrix_approximation_rank: ``r``; 1 to 4 is usual, 32 for some language models. More ranks
            cost bytes and time and lose less.
        start_powerSGD_iter: backward passes that all-reduce gradients as they are before it
            starts. The start of training is sensitive: about a tenth of all steps, and no fewer
            than the learning rate's warm-up.
        min_compression_rate: matrices are compressed where
            ``(n + m) * r * min_compression_rate < n * m``; what is not is sent as it is.
        use_error_feedback: keep what was lost and add it to the next gradients. It needs memory
            for one copy of the gradients.
        warm_start: start each step's power iteration where the last one ended.
        orthogonalization_epsilon: added to norms that columns are divided by. Columns of zeros
            do no harm without it.
        random_seed: of the first ``Q``, the same on all ranks.
        compression_stats_logging_frequency: steps between log messages of `compression_stats`.
        batch_tensors_with_same_shape: multiply matrices of one shape together; it copies them,
            and pays where a device is not kept busy by one of them.

    Attributes:
        iter: backward passes so far.

    Raises:
        ValueError: if a number is out of its range.

    Unlike torch's class it can start in any step, since nothing is kept by bucket.

    Example:
        >>> PowerSGDState(None, matrix_approximation_rank=4).compression_stats()
        (0.0, 0, 0)
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None,
        matrix_approximation_rank: int = 1,
        start_powerSGD_iter: int = 1_000,
        min_compression_rate: float = 2,
        use_error_feedback: bool = True,
        warm_start: bool = True,
        orthogonalization_epsilon: float = 0,
        random_seed: int = 0,
        compression_stats_logging_frequency: int = 10_000,
        batch_tensors_with_same_shape: bool = False,
    ) -> None:
        if matrix_approximation_rank < 1:
            raise ValueError(
                f"matrix_approximation_rank must be at least 1, got {matrix_approximation_rank}"
            )
        if start_powerSGD_iter < 0:
            raise ValueError(f"start_powerSGD_iter must be at least 0, got {start_powerSGD_iter}")
        if not min_compression_rate > 0:
            raise ValueError(f"min_compression_rate must be above 0, got {min_compression_rate}")
        if orthogonalization_epsilon < 0:
            raise ValueError(
                f"orthogonalization_epsilon must be at least 0, got {orthogonalization_epsilon}"
            )
        self.process_group = process_group
        self.matrix_approximation_rank = matrix_approximation_rank
        self.start_powerSGD_iter = start_powerSGD_iter
        self.min_compression_rate = min_compression_rate
        self.use_error_feedback = use_error_feedback
        self.warm_start = warm_start
        self.orthogonalization_epsilon = orthogonalization_epsilon
        self.compression_stats_logging_frequency = max(1, compression_stats_logging_frequency)
        self.batch_tensors_with_same_shape = batch_tensors_with_same_shape
        self.rng = np.random.RandomState(random_seed)
        self.iter = 0
        self.total_numel_before_compression = 0
        self.total_numel_after_compression = 0
        self.next_stats_report = 0
        self._residuals = Residuals()
        self._qs: dict[Hashable, Tensor] = {}
        self._group: Processes | None = None
        self._pending: list[_Bucket] = []

    @property
    def errors(self) -> Mapping[int, Tensor]:
        """The residual of each parameter's gradient on this rank, in the order first seen."""
        return self._residuals.by_parameter

    def maybe_increase_iter(self, bucket: GradBucket) -> None:
        """Count a backward pass when its last bucket is here."""
        if bucket.is_last():
            self.iter += 1
            if self.iter == self.start_powerSGD_iter:
                logger.info("PowerSGD starts after %d iterations", self.iter)

    def compression_stats(self) -> tuple[float, int, int]:
        """Compression rate, and the numbers of elements before and after compression so far."""
        before, after = self.total_numel_before_compression, self.total_numel_after_compression
        return (before / after if after else 0.0, before, after)

    def state_dict(self) -> dict[str, Any]:
        """What an exact resume needs: each rank loads its own again.

        Tensors, numbers and lists only, so that `torch.load` needs no trust.
        """
        _, keys, position, has_gauss, gauss = cast(_RandomState, self.rng.get_state(legacy=True))
        return {
            "iter": self.iter,
            "errors": self._residuals.state_dict(),
            "qs": {key: q.clone() for key, q in self._qs.items()},
            "rng": [keys.tolist(), position, has_gauss, gauss],
            "stats": [
                self.total_numel_before_compression,
                self.total_numel_after_compression,
                self.next_stats_report,
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken. Register the hook before the first backward pass."""
        self.iter = state["iter"]
        self._residuals.load_state_dict(state["errors"])
        self._qs = {key: q.clone() for key, q in state["qs"].items()}
        keys, position, has_gauss, gauss = state["rng"]
        self.rng.set_state(("MT19937", np.array(keys, np.uint32), position, has_gauss, gauss))
        (
            self.total_numel_before_compression,
            self.total_numel_after_compression,
            self.next_stats_report,
        ) = state["stats"]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in _UNSAVED}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state, process_group=None, _group=None, _pending=[])

    def _processes(self) -> Processes:
        group = torch_group(self.process_group)
        if self._group is None or self._group.process_group is not group:
            self._group = Processes(group)
        return self._group


@dataclass
class _Bucket:
    """What is needed of a bucket until the last one is there."""

    buffer: Tensor
    gradients: list[Tensor]
    keys: tuple[int, ...]
    values: Tensor  # gradients with errors, flat; becomes the new errors
    promise: Future[Tensor]


@dataclass
class _Matrix:
    """Gradients that are approximated as one, shape ``(n, m)``."""

    key: Hashable
    values: Tensor  # gradients with errors
    output: Tensor  # takes the approximation

    def keep_residual(self, feedback: bool) -> None:
        """Keep what the approximation lost, where it is fed back."""
        if feedback:
            self.values.sub_(self.output)


@dataclass
class _Square(_Matrix):
    """A whole bucket, zeros after its end."""

    bucket: _Bucket

    def keep_residual(self, feedback: bool) -> None:
        buffer = self.bucket.buffer
        buffer.copy_(self.output.view(-1)[: buffer.numel()])
        if feedback:
            self.bucket.values.sub_(buffer)


@dataclass
class _Batch:
    """Matrices of one shape that are multiplied together, shape ``(b, n, m)``."""

    members: list[_Matrix]
    values: Tensor
    start: Tensor
    output: Tensor


@dataclass
class _Work:
    """What is sent in one step, of one dtype."""

    batches: list[_Batch]
    exact: list[Tensor]


_Plan = Callable[[PowerSGDState, "_Bucket", _Work], None]


def powerSGD_hook(state: PowerSGDState, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Mean of gradients by low-rank approximation, matrix by matrix.

    Nothing is sent before the last bucket is there: then two all-reduces send all of them. Tensors
    of one dimension, and matrices that would not gain, are averaged as they are.

    Args:
        state: settings and residuals.
        bucket: the gradients.

    Returns:
        A promise of the bucket's buffer, the same bits on all ranks. What a rank's gradients plus
        its old errors hold beyond it are its new errors.
    """
    return _hook(state, bucket, _by_matrix)


def batched_powerSGD_hook(
    state: PowerSGDState, bucket: GradBucket
) -> torch.futures.Future[torch.Tensor]:
    """Mean of gradients by low-rank approximation of whole buckets, each seen as a square matrix.

    Faster than `powerSGD_hook` where there are many small matrices, and less accurate: a bucket has
    no low-rank structure of its own. Rows and columns are those of the buckets, so a resume is
    exact only where buckets stay as they are from the start (``find_unused_parameters=True``);
    elsewhere errors are kept and ``Q`` is drawn again.

    Args:
        state: settings and residuals; any rank works.
        bucket: the gradients.

    Returns:
        A promise of the bucket's buffer, the same bits on all ranks.
    """
    return _hook(state, bucket, _as_square)


def _hook(
    state: PowerSGDState,
    bucket: GradBucket,
    plan: _Plan,
) -> Future[Tensor]:
    dense(bucket)  # from the first pass on, not only when compression starts
    if state.iter < state.start_powerSGD_iter:
        state._residuals.keys(bucket)  # so that parameters count from the first pass on
        state.maybe_increase_iter(bucket)
        return allreduce_hook(state.process_group, bucket)
    if bucket.index() == 0:
        state._pending.clear()  # a backward pass that failed may have left some
    taken = _take(state, bucket)
    state._pending.append(taken)
    if bucket.is_last():
        _report(state)
        for buckets in _by_dtype(state._pending):
            _exchange(state, buckets, plan)
        state._pending.clear()
        state.maybe_increase_iter(bucket)
    return taken.promise


def _take(state: PowerSGDState, bucket: GradBucket) -> _Bucket:
    buffer = bucket.buffer()
    values = buffer
    if state.use_error_feedback:
        values = state._residuals.flat(bucket, buffer.dtype).add_(buffer)
    keys = state._residuals.keys(bucket)
    return _Bucket(buffer, bucket.gradients(), keys, values, promise(buffer))


def _report(state: PowerSGDState) -> None:
    if state.iter >= state.next_stats_report:
        logger.info(
            "iteration %d: compression rate %.4g, %d elements before, %d after",
            state.iter, *state.compression_stats(),
        )  # fmt: skip
        state.next_stats_report = state.iter + state.compression_stats_logging_frequency


def _by_dtype(buckets: Iterable[_Bucket]) -> Iterable[list[_Bucket]]:
    kinds: dict[tuple[torch.dtype, torch.device], list[_Bucket]] = defaultdict(list)
    for bucket in buckets:
        kinds[bucket.buffer.dtype, bucket.buffer.device].append(bucket)
    return kinds.values()


def _exchange(state: PowerSGDState, buckets: list[_Bucket], plan: _Plan) -> None:
    work = _Work([], [])
    for bucket in buckets:
        plan(state, bucket, work)
    group = state._processes()
    group.announce(state.iter + 1)
    qs = low_rank.mean_(
        [batch.values for batch in work.batches],
        [batch.start for batch in work.batches],
        [batch.output for batch in work.batches],
        work.exact,
        group,
        state.orthogonalization_epsilon,
    )
    for batch, q in zip(work.batches, qs, strict=True):
        _finish(state, batch, q)
    for bucket in buckets:
        bucket.promise.set_result(bucket.buffer)


def _by_matrix(state: PowerSGDState, bucket: _Bucket, work: _Work) -> None:
    """Plan a bucket's matrices, by shape, and its other tensors as they are."""
    sizes = [gradient.numel() for gradient in bucket.gradients]
    parts = zip(torch.split(bucket.values, sizes), torch.split(bucket.buffer, sizes), strict=True)
    together: dict[tuple[int, int], list[_Matrix]] = defaultdict(list)
    for key, gradient, (values, output) in zip(bucket.keys, bucket.gradients, parts, strict=True):
        n, m = low_rank.matrix_shape(gradient)
        if _is_compressed(state, n, m):
            together[n, m].append(_Matrix(key, values.view(n, m), output.view(n, m)))
        else:
            work.exact.append(output)
            if state.use_error_feedback:
                values.zero_()  # nothing is lost of it
    _add_batches(state, together.values(), work)


def _is_compressed(state: PowerSGDState, n: int, m: int) -> bool:
    rank = state.matrix_approximation_rank
    after = low_rank.factors_numel(n, m, rank)
    compressed = low_rank.is_compressed(n, m, rank, state.min_compression_rate)
    state.total_numel_before_compression += n * m
    state.total_numel_after_compression += after if compressed else n * m
    return compressed


def _as_square(state: PowerSGDState, bucket: _Bucket, work: _Work) -> None:
    """Plan a bucket as one square matrix, zeros after its end."""
    side = math.isqrt(bucket.buffer.numel() - 1) + 1
    state.total_numel_before_compression += bucket.buffer.numel()
    state.total_numel_after_compression += 2 * side * state.matrix_approximation_rank
    square = bucket.buffer.new_zeros(side, side)
    square.view(-1)[: bucket.values.numel()] = bucket.values
    output = torch.empty_like(square)
    _add_batches(state, [[_Square(bucket.keys, square, output, bucket)]], work)


def _add_batches(state: PowerSGDState, together: Iterable[list[_Matrix]], work: _Work) -> None:
    batches = [
        batch
        for matrices in together
        for batch in (
            [matrices] if state.batch_tensors_with_same_shape else [[matrix] for matrix in matrices]
        )
    ]
    for members, start in zip(batches, _starts(state, batches), strict=True):
        if len(members) == 1:
            values, output = members[0].values[None], members[0].output[None]
        else:
            values = torch.stack([matrix.values for matrix in members])
            output = torch.empty_like(values)
        work.batches.append(_Batch(members, values, start, output))


def _starts(state: PowerSGDState, batches: list[list[_Matrix]]) -> list[Tensor]:
    """``Q`` to start from: where the last step ended, else random and equal on all ranks."""
    generator: torch.Generator | None = None
    starts = []
    for members in batches:
        like = members[0].values
        shape = (like.shape[1], min(*like.shape, state.matrix_approximation_rank))
        known = [state._qs.get(matrix.key) for matrix in members]
        kept = [q for q in known if q is not None and q.shape == shape]
        if len(kept) == len(members):
            starts.append(torch.stack([q.to(like) for q in kept]))
            continue
        if generator is None:  # a seed a bucket, as torch draws them
            seed = int(state.rng.randint(1_000_000_000))
            generator = torch.Generator().manual_seed(seed)
        starts.append(low_rank.random_start((len(members), *shape), generator, like))
    return starts


def _finish(state: PowerSGDState, batch: _Batch, q: Tensor) -> None:
    for index, matrix in enumerate(batch.members):
        if len(batch.members) > 1:
            matrix.output.copy_(batch.output[index])
        matrix.keep_residual(state.use_error_feedback)
        if state.warm_start:
            state._qs[matrix.key] = q[index]
