"""Wires in use: recipes, and what they are over one group."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from postlocal.group import Group
from postlocal.topology import Layout
from postlocal.wire.exchange import ChunkWire, Divisor
from postlocal.wire.mean import mean_, payload_bytes
from postlocal.wire.staging import Staging


class Carrier(Protocol):
    """A wire in use over one group, with what it remembers of each tensor.

    Memory is by the tensors' names, and made where a name is first seen. Different calls may take
    different tensors; one call takes the same ones in the same order on all ranks. Calls come from
    one thread at a time.

    Attributes:
        group: whose mean is taken.
    """

    group: Group

    def mean_(self, tensors: Mapping[str, Tensor], divisor: Divisor | None = None) -> int:
        """Replace tensors by their mean over the group; all ranks end with identical bits.

        Args:
            tensors: by name; floating point, of the same shapes, dtypes and strides on all ranks;
                no two overlap in memory.
            divisor: gives the sum of the weights of all contributions; None: the size of the
                group.

        Returns:
            Bytes of payload that this rank sent.

        Raises:
            PeerError: if a rank did not take part in time. What is remembered is then worth
                nothing: `forget` it, or load a state.
        """
        ...

    def payload_bytes(self, tensors: Mapping[str, Tensor]) -> int:
        """What `mean_` of these tensors will return on this rank."""
        ...

    def forget(self) -> None:
        """Drop what was lost of this rank's values, as a replica does that was left out."""
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
        """Bytes each of ``size`` ranks sends for the mean of a tensor of ``numel`` elements.

        Where it depends on more, such as the tensor's shape, it is an estimate, and the docstring
        of the recipe says of what; `Carrier.payload_bytes` is exact.
        """
        ...

    def open(self, layout: Layout, level: str, staging: Staging | None = None) -> Carrier:
        """Put it in use over this rank's group at a level; collective.

        Args:
            layout: the groups.
            level: one of the layout's.
            staging: memory for what travels, which several carriers can share.
        """
        ...


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

    def mean_(self, tensors: Mapping[str, Tensor], divisor: Divisor | None = None) -> int:
        return mean_(list(tensors.values()), self.group, self._wire, divisor, staging=self._staging)

    def payload_bytes(self, tensors: Mapping[str, Tensor]) -> int:
        return payload_bytes(tensors.values(), self.group.size, self._wire)

    def forget(self) -> None:
        return None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        return None
