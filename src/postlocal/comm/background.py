"""A thread that runs collectives beside training, such as those of a backward pass."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from queue import SimpleQueue
from threading import Event, Thread

import torch
from torch import Tensor
from torch.futures import Future

from postlocal.comm.exiting import watch


def promise(tensor: Tensor) -> Future[Tensor]:
    """A future for a tensor on the device of ``tensor``."""
    return Future(devices=[] if tensor.device.type == "cpu" else [tensor.device])


class BackgroundThread:
    """Runs collectives beside training, one task after the other, in the order of `submit`.

    Ranks that submit tasks in one order so run their collectives in one order. The groups that the
    tasks use must be used by nothing else meanwhile.
    """

    def __init__(self) -> None:
        self._tasks: SimpleQueue[tuple[Callable[[], None], Event] | None] = SimpleQueue()
        # A daemon: Python would join any other thread at exit, however long its peer is away.
        self._thread = Thread(target=self._run, name="postlocal-background", daemon=True)
        self._thread.start()
        self._side: torch.Stream | None = None

    def submit(self, tensor: Tensor, task: Callable[[], object]) -> Future[Tensor]:
        """Run ``task``, which works on ``tensor`` in place, and promise the tensor."""
        future = promise(tensor)
        if tensor.device.type == "cpu":
            self._put(lambda: _fulfil(future, tensor, task))
            return future
        self._side = side = self._side or torch.Stream(tensor.device)
        ready = torch.accelerator.current_stream(tensor.device).record_event()
        self._put(lambda: _fulfil(future, tensor, task, lambda: _on(side, ready)))
        return future

    def close(self) -> None:
        """End the thread, once it has done what it was given."""
        self._tasks.put(None)
        self._thread.join()

    def _put(self, task: Callable[[], None]) -> None:
        done = Event()
        watch(done.is_set)
        self._tasks.put((task, done))

    def _run(self) -> None:
        while (item := self._tasks.get()) is not None:
            task, done = item
            task()
            del item, task  # they hold tensors
            done.set()


def _fulfil(
    future: Future[Tensor],
    tensor: Tensor,
    task: Callable[[], object],
    beside: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> None:
    try:
        with beside(), torch.no_grad():
            task()
            future.set_result(tensor)  # on a device: complete after all that the task enqueued
    except Exception as error:
        future.set_exception(error)  # type: ignore[arg-type]


@contextmanager
def _on(stream: torch.Stream, ready: torch.Event) -> Iterator[None]:
    with stream:
        stream.wait_event(ready)
        yield
