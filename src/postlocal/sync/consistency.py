"""That ranks hold equal values where the clock says so: measured by fingerprints, not assumed."""

import hashlib
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from postlocal.comm.agreement import raise_together, ranks_named, same_values_
from postlocal.comm.group import Group
from postlocal.errors import DisagreementError
from postlocal.sync.status import Ballot, Vote, layout_number
from postlocal.tensors import flat_view

logger = logging.getLogger("postlocal")

_COLUMNS = 4096
_ROUNDING = 1e-3  # of a tensor's norm: more than processors that round differently come to
_SHOWN = 3
_NOTHING = Vote()


def fingerprint(tensor: Tensor) -> bytes:
    """Sixteen bytes that tell values apart by their bits; one pass over the memory.

    Rows of 32 KiB that trade places within a tensor are the one difference that it does not show.

    Args:
        tensor: dense, of any dtype; tensors to be compared have equal shapes and strides.

    Example:
        >>> one, other = torch.zeros(9000), torch.zeros(9000)
        >>> fingerprint(one) == fingerprint(other)
        True
        >>> other[8999] = 1e-30
        >>> fingerprint(one) == fingerprint(other)
        False
    """
    values = tensor.detach()
    flat = flat_view(values)
    content = (values.contiguous().flatten() if flat is None else flat).view(torch.uint8)
    whole = content.numel() // (8 * _COLUMNS) * (8 * _COLUMNS)
    hashed = hashlib.blake2b(digest_size=16)
    if whole:
        head = content[:whole]
        words = (
            head if head.data_ptr() % 8 == 0 and head.storage_offset() % 8 == 0 else head.clone()
        )
        # Sums of columns wrap around, which keeps every bit that a fingerprint needs.
        sums = words.view(torch.int64).view(-1, _COLUMNS).sum(dim=0)
        hashed.update(sums.cpu().numpy().data)
    hashed.update(content[whole:].cpu().numpy().data)
    return hashed.digest()


def contents_number(fingerprints: Iterable[bytes]) -> int:
    """A number of 48 bits, exact as fp64, that tells tensors apart by their fingerprints.

    Example:
        >>> values = [torch.zeros(3), torch.ones(3)]
        >>> number = contents_number(map(fingerprint, values))
        >>> number == contents_number(map(fingerprint, reversed(values)))
        False
    """
    whole = hashlib.blake2b(b"".join(fingerprints), digest_size=6)
    return int.from_bytes(whole.digest())


def check_equal_(
    group: Group,
    tensors: Mapping[str, Tensor],
    claim: str,
    advice: str,
    vote: Vote = _NOTHING,
    modules: int = 0,
    problem: str | None = None,
    moving: set[str] | None = None,
) -> int:
    """Check that all ranks hold equal values; collective, and one ballot where they do.

    Differences as small as the rounding of unlike processors are removed: every rank takes rank
    0's values, with a warning.

    Args:
        group: the ranks that should be equal.
        tensors: what they should hold in common, by name.
        claim: why they should be equal, for the message: "although ...".
        advice: what usually makes them differ, and the fix.
        vote: what else this rank says.
        modules: number of squared norms in ballots of the group: a rank that synchronizes while
            another compares is then told that their steps differ.
        problem: what is wrong with the model of this rank, if anything is.
        moving: names of tensors that this rank writes to by itself, which may differ; those of all
            ranks afterwards.

    Returns:
        Bytes of payload that this rank sent, where values were equal.

    Raises:
        ModelChangedError: if any rank has a ``problem``.
        PeerError: if a rank does not come in time.
        DisagreementError: on every rank, if ranks are at different steps, or values differ by more
            than rounding; it names the first tensors, by how much they differ, and the ranks.
    """
    if group.size == 1:
        if problem is not None:
            raise_together(group, problem)
        return 0
    prints = {name: fingerprint(tensor) for name, tensor in tensors.items()}
    moving = set() if moving is None else moving
    vote = replace(
        vote,
        fingerprint=contents_number(prints.values()),
        moving=layout_number(sorted(moving)),
        changed=problem is not None,
    )
    device = next(iter(tensors.values())).device
    ballot = Ballot(group, device, vote, [0.0] * modules, problem)
    ballot.check_models()
    if ballot.unanimous("fingerprint") and ballot.unanimous("moving"):
        return ballot.payload_bytes
    moving.update(*group.all_gather_object(moving))
    differing = [name for name in _differing(group, prints) if name not in moving]
    if not differing:
        return ballot.payload_bytes
    distances = _distances(group, {name: tensors[name] for name in differing})
    worst = max(max(theirs.values()) for theirs in distances)
    if worst <= _ROUNDING:
        same_values_(group, {name: tensors[name] for name in differing})
        if group.rank == 0:
            logger.warning(
                "ranks differed by %.1e of a tensor's norm at most although %s, and take rank 0's "
                "values: processors that round differently do so; otherwise %s",
                worst, claim, advice,
            )  # fmt: skip
        return ballot.payload_bytes
    raise DisagreementError(
        f"ranks hold different values although {claim}: {_shown(differing, distances)}; {advice}"
    )


