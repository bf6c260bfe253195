"""What ranks tell each other at a synchronization, beside the tensors: a few numbers each."""

import hashlib
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from postlocal.comm.agreement import Failures, together
from postlocal.comm.group import Group, Work
from postlocal.errors import DisagreementError, ModelChangedError


def layout_number(lines: Sequence[str]) -> int:
    """A number that tells descriptions apart, of 48 bits: exact as fp64.

    Example:
        >>> layout_number(["weight: shape (2,)"]) == layout_number(["weight: shape (3,)"])
        False
    """
    content = "\n".join(lines).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=6).digest())


@dataclass(frozen=True)
class RankStatus:
    """What one rank says of itself.

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


_FIELDS = tuple(field.name for field in fields(RankStatus))


@dataclass(frozen=True)
class GroupStatus:
    """What all ranks of a group said.

    Attributes:
        rows: one row a rank: the fields of `RankStatus`, then the squared norms of its
            contribution, module by module; fp64, shape ``(ranks, fields + modules)``.
        rank: this rank's row.
    """

    rows: Tensor
    rank: int

    def own(self, item: str) -> float:
        """What this rank said of an item of its `RankStatus`."""
        return float(self._column(item)[self.rank])

    @property
    def payload_bytes(self) -> int:
        """Bytes of payload that this rank sent."""
        return self.rows[0].nbytes * (len(self.rows) - 1)

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
        return self.rows[:, len(_FIELDS) :]

    @property
    def inner_lr(self) -> float:
        """The greatest `RankStatus.inner_lr`, so that all ranks take the same outer step."""
        return float(self._column("inner_lr").max())

    def buffer_weights(self) -> tuple[float, float]:
        """This rank's buffers' weight and the sum of all; all are 1 where none is above 0."""
        weights = self._column("buffer_weight")
        total = float(weights.sum())
        return (float(weights[self.rank]), total) if total else (1.0, float(len(self.rows)))

    def unanimous(self, item: Literal["layout", "moving", "fingerprint"]) -> bool:
        """Whether all ranks say the same of an item of their `RankStatus`."""
        return not _odd_ranks(self._column(item))

    def check_models(self, group: Group, problem: str | None) -> None:
        """Check that no rank says ``changed``; collective where one does.

        All ranks call it after the same collectives of the group: some wait for the status before
        they send tensors, and others after.

        Args:
            group: the ranks that said it.
            problem: what makes this rank say ``changed``, in words.

        Raises:
            ModelChangedError: on every rank, if a model or an optimizer cannot be synchronized.
        """
        if self._column("changed").any():
            with together(group, _models_changed):
                if problem is not None:
                    raise ModelChangedError(problem)

    def _column(self, name: str) -> Tensor:
        return self.rows[:, _FIELDS.index(name)]


def _models_changed(failures: Failures, words: str) -> ModelChangedError:
    return ModelChangedError(words, ranks=failures)


class PendingStatus:
    """The status of a group on its way; see `gather_status`."""

    def __init__(self, work: Work, output: Tensor, group: Group) -> None:
        self._work = work
        self._output = output
        self._group = group
        self._status: GroupStatus | None = None

    def wait(self) -> GroupStatus:
        """What all ranks said.

        Raises:
            PeerError: if a rank did not take part in time.
            DisagreementError: if ranks are at different steps, or plan different rounds.
        """
        if self._status is None:
            self._work.wait()
            rows = self._output.cpu().view(self._group.size, -1)
            _check_clocks(rows)
            self._status = GroupStatus(rows, self._group.rank)
        return self._status


def gather_status(
    group: Group, device: torch.device, status: RankStatus, squares: Sequence[float] = ()
) -> PendingStatus:
    """Start to tell all ranks of a group what each says of itself; one small all-gather.

    Args:
        group: the ranks; collective.
        device: where collectives of the group take tensors from.
        status: what this rank says.
        squares: squared norms of this rank's contribution, module by module; as many on all ranks.

    Example:
        >>> from postlocal.comm.group import Alone
        >>> said = gather_status(Alone(), torch.device("cpu"), RankStatus(step=8)).wait()
        >>> said.own("step"), said.unanimous("layout"), said.payload_bytes
        (8.0, True, 0)
    """
    row = torch.tensor([*map(float, astuple(status)), *squares], dtype=torch.float64)
    output = torch.empty(group.size * len(row), dtype=torch.float64, device=device)
    return PendingStatus(group.all_gather(output, row.to(device)), output, group)


def _check_clocks(rows: Tensor) -> None:
    steps, planned, lrs = (rows[:, _FIELDS.index(name)] for name in ("step", "planned", "lr"))
    if ranks := _odd_ranks(steps):
        rank = ranks[0]
        raise DisagreementError(
            f"ranks are not at the same step: rank {rank} of the group has taken "
            f"{steps[rank]:.0f} steps, rank 0 {steps[0]:.0f}; count each "
            "iteration once on every rank (sync.step(), or that of the averager), also where "
            "the optimizer was skipped",
            what="steps",
            by_rank={number: f"{taken:.0f}" for number, taken in enumerate(steps.tolist())},
            ranks=ranks,
        )
    if ranks := _odd_ranks(planned):
        rank = ranks[0]
        raise DisagreementError(
            f"ranks plan different rounds: rank {rank} of the group {planned[rank]:.0f} steps "
            f"at learning rate {lrs[rank]:g}, rank 0 {planned[0]:.0f} steps at {lrs[0]:g}; "
            "the schedule follows the learning rate, which must be the same on every rank",
            what="planned round",
            by_rank={
                number: f"{theirs:.0f} steps at learning rate {lr:g}"
                for number, (theirs, lr) in enumerate(
                    zip(planned.tolist(), lrs.tolist(), strict=True)
                )
            },
            ranks=ranks,
        )


_NEGLIGIBLE = 1e-8  # of the greatest weight: at less, a contribution is left out


def shares(weights: Tensor) -> tuple[Tensor, float]:
    """Weights by which contributions are multiplied, and what their sum is divided by.

    Where nobody's weight is 1 they are scaled, so that the greatest is: equal contributions of
    equal weights then stay as they are, in any precision. One that hardly counts does not at all:
    the residual of a lossy wire would be sent where nobody sees it.

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


def _odd_ranks(column: Tensor) -> list[int]:
    """The ranks that say something else than rank 0."""
    differing: list[int] = (column != column[0]).nonzero().flatten().tolist()
    return differing
