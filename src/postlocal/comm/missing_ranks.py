"""Which ranks are missing: each announces its progress in the store that they met at."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from threading import Thread
from typing import ClassVar, TypeVar

import torch.distributed as dist

from postlocal.comm.exiting import watch
from postlocal.errors import PeerError
from postlocal.torch_versions import PrefixStore, default_store

Value = TypeVar("Value")
_LATER_SECONDS = 2.0  # how much later than this rank others may see that a collective failed
_ANSWER_SECONDS = 3.0  # how long a store may take to answer
_LOOK_SECONDS = 1.0  # how often a rank that waits looks where the others are


class Progress:
    """How far each rank is, to name the missing ones when a collective fails.

    The error of a collective says that a connection broke or a time ran out, not who is missing. So
    each rank announces in the store what it begins (one small message, no answer awaited), and a
    rank whose collective failed reads there who did not. Where all did, a rank or its link was lost
    afterwards: each announces the failure, and waits a little for the others to do so.

    Args:
        process_group: of all ranks that may be named; all of them make theirs in one order.

    Attributes:
        failed: whether a collective has failed.
    """

    _opened: ClassVar[Counter[str]] = Counter()

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        name = process_group.group_name
        Progress._opened[name] += 1
        prefix = f"postlocal/{name}/{Progress._opened[name]}/"
        self._store = PrefixStore(prefix, default_store())
        self._step = 0
        self._place = _place(0)
        self._meetings: Counter[str] = Counter()
        self._met: str | None = None
        self.failed = False

    def announce(self, step: int, place: str | None = None) -> None:
        """Announce that this rank is at a place.

        Args:
            step: number of steps that it took.
            place: what it begins; None: the synchronization after these steps.
        """
        self._step = step
        self._place = place or _place(step)
        self._store.set(str(dist.get_rank()), f"{step} {self._place}")

    def wait_for_all(
        self, step: int, place: str, members: Sequence[int], limit: timedelta
    ) -> PeerError | None:
        """Wait until all members are at a place where no collective has begun yet.

        A collective that some ranks never begin pairs with another one of theirs, and gloo aborts.
        So ranks wait here where a caller may have left out some of them.

        Args:
            step: number of steps that this rank took.
            place: what it begins, for messages.
            members: who must come, by their number in the world.
            limit: how long to wait for them.

        Returns:
            None once all are here; else the error to raise: it names who is missing, after
            ``limit`` or as soon as one of them is seen at a later step.
        """
        self.announce(step, place)
        self._meetings[place] += 1
        meeting = f"met/{place}/{self._meetings[place]}"
        self._store.set(f"{meeting}/{dist.get_rank()}", "")
        keys = [f"{meeting}/{rank}" for rank in members]
        deadline = time.monotonic() + limit.total_seconds()
        pause = 0.001
        while not _answer(lambda: self._store.check(keys)):
            late = time.monotonic() > deadline
            if late or pause > _LOOK_SECONDS / 2:
                problem = self._report(meeting, members, late)
                if problem is not None:
                    _answer(lambda: self._store.set(self._left(dist.get_rank(), place), ""))
                    return problem
            time.sleep(pause)
            pause = min(2 * pause, _LOOK_SECONDS)
        self._leave(meeting)
        return None

    def _leave(self, meeting: str) -> None:
        """Remove this rank's key of the meeting before: all who are at this one have left it."""
        before, self._met = self._met, meeting
        if before is not None:
            _answer(lambda: self._store.delete_key(f"{before}/{dist.get_rank()}"))

    def _report(self, meeting: str, members: Sequence[int], late: bool) -> PeerError | None:
        """Who is missing at a meeting, if it is late or one of them went on without it."""
        seen = _answer(lambda: self._absent(meeting, members))
        if seen is None:
            return self._error(f"the store of the process group is out of reach at {self._place}")
        if not (seen and (late or _answer(lambda: self._went_on(seen)))):
            return None
        return self._error(f"missing at {self._place}: {_names(seen)}", seen)

    def _error(self, message: str, ranks: Iterable[int] = ()) -> PeerError:
        return PeerError(message, ranks=ranks, step=self._step)

    def _went_on(self, seen: Mapping[int, tuple[int, str] | None]) -> bool:
        """Whether one of the ranks seen is at a later step, or gave up where it waited."""
        return any(
            last[0] > self._step or self._store.check([self._left(rank, last[1])])
            for rank, last in seen.items()
            if last is not None
        )

    def _left(self, rank: int, place: str) -> str:
        return f"left/{place}/{rank}"

    def _absent(self, meeting: str, members: Sequence[int]) -> dict[int, tuple[int, str] | None]:
        absent = [rank for rank in members if not self._store.check([f"{meeting}/{rank}"])]
        return {rank: self._last_seen(rank) for rank in absent}

    def explain(self, error: RuntimeError, members: Sequence[int]) -> PeerError:
        """The error to raise for a failed collective, within seconds.

        Args:
            error: that of the collective.
            members: ranks that took part in it, by their number in the world.
        """
        self.failed = True
        reason = str(error).splitlines()[0]
        place = self._place
        behind = _answer(lambda: self._behind(members))
        if behind is None:
            return self._error(
                f"{place} failed and the store of the process group is out of reach: {reason}"
            )
        if behind:
            return self._error(f"missing at {place}: {_names(behind)}: {reason}", behind)
        silent = _answer(lambda: self._silent(members)) or []
        names = ", ".join(f"rank {rank}" for rank in silent)
        since = f", and nothing was heard of {names} since" if silent else ""
        return self._error(f"a connection broke during {place}{since}: {reason}", silent)

    def _behind(self, members: Sequence[int]) -> dict[int, tuple[int, str] | None]:
        """Members that did not come as far as this rank, and where they were last."""
        self._store.set(self._failure(dist.get_rank()), "")
        seen = {rank: self._last_seen(rank) for rank in members}
        return {r: last for r, last in seen.items() if last is None or last[0] < self._step}

    def _silent(self, members: Sequence[int]) -> list[int]:
        """Members that do not announce the failure, though this rank waits for it."""
        deadline = time.monotonic() + _LATER_SECONDS
        while True:
            silent = [rank for rank in members if not self._store.check([self._failure(rank)])]
            if not silent or time.monotonic() > deadline:
                return silent
            time.sleep(0.05)

    def _failure(self, rank: int) -> str:
        return f"failed/{self._place}/{rank}"

    def _last_seen(self, rank: int) -> tuple[int, str] | None:
        """Steps that a rank took, and the place where it was."""
        key = str(rank)
        if not self._store.check([key]):
            return None
        step, place = self._store.get(key).decode().split(" ", 1)
        return int(step), place