def take_first_(group: Group, tensors: Mapping[str, Tensor], device: torch.device) -> list[str]:
    """Take rank 0's values of tensors that differ between ranks; the others are not sent.

    Args:
        group: the ranks; collective.
        tensors: of the same names, shapes and dtypes on all ranks; changed in place.
        device: where collectives of the group take tensors from.

    Returns:
        Names of the tensors that differed on any rank.
    """
    if group.size == 1:
        return []
    differing = _differing(group, {name: fingerprint(t) for name, t in tensors.items()})
    with torch.no_grad():
        for name in differing:
            tensor = tensors[name]
            first = tensor.to(device, copy=True, memory_format=torch.contiguous_format)
            group.broadcast(first.view(-1).view(torch.uint8)).wait()
            tensor.copy_(first)
    return differing


def _differing(group: Group, prints: Mapping[str, bytes]) -> list[str]:
    """Names of the fingerprints that are not the same on all ranks; collective."""
    everyones = group.all_gather_object(dict(prints))
    return [n for n in prints if any(theirs[n] != everyones[0][n] for theirs in everyones)]


def _distances(group: Group, tensors: Mapping[str, Tensor]) -> list[dict[str, float]]:
    """How far each rank's tensors are from rank 0's, relative to the norm of those."""
    mine = {}
    with torch.no_grad():
        for name, tensor in tensors.items():
            first = tensor.detach().clone(memory_format=torch.contiguous_format)
            group.broadcast(first.view(-1).view(torch.uint8)).wait()
            mine[name] = _distance(tensor.detach(), first)
    return group.all_gather_object(mine)


def _distance(tensor: Tensor, other: Tensor) -> float:
    if not tensor.is_floating_point():
        return 0.0 if torch.equal(tensor, other) else math.inf
    mine, theirs = tensor.double(), other.double()
    same = (mine == theirs) | (mine.isnan() & theirs.isnan())
    apart = float(torch.where(same, 0.0, mine - theirs).norm())
    scale = float(theirs.norm())
    return 0.0 if apart == 0 else apart / scale if apart < math.inf and scale > 0 else math.inf


def _shown(names: Sequence[str], distances: Sequence[Mapping[str, float]]) -> str:
    parts = []
    for name in names[:_SHOWN]:
        ranks = [rank for rank, theirs in enumerate(distances) if theirs[name] > 0]
        most = max(theirs[name] for theirs in distances)
        parts.append(f"{name!r} ({ranks_named(ranks)}: {most:.1e} of its norm from rank 0's)")
    more = len(names) - len(parts)
    return ", ".join(parts) + (f" and {more} more" if more else "")
