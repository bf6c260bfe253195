"""A fragment: parameters that are synchronized together, their state, and what a rank sends."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from postlocal.comm.group import Group
from postlocal.guard import OutlierDetector
from postlocal.schedule import WORLD
from postlocal.strategies import Strategy
from postlocal.sync.anchor import Anchor
from postlocal.tensors import all_finite, squared_norm
from postlocal.torch_versions import copy_all_
from postlocal.wire import Reducer, Staging


class Fragment:
    """Parameters that are synchronized together, and what stays between synchronizations.

    Args:
        parameters: by name; they are changed in place.
        level: with whom they are synchronized.
        reducer: how they are sent, and to whom.
        strategy: its guard weighs contributions, and its outer optimizer moves the anchor, if
            there is one at this level.
        modules: names of the parameters, in groups that an outlier detector judges one by one.
        number: from 0; None where there is but one fragment.

    Attributes:
        device: of the parameters when this was made, which collectives take tensors from.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        level: str,
        reducer: Reducer,
        strategy: Strategy,
        modules: Sequence[Sequence[str]] = (),
        number: int | None = None,
    ) -> None:
        self._trained = dict(parameters)
        self._likes = [torch.empty_like(tensor, device="meta") for tensor in parameters.values()]
        self.device = next(iter(parameters.values())).device
        self.level = level
        self.reducer = reducer
        self.number = number
        self.guard = strategy.guard
        self.anchor: Anchor | None = None
        self.detector: OutlierDetector | None = None
        if strategy.anchored and level == WORLD:
            self.anchor = Anchor(parameters, strategy.outer)
            self.detector = strategy.guard.detector(reducer.group.size, len(modules))
        self.modules = [tuple(parameters)] if self.detector is None else [*map(tuple, modules)]
        self._since = (0, 0.0)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters where they lie now, in the order in which they are sent."""
        return {name: parameter.detach() for name, parameter in self._trained.items()}

    def zeros(self) -> dict[str, Tensor]:
        """What a rank sends whose parameters have changed: zeros of the expected shapes."""
        likes = self._likes if self.anchor is None else list(self.anchor.tensors.values())
        zeros = (torch.zeros_like(like, device=self.device) for like in likes)
        return dict(zip(self._trained, zeros, strict=True))

    @property
    def group(self) -> Group:
        """Who takes part."""
        return self.reducer.group

    def begin(self, steps: int, work: float) -> None:
        """Count work from here on, given steps and work of the clock so far."""
        self._since = (steps, work)

    def work(self, steps: int, work: float) -> float:
        """Share of the steps since the last `begin` that this rank did."""
        before_steps, before_work = self._since
        return (work - before_work) / (steps - before_steps) if steps > before_steps else 1.0

    def of(self, module: Sequence[str], tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """The tensors of one module."""
        return [tensors[name] for name in module]

    def state_dict(self) -> dict[str, Any]:
        """Anchor, residuals of the wire, statistics of the guard, and when work began to count."""
        return {
            "anchor": None if self.anchor is None else self.anchor.state_dict(),
            "wire": self.reducer.state_dict(),
            "detector": None if self.detector is None else self.detector.state_dict(),
            "since": self._since,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state_dict` gave."""
        if self.anchor is not None:
            self.anchor.load_state_dict(state["anchor"])
        self.reducer.load_state_dict(state["wire"])
        if self.detector is not None:
            self.detector.load_state_dict(state["detector"])
        self._since = tuple(state["since"])


@dataclass
class Contribution:
    """What this rank sends of a fragment, and what becomes of it: the mean.

    Attributes:
        tensors: parameters, or how far they moved from the anchor, by name; reduced in place.
        squares: squared norms before the mean, module by module.
        finite: whether all values were finite before the mean.
        moves_from: parameters as they were sent, where the steps of the delay are kept.
        staging: where memory was allocated; None: in the parameters' own memory.
        allocated: that memory.
        problem: why the model of this rank cannot be synchronized, to be raised on all ranks.
    """

    tensors: dict[str, Tensor]
    squares: list[float]
    finite: bool
    moves_from: list[Tensor] | None = None
    staging: Staging | None = None
    allocated: list[Tensor] = field(default_factory=list)
    problem: str | None = None

    def release(self) -> None:
        """Free the memory; the tensors are no longer needed."""
        if self.staging is not None:
            self.staging.free(*self.allocated)
            self.allocated.clear()


def contribute(
    fragment: Fragment,
    staging: Staging | None = None,
    keep_moves: bool = False,
    problem: str | None = None,
) -> Contribution:
    """Take what this rank sends: parameters, or how far they moved from the anchor.

    Args:
        fragment: what is synchronized.
        staging: memory for what is sent while training goes on; None: it is sent from the
            parameters' own memory, which has to be left alone until the result is applied.
        keep_moves: whether parameters keep how far they move until then; it needs ``staging``.
        problem: see `Contribution`; zeros are sent where there is one.
    """
    if problem is not None:
        return _contribution(fragment, fragment.zeros(), problem=problem)
    if fragment.anchor is None:
        return _contribution(fragment, fragment.parameters)
    if staging is None:
        return _contribute_in_place(fragment, fragment.anchor)
    allocated: list[Tensor] = []
    differences = fragment.anchor.pseudo_gradients(staged(fragment.anchor, staging, allocated))
    contribution = _contribution(fragment, named(fragment, differences))
    contribution.staging, contribution.allocated = staging, allocated
    if keep_moves:
        contribution.moves_from = staged(fragment.anchor, staging, allocated)
        copy_all_(contribution.moves_from, list(fragment.parameters.values()))
    return contribution


def _contribute_in_place(fragment: Fragment, anchor: Anchor) -> Contribution:
    try:
        return _contribution(fragment, named(fragment, anchor.pseudo_gradients()))
    except BaseException:
        anchor.restore()  # what the parameters held is lost
        raise


def _contribution(
    fragment: Fragment, tensors: dict[str, Tensor], problem: str | None = None
) -> Contribution:
    squares = [squared_norm(fragment.of(module, tensors)) for module in fragment.modules]
    finite = all_finite(tensors.values(), sum(squares))
    return Contribution(tensors, squares, finite, problem=problem)


def named(fragment: Fragment, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Tensors by the names of a fragment's parameters."""
    return dict(zip(fragment.parameters, tensors, strict=True))


def staged(anchor: Anchor, staging: Staging, allocated: list[Tensor]) -> list[Tensor]:
    """Tensors of the anchor's shapes and dtypes, in memory that outlives this step."""
    tensors = list(anchor.tensors.values())
    free: dict[torch.dtype, Tensor] = {}
    for dtype in {tensor.dtype for tensor in tensors}:
        numel = sum(tensor.numel() for tensor in tensors if tensor.dtype == dtype)
        free[dtype] = staging.allocate(numel, tensors[0], dtype)
    allocated += free.values()
    cut: list[Tensor] = []
    for tensor in tensors:
        own, free[tensor.dtype] = free[tensor.dtype].tensor_split([tensor.numel()])
        cut.append(own.view(tensor.shape))
    return cut
