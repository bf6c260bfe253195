"""Groups of ranks that communicate: a process group of torch, a rank alone, or threads.

`Group` is all that the layers above know of communication. `Processes` is torch.distributed,
`Alone` is a world of one rank, and `postlocal.virtual` has one of threads. `OnPaper` has a size
alone: wires tell their messages over it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, ClassVar, Literal, Protocol, TypeVar
from uuid import uuid4

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.futures import Future

from postlocal import torch_versions
from postlocal.checks import made
from postlocal.comm.exiting import note_failure, watch
from postlocal.comm.missing_ranks import Progress, Release

Value = TypeVar("Value")
Operation = Literal["sum", "max"]
TensorsByRank = Sequence[Sequence[Tensor]]
"""Tensors for each rank of a group, or from each."""
_PATIENCE_SECONDS = 2.0  # how long a rank waits for others to give up groups
_OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


class Work(Protocol):
    """A collective under way."""

    def wait(self) -> None:
        """Block until the result is there.

        Raises:
            PeerError: if a rank did not take part in time; it names the rank.
        """
        ...


class Group(Protocol):
    """Ranks that communicate. Every method but `announce` is collective and works in place.

    Attributes:
        rank: this rank's index in the group, from 0.
        size: number of ranks.
    """

    rank: int
    size: int

    def all_reduce(self, tensor: Tensor, operation: Operation = "sum") -> Work:
        """Replace ``tensor``, contiguous and of one shape on all ranks, by its sum or maximum."""
        ...

    def all_gather(self, output: Tensor, tensor: Tensor) -> Work:
        """Concatenate all ranks' ``tensor``, shape ``(n,)``, into ``output``, ``(size * n,)``."""
        ...

    def all_to_all(self, sent: TensorsByRank, received: TensorsByRank) -> Work:
        """Send ``sent[i]`` to rank i, and receive into ``received[i]`` what it sends here.

        Contiguous tensors, any number for each rank, of the sizes that the other one expects. Those
        of this rank for itself are neither sent nor copied.
        """
        ...

    def broadcast(self, tensor: Tensor, source: int = 0) -> Work:
        """Replace ``tensor`` by that of the group's rank ``source``."""
        ...

    def all_gather_object(self, value: Value) -> list[Value]:
        """All ranks' values, in the order of ranks."""
        ...

    def subgroup(self, partition: Sequence[Sequence[int]]) -> "Group":
        """A new group of those ranks of a partition that hold this rank."""
        ...

    def announce(self, step: int) -> None:
        """Announce that this rank begins the synchronization after ``step`` (0: attach)."""
        ...

    def wait_for_all(self, step: int, place: str) -> None:
        """Wait for all ranks at a place that some may not come to, such as a checkpoint.

        Args:
            step: number of steps that this rank took.
            place: for messages.

        Raises:
            PeerError: if a rank does not come in time, or went on without; it names the rank.
        """
        ...

    def close(self, subgroups: Sequence["Group"]) -> None:
        """Give up subgroups of this group for good, once no rank communicates over them.

        It waits a few seconds for the other ranks, and raises nothing.
        """
        ...


class Done:
    """Work that was complete when its call returned."""

    def wait(self) -> None:
        return None


class Alone:
    """A world of one rank: every collective is the identity."""

    rank = 0
    size = 1

    def all_reduce(self, tensor: Tensor, operation: Operation = "sum") -> Work:
        return Done()

    def all_gather(self, output: Tensor, tensor: Tensor) -> Work:
        output.copy_(tensor)
        return Done()

    def all_to_all(self, sent: TensorsByRank, received: TensorsByRank) -> Work:
        return Done()

    def broadcast(self, tensor: Tensor, source: int = 0) -> Work:
        return Done()

    def all_gather_object(self, value: Value) -> list[Value]:
        return [value]

    def subgroup(self, partition: Sequence[Sequence[int]]) -> "Group":
        return self

    def announce(self, step: int) -> None:
        return None

    def wait_for_all(self, step: int, place: str) -> None:
        return None

    def close(self, subgroups: Sequence[Group]) -> None:
        return None


