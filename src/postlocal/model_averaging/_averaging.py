"""Repeated averaging of parameters and buffers over one process group."""

import logging
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from postlocal.comm import agreement
from postlocal.comm.group import Group, Processes
from postlocal.errors import NonFiniteError
from postlocal.sync.parameters import once
from postlocal.sync.status import RankStatus, gather_status, layout_number
from postlocal.tensors import is_dtensor
from postlocal.wire import Staging, exact, maximum_, mean_

logger = logging.getLogger(__name__)


class Averaging:
    """Means over a process group; see `postlocal.model_averaging.utils.average_parameters`.

    Args:
        process_group: who takes part.
    """

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        self._group = Processes(process_group)
        self._staging = Staging()
        self._count = 0

    def average_(
        self, parameters: Sequence[Tensor], buffers: Sequence[Tensor] = (), step: int | None = None
    ) -> None:
        """Replace parameters and buffers by their means, integer buffers by their maximum.

        Args:
            parameters: the same on all ranks.
            buffers: the same on all ranks.
            step: steps of this rank, which all must agree on; None: the number of averagings.
        """
        if self._group.size == 1:
            return
        self._count += 1
        self._group.announce(self._count)
        with torch.no_grad():
            tensors = _local(parameters), _local(buffers)
            device = next((t.device for kind in tensors for t in kind), torch.device("cpu"))
            lines = [_describe(tensor) for tensor in (*parameters, *buffers)]
            self._agree(lines, self._count if step is None else step, device)
            self._average(*tensors, device)

    def _agree(self, lines: Sequence[str], step: int, device: torch.device) -> None:
        status = gather_status(
            self._group, device, RankStatus(step=step, layout=layout_number(lines))
        ).wait()
        if not status.unanimous("layout"):
            agreement.check(self._group, {"parameters to average": lines})

    def _average(
        self, parameters: list[Tensor], buffers: list[Tensor], device: torch.device
    ) -> None:
        finite = _FiniteMean(self._group)
        mean_(parameters, self._group, exact(finite.average), staging=self._staging)
        floats = [t for t in buffers if t.is_floating_point()]
        tolerant = exact(_FiniteMean(self._group).average)
        mean_(floats, self._group, tolerant, staging=self._staging)
        maximum_([t for t in buffers if not t.is_floating_point()], self._group)
        finite.report(device)


class _FiniteMean:
    """Leaves values that are not finite out of their means."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._left_out = torch.zeros(group.size)
        self._lost = False

    def report(self, device: torch.device) -> None:
        """Tell all ranks, which reduced different shards, what was left out.

        Raises:
            NonFiniteError: on all ranks, if a value was finite on none.
        """
        found = torch.cat([self._left_out, torch.tensor([float(self._lost)])]).to(device)
        self._group.all_reduce(found, "max").wait()
        *left_out, lost = found.tolist()
        if lost:
            raise NonFiniteError(
                "parameters hold infinities or NaN on every rank: resume from a checkpoint, with a "
                "lower learning rate",
                ranks=range(self._group.size),
            )
        ranks = [rank for rank, flag in enumerate(left_out) if flag]
        if ranks and (self._group.rank == 0 or self._group.rank in ranks):
            logger.warning(
                "means leave out what is not finite on %s of the group",
                agreement.ranks_named(ranks),
            )

    def average(self, mean: Tensor, others: Sequence[Tensor]) -> None:
        """Replace this rank's values by the mean of all ranks' finite values."""
        everyones = list(others)
        everyones.insert(self._group.rank, mean)
        values = torch.stack(everyones)
        finite = torch.isfinite(values)
        self._left_out = self._left_out.maximum((~finite.all(dim=1)).float().cpu())
        self._lost = self._lost or not bool(finite.any(dim=0).all())
        total = values.where(finite, 0.0).sum(dim=0, dtype=torch.float64)
        mean.copy_(total / finite.sum(dim=0))  # NaN where nobody has a finite value


def _local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """This rank's local tensors: tied ones once, complex ones as pairs."""
    held = [t.to_local() if is_dtensor(t) else t for t in tensors]
    distinct = once((str(index), tensor.detach()) for index, tensor in enumerate(held))
    return [torch.view_as_real(t) if t.is_complex() else t for t in distinct.values()]


def _describe(tensor: Tensor) -> str:
    if not is_dtensor(tensor):
        return f"shape {tuple(tensor.shape)}, stride {tensor.stride()}, {tensor.dtype}"
    # Ranks can average what they hold of a sharded tensor where they hold the same part of it.
    where: Sequence[int] = tensor.device_mesh.get_coordinate() or ()
    part = [
        f"{placement} at {index}"
        for placement, index in zip(tensor.placements, where, strict=True)
        if not placement.is_replicate()
    ]
    return f"{_describe(tensor.to_local())}, part {', '.join(part)} of {tuple(tensor.shape)}"
