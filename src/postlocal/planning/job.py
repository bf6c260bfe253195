"""A training job, as far as time and memory depend on it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from postlocal.fragments import Fragments
from postlocal.planning.step_time import StepTime, steady
from postlocal.sync.parameters import Replica
from postlocal.sync.supported_wrappers import unwrap

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Job:
    """A model and its steps.

    Args:
        parameters: their number, at least 1, or the model itself. A number means fragments of
            equal size, and one square matrix for PowerSGD.
        step: seconds that a rank computes for a step, or their distribution.
        steps: optimizer steps of the run, at least 1.
        lr: the inner learning rate, or a function of the step, for schedules that depend on it.
        dtype: of parameters and gradients; ignored if a model is given.
        optimizer_bytes: bytes of the inner optimizer's state for each parameter; 8 for Adam in
            fp32.
        gradient_overlap: share of a step that the reduction of gradients can overlap, from 0 to 1.
            DistributedDataParallel reduces during the backward pass, about two thirds of a step.
        parameter_overlap: the same for parameters: 0 for `Sync`, which starts a synchronization
            after the step. Other systems start it layer by layer.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> Job(nn.Linear(4, 2), step=0.1).numel
        10
    """

    parameters: int | nn.Module
    step: float | StepTime
    steps: int = 10_000
    lr: float | Callable[[int], float] = 1.0
    dtype: torch.dtype = torch.float32
    optimizer_bytes: float = 8.0
    gradient_overlap: float = 2 / 3
    parameter_overlap: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (("parameters", 1), ("steps", 1), ("optimizer_bytes", 0)):
            value = getattr(self, name)
            if not isinstance(value, nn.Module) and not least <= value < math.inf:
                rule = "finite" if value == math.inf else f"at least {least}"
                raise ValueError(f"{name} must be {rule}, got {value}")
        for name in ("gradient_overlap", "parameter_overlap"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"{name} must be a share of a step from 0 to 1, got {getattr(self, name)}"
                )
        if isinstance(self.step, int | float):
            object.__setattr__(self, "step", steady(self.step))

    @property
    def step_time(self) -> StepTime:
        """The time of a step."""
        assert not isinstance(self.step, int | float)
        return self.step

    @property
    def tensors(self) -> Tensors:
        """The trained parameters, by name; tensors without content if a number was given."""
        if isinstance(self.parameters, nn.Module):
            return Replica(self.parameters).parameters
        return self._blank(self.parameters)

    @property
    def numel(self) -> int:
        """Number of parameters."""
        return count(self.tensors)

    @property
    def parameter_bytes(self) -> int:
        """Bytes of all parameters."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def optimizer_tensors(self) -> Tensors:
        """The inner optimizer's state as one fp32 tensor without content."""
        return self._blank(math.ceil(self.numel * self.optimizer_bytes / 4), torch.float32)

    def split(self, fragments: Fragments) -> tuple[Tensors, ...]:
        """The parameters of each fragment.

        Raises:
            ValueError: if the model cannot be split in this way.
        """
        if isinstance(self.parameters, nn.Module):
            tensors = self.tensors
            sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
            parts = fragments.split(unwrap(self.parameters), sizes)
            return tuple({name: tensors[name] for name in names} for names in parts)
        least, more = divmod(self.parameters, fragments.count)
        return tuple(self._blank(least + (part < more)) for part in range(fragments.count))

    def _blank(self, numel: int, dtype: torch.dtype | None = None) -> Tensors:
        """A square matrix and the rest, of a number of elements in all."""
        side = math.isqrt(numel)
        shapes = {"matrix": (side, side), "rest": (numel - side**2,)}
        kept = {name: shape for name, shape in shapes.items() if math.prod(shape)}
        return {
            name: torch.empty(shape, dtype=dtype or self.dtype, device="meta")
            for name, shape in kept.items()
        }


def count(tensors: Tensors) -> int:
    """Number of elements.

    Example:
        >>> count({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)})
        8
    """
    return sum(map(torch.numel, tensors.values()))
