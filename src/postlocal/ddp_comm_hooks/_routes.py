"""Where exchanges of several legs run: a process group of their own and a thread, one each a group.

Hooks whose only state is a process group have no place to keep theirs.
"""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future

from postlocal.comm.background import BackgroundThread
from postlocal.comm.group import Group, Processes
from postlocal.sync.supported_tensors import dense
from postlocal.wire import ChunkWire, mean_


@dataclass
class Route:
    """Carries buckets over a wire, one after the other.

    Attributes:
        group: the process group that only these exchanges use.
        background: the thread that runs them.
        passes: backward passes begun.
    """

    group: Group
    background: BackgroundThread
    passes: int = 0

    def mean(
        self, bucket: GradBucket, wire: ChunkWire, residual: Tensor | None = None
    ) -> Future[Tensor]:
        """Start the mean of a bucket over a wire, beside the backward pass."""
        buffer = dense(bucket)
        residuals = None if residual is None else [residual]
        if bucket.index() == 0:
            self.passes += 1
        step = self.passes

        def exchange() -> None:
            self.group.announce(step)
            mean_([buffer], self.group, wire, residuals=residuals)

        return self.background.submit(buffer, exchange)


_ROUTES: WeakKeyDictionary[dist.ProcessGroup, Route] = WeakKeyDictionary()


def route(process_group: dist.ProcessGroup) -> Route:
    """The route of a process group; collective the first time."""
    known = _ROUTES.get(process_group)
    if known is None:
        base = Processes(process_group)
        known = Route(base.subgroup([tuple(range(base.size))]), BackgroundThread())
        _ROUTES[process_group] = known
    return known
