"""What a wire is: a recipe for a mean, the reducer that it opens, and the legs that it sends."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from postlocal.checks import made
from postlocal.codec import Codec
from postlocal.comm.group import Group, OnPaper
from postlocal.comm.groups import LevelGroups
from postlocal.topology import WORLD, world
from postlocal.wire.chunks import Staging

Tensors = Mapping[str, Tensor]
"""Tensors by name."""

Weights = Mapping[str, float]
"""What this rank's tensors are multiplied by, by name."""

Divisor = Callable[[], float]
"""The sum of the weights of all contributions; called when the first sums arrive, not before."""


@dataclass(frozen=True)
class Leg:
    """Messages of a mean that are sent together: those of one leg, for all chunks.

    Attributes:
        payload_bytes: bytes that this rank sends.
        peers: ranks that take part, this one among them.
        pattern: ``"exchange"``: every rank sends to every other one, at the same time; ``"ring"``:
            an all-reduce along a ring, in ``2 * (peers - 1)`` steps; ``"root"``: all send to one
            rank, or one sends to all.
        busiest_bytes: bytes that the busiest rank sends or receives; None: ``payload_bytes``.
        level: whose link the messages cross.
    """

    payload_bytes: int
    peers: int
    pattern: Literal["exchange", "ring", "root"] = "exchange"
    busiest_bytes: int | None = None
    level: str = WORLD

    @property
    def busiest(self) -> int:
        """Bytes that the busiest rank sends or receives."""
        return self.payload_bytes if self.busiest_bytes is None else self.busiest_bytes


def total(legs: Sequence[tuple[int, Leg]], level: str) -> Leg:
    """One leg at a level for several of a kind, each so many times.

    Example:
        >>> total([(2, Leg(100, peers=4)), (1, Leg(50, peers=4))], "node").payload_bytes
        250
    """
    return replace(
        legs[0][1],
        payload_bytes=sum(times * leg.payload_bytes for times, leg in legs),
        busiest_bytes=sum(times * leg.busiest for times, leg in legs),
        level=level,
    )


def sent_bytes(legs: Iterable[Leg]) -> int:
    """Bytes of payload that this rank sends in all legs.

    Example:
        >>> sent_bytes([Leg(100, peers=4), Leg(50, peers=4)])
        150
    """
    return sum(leg.payload_bytes for leg in legs)


def ring_bytes(numel: int, size: int, dtype: torch.dtype) -> int:
    """Bytes that each of ``size`` ranks sends in an all-reduce along a ring.

    Example:
        >>> ring_bytes(1000, 4, torch.float32)
        6000
    """
    return 2 * (size - 1) * -(-numel // size) * dtype.itemsize


class Reducer(Protocol):
    """A wire in use over one group, with the residuals and other state that it keeps.

    State is kept by the tensors' names, and made where a name is first seen. Different calls may
    take different tensors; one call takes the same ones in the same order on all ranks. Calls come
    from one thread at a time.

    Attributes:
        group: whose mean is taken.
    """

    group: Group

    def mean_(
        self, tensors: Tensors, divisor: Divisor | None = None, weights: Weights | None = None
    ) -> int:
        """Replace tensors by their mean over the group; all ranks end with identical bits.

        A reducer with error feedback sends ``(value + residual) * weight``, and keeps what is lost
        over ``weight``.

        Args:
            tensors: by name; floating point, of the same shapes, dtypes and strides on all ranks;
                no two overlap in memory.
            divisor: gives the sum of the weights of all contributions; None: the size of the
                group.
            weights: by name, of this rank; None: all are 1. A tensor of weight 0 counts as zeros,
                whatever it holds, and its residual is kept for a later mean.

        Returns:
            Bytes of payload that this rank sent, as the wire's ``messages`` tells them.

        Raises:
            PeerError: if a rank did not take part in time. The state is then invalid: load one, or
                an empty one.
        """
        ...

    def drop_residuals(self, names: Iterable[str] | None = None) -> None:
        """Drop what was lost of this rank's values, as for a replica that was left out of a mean.

        What this rank lost of means that it encoded for all is kept.

        Args:
            names: of which tensors; None: of all.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """What an exact resume needs, this rank's own and not copied; empty if nothing."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, on the same rank of as many ranks."""
        ...


class Wire(Protocol):
    """A recipe for how the mean of tensors over a group is taken.

    A wire of one's own derives from this class, and implements `lossy`, `messages` and `open`.
    """

    @property
    @abstractmethod
    def lossy(self) -> bool:
        """Whether values lose precision on the way, so that differences should be sent."""

    @property
    def codecs(self) -> Sequence[Codec]:
        """The codecs that it uses, to be compiled before training."""
        return ()

    @property
    def levels(self) -> frozenset[str]:
        """The levels that it needs beside the one that it is opened at."""
        return frozenset()

    @property
    def keeps_residuals(self) -> bool:
        """Whether its reducers keep an fp32 copy of what they lost."""
        return False

    @property
    def by_bucket(self) -> bool:
        """Whether gradients may be sent bucket by bucket, beside the backward pass.

        Else they wait for the last bucket and are sent together: buckets change during a run.
        """
        return False

    @abstractmethod
    def messages(self, tensors: Tensors, groups: LevelGroups, level: str) -> Sequence[Leg]:
        """What ``mean_`` of tensors makes this rank send, once it is opened over a group.

        Nothing is sent to tell this. Meters, tests and the planner all read it.

        Args:
            tensors: by name; their content is not looked at.
            groups: the groups, as for `open`.
            level: one of theirs.

        Returns:
            The legs, in the order in which they are sent; none where the group has one rank.
        """

    def payload_bytes(self, numel: int, size: int, dtype: torch.dtype = torch.float32) -> int:
        """The most bytes that one of ``size`` ranks sends for a tensor of ``numel`` elements.

        Where they depend on the tensor's shape or the nodes' sizes it is an estimate, and the
        docstring of the recipe says of what; `messages` is exact, rank by rank.
        """
        flat = {"flat": torch.empty(numel, dtype=dtype, device="meta")}
        return sent_bytes(self.messages(flat, LevelGroups(OnPaper(size), world()), WORLD))

    @abstractmethod
    def open(self, groups: LevelGroups, level: str, staging: Staging | None = None) -> Reducer:
        """Put it in use over this rank's group at a level; collective.

        Args:
            groups: the groups.
            level: one of theirs.
            staging: memory for what is sent, which several reducers can share.
        """


def is_wire(name: str, value: Any) -> Any:
    """The rule for an argument that takes a wire.

    Raises:
        TypeError: if it lacks what `Wire` has, or has to be called to make a wire.
    """
    example = f"wire.named({value!r})" if isinstance(value, str) else "wire.bf16()"
    needs = ("lossy", "messages", "open", "codecs", "levels", "keeps_residuals", "by_bucket")
    return made(name, value, needs, example)
