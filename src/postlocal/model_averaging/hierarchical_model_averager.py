"""Averaging at several levels: often among few ranks, seldom among all (arXiv 2010.12998).

Example:
    >>> from postlocal.model_averaging.hierarchical_model_averager import HierarchicalModelAverager
    >>> import torch
    >>> import torch.distributed as dist
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> averager = HierarchicalModelAverager({4: 1}, warmup_steps=100)  # 16 ranks: {4: 8, 16: 16}
    >>> averager.average_parameters(torch.nn.Linear(2, 1).parameters())
    >>> averager.step
    1
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import torch.distributed as dist
from torch import Tensor

from postlocal.checks import Timeout
from postlocal.comm.group import Processes, torch_group
from postlocal.model_averaging.averagers import ModelAverager, warn_of_period_one
from postlocal.model_averaging.utils import Parameters

__all__ = ["HierarchicalModelAverager"]


class HierarchicalModelAverager(ModelAverager):
    """Averages in groups of several sizes, each with a period of its own.

    After each step from ``warmup_steps`` on, the largest period that divides the step decides in
    which group parameters are averaged, as torch has it. (So with a warm-up that is no multiple of
    the periods it averages at other steps than `PeriodicModelAverager`, which counts from the end
    of the warm-up.)

    Groups are contiguous blocks of the ranks of ``process_group``. All are made here, together.

    Args:
        period_group_size_dict: period -> number of ranks that average. Periods increase and sizes
            do not decrease, each a multiple of the one before; the last size is that of
            ``process_group``. Levels of one size average among the same ranks, as one level would
            with the shortest of their periods.
        warmup_steps: steps without averaging.
        process_group: all ranks that average; None: torch's default group.
        buffers: see `ModelAverager`.
        timeout: see `ModelAverager`.

    Raises:
        ValueError: if an argument is out of its range, or levels are not sorted and nested.
    """

    def __init__(
        self,
        period_group_size_dict: Mapping[int, int] | None = None,
        warmup_steps: int = 0,
        process_group: dist.ProcessGroup | None = None,
        *,
        buffers: Iterable[Tensor] | None = None,
        timeout: Timeout | None = None,
    ) -> None:
        sizes = dict(period_group_size_dict or {})
        _check_levels(sizes, dist.get_world_size(torch_group(process_group)))
        super().__init__(process_group, warmup_steps, buffers=buffers, timeout=timeout)
        if max(sizes) == 1:
            warn_of_period_one(stacklevel=2)
        self._sizes = sizes
        self._groups: OrderedDict[int, dist.ProcessGroup] = OrderedDict()
        self._make_groups()

    @property
    def period_process_group_dict(self) -> "OrderedDict[int, dist.ProcessGroup]":
        """Period -> this rank's process group, from the shortest period to the longest."""
        if not self._groups:  # after unpickling
            self._make_groups()
        return self._groups

    def average_parameters(self, params: Parameters) -> None:
        """Average parameters in the group whose time it is, and count a step.

        Args:
            params: the parameters of a model, or the parameter groups of an optimizer.

        Raises:
            DisagreementError, NonFiniteError, PeerError: see
                `postlocal.model_averaging.utils.average_parameters`; the first also if ranks have
                counted different numbers of steps.
        """
        group = self._find_process_group() if self.step >= self.warmup_steps else None
        if group is not None:
            self._average(params, group)
        self.step += 1

    def _find_process_group(self) -> dist.ProcessGroup | None:
        due = [period for period in self._sizes if self.step % period == 0]
        return self.period_process_group_dict[max(due)] if due else None

    def _make_groups(self) -> None:
        everyone = torch_group(self.process_group)
        base = Processes(everyone)
        made: dict[int, dist.ProcessGroup] = {}
        for period, size in self._sizes.items():
            blocks = [tuple(range(start, start + size)) for start in range(0, base.size, size)]
            group = everyone if size == base.size else made.get(size)
            made[size] = group = group or base.torch_subgroup(blocks)
            self._groups[period] = group
            self._prepare(group)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_groups"}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        super().__setstate__(state)
        self._groups = OrderedDict()

    def __deepcopy__(self, memo: dict[int, Any]) -> "HierarchicalModelAverager":
        twin = super().__deepcopy__(memo)
        assert isinstance(twin, HierarchicalModelAverager)
        twin._groups = OrderedDict(self._groups)
        return twin


def _check_levels(sizes: Mapping[int, int], world: int) -> None:
    if not sizes:
        raise ValueError(
            "period_group_size_dict must not be empty: give the number of ranks for each period, "
            f"such as {{16: {world}}}"
        )
    # A period is at least twice the one before; two levels may have the same size.
    for what, values, least in (("periods", list(sizes), 2), ("sizes", list(sizes.values()), 1)):
        if values[0] < 1:
            raise ValueError(f"{what} in period_group_size_dict must be at least 1: {dict(sizes)}")
        for smaller, larger in pairwise(values):
            if larger < least * smaller or larger % smaller:
                raise ValueError(
                    f"{what} in period_group_size_dict must be sorted, each a multiple of the one "
                    f"before, got {smaller} and then {larger}: else a level would be left out"
                )
    last = list(sizes.values())[-1]
    if last != world:
        raise ValueError(
            f"the last size in period_group_size_dict must be that of process_group ({world}), "
            f"got {last}"
        )
