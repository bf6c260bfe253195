"""An emulated link: delays what a worker sends as a link of a given rate would. For demonstrations.

A message is passed to torch only after the time that a link of that rate needs for it, so other
ranks wait for it as long as behind a real link. The time of the machine's own network is added. The
link has no latency, and receiving does not slow down sending.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future as Posted
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from threading import Lock
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from postlocal.comm.background import promise
from postlocal.comm.group import Group, Operation, Processes, TensorsByRank, Work, torch_group
from postlocal.comm.missing_ranks import Progress
from postlocal.wire import ring_bytes

Result = TypeVar("Result")


class Link:
    """The emulated link of a worker: one message after the other, at a limited rate.

    Args:
        rate: bit/s.

    Raises:
        ValueError: if the rate is not above 0.

    Example:
        >>> link = Link(rate=8e6)
        >>> start = time.monotonic()
        >>> first, second = (link.send(10_000, lambda: "sent") for _ in range(2))
        >>> second.result(), time.monotonic() - start >= 0.02
        ('sent', True)
        >>> link.close()
    """

    def __init__(self, rate: float) -> None:
        if not rate > 0:
            raise ValueError(f"rate must be above 0 bit/s, got {rate}")
        self._rate = rate
        self._free = 0.0
        self._order = Lock()
        self._thread = ThreadPoolExecutor(1, "postlocal-link")

    def send(self, payload_bytes: int, post: Callable[[], Result]) -> Posted[Result]:
        """Call ``post`` after the time of a message, on the thread of the link.

        A message starts when the messages before it have been sent. All ranks must send the
        messages of a group in the same order.

        Args:
            payload_bytes: size of the message.
            post: starts the collective, without waiting for it.
        """
        with self._order:
            self._free = max(time.monotonic(), self._free) + 8 * payload_bytes / self._rate
            return self._thread.submit(_post_at, self._free, post)

    def close(self) -> None:
        """End the thread; messages that wait are not sent."""
        self._thread.shutdown(cancel_futures=True)


def _post_at(deadline: float, post: Callable[[], Result]) -> Result:
    time.sleep(max(0.0, deadline - time.monotonic()))
    return post()


class LinkedProcesses(Processes):
    """Ranks of torch.distributed, each behind its own emulated link.

    Reductions, gathers and exchanges of tensors are delayed. Broadcasts and objects, which compare
    ranks before training, are not.

    Args:
        process_group: the group of torch.
        timeout: as of `Processes`.
        link: the link of this rank, which all its groups share.
        progress: as of `Processes`.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup,
        timeout: timedelta | None,
        link: Link,
        progress: Progress | None = None,
    ) -> None:
        super().__init__(process_group, timeout, progress)
        self._link = link

    def over(self, process_group: dist.ProcessGroup) -> Processes:
        return LinkedProcesses(process_group, self._timeout, self._link, self._progress)

    def all_reduce(self, tensor: Tensor, operation: Operation = "sum") -> Work:
        start = super().all_reduce
        return self._send(self._ring_bytes(tensor), lambda: start(tensor, operation))

    def sum_(self, tensor: Tensor) -> Future[Tensor]:
        start, promised = super().sum_, promise(tensor)
        posted = self._link.send(self._ring_bytes(tensor), lambda: start(tensor))
        posted.add_done_callback(lambda started: _forward(started, promised))
        return promised

    def all_gather(self, output: Tensor, tensor: Tensor) -> Work:
        start = super().all_gather
        return self._send((self.size - 1) * tensor.nbytes, lambda: start(output, tensor))

    def all_to_all(self, sent: TensorsByRank, received: TensorsByRank) -> Work:
        start = super().all_to_all
        others = (tensors for rank, tensors in enumerate(sent) if rank != self.rank)
        payload_bytes = sum(tensor.nbytes for tensors in others for tensor in tensors)
        return self._send(payload_bytes, lambda: start(sent, received))

    def _send(self, payload_bytes: int, start: Callable[[], Work]) -> Work:
        return _Sent(self._link.send(payload_bytes, start))

    def _ring_bytes(self, tensor: Tensor) -> int:
        return ring_bytes(tensor.numel(), self.size, tensor.dtype)


class _Sent:
    def __init__(self, posted: Posted[Work]) -> None:
        self._posted = posted

    def wait(self) -> None:
        self._posted.result().wait()


def _forward(started: Posted[Future[Tensor]], promised: Future[Tensor]) -> None:
    """Set the result of a future to that of a collective, once it is complete."""

    def fulfil(done: Future[Tensor]) -> None:
        try:
            promised.set_result(done.value())
        except Exception as error:
            promised.set_exception(error)  # type: ignore[arg-type]

    if started.cancelled():
        return
    if error := started.exception():
        promised.set_exception(error)  # type: ignore[arg-type]
    else:
        started.result().add_done_callback(fulfil)


def linked(link: Link | None, timeout: float, device: torch.device) -> Group | None:
    """The process group for `attach`: torch's default one behind a link.

    Args:
        link: the link of this rank; None: there is none.
        timeout: seconds that a collective waits for a missing rank.
        device: the device of the model.

    Returns:
        The group, or None if nothing is delayed.

    Raises:
        ValueError: if the model is not on the CPU.
    """
    if link is None or not dist.is_initialized():
        return None
    if device.type != "cpu":
        # Another thread sends messages, and its stream would not wait for this one's.
        raise ValueError(f"link must be left out where the model is not on the CPU, got {device}")
    return LinkedProcesses(torch_group(None), timedelta(seconds=timeout), link)
