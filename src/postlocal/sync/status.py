"""What ranks tell each other at a synchronization, beside the tensors: a few numbers each."""

import hashlib
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from postlocal.comm.agreement import raise_together
from postlocal.comm.group import Group
from postlocal.errors import DisagreementError


def layout_number(lines: Sequence[str]) -> int:
    """A number that tells descriptions apart, of 48 bits: exact as fp64.

    Example:
        >>> layout_number(["weight: shape (2,)"]) == layout_number(["weight: shape (3,)"])
        False
    """
    content = "\n".join(lines).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=6).digest())


@dataclass(frozen=True)
class Vote:
    """What one rank says.

    Attributes:
        weight: of its contribution in the mean.
        buffer_weight: of its buffers in theirs.
        finite: whether all values of its contribution are.
        work: share of the round's steps that it did.
        step: steps it has taken.
        planned: steps of the round that it plans next.
        lr: its learning rate, for messages.
        inner_lr: the greatest learning rate of its steps since the last synchronization.
        layout: a `layout_number` of what has to be the same on all ranks.
        moving: a `layout_number` of the frozen parameters that the loop writes to.
        fingerprint: of what it holds in common with the others; 48 bits.
        changed: whether its model or optimizer cannot be synchronized any more.
    """

    weight: float = 1.0
    buffer_weight: float = 1.0
    finite: bool = True
    work: float = 1.0
    step: int = 0
    planned: int = 0
    lr: float = 0.0
    inner_lr: float = 0.0
    layout: int = 0
    moving: int = 0
    fingerprint: int = 0
    changed: bool = False


_FIELDS = tuple(field.name for field in fields(Vote))


class Ballot:
    """One row of numbers a rank, exchanged while the tensors travel.

    Args:
        group: who synchronizes.
        device: where collectives of the group take tensors from.
        vote: what this rank says.
        squares: squared norms of this rank's contribution, module by module; as many on all ranks.
        problem: what makes a `Vote` say ``changed``, in words.
    """

    def __init__(
        self,
        group: Group,
        device: torch.device,
        vote: Vote,
        squares: Sequence[float] = (),
        problem: str | None = None,
    ) -> None:
        self.vote = vote
        self._group = group
        self._problem = problem
        self._size = group.size
        row = torch.tensor([*map(float, astuple(vote)), *squares], dtype=torch.float64)
        self._output = torch.empty(group.size * len(row), dtype=torch.float64, device=device)
        self._work = group.all_gather(self._output, row.to(device))
        self._rows: Tensor | None = None
        self.payload_bytes = row.nbytes * (group.size - 1)

    @classmethod
    def counted(cls, rows: Tensor, rank: int) -> "Ballot":
        """A ballot that was waited for, as rank ``rank`` of the group saw it."""
        ballot = cls.__new__(cls)
        ballot._rows = rows
        ballot._size = len(rows)
        ballot.payload_bytes = rows[0].nbytes * (len(rows) - 1)
        said = dict(zip(_FIELDS, rows[rank].tolist(), strict=False))
        kinds = {field.name: field.type for field in fields(Vote)}
        ballot.vote = Vote(**{name: kinds[name](value) for name, value in said.items()})  # type: ignore[operator]
        return ballot

    def wait(self) -> Tensor:
        """All that was said, one row a rank, fp64.

        Raises:
            PeerError: if a rank did not take part in time.
            DisagreementError: if ranks are at different steps, or plan different rounds.
        """
        if self._rows is None:
            self._work.wait()
            rows = self._output.cpu().view(self._size, -1)
            _check_clocks(rows)
            self._rows = rows
        return self._rows

    def check_models(self) -> None:
        """Check that no rank says ``changed``; collective where one does.

        All ranks call it after the same collectives of the group: some wait for a ballot before
        they send tensors, and others after.

        Raises:
            ModelChangedError: on every rank, if a model or an optimizer cannot be synchronized.
        """
        if self._column("changed").any():
            raise_together(self._group, self._problem)

    @property
    def finite(self) -> Tensor:
        """Whose contributions are finite, shape ``(ranks,)``, bool."""
        return self._column("finite") > 0

    @property
    def work(self) -> Tensor:
        """Shares of the round's steps, shape ``(ranks,)``, fp64."""
        return self._column("work")

    @property
    def weights(self) -> Tensor:
        """Weights of contributions, shape ``(ranks,)``, fp64."""
        return self._column("weight")

    @property
    def squares(self) -> Tensor:
        """Squared norms of contributions, shape ``(ranks, modules)``, fp64."""
        return self.wait()[:, len(_FIELDS) :]

    @property
    def inner_lr(self) -> float:
        """The greatest `Vote.inner_lr`, so that all ranks take the same outer step."""
        return float(self._column("inner_lr").max())

    def buffer_weights(self) -> tuple[float, float]:
        """This rank's buffers' weight and the sum of all; all are 1 where none is above 0."""
        total = float(self._column("buffer_weight").sum())
        return (self.vote.buffer_weight, total) if total else (1.0, float(self._size))

    def unanimous(self, item: Literal["layout", "moving", "fingerprint"]) -> bool:
        """Whether all ranks say the same of an item of their `Vote`."""
        return _odd_one(self._column(item)) is None

    def _column(self, name: str) -> Tensor:
        return self.wait()[:, _FIELDS.index(name)]


def _check_clocks(rows: Tensor) -> None:
    steps, planned, lrs = (rows[:, _FIELDS.index(name)] for name in ("step", "planned", "lr"))
    if (rank := _odd_one(steps)) is not None:
        raise DisagreementError(
            f"ranks are not at the same step: rank {rank} of the group has taken "
            f"{steps[rank]:.0f} steps, rank 0 {steps[0]:.0f}; count each "
            "iteration once on every rank (sync.step(), or that of the averager), also where "
            "the optimizer was skipped"
        )
    if (rank := _odd_one(planned)) is not None:
        raise DisagreementError(
            f"ranks plan different rounds: rank {rank} of the group {planned[rank]:.0f} steps "
            f"at learning rate {lrs[rank]:g}, rank 0 {planned[0]:.0f} steps at {lrs[0]:g}; "
            "the schedule follows the learning rate, which must be the same on every rank"
        )


_NEGLIGIBLE = 1e-8  # of the greatest weight: at less, a contribution is left out


def shares(weights: Tensor) -> tuple[Tensor, float]:
    """Weights by which contributions are multiplied, and what their sum is divided by.

    Where nobody's weight is 1 they are scaled, so that the greatest is: equal contributions of
    equal weights then stay as they are, in any precision. One that hardly counts does not at all:
    what a lossy wire owes would be spent where nobody sees it.

    Args:
        weights: of all ranks, shape ``(ranks,)``, fp64.

    Example:
        >>> shares(torch.tensor([0.5, 0.25], dtype=torch.float64))
        (tensor([1.0000, 0.5000], dtype=torch.float64), 1.5)
    """
    greatest = float(weights.max())
    unit = 1.0 if greatest == 0 or bool((weights == 1).any()) else greatest
    scaled = weights.where(weights > _NEGLIGIBLE * greatest, 0.0) / unit
    return scaled, float(scaled.sum()) or 1.0  # where all are 0, so is the sum of contributions


def _odd_one(column: Tensor) -> int | None:
    differing = (column != column[0]).nonzero().flatten().tolist()
    return differing[0] if differing else None
