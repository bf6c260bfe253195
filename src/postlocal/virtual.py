"""An in-process world: N workers as threads, to try a strategy without a cluster.

Threads of one process send tensors through memory, by the same interface as processes do.
It is meant for tests and for experiments with small models, not for speed.

Example:
    >>> import torch
    >>> from postlocal import virtual
    >>> def work(group):
    ...     mine = torch.tensor([float(group.rank)])
    ...     group.all_reduce(mine).wait()
    ...     return mine.item()
    >>> virtual.run(4, work)
    [6.0, 6.0, 6.0, 6.0]
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, BrokenBarrierError
from typing import Any, TypeVar

import torch
from torch import Tensor

from postlocal.checks import Timeout, count
from postlocal.checks import timeout as checked_timeout
from postlocal.comm.group import Alone, Done, Group, Operation, TensorsByRank, Work
from postlocal.errors import PeerError

Result = TypeVar("Result")
Value = TypeVar("Value")


def run(workers: int, function: Callable[[Group], Result], timeout: Timeout = 60.0) -> list[Result]:
    """Call ``function(group)`` in ``workers`` threads that form one group.

    Pass ``group`` to `postlocal.attach` as ``process_group``.

    Args:
        workers: number of threads, at least 1.
        function: what each worker does.
        timeout: seconds, or a `datetime.timedelta`, that a collective waits for the other workers,
            at most 1e7 seconds.

    Returns:
        What the workers returned, in the order of ranks.

    Raises:
        TypeError: if ``workers`` is no whole number, or ``timeout`` no number.
        ValueError: if ``workers`` is below 1, or ``timeout`` not above 0 or above 1e7.
        Exception: the first one that a worker raised; the others are released.
    """
    workers = count("workers", workers, "worker")
    room = _Room(workers, checked_timeout("timeout", timeout))

    def work(rank: int) -> Result:
        try:
            return function(Threads(room, rank))
        except BaseException:
            room.leave()
            raise

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work, rank) for rank in range(workers)]
    errors = [error for future in futures if (error := future.exception())]
    # Workers released by another one's failure raise PeerError; the cause tells more.
    causes = [error for error in errors if not isinstance(error, PeerError)]
    for error in causes + errors:
        raise error
    return [future.result() for future in futures]


class Threads:
    """Ranks that are threads of one process; see `run`."""

    def __init__(self, room: "_Room", rank: int) -> None:
        self._room = room
        self.rank = rank
        self.size = room.size

    def all_reduce(self, tensor: Tensor, operation: Operation = "sum") -> Work:
        stacked = torch.stack(self._room.gather(self.rank, tensor.clone()))
        tensor.copy_(stacked.sum(0) if operation == "sum" else stacked.amax(0))
        return Done()

    def all_gather(self, output: Tensor, tensor: Tensor) -> Work:
        output.copy_(torch.cat(self._room.gather(self.rank, tensor.clone())))
        return Done()

    def all_to_all(self, sent: TensorsByRank, received: TensorsByRank) -> Work:
        copies = [[tensor.clone() for tensor in tensors] for tensors in sent]
        everyones = self._room.gather(self.rank, copies)
        for rank, tensors in enumerate(received):
            if rank != self.rank:
                for tensor, theirs in zip(tensors, everyones[rank][self.rank], strict=True):
                    tensor.copy_(theirs)
        return Done()

    def broadcast(self, tensor: Tensor, source: int = 0) -> Work:
        tensor.copy_(self._room.gather(self.rank, tensor.clone())[source])
        return Done()

    def all_gather_object(self, value: Value) -> list[Value]:
        return self._room.gather(self.rank, value)

    def subgroup(self, partition: Sequence[Sequence[int]]) -> Group:
        rooms = {tuple(ranks): _Room(len(ranks), self._room.timeout) for ranks in partition}
        rooms = self._room.gather(self.rank, rooms)[0]
        members = next(ranks for ranks in rooms if self.rank in ranks)
        if len(members) == 1:
            return Alone()
        return Threads(self._room.open(rooms[members]), members.index(self.rank))

    def announce(self, step: int) -> None:
        return None

    def wait_for_all(self, step: int, place: str) -> None:
        return None

    def close(self, subgroups: Sequence[Group]) -> None:
        return None


class _Room:
    """The all-gather of threads: each puts a value down, and all pick up all of them."""

    def __init__(self, size: int, timeout: float) -> None:
        self.size = size
        self.timeout = timeout
        self._barrier = Barrier(size, timeout=timeout)
        self._values: dict[int, Any] = {}
        self._counts = [0] * size
        self._inner: list[_Room] = []

    def gather(self, rank: int, value: Value) -> list[Value]:
        self._counts[rank] += 1
        try:
            self._values[rank] = value
            self._barrier.wait()
            values = [self._values[other] for other in range(self.size)]
            self._barrier.wait()  # nobody puts the next value down before all have read this one
        except BrokenBarrierError:
            raise PeerError(
                f"a worker left, or did not come within {self.timeout} s", ranks=self._behind(rank)
            ) from None
        return values

    def _behind(self, rank: int) -> list[int]:
        """Workers that took part in fewer collectives than one that waits for them."""
        return [other for other, count in enumerate(self._counts) if count < self._counts[rank]]

    def open(self, inner: "_Room") -> "_Room":
        self._inner.append(inner)
        return inner

    def leave(self) -> None:
        self._barrier.abort()
        for inner in self._inner:
            inner.leave()
