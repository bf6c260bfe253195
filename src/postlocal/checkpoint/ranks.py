"""Work that any rank may fail at, and all ranks have to hear of."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch.distributed.checkpoint.api import CheckpointException

from postlocal.checkpoint.folder import Damaged
from postlocal.comm.group import Group
from postlocal.errors import CheckpointError

Value = TypeVar("Value")


def on_all_ranks(group: Group, part: Callable[[], Value], problem: str) -> Value:
    """What a function gives on this rank, once it succeeded on all; collective.

    Args:
        group: all ranks.
        part: what each does.
        problem: first words of the message if one fails.

    Raises:
        CheckpointError: on every rank, with the words of those that failed; `Damaged` if it was
            that on each of them.
    """
    value: Any = None
    fault = None
    try:
        value = part()
    except (Exception, CheckpointException) as error:
        fault = isinstance(error, Damaged), _words(error)
    faults = {rank: f for rank, f in enumerate(group.all_gather_object(fault)) if f is not None}
    if faults:
        kind = Damaged if all(damaged for damaged, _ in faults.values()) else CheckpointError
        words = {rank: words for rank, (_, words) in faults.items()}
        raise kind(f"{problem} {by_words(words, group.size)}")
    done: Value = value
    return done


def by_words(words: Mapping[int, str], size: int) -> str:
    """What ranks say, with who says it where it is not all of them.

    Example:
        >>> by_words({0: "no space", 2: "no space", 3: "no file"}, 4)
        'no space (rank 0, 2); no file (rank 3)'
    """
    who: dict[str, list[int]] = {}
    for rank, theirs in words.items():
        who.setdefault(theirs, []).append(rank)
    return "; ".join(
        theirs if len(ranks) == size else f"{theirs} (rank {', '.join(map(str, ranks))})"
        for theirs, ranks in who.items()
    )


def _words(error: BaseException) -> str:
    if isinstance(error, CheckpointException):  # torch's, of all ranks that failed
        rank, (error, _) = min(error.failures.items(), key=lambda failure: failure[0])
        return f"{_words(error)} (rank {rank})"
    if isinstance(error, CheckpointError):
        return str(error)
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
