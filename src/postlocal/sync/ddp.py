"""Gradients in a backward pass: a hook of DDP that reduces them at the level of the round.

No `from __future__ import annotations` here: torch checks the hook's annotations by identity.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from postlocal import torch_versions
from postlocal.comm.background import BackgroundThread, promise
from postlocal.comm.exiting import drop_done
from postlocal.comm.group import Group, Processes
from postlocal.comm.groups import LevelGroups
from postlocal.meter import Meter
from postlocal.schedule import WORLD
from postlocal.torch_versions import GradBucket
from postlocal.wire import Staging, Wire, fp32, ring_bytes


class UnreducedGradients:
    """Gradients of a model without DDP, which nothing reduces.

    Args:
        groups: this rank's groups.
    """

    wrapper: DistributedDataParallel | None = None

    def __init__(self, groups: LevelGroups) -> None:
        self._groups = groups

    def use(self, level: str) -> None:
        """Refuse a level with more than this rank.

        Raises:
            ValueError: naming the level and the fix.
        """
        if self._groups[level].size > 1:
            raise ValueError(
                f"the schedule averages gradients at level {level!r}, and model has nothing that "
                "reduces gradients: wrap it in torch.nn.parallel.DistributedDataParallel, or "
                "choose a schedule with gradients='rank'"
            )

    def check(self) -> None:
        """Nothing to check."""

    def close(self) -> None:
        """Nothing to close."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to load."""

    def drop_residuals(self) -> None:
        """Nothing to drop."""


