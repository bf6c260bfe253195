"""One averaging after the other over one process group."""

import hashlib
import logging
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from postlocal import agreement
from postlocal.ballot import Ballot
from postlocal.errors import NonFiniteError
from postlocal.group import Processes
from postlocal.replica import once
from postlocal.tensors import all_finite, squared_norm, weigh_
from postlocal.wire import fp32, maximum_, mean_

logger = logging.getLogger(__name__)


class Averaging:
    """Means over a process group; see `postlocal.model_averaging.utils.average_parameters`.

    Args:
        process_group: who takes part.
    """

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        self._group = Processes(process_group)
        self._count = 0

    def average_(
        self, parameters: Sequence[Tensor], buffers: Sequence[Tensor] = (), step: int | None = None
    ) -> None:
        """Replace parameters and buffers by their means, integer buffers by their maximum.

        Args:
            parameters: the same on all ranks.
            buffers: the same on all ranks; those with NaN have no weight.
            step: steps of this rank, which all must agree on; None: the number of averagings.
        """
        if self._group.size == 1 or not parameters:
            return
        self._count += 1
        self._group.arrive(self._count)
        with torch.no_grad():
            self._meet(parameters, buffers, self._count if step is None else step)

    def _meet(self, parameters: Sequence[Tensor], buffers: Sequence[Tensor], step: int) -> None:
        lines = [_describe(tensor) for tensor in (*parameters, *buffers)]
        tensors = _memory(parameters)
        floats = [t for t in _memory(buffers) if t.is_floating_point()]
        square = squared_norm(tensors)
        ballot = Ballot(
            self._group,
            tensors[0].device,
            weight=float(all_finite(tensors, square)),
            buffer_weight=float(not any(bool(torch.isnan(t).any()) for t in floats)),
            square=square,
            step=step,
            planned=0,
            lr=0.0,
            layout=_digest(lines),
        )
        if not ballot.unanimous:
            agreement.check(self._group, {"parameters to average": lines})
        self._check_finite(ballot)
        weigh_(tensors, ballot.weight)
        mean_(tensors, self._group, fp32(), ballot.total_weight)
        weight, total = ballot.buffer_weights()
        weigh_(floats, weight)
        mean_(floats, self._group, fp32(), lambda: total)
        maximum_([t for t in _memory(buffers) if not t.is_floating_point()], self._group)

    def _check_finite(self, ballot: Ballot) -> None:
        excluded = ballot.excluded
        if len(excluded) == self._group.size:
            raise NonFiniteError(
                "the parameters of every rank hold infinities or NaN: resume from a checkpoint, "
                "with a lower learning rate"
            )
        if excluded and (self._group.rank == 0 or self._group.rank in excluded):
            logger.warning(
                "the mean leaves out rank %s of the group: not finite",
                ", ".join(map(str, excluded)),
            )


def _memory(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors as they lie on this rank, tied ones once, complex ones as pairs."""
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    distinct = once((str(index), tensor.detach()) for index, tensor in enumerate(local))
    return [torch.view_as_real(t) if t.is_complex() else t for t in distinct.values()]


def _describe(tensor: Tensor) -> str:
    if not isinstance(tensor, DTensor):
        return f"shape {tuple(tensor.shape)}, stride {tensor.stride()}, {tensor.dtype}"
    # Ranks can average what they hold of a sharded tensor where they hold the same part of it.
    where: Sequence[int] = tensor.device_mesh.get_coordinate() or ()
    part = [
        f"{placement} at {index}"
        for placement, index in zip(tensor.placements, where, strict=True)
        if not placement.is_replicate()
    ]
    return f"{_describe(tensor.to_local())}, part {', '.join(part)} of {tuple(tensor.shape)}"


def _digest(lines: Sequence[str]) -> int:
    content = hashlib.blake2b("\n".join(lines).encode(), digest_size=6).digest()
    return int.from_bytes(content, "big")  # 48 bits: exact as fp64
