"""Faults at run time that a caller can catch.

Bad arguments raise `ValueError` or `TypeError` where they are given. What can only be known
while ranks talk to each other, or while files are read, is one of these::

    PostlocalError (RuntimeError)
    +-- DisagreementError   ranks were given different strategies, parameters or versions, or
    |                       hold different values where they should be equal
    +-- ModelChangedError   the model or the optimizer is not what attach was given
    +-- PeerError           a rank did not arrive in time, or its connection broke
    +-- NonFiniteError      no replica has a finite contribution left to average
    +-- CheckpointError     a checkpoint is damaged, unfinished or of something else

Errors carry what they say as attributes too, for programs to act on. Ranks are numbered within the
group that raised: the world's group, except for synchronizations of narrower levels.

Example:
    >>> try:
    ...     raise PeerError("missing at attach: rank 2", ranks=[2], step=0)
    ... except PostlocalError as error:
    ...     error.ranks, error.step
    ((2,), 0)
"""

from collections.abc import Iterable, Mapping
from pathlib import Path


class PostlocalError(RuntimeError):
    """Base of every fault that postlocal raises at run time.

    Args:
        message: what happened, and the fix.
        ranks: those at fault.

    Attributes:
        ranks: the ranks at fault, in order; empty where they are not known.
    """

    def __init__(self, message: str, *, ranks: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


class DisagreementError(PostlocalError):
    """Ranks do not agree on what they train or how; raised on every rank, naming rank and item.

    Attributes:
        what: the item that differs, such as ``"strategy"`` or ``"steps"``.
        by_rank: what some of the ranks have, in words. Rank 0 is among them where ranks are
            compared with it.
        ranks: the ranks that differ from rank 0, or that cannot go on.

    Example:
        >>> error = DisagreementError("ranks differ", what="steps", by_rank={0: "8", 1: "7"})
        >>> error.what, error.by_rank
        ('steps', {0: '8', 1: '7'})
    """

    def __init__(
        self,
        message: str,
        *,
        what: str = "",
        by_rank: Mapping[int, str] | None = None,
        ranks: Iterable[int] = (),
    ) -> None:
        super().__init__(message, ranks=ranks)
        self.what = what
        self.by_rank = dict(by_rank or {})


class ModelChangedError(PostlocalError):
    """The model or the optimizer was changed on some rank so that it cannot be synchronized.

    Raised on every rank of the synchronization, naming the tensor and the ranks. After an averaging
    without anchor the parameters of this rank are undefined: resume from a checkpoint.

    Attributes:
        ranks: the ranks that changed it.
    """


class PeerError(PostlocalError):
    """A collective failed or timed out; the message names the ranks that are missing.

    After an averaging without anchor the parameters of this rank are undefined: resume from a
    checkpoint. With an anchor they are set back to the last agreed values.

    Attributes:
        ranks: the missing ranks, numbered as in torch's default group; empty where the store that
            tells of them is out of reach.
        step: steps that this rank had taken; None where none are counted.
    """

    def __init__(self, message: str, *, ranks: Iterable[int] = (), step: int | None = None) -> None:
        super().__init__(message, ranks=ranks)
        self.step = step


class NonFiniteError(PostlocalError):
    """Every replica holds infinities or NaN, and there is no anchor to fall back to.

    Attributes:
        ranks: all ranks of the mean.
        step: steps that were taken before the mean; None where none are counted.
    """

    def __init__(self, message: str, *, ranks: Iterable[int] = (), step: int | None = None) -> None:
        super().__init__(message, ranks=ranks)
        self.step = step


class CheckpointError(PostlocalError):
    """A checkpoint cannot be written or read; the message names the file or the item.

    Attributes:
        path: the checkpoint's folder, or the folder in which it should be; None where the fault is
            of no folder, such as a model that cannot be saved.
        ranks: the ranks that failed.
    """

    def __init__(
        self, message: str, *, path: Path | None = None, ranks: Iterable[int] = ()
    ) -> None:
        super().__init__(message, ranks=ranks)
        self.path = path
