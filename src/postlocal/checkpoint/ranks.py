"""Work that can fail on any rank, with an error on all."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from torch.distributed.checkpoint.api import CheckpointException

from postlocal.checkpoint.folder import Damaged
from postlocal.comm.agreement import Failures, together
from postlocal.comm.group import Group
from postlocal.errors import CheckpointError

Value = TypeVar("Value")


def on_all_ranks(
    group: Group, part: Callable[[], Value], problem: str, path: Path | None = None
) -> Value:
    """The result of a function on this rank, once it succeeded on all; collective.

    Args:
        group: all ranks.
        part: what each rank does.
        problem: the start of the message if one fails.
        path: the folder that the message is about.

    Raises:
        CheckpointError: on every rank, with the messages of those that failed; `Damaged` if all
            of these were.
    """

    def failed(failures: Failures, words: str) -> CheckpointError:
        damaged = all(failure.kind == Damaged.__name__ for failure in failures.values())
        kind = Damaged if damaged else CheckpointError
        return kind(f"{problem} {words}", path=path, ranks=failures)

    with together(group, failed):
        try:
            return part()
        except CheckpointError:
            raise
        except (Exception, CheckpointException) as error:
            raise CheckpointError(_words(error)) from error


def _words(error: BaseException) -> str:
    if isinstance(error, CheckpointException):  # torch's, of all ranks that failed
        rank, (error, _) = min(error.failures.items(), key=lambda failure: failure[0])
        return f"{_words(error)} (rank {rank})"
    if isinstance(error, CheckpointError):
        return str(error)
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
