"""Averagers: count steps, and average parameters when it is time.

Example:
    >>> import torch
    >>> import torch.distributed as dist
    >>> from postlocal.model_averaging.averagers import PeriodicModelAverager
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> averager = PeriodicModelAverager(period=4, warmup_steps=2)
    >>> for batch in torch.ones(6, 3, 2):
    ...     model(batch).sum().backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    ...     averager.average_parameters(model.parameters())
    >>> averager.finish(model.parameters())
    >>> averager.step
    6
"""

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from postlocal import checks
from postlocal.comm.agreement import together
from postlocal.comm.group import Processes, torch_group
from postlocal.model_averaging._averaging import Averaging
from postlocal.model_averaging.utils import Parameters, get_params_to_average

__all__ = ["ModelAverager", "PeriodicModelAverager"]


class ModelAverager(ABC):
    """Base of averagers.

    Args:
        process_group: who averages; None: torch's default group. On other ranks nothing is done.
        warmup_steps: steps at the start without averaging, at least 0.
        buffers: averaged along with the parameters: those of floating point by their mean, others
            by their maximum. For BatchNorm statistics, where DDP does not broadcast them.
        timeout: seconds, or a `datetime.timedelta`, that an averaging waits for a missing rank, at
            most 1e7 seconds; a process group with this timeout is made for it, by all ranks
            together. None: as long as ``process_group`` does.

    Attributes:
        step: calls of `average_parameters` so far.

    Raises:
        ValueError: if an argument is out of its range, or there is no process group.
        TypeError: if ``timeout`` is no number.
        DisagreementError: if ``timeout`` is bad on another rank.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
        warmup_steps: int = 0,
        *,
        buffers: Iterable[Tensor] | None = None,
        timeout: checks.Timeout | None = None,
    ) -> None:
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must be at least 0, got {warmup_steps}")
        self.process_group: dist.ProcessGroup | None = torch_group(process_group)
        self.warmup_steps = warmup_steps
        self.step = 0
        self.buffers = list(buffers or ())
        self.timeout = self._checked(timeout)
        self._averaged_at = -1
        self._averagings: dict[dist.ProcessGroup, Averaging] = {}
        self._prepare(self.process_group)

    def _checked(self, timeout: checks.Timeout | None) -> float | None:
        """Seconds; a bad timeout is refused on all ranks, before a group is made with it."""
        group = torch_group(self.process_group)
        if timeout is None or dist.get_rank(group) < 0:
            return None
        with together(Processes(group)):
            return checks.timeout("timeout", timeout)

    @abstractmethod
    def average_parameters(self, params: Parameters) -> None:
        """Average parameters if it is time, and count a step; to be called after each one."""
        raise NotImplementedError

    def finish(self, params: Parameters) -> None:
        """Average over the whole process group now, unless that was the last thing done.

        A run whose last step is not one of averaging ends with replicas that differ. This makes
        them equal; it counts no step.

        Args:
            params: the parameters of a model, or the parameter groups of an optimizer.
        """
        if self._averaged_at != self.step:
            self._average(params, torch_group(self.process_group))
            self._averaged_at = self.step

    def state_dict(self) -> dict[str, Any]:
        """The step."""
        return {"step": self.step, "averaged_at": self._averaged_at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.step = state["step"]
        self._averaged_at = state.get("averaged_at", -1)

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value
            for name, value in vars(self).items()
            if name not in ("process_group", "_averagings")
        }

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """A process group cannot be saved: it is the default one, unless set afterwards."""
        vars(self).update(state, process_group=None, _averagings={})

    def __deepcopy__(self, memo: dict[int, Any]) -> "ModelAverager":
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        twin.process_group = self.process_group
        return twin

    def _average(self, params: Parameters, process_group: dist.ProcessGroup) -> None:
        averaging = self._prepare(process_group)
        if averaging is None:
            return
        averaging.average_(get_params_to_average(params), self.buffers, self.step)
        if process_group is torch_group(self.process_group):
            self._averaged_at = self.step + 1

    def _prepare(self, process_group: dist.ProcessGroup) -> Averaging | None:
        """What averages over a process group; None on ranks outside it."""
        if dist.get_rank(process_group) < 0:
            return None
        known = self._averagings.get(process_group)
        if known is None:
            chosen = process_group
            if self.timeout is not None:
                base = Processes(process_group, timedelta(seconds=self.timeout))
                chosen = base.torch_subgroup([tuple(range(base.size))])
            known = self._averagings[process_group] = Averaging(chosen)
        return known


class PeriodicModelAverager(ModelAverager):
    """Averages every ``period`` steps after a warm-up: post-local SGD (arXiv 1808.07217).

    Step 0 is the first one, and parameters are averaged after each step with
    ``step >= warmup_steps`` and ``(step - warmup_steps) % period == 0``, as torch has it: so the
    first averaging comes right after the first local step. During the warm-up gradients are to be
    reduced at every step, as `postlocal.ddp_comm_hooks.post_localSGD_hook` does.

    Args:
        period: steps from one averaging to the next, at least 1.
        warmup_steps: steps without averaging.
        process_group: who averages; None: torch's default group.
        buffers: see `ModelAverager`.
        timeout: see `ModelAverager`.

    Raises:
        ValueError: if an argument is out of its range, or there is no process group.
    """

    def __init__(
        self,
        period: int,
        warmup_steps: int = 0,
        process_group: dist.ProcessGroup | None = None,
        *,
        buffers: Iterable[Tensor] | None = None,
        timeout: checks.Timeout | None = None,
    ) -> None:
        if period < 1:
            raise ValueError(f"period must be at least 1 step, got {period}")
        super().__init__(process_group, warmup_steps, buffers=buffers, timeout=timeout)
        if period == 1:
            warn_of_period_one(stacklevel=3)
        self.period = period

    def average_parameters(self, params: Parameters) -> None:
        """Average parameters if it is time, and count a step; to be called after each one.

        Args:
            params: the parameters of a model, or the parameter groups of an optimizer.

        Raises:
            DisagreementError, NonFiniteError, PeerError: see
                `postlocal.model_averaging.utils.average_parameters`; the first also if ranks have
                counted different numbers of steps.
        """
        since = self.step - self.warmup_steps
        if since >= 0 and since % self.period == 0:
            self._average(params, torch_group(self.process_group))
        self.step += 1


def warn_of_period_one(stacklevel: int) -> None:
    """Say that averaging at every step is plain DDP for more bytes."""
    warnings.warn(
        "with a period of 1 parameters are sent at every step, which costs no less than the "
        "gradients that DistributedDataParallel reduces: use it alone, or a longer period",
        stacklevel=stacklevel + 1,
    )
