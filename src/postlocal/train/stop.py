"""Agreement of all ranks on the step to stop at, after a signal to any of them.

Ranks synchronize seldom, so a signal cannot wait for the next synchronization. Ranks that stop at
different steps could neither save nor exit. A thread on each rank checks the store regularly for a
signal to any rank. After a signal, each thread writes the number of steps that its rank has
completed, and all stop one step after the greatest number. No rank is past that step, and all ranks
take part in every synchronization before it.
"""

import signal
from threading import Event, Lock, Thread
from types import FrameType, TracebackType

from postlocal.errors import PeerError
from postlocal.torch_versions import Store

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Watches for SIGINT and SIGTERM; a context manager for the main thread.

    Args:
        rank: this rank.
        world: number of ranks.
        store: where ranks write their steps; None if there is only one rank.
        interval: seconds between checks.
        patience: seconds that a rank may take to answer; its thread answers even while it trains.

    Attributes:
        signal: the signal that this rank or another received, if known; None: none.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        store: Store | None,
        interval: float = 0.25,
        patience: float = 5.0,
    ) -> None:
        self.signal: int | None = None
        self._rank = rank
        self._world = world
        self._store = store
        self._interval = interval
        self._patience = patience
        self._lock = Lock()
        self._steps = 0
        self._told = False
        self._target: int | None = None
        self._decided = Event()
        self._closed = Event()
        self._thread = Thread(target=self._watch, name="postlocal-stop", daemon=True)
        self._handlers: dict[int, object] = {}

    def __enter__(self) -> "Stop":
        for number in _SIGNALS:
            self._handlers[number] = signal.signal(number, self._receive)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closed.set()
        self._thread.join(self._patience)  # a limit, because an unreachable store never answers
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def due(self, steps: int) -> bool:
        """Whether to stop after ``steps`` completed steps; to be called after every step.

        Raises:
            PeerError: if a rank did not answer in time, and so nothing can be saved.
        """
        with self._lock:
            self._steps = steps
            told = self._told
        if not told:
            return False
        self._decided.wait()
        if self._target is None:
            raise PeerError(
                "stopped by a signal without a checkpoint, because a rank did not answer",
                step=steps,
            )
        return steps >= self._target

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.signal = number

    def _watch(self) -> None:
        while not self._closed.wait(self._interval):
            if self.signal is not None or self._heard():
                self._agree()
                return

    def _heard(self) -> bool:
        if self._store is None or not self._store.check(["stop"]):
            return False
        self.signal = int(self._store.get("stop"))
        return True

    def _agree(self) -> None:
        with self._lock:
            self._told = True
            completed = self._steps
        try:
            furthest = completed if self._store is None else self._furthest(completed)
            self._target = None if furthest is None else furthest + 1
        finally:
            self._decided.set()

    def _furthest(self, completed: int) -> int | None:
        assert self._store is not None
        assert self.signal is not None
        self._store.set("stop", str(int(self.signal)))
        self._store.set(f"stop/{self._rank}", str(completed))
        keys = [f"stop/{rank}" for rank in range(self._world)]
        for _ in range(int(self._patience / self._interval)):
            if self._store.check(keys):
                return max(int(self._store.get(key)) for key in keys)
            self._closed.wait(self._interval)
        return None