class Release:
    """What ranks share and give up, each when it needs it no more.

    Args:
        name: of what is shared, the same on all ranks and no other's.
        members: the ranks, by their number in the world.
    """

    def __init__(self, name: str, members: Sequence[int]) -> None:
        prefix = f"postlocal/released/{name}/"
        self._store = PrefixStore(prefix, default_store())
        self._keys = [str(member) for member in members]

    def give_up(self, seconds: float) -> bool:
        """Give it up on this rank; whether all ranks have done so within some seconds."""
        return bool(_answer(lambda: self._given_up(seconds)))

    def complete(self) -> bool:
        """Whether all ranks have given it up."""
        return bool(_answer(lambda: self._store.check(self._keys)))

    def _given_up(self, seconds: float) -> bool:
        self._store.set(str(dist.get_rank()), "")
        deadline = time.monotonic() + seconds
        while not self._store.check(self._keys):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        return True


def _place(step: int) -> str:
    return f"the synchronization after step {step}" if step else "attach"


def _names(seen: Mapping[int, tuple[int, str] | None]) -> str:
    return ", ".join(
        f"rank {rank} ({'never seen' if last is None else f'last seen at {last[1]}'})"
        for rank, last in seen.items()
    )


def _answer(ask: Callable[[], Value]) -> Value | None:
    """What ``ask`` gives, or None where the store is gone or does not answer.

    One at the other end of a cut link never does, and torch waits for it with no limit.
    """
    answers: list[Value] = []

    def listen() -> None:
        with suppress(RuntimeError):
            answers.append(ask())

    thread = Thread(target=listen, daemon=True)
    thread.start()
    thread.join(_LATER_SECONDS + _ANSWER_SECONDS)
    if thread.is_alive():
        watch(lambda: not thread.is_alive())
    return answers[0] if answers else None
