"""What communication costs: a hook without any, and one that measures another.

Example:
    >>> import torch
    >>> import torch.distributed as dist
    >>> from torch.nn.parallel import DistributedDataParallel
    >>> from postlocal.ddp_comm_hooks.debugging_hooks import MeasureState, measure_hook
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> model = DistributedDataParallel(torch.nn.Linear(2, 1))
    >>> state = MeasureState(process_group=None)
    >>> model.register_comm_hook(state, measure_hook)
    >>> for batch in torch.ones(6, 3, 2):
    ...     model(batch).sum().backward()
    >>> report = state.report()
    >>> report.steps, [bucket.numel for bucket in report.buckets]
    (4, [3])
"""

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from postlocal.ddp_comm_hooks.default_hooks import Hook, allreduce_hook, kept
from postlocal.torch_versions import GradBucket

__all__ = ["BucketReport", "MeasureState", "Report", "measure_hook", "noop_hook"]


def noop_hook(_: Any, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Leave gradients as they are: no communication, and replicas that diverge.

    For finding out how fast training would be without communication, and for nothing else.
    `measure_hook` estimates it while training goes on.
    """
    return kept(bucket.buffer())


@dataclass
class BucketReport:
    """What one bucket cost, over all steps measured.

    Attributes:
        index: the bucket's index.
        numel: elements.
        nbytes: size of the buffer handed to the hook, in bytes.
        seconds: from handing it over until it was reduced, mean over steps.
    """

    index: int
    numel: int
    nbytes: int
    seconds: float


@dataclass
class Report:
    """What communication cost.

    Attributes:
        steps: steps measured.
        seconds: duration of a step, mean.
        exposed_seconds: of it, waiting for communication with nothing left to compute, mean.
        buckets: one entry a bucket.
    """

    steps: int
    seconds: float
    exposed_seconds: float
    buckets: list[BucketReport] = field(default_factory=list)

    @property
    def headroom(self) -> float:
        """How many times faster a step would be with no communication: 1.1 is 10 %."""
        computing = self.seconds - self.exposed_seconds
        return self.seconds / computing if computing > 0 else math.inf

    def __str__(self) -> str:
        lines = ["bucket   elements      bytes  ms until reduced"]
        lines += [
            f"{b.index:>6} {b.numel:>10} {b.nbytes:>10} {1e3 * b.seconds:>17.2f}"
            for b in self.buckets
        ]
        lines.append(
            f"{self.steps} steps of {1e3 * self.seconds:.2f} ms, of which "
            f"{1e3 * self.exposed_seconds:.2f} ms wait for communication: "
            f"{self.headroom:.2f} times as fast without"
        )
        return "\n".join(lines)


class MeasureState:
    """What `measure_hook` runs and what it saw.

    Times are the host's: on an accelerator whose collectives are enqueued they show when work was
    handed over, not when it ran; use its profiler there.

    Args:
        process_group: who takes part; None: torch's default group.
        hook: the hook to measure.
        hook_state: its state; None: the process group.
        skip: steps at the start that do not count, as DDP makes its buckets anew in the second.

    Raises:
        ValueError: if ``skip`` is negative.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
        hook: Hook = allreduce_hook,
        hook_state: Any = None,
        skip: int = 2,
    ) -> None:
        if skip < 0:
            raise ValueError(f"skip must be at least 0 steps, got {skip}")
        self.process_group = process_group
        self.hook = hook
        self.hook_state = process_group if hook_state is None else hook_state
        self.skip = skip
        self._seen = 0
        self._buckets: dict[int, BucketReport] = {}
        self._total: dict[int, float] = {}
        self._exposed = 0.0
        self._durations: list[float] = []
        self._last_end: float | None = None

    def report(self) -> Report:
        """Means over the steps so far, those skipped left out.

        Raises:
            RuntimeError: if there are none yet.
        """
        steps = len(self._durations)
        if not steps:
            raise RuntimeError(
                f"nothing is measured yet: {self.skip} steps are skipped, and a duration needs the "
                f"end of two steps; {self._seen} were seen"
            )
        for index, bucket in self._buckets.items():
            bucket.seconds = self._total[index] / steps
        buckets = [self._buckets[index] for index in sorted(self._buckets)]
        return Report(steps, sum(self._durations) / steps, self._exposed / steps, buckets)

    def _reduced(self, bucket: GradBucket, start: float) -> None:
        now = time.perf_counter()
        counts = self._last_end is not None
        if counts:
            index, buffer = bucket.index(), bucket.buffer()
            self._buckets[index] = BucketReport(index, buffer.numel(), buffer.nbytes, 0.0)
            self._total[index] = self._total.get(index, 0.0) + now - start
        if bucket.is_last():
            self._seen += 1
            if self._last_end is not None:
                self._durations.append(now - self._last_end)
                # From the last bucket on nothing is left to compute: it is waited for.
                self._exposed += now - start
            if self._seen >= self.skip:
                self._last_end = now


def measure_hook(state: MeasureState, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Run another hook and take note of bytes and time, bucket by bucket.

    Args:
        state: what to run, and where to note.
        bucket: the gradients.

    Returns:
        What the other hook promises.
    """
    start = time.perf_counter()

    def note(done: Future[Tensor]) -> Tensor:
        state._reduced(bucket, start)
        return done.value()

    return state.hook(state.hook_state, bucket).then(note)
