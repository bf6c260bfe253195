"""What replicas last agreed on, noted by each rank for itself."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from postlocal.sync.parameters import Replica


class Agreed:
    """When replicas last held equal values, and with which buffers; nothing is sent.

    Args:
        replica: this rank's.
        keeps_buffers: whether buffers are kept, to be shown with an anchor.

    Attributes:
        step: steps taken when replicas last agreed.
        buffers: copies of their buffers, and of frozen parameters that move, by name; none where
            they are not kept.

    Example:
        >>> replica = Replica(torch.nn.Linear(2, 1))
        >>> agreed = Agreed(replica, keeps_buffers=True)
        >>> agreed.note(step=4)
        >>> agreed.holds(step=4), agreed.holds(step=5)
        (True, False)
        >>> with torch.no_grad():
        ...     _ = replica.parameters["bias"].add_(1)
        >>> agreed.holds(step=4)
        False
    """

    def __init__(self, replica: Replica, keeps_buffers: bool) -> None:
        self._replica = replica
        self._keeps_buffers = keeps_buffers
        self.buffers: dict[str, Tensor] = {}
        self.note(0)

    def note(self, step: int) -> None:
        """Note that replicas hold equal parameters now, after some steps."""
        self.step = step
        self._noted = self.versions()

    def holds(self, step: int) -> bool:
        """Whether they do after ``step`` steps: no step was taken and no parameter written to."""
        return step == self.step and self.versions() == self._noted

    def keep(self, buffers: Mapping[str, Tensor]) -> None:
        """Copy buffers that are equal on all ranks, where they are kept."""
        if self._keeps_buffers:
            self.buffers = {name: tensor.clone() for name, tensor in buffers.items()}

    def versions(self) -> int:
        """A number that changes where a parameter is written to."""
        return sum(parameter._version for parameter in self._replica.parameters.values())


@contextmanager
def put_back(tensors: Iterable[Tensor]) -> Iterator[None]:
    """A ``with`` block after which tensors have the values that they had before it.

    Example:
        >>> tensor = torch.zeros(2)
        >>> with put_back([tensor]):
        ...     _ = tensor.fill_(1)
        >>> tensor
        tensor([0., 0.])
    """
    held = list(tensors)
    before = [tensor.clone() for tensor in held]
    try:
        yield
    finally:
        copy_(held, before)


def copy_(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Give tensors the values of others, outside of autograd."""
    with torch.no_grad():
        for target, value in zip(targets, values, strict=True):
            target.copy_(value)
