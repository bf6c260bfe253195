"""Means over two levels: sums in fp32 within nodes, by another wire between them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from postlocal.checks import settle, text
from postlocal.comm.group import Group, Work
from postlocal.comm.groups import LevelGroups
from postlocal.tensors import weigh_
from postlocal.wire.cargo import Terms
from postlocal.wire.carrier import Carrier, Forgetful, Weights, Wire, is_wire, weight_of
from postlocal.wire.chunks import Chunk, Parcel, travels_as
from postlocal.wire.exact import Direct
from postlocal.wire.exchange import Divisor, Exchange
from postlocal.wire.mean import carry_, payload_bytes
from postlocal.wire.recipes import Exact
from postlocal.wire.staging import Staging


@dataclass(frozen=True)
class relayed:
    """Sums in fp32 within the groups of a level, another wire between their first ranks.

    What is lossy, or slow, is done once a node: contributions are summed at the node's first rank,
    the first ranks of all nodes take the mean, and hand it to their nodes. Nodes may differ in
    size. Tensors of 16 bits are summed in fp32 copies, of all of them at once.

    Where everybody is in one group of the level, or the mean is taken within such a group, nothing
    is left between, and the mean is that of `fp32`: identical replicas stay as they are.

    What a lossy wire between remembers is a node's, at its first rank, and not one replica's to
    forget: contributions of weight 0 have never been in it. Only a replica that is a node by itself
    forgets.

    `payload_bytes` is what a first rank sends between nodes, where each rank is a node.

    Args:
        between: how values travel between the first ranks of groups.
        level: whose groups are summed in fp32.

    Raises:
        TypeError: if ``between`` is no wire, or ``level`` no string.

    Example:
        >>> from postlocal.wire import bf16
        >>> relayed(bf16(), level="node").lossy
        True
    """

    between: Wire
    level: str = "node"

    def __post_init__(self) -> None:
        settle(self, between=is_wire, level=text)

    @property
    def lossy(self) -> bool:
        return self.between.lossy

    def payload_bytes(self, numel: int, size: int, dtype: torch.dtype = torch.float32) -> int:
        return self.between.payload_bytes(numel, size, dtype)

    def open(self, groups: LevelGroups, level: str, staging: Staging | None = None) -> Carrier:
        staging = staging or Staging()
        leaders = groups.leaders(self.level)
        inside = groups[min(self.level, level, key=groups.levels.index)]
        between = self.between.open(leaders, level, staging)
        if inside.size == groups[level].size:
            return Forgetful(Exact(), inside, staging)
        return _Relay(groups[level], inside, between, staging, weighs=self.lossy)


class _Relay:
    """A carrier over two levels.

    Args:
        group: whose mean is taken.
        inside: this rank's part of it, whose first rank leads.
        between: carries between leaders.
        staging: memory for what travels.
        weighs: whether nodes' weights travel too, so that what is remembered between is for a
            weight of 1.
    """

    def __init__(
        self, group: Group, inside: Group, between: Carrier, staging: Staging, *, weighs: bool
    ) -> None:
        self.group = group
        self._inside = inside
        self._leads = inside.rank == 0
        self._between = between
        self._staging = staging
        self._weighs = weighs

    def mean_(
        self,
        tensors: Mapping[str, Tensor],
        divisor: Divisor | None = None,
        weights: Weights | None = None,
    ) -> int:
        wide = {name: tensor.to(travels_as(tensor.dtype)) for name, tensor in tensors.items()}
        sent, node = self._gather(wide, weights)
        # Asked on all ranks: what it may raise, such as a disagreement, all have to hear.
        total = float(self.group.size) if divisor is None else divisor()
        if self._leads:
            sent += self._between.mean_(wide, lambda: total, node)
        mean = [Parcel(tensor) for tensor in wide.values()]
        sent += carry_(mean, self._inside, _FromLeader(), lambda: 1.0, self._staging)
        for name, tensor in tensors.items():
            if wide[name] is not tensor:
                tensor.copy_(wide[name])
        return sent

    def payload_bytes(self, tensors: Mapping[str, Tensor]) -> int:
        wide = {name: _widened(tensor) for name, tensor in tensors.items()}
        weights = [torch.empty(len(wide))] if self._weighs else []
        inside = payload_bytes([*wide.values(), *weights], self._inside, _ToLeader())
        inside += payload_bytes(wide.values(), self._inside, _FromLeader())
        return inside + (self._between.payload_bytes(wide) if self._leads else 0)

    def forget(self, names: Iterable[str] | None = None) -> None:
        if self._inside.size == 1:
            self._between.forget(names)

    def _gather(
        self, wide: Mapping[str, Tensor], weights: Weights | None
    ) -> tuple[int, Weights | None]:
        """Bring the node's weighted sums to its leader, or its means and their weights."""
        own = [weight_of(name, weights) for name in wide]
        sums = [
            Parcel(tensor, terms=Terms(weight))
            for tensor, weight in zip(wide.values(), own, strict=True)
        ]
        if not self._weighs:
            return self._sum(sums), None
        totals = torch.tensor(own, device=next((t.device for t in wide.values()), None))
        sent = self._sum([*sums, Parcel(totals)])
        if not self._leads:
            return sent, None
        node = dict(zip(wide, totals.tolist(), strict=True))
        for name, total in node.items():
            weigh_([wide[name]], 1 / total if total else 0.0)
        return sent, node

    def _sum(self, parcels: Sequence[Parcel]) -> int:
        return carry_(parcels, self._inside, _ToLeader(), lambda: 1.0, self._staging)

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

    def sent_bytes(
        self, numel: int, rank: int, size: int, dtype: torch.dtype = torch.float32
    ) -> int:
        kept = math.ceil(numel / size) if rank == 0 else 0
        return (numel - kept) * dtype.itemsize

    def launch(self, chunk: Chunk, group: Group, divisor: Divisor, staging: Staging) -> Exchange:
        return Direct(chunk.pieces(), group, divisor, staging, readers=(0,))


@dataclass(frozen=True)
class _FromLeader(Exact):
    """What the first rank holds comes to all."""

    def sent_bytes(
        self, numel: int, rank: int, size: int, dtype: torch.dtype = torch.float32
    ) -> int:
        return (size - 1) * numel * dtype.itemsize if rank == 0 else 0

    def launch(self, chunk: Chunk, group: Group, divisor: Divisor, staging: Staging) -> Exchange:
        return _Copies(chunk.pieces(), group)


class _Copies:
    """Values of the first rank under way to the others, from where they lie."""

    def __init__(self, pieces: Sequence[Tensor], group: Group) -> None:
        nothing: list[Sequence[Tensor]] = [[] for _ in range(group.size)]
        if group.rank == 0:
            self._work: Work = group.all_to_all([pieces] * group.size, nothing)
        else:
            self._work = group.all_to_all(nothing, [pieces, *nothing[1:]])

    def turn(self) -> None:
        return None

    def wait(self) -> None:
        self._work.wait()