class OnPaper(Alone):
    """Rank 0 of a group that is not there: it has a size, and sends nothing.

    Of a partition it takes the largest part, whose synchronizations take longest.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def subgroup(self, partition: Sequence[Sequence[int]]) -> Group:
        return OnPaper(max(map(len, partition)))


class Processes:
    """Ranks of torch.distributed.

    Args:
        process_group: the group of torch, of any backend that has the collectives above; gloo
            and NCCL do.
        timeout: how long a collective of a subgroup waits for a missing rank; None: as long as
            those of ``process_group`` do.
        progress: who names missing ranks; None: a new one, made by all ranks in one order.
    """

    _given_up: ClassVar[list[tuple[Release, list[dist.ProcessGroup]]]] = []
    """Groups that this rank does not need any more, and other ranks may."""

    def __init__(
        self,
        process_group: dist.ProcessGroup,
        timeout: timedelta | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.process_group = process_group
        self.rank = dist.get_rank(process_group)
        self.size = dist.get_world_size(process_group)
        self._timeout = timeout or torch_versions.timeout_of(process_group)
        self._progress = progress or Progress(process_group)
        self._prefix: str | None = None
        self._made = 0

    def all_reduce(self, tensor: Tensor, operation: Operation = "sum") -> Work:
        return self._start(
            lambda: dist.all_reduce(
                tensor, _OPERATIONS[operation], group=self.process_group, async_op=True
            )
        )

    def sum_(self, tensor: Tensor) -> Future[Tensor]:
        """Replace ``tensor`` by its sum over all ranks; a future, as a hook of DDP returns."""
        work = dist.all_reduce(tensor, group=self.process_group, async_op=True)
        assert work is not None
        future: Future[list[Tensor]] = work.get_future()
        summed = future.then(lambda done: done.value()[0])
        watch(summed.done)
        return summed

    def all_gather(self, output: Tensor, tensor: Tensor) -> Work:
        return self._start(
            lambda: torch_versions.all_gather_single(output, tensor, self.process_group)
        )

    def all_to_all(self, sent: TensorsByRank, received: TensorsByRank) -> Work:
        transfers = [
            dist.P2POp(operation, tensor, group=self.process_group, group_peer=rank)
            for operation, by_rank in ((dist.irecv, received), (dist.isend, sent))
            for rank, tensors in enumerate(by_rank)
            for tensor in tensors
            if rank != self.rank and tensor.numel()
        ]
        if not transfers:
            return Done()
        with self._naming_the_missing():
            return _Pending(dist.batch_isend_irecv(transfers), self)

    def broadcast(self, tensor: Tensor, source: int = 0) -> Work:
        return self._start(
            lambda: dist.broadcast(
                tensor, group=self.process_group, group_src=source, async_op=True
            )
        )

    def all_gather_object(self, value: Value) -> list[Value]:
        values: list[Any] = [None] * self.size
        with self._naming_the_missing():
            dist.all_gather_object(values, value, group=self.process_group)
        return values

    def subgroup(self, partition: Sequence[Sequence[int]]) -> Group:
        created = self.torch_subgroup(partition)
        if dist.get_world_size(created) == 1:
            dist.destroy_process_group(created)
            return Alone()
        return self.over(created)

    def over(self, process_group: dist.ProcessGroup) -> "Processes":
        """The same over another process group of torch: its timeout, and who names the missing."""
        return Processes(process_group, self._timeout, self._progress)

    def torch_subgroup(self, partition: Sequence[Sequence[int]]) -> dist.ProcessGroup:
        """Those ranks of a partition that hold this rank, as a new process group of torch."""
        members = next(ranks for ranks in partition if self.rank in ranks)
        ranks = [dist.get_global_rank(self.process_group, member) for member in members]
        name = self._new_name(members)
        with self._naming_the_missing():
            return torch_versions.new_group(sorted(ranks), name, self._timeout)

    def _new_name(self, members: Sequence[int]) -> str:
        """A name that no group has or had, the same on all members; collective."""
        if self._prefix is None:
            self._prefix = self.all_gather_object(uuid4().hex)[0]
        self._made += 1
        return f"postlocal/{self._prefix}/{self._made}/{min(members)}"

    def announce(self, step: int) -> None:
        self._progress.announce(step)

    def wait_for_all(self, step: int, place: str) -> None:
        members = dist.get_process_group_ranks(self.process_group)
        limit = self._timeout or distributed_c10d.default_pg_timeout
        missing = self._progress.wait_for_all(step, place, members, limit)
        if missing is not None:
            raise missing

    def close(self, subgroups: Sequence[Group]) -> None:
        groups = []
        for subgroup in subgroups:
            if isinstance(subgroup, Processes):
                groups.append(subgroup.process_group)
                del subgroup.process_group  # the threads of a group end with its last reference
        if not groups or not dist.is_initialized():
            return
        # What a peer has not received yet must not be cut off: groups are
        # destroyed when all ranks have given them up. Where one does not in time, they wait for the
        # next call of `destroy_given_up`.
        assert self._prefix is not None
        release = Release(self._prefix, dist.get_process_group_ranks(self.process_group))
        self._prefix = None  # what is made from here on is given up by itself
        if release.give_up(0.0 if self._progress.failed else _PATIENCE_SECONDS):
            torch_versions.destroy(groups)
        else:
            Processes._given_up.append((release, groups))

    @staticmethod
    def destroy_given_up() -> None:
        """Destroy groups whose ranks have all given them up since; it waits for nobody."""
        complete = [(given, given[0].complete()) for given in Processes._given_up]
        for (_, groups), done in complete:
            if done:
                torch_versions.destroy(groups)
        Processes._given_up[:] = [given for given, done in complete if not done]

    def _start(self, collective: Callable[[], dist.Work | None]) -> Work:
        with self._naming_the_missing():
            work = collective()
        return Done() if work is None else _Pending([work], self)

    @contextmanager
    def _naming_the_missing(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            note_failure()
            members = dist.get_process_group_ranks(self.process_group)
            raise self._progress.explain(error, members) from error


class _Pending:
    def __init__(self, works: Sequence[dist.Work], group: Processes) -> None:
        self._works = works
        self._group = group

    def wait(self) -> None:
        with self._group._naming_the_missing():
            for work in self._works:
                work.wait()


def torch_group(process_group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """The process group of torch that a caller means: the default one for None.

    Raises:
        ValueError: if it is None and there is no default group.
    """
    if process_group is not None:
        return process_group
    if not dist.is_initialized():
        raise ValueError(
            "process_group is None and there is no default process group: call "
            "torch.distributed.init_process_group() first"
        )
    return torch_versions.default_group()


def _check_member(process_group: object) -> None:
    # What torch gives to ranks that are not in a new group.
    outside = isinstance(process_group, int) and process_group == dist.GroupMember.NON_GROUP_MEMBER
    if outside or (isinstance(process_group, dist.ProcessGroup) and process_group.rank() < 0):
        raise ValueError(
            "process_group must be one that this rank is in, got one of other ranks: call only on "
            "the ranks that torch.distributed.new_group() was given"
        )


def resolve(process_group: dist.ProcessGroup | Group | None, timeout: timedelta | None) -> Group:
    """The group that a caller means: torch's default for None, `Alone` where there is none.

    Raises:
        TypeError: if it is neither a group of torch nor a `Group`.
        ValueError: if this rank is not in it.
    """
    Processes.destroy_given_up()
    if process_group is None:
        if not dist.is_available() or not dist.is_initialized():
            return Alone()
        return Processes(dist.group.WORLD, timeout)  # type: ignore[arg-type]
    _check_member(process_group)
    if isinstance(process_group, dist.ProcessGroup):
        return Processes(process_group, timeout)
    needs = ("rank", "size", "all_reduce", "all_gather", "all_to_all", "broadcast", "subgroup")
    group: Group = made("process_group", process_group, needs, "torch.distributed.new_group(...)")
    return group
