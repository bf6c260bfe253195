"""Means over two levels: exact within nodes, by another wire between them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from postlocal.group import Group, Work
from postlocal.topology import Layout
from postlocal.wire.carrier import Carrier, Forgetful, Wire
from postlocal.wire.chunks import Chunk, travels_as
from postlocal.wire.direct import Direct
from postlocal.wire.exchange import Divisor, Exchange
from postlocal.wire.recipes import Exact
from postlocal.wire.staging import Staging


@dataclass(frozen=True)
class relayed:
    """Exact sums within the groups of a level, another wire between their first ranks.

    What is lossy, or slow, is done once a node: contributions are summed at the node's first rank,
    the first ranks of all nodes take the mean, and hand it to their nodes. Nodes may differ in
    size. Where everybody is in one group of the level, or the mean is taken within such a group,
    nothing is left between, and the mean is exact. Tensors of 16 bits are summed in fp32 copies.

    `payload_bytes` is what a first rank sends between nodes, where each rank is a node.

    Args:
        between: how values travel between the first ranks of groups.
        level: whose groups are summed exactly.

    Example:
        >>> from postlocal.wire import bf16
        >>> relayed(bf16(), level="node").lossy
        True
    """

    between: Wire
    level: str = "node"

    @property
    def lossy(self) -> bool:
        return self.between.lossy

    def payload_bytes(self, numel: int, size: int, dtype: torch.dtype = torch.float32) -> int:
        return self.between.payload_bytes(numel, size, dtype)

    def open(self, layout: Layout, level: str, staging: Staging | None = None) -> Carrier:
        staging = staging or Staging()
        leaders = layout.leaders(self.level)
        inside = layout[min(self.level, level, key=layout.levels.index)]
        return _Relay(layout[level], inside, self.between.open(leaders, level, staging), staging)


class _Relay:
    """A carrier over two levels.

    Args:
        group: whose mean is taken.
        inside: this rank's part of it, whose first rank leads.
        between: carries between leaders.
        staging: memory for what travels.
    """

    def __init__(self, group: Group, inside: Group, between: Carrier, staging: Staging) -> None:
        self.group = group
        self._leads = inside.rank == 0
        self._between = between
        self._to_leader = Forgetful(_ToLeader(leads=self._leads), inside, staging)
        self._from_leader = Forgetful(_FromLeader(leads=self._leads), inside, staging)

    def mean_(self, tensors: Mapping[str, Tensor], divisor: Divisor | None = None) -> int:
        wide = {name: tensor.to(travels_as(tensor.dtype)) for name, tensor in tensors.items()}
        sent = self._to_leader.mean_(wide, lambda: 1.0)
        # Asked on all ranks: what it may raise, such as a disagreement, all have to hear.
        total = float(self.group.size) if divisor is None else divisor()
        if self._leads:
            sent += self._between.mean_(wide, lambda: total)
        sent += self._from_leader.mean_(wide, lambda: 1.0)
        for name, tensor in tensors.items():
            if wide[name] is not tensor:
                tensor.copy_(wide[name])
        return sent

    def payload_bytes(self, tensors: Mapping[str, Tensor]) -> int:
        wide = {name: _widened(tensor) for name, tensor in tensors.items()}
        inside = self._to_leader.payload_bytes(wide) + self._from_leader.payload_bytes(wide)
        return inside + (self._between.payload_bytes(wide) if self._leads else 0)

    def forget(self) -> None:
        self._between.forget()

    def state_dict(self) -> dict[str, Any]:
        return self._between.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._between.load_state_dict(state)


def _widened(tensor: Tensor) -> Tensor:
    """A tensor as it will travel, without content where it has to be copied."""
    dtype = travels_as(tensor.dtype)
    if tensor.dtype == dtype:
        return tensor
    return torch.empty_like(tensor, dtype=dtype, device="meta")


@dataclass(frozen=True)
class _ToLeader(Exact):
    """The sum comes to the first rank; what the others hold is then worth nothing."""

    leads: bool = False

    def payload_bytes(self, numel: int, size: int, dtype: torch.dtype = torch.float32) -> int:
        kept = math.ceil(numel / size) if self.leads else 0
        return (numel - kept) * dtype.itemsize

    def launch(self, chunk: Chunk, group: Group, divisor: Divisor, staging: Staging) -> Exchange:
        return Direct(chunk.pieces, group, divisor, staging, readers=(0,))


@dataclass(frozen=True)
class _FromLeader(Exact):
    """What the first rank holds comes to all."""

    leads: bool = False

    def payload_bytes(self, numel: int, size: int, dtype: torch.dtype = torch.float32) -> int:
        return (size - 1) * numel * dtype.itemsize if self.leads else 0

    def launch(self, chunk: Chunk, group: Group, divisor: Divisor, staging: Staging) -> Exchange:
        return _Copies(chunk.pieces, group)


class _Copies:
    """Values of the first rank under way to the others, from where they lie."""

    def __init__(self, pieces: Sequence[Tensor], group: Group) -> None:
        nothing: list[Sequence[Tensor]] = [[] for _ in range(group.size)]
        if group.rank == 0:
            self._work: Work = group.exchange([pieces] * group.size, nothing)
        else:
            self._work = group.exchange(nothing, [pieces, *nothing[1:]])

    def turn(self) -> None:
        return None

    def wait(self) -> None:
        self._work.wait()
