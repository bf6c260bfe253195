"""Where gradients meet: a DDP model whose gradients are reduced at the level of the round.

No `from __future__ import annotations` here: torch checks the hook's annotations by identity.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from postlocal.courier import Courier, promise
from postlocal.group import Group, Processes
from postlocal.meter import Meter
from postlocal.schedule import RANK, WORLD
from postlocal.topology import Layout
from postlocal.wire import ChunkWire, Staging, Wire, fp32


class Local:
    """Gradients of a model that nothing reduces: they stay on their rank.

    Args:
        layout: this rank's groups.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def use(self, level: str) -> None:
        """Refuse a level at which there is anybody to meet.

        Raises:
            ValueError: naming the level and the fix.
        """
        if self._layout[level].size > 1:
            raise ValueError(
                f"the schedule averages gradients at level {level!r}, and model has nothing that "
                "reduces gradients: wrap it in torch.nn.parallel.DistributedDataParallel, or "
                "choose a schedule with gradients='rank'"
            )

    def check(self) -> None:
        return None

    def close(self) -> None:
        return None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        return None

    def forget(self) -> None:
        return None


class Reduced:
    """Gradients of a DistributedDataParallel model, reduced by a communication hook of ours.

    In rounds at level ``"rank"`` DDP is told to leave gradients alone: nothing is copied to
    buckets, and neither its broadcast of buffers nor its search for unused parameters
    communicates. At level ``"world"`` the arithmetic of the wire fp32 is DDP's own, bit for bit.

    Other wires run beside the backward pass, bucket by bucket. Those that remember something wait
    for the last bucket and take all gradients at once, in the order of the model's parameters: DDP
    makes its buckets anew after the first backward pass of each process, and blocks of codes that
    lay across other parameters would not resume bit for bit.

    Args:
        model: the DDP module; it must have no communication hook yet.
        layout: this rank's groups, for gradients only.
        wire: how gradients travel.
        meter: where bytes and exposed waiting are counted.

    Raises:
        ValueError: if the model already has a communication hook.
    """

    def __init__(
        self, model: DistributedDataParallel, layout: Layout, wire: Wire, meter: Meter
    ) -> None:
        self._model = model
        self._layout = layout
        self._meter = meter
        self._group: Group = layout[WORLD]
        self._names = {parameter: name for name, parameter in model.module.named_parameters()}
        staging = Staging()  # one thread runs all exchanges
        self._carriers = {level: wire.open(layout, level, staging) for level in layout.levels}
        self._carrier = self._carriers[WORLD]
        self._syncs_buffers = model.broadcast_buffers
        self._reducing = True
        self._courier = None if wire == fp32() else Courier()
        self._by_bucket = isinstance(wire, ChunkWire)
        self._waiting: list[_Bucket] = []
        try:
            model.register_comm_hook(self, _hook)
        except RuntimeError as error:
            raise ValueError(
                "model already has a communication hook, and a strategy needs its own: build the "
                "DistributedDataParallel without one and give the strategy a gradient_wire"
            ) from error

    def use(self, level: str) -> None:
        """Reduce gradients at ``level`` from the next backward pass on."""
        self._group = self._layout[level]
        self._carrier = self._carriers[level]
        # A static graph has to be seen by the reducer from the first pass on: there the hook is
        # called in local rounds too, and leaves gradients as they are.
        self._reducing = level != RANK or self._model.static_graph
        self._model.require_backward_grad_sync = self._reducing
        self._model.broadcast_buffers = self._syncs_buffers and level == WORLD

    def check(self) -> None:
        """Notice a caller inside ``no_sync()``, which would undo what `use` sets.

        Raises:
            RuntimeError: with the fix.
        """
        if self._reducing and not self._model.require_backward_grad_sync:
            raise RuntimeError(
                "sync.step() was called inside model.no_sync(): call it after the with block, "
                "once for each optimizer step"
            )

    def close(self) -> None:
        """End the communication thread, if there is one."""
        if self._courier is not None:
            self._courier.close()

    def state_dict(self) -> dict[str, Any]:
        """What the wire remembers, by level and parameter; this rank's own and not copied."""
        return {level: carrier.state_dict() for level, carrier in self._carriers.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; a level that it lacks starts with no memory."""
        for level, carrier in self._carriers.items():
            carrier.load_state_dict(state.get(level, {}))

    def forget(self) -> None:
        """Drop what was lost of this rank's gradients."""
        for carrier in self._carriers.values():
            carrier.forget()

    def reduce(self, bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]
        """Start the mean of one bucket over the group of the round."""
        buffer = bucket.buffer()
        if self._group.size == 1:
            future = Future[Tensor]()
            future.set_result(buffer)
            return future
        launch = self._all_reduce if self._courier is None else self._exchange
        future = launch(bucket)
        # Nothing is left to compute when the last bucket is handed over: from there on it waits.
        return future.then(self._waited(time.perf_counter())) if bucket.is_last() else future

    def _all_reduce(self, bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]
        buffer, group = bucket.buffer(), self._group
        assert isinstance(group, Processes)
        size = group.size
        self._meter.count(
            "gradients", 2 * (size - 1) * math.ceil(buffer.numel() / size) * buffer.itemsize
        )
        buffer.mul_(1 / size)  # by the reciprocal and before the sum, to round as DDP does
        return group.sum_(buffer)

    def _exchange(self, bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]
        if self._by_bucket:
            return self._carry(bucket.buffer(), {"bucket": bucket.buffer()})
        if bucket.index() == 0:
            self._waiting.clear()  # a backward pass that failed may have left some
        names = [self._names[parameter] for parameter in bucket.parameters()]
        gradients = dict(zip(names, bucket.gradients(), strict=True))
        if not bucket.is_last():
            waiting = _Bucket(bucket.buffer(), gradients, promise(bucket.buffer()))
            self._waiting.append(waiting)
            return waiting.promise
        for waiting in self._waiting:
            gradients |= waiting.gradients
        ordered = {name: gradients[name] for name in self._names.values() if name in gradients}
        return self._carry(bucket.buffer(), ordered)

    def _carry(self, buffer: Tensor, gradients: Mapping[str, Tensor]) -> Future[Tensor]:
        """Send gradients, and promise the last one's bucket and those that wait for it."""
        assert self._courier is not None
        carrier, waiting = self._carrier, list(self._waiting)
        self._waiting.clear()

        def exchange() -> None:
            try:
                self._meter.count("gradients", carrier.mean_(gradients))
            except Exception as error:
                for bucket in waiting:
                    bucket.promise.set_exception(error)  # type: ignore[arg-type]
                raise
            for bucket in waiting:
                bucket.promise.set_result(bucket.buffer)

        return self._courier.send(buffer, exchange)

    def _waited(self, start: float) -> Callable[[Future[Tensor]], Tensor]:
        def stop(done: Future[Tensor]) -> Tensor:
            self._meter.wait(time.perf_counter() - start)
            return done.value()

        return stop


@dataclass
class _Bucket:
    """Gradients that wait for others to travel with them."""

    buffer: Tensor
    gradients: dict[str, Tensor]
    promise: Future[Tensor]


def _hook(gradients: Reduced, bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]
    return gradients.reduce(bucket)