class DDPHook:
    """A communication hook of DistributedDataParallel that reduces gradients as the round says.

    In rounds at level ``"rank"`` DDP is told to leave gradients alone, for as long as each of its
    forward passes takes: nothing is copied to buckets, and neither its broadcast of buffers nor its
    search for unused parameters communicates. At level ``"world"`` the arithmetic of the wire fp32
    is DDP's own, bit for bit. Between forward passes all attributes of DDP have the values that
    the user gave them, and `close` takes the hooks away.

    Wires that are `by_bucket` run beside the backward pass, bucket by bucket. Others wait
    for the last bucket and take all gradients at once, in the order of the model's parameters: DDP
    makes its buckets anew after the first backward pass of each process, and blocks of codes that
    lay across other parameters would not resume bit for bit.

    Args:
        model: the DDP module; it must have no communication hook yet.
        groups: this rank's groups, for gradients only.
        wire: how gradients are sent.
        meter: where bytes and exposed waiting are counted.
        search: groups for DDP's search for unused parameters, where it has one.
    """

    def __init__(
        self,
        model: DistributedDataParallel,
        groups: LevelGroups,
        wire: Wire,
        meter: Meter,
        search: LevelGroups | None = None,
    ) -> None:
        self._model = model
        self.wrapper: DistributedDataParallel | None = model
        self._groups = groups
        self._search = search
        self._meter = meter
        self._group: Group = groups[WORLD]
        self._names = {parameter: name for name, parameter in model.module.named_parameters()}
        staging = Staging()  # one thread runs all reductions
        self._reducers = {level: wire.open(groups, level, staging) for level in groups.levels}
        self._reducer = self._reducers[WORLD]
        self._reducing = True
        self._at_world = True
        self._kept: dict[str, bool] = {}
        self._background = None if wire == fp32() else BackgroundThread()
        self._by_bucket = wire.by_bucket
        self._waiting: list[_Bucket] = []
        self._closed = False
        torch_versions.register_hook(model, self, _hook)
        self._handles = [
            model.register_forward_pre_hook(_Silent(self._before_forward), prepend=True),
            model.register_forward_hook(_Silent(self._after_forward), always_call=True),
        ]

    def use(self, level: str) -> None:
        """Reduce gradients at ``level`` from the next forward pass on."""
        self._group = self._groups[level]
        self._reducer = self._reducers[level]
        self._at_world = level == WORLD
        # A static graph has to be seen by the reducer from the first pass on: there the hook is
        # called in local rounds too, and leaves gradients as they are.
        self._reducing = self._at_world or self._group.size > 1 or self._model.static_graph
        if self._search is not None:
            group = self._search[level]
            if isinstance(group, Processes):
                torch_versions.search_within(self._model, group.process_group)

    def check(self) -> None:
        """Notice a caller inside ``no_sync()`` or ``join()``.

        Raises:
            RuntimeError: with the fix.
        """
        self._put_back()  # a forward pass that was interrupted may have left something
        if torch_versions.joins(self._model):
            raise RuntimeError(f"sync.step() was called inside model.join(): {_WITHOUT_JOIN}")
        if not self._model.require_backward_grad_sync:
            raise RuntimeError(
                "sync.step() was called inside model.no_sync(): call it after the with block, "
                "once for each optimizer step"
            )

    def close(self) -> None:
        """Leave the model as it was before; end the communication thread, if there is one."""
        self._put_back()
        for handle in self._handles:
            handle.remove()
        if self._background is not None:
            self._background.close()
        drop_done()
        self._closed = not torch_versions.remove_hook(self._model)
        del self._model  # a Sync that was closed keeps no wrapper alive
        self.wrapper = None

    def state_dict(self) -> dict[str, Any]:
        """What the wire keeps, by level and parameter; this rank's own and not copied."""
        return {level: reducer.state_dict() for level, reducer in self._reducers.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; a level that it lacks starts without residuals."""
        for level, reducer in self._reducers.items():
            reducer.load_state_dict(state.get(level, {}))

    def drop_residuals(self) -> None:
        """Drop what the wire lost of this rank's gradients."""
        for reducer in self._reducers.values():
            reducer.drop_residuals()

    def reduce(self, bucket: GradBucket) -> Future[Tensor]:
        """Start the mean of one bucket over the group of the round.

        Raises:
            RuntimeError: after `close`, on a version of torch that cannot take a hook away.
        """
        if self._closed:
            raise RuntimeError(
                "the DistributedDataParallel still has the communication hook of a strategy that "
                "was closed, since this torch cannot take it away: build it anew"
            )
        buffer = bucket.buffer()
        if self._group.size == 1:
            future = Future[Tensor]()
            future.set_result(buffer)
            return future
        start = self._all_reduce if self._background is None else self._reduce_over_wire
        future = start(bucket)
        # Nothing is left to compute when the last bucket is handed over: from there on it waits.
        return future.then(self._waited(time.perf_counter())) if bucket.is_last() else future

    def _all_reduce(self, bucket: GradBucket) -> Future[Tensor]:
        buffer, group = bucket.buffer(), self._group
        assert isinstance(group, Processes)
        self._meter.count("gradients", ring_bytes(buffer.numel(), group.size, buffer.dtype))
        buffer.mul_(1 / group.size)  # by the reciprocal and before the sum, to round as DDP does
        return group.sum_(buffer)

    def _reduce_over_wire(self, bucket: GradBucket) -> Future[Tensor]:
        if self._by_bucket:
            return self._submit(bucket.buffer(), {"bucket": bucket.buffer()})
        if bucket.index() == 0:
            self._waiting.clear()  # a backward pass that failed may have left some
        names = [self._names[parameter] for parameter in bucket.parameters()]
        gradients = dict(zip(names, bucket.gradients(), strict=True))
        if not bucket.is_last():
            waiting = _Bucket(bucket.buffer(), gradients, promise(bucket.buffer()))
            self._waiting.append(waiting)
            return waiting.promise.then(_value)
        for waiting in self._waiting:
            gradients |= waiting.gradients
        ordered = {name: gradients[name] for name in self._names.values() if name in gradients}
        return self._submit(bucket.buffer(), ordered)

    def _submit(self, buffer: Tensor, gradients: Mapping[str, Tensor]) -> Future[Tensor]:
        """Send gradients, and promise the last one's bucket and those that wait for it."""
        assert self._background is not None
        reducer, waiting = self._reducer, list(self._waiting)
        self._waiting.clear()

        def reduce() -> None:
            try:
                self._meter.count("gradients", reducer.mean_(gradients))
            except Exception as error:
                for bucket in waiting:
                    bucket.promise.set_exception(error)  # type: ignore[arg-type]
                raise
            for bucket in waiting:
                bucket.promise.set_result(bucket.buffer)

        return self._background.submit(buffer, reduce).then(_value)

    def _before_forward(self) -> None:
        self._put_back()
        model = self._model
        if not self._reducing and model.require_backward_grad_sync:
            self._keep("require_backward_grad_sync", False)
            self._keep("require_forward_param_sync", model.require_forward_param_sync)
        if not self._at_world:
            self._keep(torch_versions.buffers_option(model), False)

    def _after_forward(self) -> None:
        self._put_back()

    def _keep(self, name: str, value: bool) -> None:
        """Give an attribute of the model a value until `_put_back`."""
        self._kept[name] = getattr(self._model, name)
        setattr(self._model, name, value)

    def _put_back(self) -> None:
        while self._kept:
            name, value = self._kept.popitem()
            setattr(self._model, name, value)

    def _waited(self, start: float) -> Callable[[Future[Tensor]], Tensor]:
        def stop(done: Future[Tensor]) -> Tensor:
            self._meter.wait(time.perf_counter() - start)
            return done.value()

        return stop


class _Silent:
    """A hook of a module, which changes neither its input nor its output.

    Copies of the module, in memory or in a file, get one that does nothing, and need no postlocal.
    """

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act

    def __call__(self, *arguments: object) -> None:
        self._act()

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")


@dataclass
class _Bucket:
    """Gradients that wait for others, to be sent with them."""

    buffer: Tensor
    gradients: dict[str, Tensor]
    promise: Future[Tensor]


def _hook(gradients: DDPHook, bucket: GradBucket) -> Future[Tensor]:
    return gradients.reduce(bucket)


def _value(done: Future[Tensor]) -> Tensor:
    """The value of a future; DDP understands the errors of callbacks, not those of Python."""
    return done.value()


_WITHOUT_JOIN = (
    "its collectives are of the whole world, and a strategy counts the same steps on all ranks; "
    "build the DistributedDataParallel anew and leave join() away: a rank that has run out of data "
    "calls sync.step(work=0) until all have, and where gradients are averaged it takes part with a "
    "loss that is multiplied by 0"
)


def check_ddp(model: DistributedDataParallel) -> None:
    """Refuse what DistributedDataParallel does with gradients beside its buckets.

    Raises:
        ValueError: naming the option and the fix.
    """
    for problem in _problems(model):
        raise ValueError(problem)


def _problems(model: DistributedDataParallel) -> Iterator[str]:
    if any(isinstance(hook, _Silent) for hook in torch_versions.forward_pre_hooks(model)):
        yield (
            "model is attached already: call close() on the Sync of the earlier attach before "
            "attaching again"
        )
    if model.mixed_precision is not None:
        yield (
            "the DistributedDataParallel has mixed_precision, which is a communication hook of its "
            "own: leave it out, and use torch.autocast, or a gradient_wire of wire.bf16()"
        )
    if torch_versions.delays_parameters(model):
        yield (
            "the DistributedDataParallel has delay_all_reduce_named_params, whose gradients are "
            "reduced over the whole world in every backward pass: leave it out"
        )
    if any(torch_versions.has_optimizer_in_backward(p) for p in model.parameters()):
        yield (
            "the model has optimizers in its backward pass, for which DistributedDataParallel has "
            "a communication hook of its own: call the optimizer's step() in the loop"
        )
    if torch_versions.reduces_in_python(model):
        yield (
            "the DistributedDataParallel was built with torch._dynamo.config.optimize_ddp = "
            "'python_reducer', which reduces by itself: leave that setting away"
        )
    if torch_versions.joins(model):
        yield f"the DistributedDataParallel is or was inside join(): {_WITHOUT_JOIN}"
    yield from _own_hook(model)


def _own_hook(model: DistributedDataParallel) -> Iterator[str]:
    name = torch_versions.own_hook(model)
    if name:
        yield (
            f"model already has a communication hook, {name}, and a strategy needs its own: build "
            "the DistributedDataParallel without one and give the strategy a gradient_wire"
        )
