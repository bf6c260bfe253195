"""Whether all ranks succeeded, and were given the same; found out before one waits for another."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from postlocal.comm.group import Group
from postlocal.errors import DisagreementError, PostlocalError

Lines = Sequence[str]


class Failure(NamedTuple):
    """What a rank that failed raised."""

    kind: str
    """Name of its class."""
    words: str
    """Its message; with the class, where that is none of postlocal."""

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        """What other ranks are told of an error.

        Example:
            >>> Failure.of(OSError("no space")).words
            'OSError: no space'
        """
        kind = type(error).__name__
        words = str(error) if isinstance(error, PostlocalError) else f"{kind}: {error}"
        return cls(kind, words)


Failures = Mapping[int, Failure]
"""Of the ranks that failed, by rank."""
Raising = Callable[[Failures, str], PostlocalError]
"""Makes the error of all ranks from the failures of some, and what these ranks say."""


@contextmanager
def together(group: Group, raising: Raising | None = None) -> Iterator[None]:
    """Fail on every rank where one fails: no rank goes on to wait for one that raised.

    Args:
        group: all ranks, each inside a ``with`` block of its own.
        raising: makes the error that every rank raises. None: a rank that failed raises what its
            block raised, and the others a `DisagreementError` with these words; errors of
            postlocal pass, since the block raised them on all ranks, or where others are missing.

    Raises:
        Exception: what the block raised here.
        DisagreementError: where the block failed only on other ranks.
        PostlocalError: what ``raising`` gives.
    """
    error: Exception | None = None
    try:
        yield
    except PostlocalError as raised:
        if raising is None:
            raise
        error = raised
    except Exception as raised:
        error = raised
    everyones = group.all_gather_object(None if error is None else Failure.of(error))
    failures = {rank: theirs for rank, theirs in enumerate(everyones) if theirs is not None}
    if not failures:
        return
    words = {rank: failure.words for rank, failure in failures.items()}
    if raising is not None:
        raise raising(failures, by_ranks(words, group.size)) from error
    if error is not None:
        raise error
    raise DisagreementError(
        f"another rank cannot go on: {by_ranks(words, group.size)}",
        what="whether it can go on",
        by_rank=words,
        ranks=words,
    )


def by_ranks(words: Mapping[int, str], size: int) -> str:
    """What some ranks say, with who says it where it is not all of them.

    Args:
        words: of each of these ranks.
        size: number of all ranks.

    Example:
        >>> by_ranks({0: "no space", 2: "no space", 3: "no file"}, size=4)
        'no space (ranks 0, 2); no file (rank 3)'
    """
    who: dict[str, list[int]] = {}
    for rank, theirs in words.items():
        who.setdefault(theirs, []).append(rank)
    return "; ".join(
        theirs if len(ranks) == size else f"{theirs} ({ranks_named(ranks)})"
        for theirs, ranks in who.items()
    )


def ranks_named(ranks: Iterable[int]) -> str:
    """Ranks in words.

    Example:
        >>> ranks_named([1]), ranks_named([1, 3])
        ('rank 1', 'ranks 1, 3')
    """
    named = list(map(str, ranks))
    return f"rank{'s' if len(named) > 1 else ''} {', '.join(named)}"


def check(
    group: Group,
    items: Mapping[str, Lines],
    explain: Callable[[str, str], str] = lambda mine, other: "",
) -> None:
    """Compare items on all ranks; they are sent whole only where they differ.

    Args:
        group: all ranks.
        items: name of the item -> its description, line by line.
        explain: says in which parts two different lines differ; empty: it cannot tell.

    Raises:
        DisagreementError: on every rank, naming the first item that differs, and the ranks.
    """
    digests = group.all_gather_object(_digests(items))
    for item in digests[0]:
        if len({theirs.get(item) for theirs in digests}) > 1:
            everyones = group.all_gather_object(list(items.get(item, [])))
            raise _difference(item, everyones, explain)


def _digests(items: Mapping[str, Lines]) -> dict[str, str]:
    return {
        item: hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()
        for item, lines in items.items()
    }


def _difference(
    item: str, everyones: Sequence[Lines], explain: Callable[[str, str], str]
) -> DisagreementError:
    reference = everyones[0]
    ranks = [rank for rank, lines in enumerate(everyones) if lines != reference]
    theirs = everyones[ranks[0]]
    pairs = zip(reference, theirs, strict=False)
    apart = next(((mine, other) for mine, other in pairs if mine != other), None)
    if apart is None:
        mine, other, words = f"{len(reference)} of them", str(len(theirs)), ""
    else:
        (mine, other), words = map(repr, apart), explain(*apart)
    verb = "" if apart is None else "has "
    return DisagreementError(
        f"ranks differ in {item}: rank 0 has {mine}, rank {ranks[0]} {verb}{other}"
        + (f" ({words})" if words else ""),
        what=item,
        by_rank={0: mine, ranks[0]: other} if apart is None else {0: apart[0], ranks[0]: apart[1]},
        ranks=ranks,
    )


def same_values_(group: Group, tensors: Mapping[str, Tensor]) -> list[str]:
    """Take rank 0's values on all ranks.

    Args:
        group: all ranks.
        tensors: the tensors, by name; changed in place.

    Returns:
        Names of the tensors of which any bit was different on this rank before.
    """
    changed = []
    with torch.no_grad():
        for name, tensor in tensors.items():
            before = tensor.detach().clone(memory_format=torch.contiguous_format)
            # As bytes: not every backend has every dtype, and NaN is not equal to itself.
            own = before.view(-1).view(torch.uint8)
            received = own.clone()
            group.broadcast(received).wait()
            if not torch.equal(received, own):
                changed.append(name)
                own.copy_(received)
                tensor.copy_(before)
    return changed
