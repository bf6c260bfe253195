"""Who came how far, kept in the store that the ranks met at."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import Thread
from typing import ClassVar, TypeVar

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.distributed import distributed_c10d

Value = TypeVar("Value")
_LATER_SECONDS = 2.0  # how much later than this rank others may see that a collective failed
_ANSWER_SECONDS = 3.0  # how long a store may take to answer


class Roll:
    """What tells who is missing when a collective fails.

    The error of a collective says that a connection broke or a time ran out, not who is missing. So
    each rank leaves word in the store before it synchronizes (one small message, no answer
    awaited), and a rank whose collective failed reads there who did not. Where all did, a rank or
    its link was lost after it: each leaves word of the failure, and waits a little for the others'.

    Args:
        process_group: of all ranks that may be named; all of them open its rolls in one order.
    """

    _opened: ClassVar[Counter[str]] = Counter()

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        name = process_group.group_name
        Roll._opened[name] += 1
        prefix = f"postlocal/{name}/{Roll._opened[name]}/"
        self._store = PrefixStore(prefix, distributed_c10d._get_default_store())
        self._step = 0

    def arrive(self, step: int) -> None:
        """Leave word that this rank begins the synchronization after ``step`` steps."""
        self._step = step
        self._store.set(str(dist.get_rank()), str(step))

    def explain(self, error: RuntimeError, members: Sequence[int]) -> str:
        """What a failed collective is to be reported as, within seconds.

        Args:
            error: that of the collective.
            members: ranks that took part in it, by their number in the world.
        """
        reason = str(error).splitlines()[0]
        place = _place(self._step)
        missing = _answer(lambda: self._behind(members))
        if missing is None:
            return f"{place} failed and the store of the process group is out of reach: {reason}"
        if missing:
            return f"missing at {place}: {', '.join(missing)}: {reason}"
        silent = _answer(lambda: self._silent(members))
        since = f", and nothing was heard of {', '.join(silent)} since" if silent else ""
        return f"a connection broke during {place}{since}: {reason}"

    def _behind(self, members: Sequence[int]) -> list[str]:
        """Members that did not come as far as this rank."""
        self._store.set(self._failure(dist.get_rank()), "")
        seen = {rank: self._last_seen(rank) for rank in members}
        return [
            f"rank {rank} ({'never seen' if step is None else f'last seen at {_place(step)}'})"
            for rank, step in seen.items()
            if step is None or step < self._step
        ]

    def _silent(self, members: Sequence[int]) -> list[str]:
        """Members that do not leave word of the failure, though this rank waits for it."""
        deadline = time.monotonic() + _LATER_SECONDS
        while True:
            silent = [rank for rank in members if not self._store.check([self._failure(rank)])]
            if not silent or time.monotonic() > deadline:
                return [f"rank {rank}" for rank in silent]
            time.sleep(0.05)

    def _failure(self, rank: int) -> str:
        return f"failed/{self._step}/{rank}"

    def _last_seen(self, rank: int) -> int | None:
        key = str(rank)
        return int(self._store.get(key)) if self._store.check([key]) else None


def _place(step: int) -> str:
    return f"the synchronization after step {step}" if step else "attach"


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
    return answers[0] if answers else None
