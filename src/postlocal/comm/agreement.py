"""That all ranks were given the same things, found out before training starts."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from postlocal.comm.group import Group
from postlocal.errors import DisagreementError, ModelChangedError, PostlocalError

Lines = Sequence[str]


@contextmanager
def together(group: Group) -> Iterator[None]:
    """Fail on every rank where one fails: no rank goes on to wait for one that raised.

    Args:
        group: all ranks, each inside a ``with`` block of its own.

    Raises:
        Exception: what the block raised here.
        DisagreementError: where the block failed only on other ranks, with the first one's words.
    """
    error = None
    try:
        yield
    except PostlocalError:  # raised on all ranks, or where others are not there to be told
        raise
    except Exception as raised:
        error = raised
    words = group.all_gather_object(error and f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, problem in enumerate(words):
        if problem is not None:
            raise DisagreementError(f"rank {rank} cannot go on: {problem}")


def raise_together(group: Group, problem: str | None) -> None:
    """Raise on every rank what is wrong with the model or the optimizer of some.

    Args:
        group: all ranks; collective, and called where one of them has a problem.
        problem: of this rank; None: it has none.

    Raises:
        ModelChangedError: with the problems, and the ranks that have them.
    """
    everyones = group.all_gather_object(problem)
    first = next(filter(None, everyones))
    ranks = [rank for rank, theirs in enumerate(everyones) if theirs == first]
    if len(ranks) == group.size:
        raise ModelChangedError(first)
    raise ModelChangedError(f"on {ranks_named(ranks)} of the group: {first}")


def ranks_named(ranks: Sequence[int]) -> str:
    """Ranks in words.

    Example:
        >>> ranks_named([1]), ranks_named([1, 3])
        ('rank 1', 'ranks 1, 3')
    """
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def check(group: Group, items: Mapping[str, Lines]) -> None:
    """Compare items on all ranks; they travel whole only where they differ.

    Args:
        group: all ranks.
        items: name of the item -> its description, line by line.

    Raises:
        DisagreementError: on every rank, naming the first item that differs, and the ranks.
    """
    digests = group.all_gather_object(_digests(items))
    for item in digests[0]:
        if len({theirs.get(item) for theirs in digests}) > 1:
            everyones = group.all_gather_object(list(items.get(item, [])))
            raise DisagreementError(_first_difference(item, everyones))


def _digests(items: Mapping[str, Lines]) -> dict[str, str]:
    return {
        item: hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()
        for item, lines in items.items()
    }


def _first_difference(item: str, everyones: Sequence[Lines]) -> str:
    reference = everyones[0]
    rank = next(rank for rank, lines in enumerate(everyones) if lines != reference)
    theirs = everyones[rank]
    for mine, other in zip(reference, theirs, strict=False):
        if mine != other:
            return f"ranks differ in {item}: rank 0 has {mine!r}, rank {rank} has {other!r}"
    return f"ranks differ in {item}: rank 0 has {len(reference)} of them, rank {rank} {len(theirs)}"


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
