"""What a method is: a way to train a worker's model together with other workers."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec

from benchmarks.training import Worker
from postlocal.train import TrainConfig


@dataclass(frozen=True)
class Training:
    """One rank's training under way.

    Attributes:
        worker: model, inner optimizer and data.
        after: called after each step of the inner optimizer.
        agreed: within it the model holds what replicas agree on, where ``agrees``.
        agrees: whether they agree on anything after so many steps.
        finish: called after the last step.
        close: called at the very end.
    """

    worker: Worker
    after: Callable[[], object] = lambda: None
    agreed: Callable[[], AbstractContextManager[object]] = nullcontext
    agrees: Callable[[int], bool] = lambda steps: True
    finish: Callable[[], object] = lambda: None
    close: Callable[[], object] = lambda: None

    def step(self, step: int) -> None:
        """Everything from the forward pass to the end of communication that is waited for."""
        self.worker.step(step)
        self.after()


@dataclass(frozen=True)
class Method:
    """A package's way to train, at one setting.

    Attributes:
        make: starts a training on a rank, given its number.
        period: steps after which what it costs repeats.
        settling: steps before that.
        package: what has to be installed.
        replica_groups: whether every host is a replica group of torchft, joined by a lighthouse.
        length: of its run, as a multiple of DDP's.
        dense: steps at the start of a run that it takes as plain DDP does.
        stretch: steps that are timed, at least: more of those that hardly wait.
    """

    make: Callable[[TrainConfig, int], Training]
    period: int = 1
    settling: int = 2
    package: str = "torch"
    replica_groups: bool = False
    length: float = 1.0
    dense: int = 0
    stretch: int = 16

    @property
    def installed(self) -> bool:
        """Whether its package is there."""
        return find_spec(self.package) is not None
