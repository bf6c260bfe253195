"""Wires in use: recipes, and what they are over one group."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from postlocal.checks import made
from postlocal.comm.group import Group
from postlocal.comm.groups import LevelGroups
from postlocal.wire.cargo import Terms
from postlocal.wire.chunks import Parcel
from postlocal.wire.exchange import ChunkWire, Divisor
from postlocal.wire.mean import carry_, payload_bytes
from postlocal.wire.staging import Staging

Weights = Mapping[str, float]
"""What this rank's tensors are multiplied by, by name."""


class Carrier(Protocol):
    """A wire in use over one group, with what it remembers of each tensor.

    Memory is by the tensors' names, and made where a name is first seen. Different calls may take
    different tensors; one call takes the same ones in the same order on all ranks. Calls come from
    one thread at a time.

    Attributes:
        group: whose mean is taken.
    """

    group: Group

    def mean_(
        self,
        tensors: Mapping[str, Tensor],
        divisor: Divisor | None = None,
        weights: Weights | None = None,
    ) -> int:
        """Replace tensors by their mean over the group; all ranks end with identical bits.

        A wire that remembers sends ``(value + residual) * weight`` and keeps what is lost over
        ``weight``.

        Args:
            tensors: by name; floating point, of the same shapes, dtypes and strides on all ranks;
                no two overlap in memory.
            divisor: gives the sum of the weights of all contributions; None: the size of the
                group.
            weights: by name, of this rank; None: all are 1. A tensor of weight 0 counts as zeros,
                whatever it holds, and its residual waits.

        Returns:
            Bytes of payload that this rank sent.

        Raises:
            PeerError: if a rank did not take part in time. What is remembered is then worth
                nothing: load a state, or an empty one.
        """
        ...

    def payload_bytes(self, tensors: Mapping[str, Tensor]) -> int:
        """What `mean_` of these tensors will return on this rank."""
        ...

    def forget(self, names: Iterable[str] | None = None) -> None:
        """Drop what was lost of this rank's values, as a replica does that was left out.

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
    """A recipe for how the mean of tensors over a group is taken."""

    @property
    def lossy(self) -> bool:
        """Whether values lose precision on the way, so that differences should be sent."""
        ...

    def payload_bytes(self, numel: int, size: int, dtype: torch.dtype = torch.float32) -> int:
        """The most bytes that one of ``size`` ranks sends for a tensor of ``numel`` elements.

        Where it depends on more, such as the tensor's shape, it is an estimate, and the docstring
        of the recipe says of what; `Carrier.payload_bytes` is exact, rank by rank.
        """
        ...

    def open(self, groups: LevelGroups, level: str, staging: Staging | None = None) -> Carrier:
        """Put it in use over this rank's group at a level; collective.

        Args:
            groups: the groups.
            level: one of theirs.
            staging: memory for what travels, which several carriers can share.
        """
        ...


def is_wire(name: str, value: Any) -> Any:
    """The rule for an argument that takes a wire.

    Raises:
        TypeError: if it lacks what `Wire` has, or has to be called to make a wire.
    """
    example = f"wire.named({value!r})" if isinstance(value, str) else "wire.bf16()"
    return made(name, value, ("lossy", "payload_bytes", "open"), example)


def weight_of(name: str, weights: Weights | None) -> float:
    """The weight of a tensor of this rank."""
    return 1.0 if weights is None else weights[name]


class Forgetful:
    """A carrier of a wire that remembers nothing.

    Args:
        wire: how values travel.
        group: whose mean is taken.
        staging: memory for what travels.
    """

    def __init__(self, wire: ChunkWire, group: Group, staging: Staging | None = None) -> None:
        self.group = group
        self._wire = wire
        self._staging = staging or Staging()

    def mean_(
        self,
        tensors: Mapping[str, Tensor],
        divisor: Divisor | None = None,
        weights: Weights | None = None,
    ) -> int:
        parcels = [
            Parcel(tensor, terms=Terms(weight_of(name, weights)))
            for name, tensor in tensors.items()
        ]
        return carry_(parcels, self.group, self._wire, divisor, self._staging)

    def payload_bytes(self, tensors: Mapping[str, Tensor]) -> int:
        return payload_bytes(tensors.values(), self.group, self._wire)

    def forget(self, names: Iterable[str] | None = None) -> None:
        return None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        return None
