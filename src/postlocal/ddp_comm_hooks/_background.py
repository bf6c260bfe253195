"""Exchanges of several legs beside a backward pass: a background group and thread a process group.

They are kept here, since hooks whose only state is a process group have no place for them.
"""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from postlocal.comm.background import BackgroundThread
from postlocal.comm.group import Group, Processes
from postlocal.sync.supported_tensors import dense
from postlocal.torch_versions import GradBucket
from postlocal.wire import ChunkWire, mean_


@dataclass
class Background:
    """Reduces buckets over a wire, one after the other.

    Attributes:
        group: the process group that only these exchanges use.
        thread: runs them.
        passes: backward passes begun.
    """

    group: Group
    thread: BackgroundThread
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

        return self.thread.submit(buffer, exchange)


_BACKGROUNDS: WeakKeyDictionary[dist.ProcessGroup, Background] = WeakKeyDictionary()


def background(process_group: dist.ProcessGroup) -> Background:
    """The background group and thread of a process group; collective the first time."""
    known = _BACKGROUNDS.get(process_group)
    if known is None:
        base = Processes(process_group)
        known = Background(base.subgroup([tuple(range(base.size))]), BackgroundThread())
        _BACKGROUNDS[process_group] = known
    return known
