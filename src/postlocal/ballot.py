"""What ranks tell each other at a synchronization, beside the tensors: a few numbers each."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from postlocal.errors import DisagreementError
from postlocal.group import Group

_FIELDS = ("weight", "buffer_weight", "square", "step", "planned", "lr", "layout")
BYTES = 8 * len(_FIELDS)
"""Bytes that one rank tells each other one."""


def layout_number(lines: Sequence[str]) -> int:
    """A number that tells descriptions apart, of 48 bits: exact as fp64.

    Example:
        >>> layout_number(["weight: shape (2,)"]) == layout_number(["weight: shape (3,)"])
        False
    """
    content = "\n".join(lines).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=6).digest())


class Ballot:
    """One row of numbers a rank, exchanged while the tensors travel.

    Args:
        group: who synchronizes.
        device: where collectives of the group take tensors from.
        weight: of this rank's contribution in the mean.
        buffer_weight: of this rank's buffers in theirs.
        square: squared norm of this rank's contribution.
        step: steps this rank has taken.
        planned: steps of the round that this rank plans next.
        lr: this rank's learning rate, for messages.
        layout: a `layout_number` of what has to be the same on all ranks.
    """

    def __init__(
        self,
        group: Group,
        device: torch.device,
        *,
        weight: float,
        buffer_weight: float,
        square: float,
        step: int,
        planned: int,
        lr: float,
        layout: int,
    ) -> None:
        self.weight = weight
        self._buffer_weight = buffer_weight
        values = [weight, buffer_weight, square, step, planned, lr, layout]
        row = torch.tensor(values, dtype=torch.float64)
        self._output = torch.empty(group.size * len(_FIELDS), dtype=torch.float64, device=device)
        self._work = group.all_gather(self._output, row.to(device))
        self._rows: Tensor | None = None

    def total_weight(self) -> float:
        """Sum of all weights; 1 where all are 0 (and so is the sum of the contributions)."""
        return float(self._column("weight").sum()) or 1.0

    def buffer_weights(self) -> tuple[float, float]:
        """This rank's buffers' weight and the sum of all; all are 1 where none is above 0."""
        total = float(self._column("buffer_weight").sum())
        return (self._buffer_weight, total) if total else (1.0, float(len(self._wait())))

    @property
    def excluded(self) -> tuple[int, ...]:
        """Ranks of the group whose contribution has no weight."""
        return tuple((self._column("weight") == 0).nonzero().flatten().tolist())

    @property
    def unanimous(self) -> bool:
        """Whether all ranks have the same layout of optimizer state."""
        return bool((self._column("layout") == self._column("layout")[0]).all())

    def mean_square(self) -> float:
        """Weighted mean of the contributions' squared norms."""
        weights = self._column("weight")
        squares = self._column("square").where(weights > 0, 0.0)
        return float((weights * squares).sum()) / self.total_weight()

    def _column(self, name: str) -> Tensor:
        return self._wait()[:, _FIELDS.index(name)]

    def _wait(self) -> Tensor:
        if self._rows is None:
            self._work.wait()
            self._rows = self._output.cpu().view(-1, len(_FIELDS))
            self._check_clocks()
        return self._rows

    def _check_clocks(self) -> None:
        steps, planned, lrs = (self._column(name) for name in ("step", "planned", "lr"))
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


def _odd_one(column: Tensor) -> int | None:
    differing = (column != column[0]).nonzero().flatten().tolist()
    return differing[0] if differing else None
