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
"""


class PostlocalError(RuntimeError):
    """Base of every fault that postlocal raises at run time."""


class DisagreementError(PostlocalError):
    """Ranks do not agree on what they train or how; raised on every rank, naming rank and item."""


class ModelChangedError(PostlocalError):
    """The model or the optimizer was changed on some rank so that it cannot be synchronized.

    Raised on every rank of the synchronization, naming the tensor and the ranks. After an averaging
    without anchor the parameters of this rank are undefined: resume from a checkpoint.
    """


class PeerError(PostlocalError):
    """A collective failed or timed out; the message names the ranks that are missing.

    After an averaging without anchor the parameters of this rank are undefined: resume from a
    checkpoint. With an anchor they are set back to the last agreed values.
    """


class NonFiniteError(PostlocalError):
    """Every replica holds infinities or NaN, and there is no anchor to fall back to."""


class CheckpointError(PostlocalError):
    """A checkpoint cannot be written or read; the message names the file or the item."""
