"""Whether ranks hold equal values: measured by fingerprints, or noted by each rank for itself."""

import hashlib
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from postlocal.comm.agreement import ranks_named, same_values_
from postlocal.comm.group import Group
from postlocal.errors import DisagreementError, ModelChangedError
from postlocal.sync.parameters import Replica
from postlocal.sync.status import GroupStatus, RankStatus, gather_status, layout_number
from postlocal.sync.supported_wrappers import gradients_reduced_elsewhere
from postlocal.tensors import flat_view
from postlocal.torch_versions import version_of

logger = logging.getLogger("postlocal")

_COLUMNS = 4096
_ROUNDING = 1e-3  # of a tensor's norm: more than processors that round differently come to
_SHOWN = 3
_NOTHING = RankStatus()


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


@dataclass
class Held:
    """What a rank holds in common with the others, as far as it knows.

    Attributes:
        tensors: by name, of the same names, shapes and dtypes on all ranks.
        moving: names of tensors that this rank writes to by itself, which may differ; those of all
            ranks once they were compared.
        status: what else this rank says.
        modules: number of squared norms in the group's `gather_status`: a rank that synchronizes
            while another compares is then told that their steps differ.
        problem: what is wrong with the model of this rank, if anything is.
    """

    tensors: Mapping[str, Tensor]
    moving: set[str] = field(default_factory=set)
    status: RankStatus = _NOTHING
    modules: int = 0
    problem: str | None = None


def check_equal_(group: Group, held: Held, claim: str, advice: str) -> int:
    """Check that all ranks hold equal values; collective, and one all-gather where they do.

    Differences as small as the rounding of unlike processors are removed: every rank takes rank
    0's values, with a warning.

    Args:
        group: the ranks that should be equal.
        held: what this rank holds; its tensors may be written to, and ``moving`` is.
        claim: why they should be equal, for the message: "although ...".
        advice: what usually makes them differ, and the fix.

    Returns:
        Bytes of payload that this rank sent, where values were equal.

    Raises:
        ModelChangedError: if any rank has a ``problem``.
        PeerError: if a rank does not come in time.
        DisagreementError: on every rank, if ranks are at different steps, or values differ by more
            than rounding; it names the first tensors, by how much they differ, and the ranks.
    """
    if group.size == 1:
        if held.problem is not None:
            raise ModelChangedError(held.problem, ranks=[0])
        return 0
    prints = {name: fingerprint(tensor) for name, tensor in held.tensors.items()}
    status = _gather(group, held, prints)
    status.check_models(group, held.problem)
    if not (status.unanimous("fingerprint") and status.unanimous("moving")):
        held.moving.update(*group.all_gather_object(held.moving))
        differing = [name for name in _differing(group, prints) if name not in held.moving]
        if differing:
            chosen = {name: held.tensors[name] for name in differing}
            _remove_rounding_(group, chosen, claim, advice)
    return status.payload_bytes


def _gather(group: Group, held: Held, prints: Mapping[str, bytes]) -> GroupStatus:
    status = replace(
        held.status,
        fingerprint=contents_number(prints.values()),
        moving=layout_number(sorted(held.moving)),
        changed=held.problem is not None,
    )
    device = next(iter(held.tensors.values())).device
    return gather_status(group, device, status, [0.0] * held.modules).wait()


def _remove_rounding_(group: Group, tensors: Mapping[str, Tensor], claim: str, advice: str) -> None:
    """Take rank 0's values of tensors that differ, if they differ by no more than rounding."""
    distances = _distances(group, tensors)
    worst = max(max(theirs.values()) for theirs in distances)
    if worst > _ROUNDING:
        raise _difference(list(tensors), distances, claim, advice)
    same_values_(group, tensors)
    if group.rank == 0:
        logger.warning(
            "ranks differed by %.1e of a tensor's norm at most although %s, and take rank 0's "
            "values: processors that round differently do so; otherwise %s",
            worst, claim, advice,
        )  # fmt: skip


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


def _difference(
    names: Sequence[str], distances: Sequence[Mapping[str, float]], claim: str, advice: str
) -> DisagreementError:
    """The error of ranks whose tensors differ: the first tensors, how much, and who has them."""
    shown = [_shown(name, [theirs[name] for theirs in distances]) for name in names[:_SHOWN]]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    apart = {rank: [n for n in names if theirs[n] > 0] for rank, theirs in enumerate(distances)}
    return DisagreementError(
        f"ranks hold different values although {claim}: {', '.join(shown)}{more}; {advice}",
        what=names[0],
        by_rank={rank: ", ".join(theirs) for rank, theirs in apart.items() if theirs},
        ranks=[rank for rank, theirs in apart.items() if theirs],
    )


def _shown(name: str, distances: Sequence[float]) -> str:
    ranks = [rank for rank, distance in enumerate(distances) if distance > 0]
    return f"{name!r} ({ranks_named(ranks)}: {max(distances):.1e} of its norm from rank 0's)"


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
        return sum(version_of(parameter) for parameter in self._replica.parameters.values())


class DivergenceCheck:
    """Looks whether replicas differ after local steps, as they should, until they do once."""

    def __init__(self) -> None:
        self._open = True

    def number(self, tensors: Iterable[Tensor]) -> int:
        """What a rank says of its parameters after local steps; 0 once replicas differed."""
        return contents_number(map(fingerprint, tensors)) if self._open else 0

    def conclude(
        self,
        status: GroupStatus,
        steps: int,
        parameters: Iterable[Tensor],
        wrapper: DistributedDataParallel | None,
    ) -> None:
        """Warn, once and on rank 0, where all ranks said the same.

        Args:
            status: what all ranks said, with a `number` as ``fingerprint``, or 0.
            steps: local steps before that.
            parameters: of the replica.
            wrapper: the one whose gradients the clock reduces, if any.
        """
        if not (self._open and steps and status.own("fingerprint")):
            return
        self._open = False
        if not status.unanimous("fingerprint") or status.rank:
            return
        owner = gradients_reduced_elsewhere(parameters, wrapper)
        reason = "ranks seem to train on the same data, or not at all: shard the data by rank"
        if owner is not None:
            reason = f"{owner} averages their gradients in each step: pass it to attach"
        logger.warning("replicas are equal to the bit after %d local steps: %s", steps, reason)


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
