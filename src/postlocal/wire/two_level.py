"""Means over two levels: exact sums within nodes, another wire between them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from postlocal.checks import settle, text
from postlocal.codec import Codec
from postlocal.comm.group import Group, Work
from postlocal.comm.groups import LevelGroups
from postlocal.tensors import weigh_
from postlocal.wire.api import Divisor, Leg, Reducer, Tensors, Weights, Wire, is_wire
from postlocal.wire.chunks import Chunk, Staging, WeightedTensor, Weighting, sent_as
from postlocal.wire.exact import ExactExchange, exact, shard_numel
from postlocal.wire.mean import Exchange, StatelessReducer, chunk_legs, weight_of, weighted_mean_


@dataclass(frozen=True)
class two_level(Wire):
    """Sums in fp32 within the groups of a level, another wire between their first ranks.

    What is lossy, or slow, is done once a node: contributions are summed at the node's first rank,
    the first ranks of all nodes take the mean, and broadcast it within their nodes. Nodes may
    differ in size. Tensors of 16 bits are summed in fp32 copies, of all of them at once.

    Where everybody is in one group of the level, or the mean is taken within such a group, nothing
    is left between, and the mean is that of `exact`: identical replicas stay as they are.

    The residuals of a lossy wire between are a node's, at its first rank. They are not dropped for
    one replica, since contributions of weight 0 have never been in them; only those of a replica
    that is a node by itself are.

    `payload_bytes` is what a first rank sends between nodes, where each rank is a node.

    Args:
        between: how values are sent between the first ranks of groups.
        level: whose groups are summed in fp32.

    Raises:
        TypeError: if ``between`` is no wire, or ``level`` no string.

    Example:
        >>> from postlocal.wire import bf16
        >>> two_level(bf16(), level="node").levels
        frozenset({'node'})
    """

    between: Wire
    level: str = "node"

    def __post_init__(self) -> None:
        settle(self, between=is_wire, level=text)

    @property
    def lossy(self) -> bool:
        return self.between.lossy

    @property
    def codecs(self) -> Sequence[Codec]:
        return self.between.codecs

    @property
    def levels(self) -> frozenset[str]:
        return self.between.levels | {self.level}

    @property
    def keeps_residuals(self) -> bool:
        return self.between.keeps_residuals

    def messages(self, tensors: Tensors, groups: LevelGroups, level: str) -> Sequence[Leg]:
        leaders, inner = groups.leaders(self.level), self._inner_level(groups, level)
        inside = groups[inner]
        if inside.size == groups[level].size:
            return exact().messages(tensors, groups, inner)
        wide = {name: _widened(tensor) for name, tensor in tensors.items()}
        weights = [torch.empty(len(wide))] if self.lossy else []
        to_leader = chunk_legs([*wide.values(), *weights], inside, _ToLeader(), inner)
        between = self.between.messages(wide, leaders, level) if inside.rank == 0 else ()
        from_leader = chunk_legs(wide.values(), inside, _FromLeader(), inner)
        return *to_leader, *between, *from_leader

    def payload_bytes(self, numel: int, size: int, dtype: torch.dtype = torch.float32) -> int:
        return self.between.payload_bytes(numel, size, dtype)

    def open(self, groups: LevelGroups, level: str, staging: Staging | None = None) -> Reducer:
        staging = staging or Staging()
        leaders = groups.leaders(self.level)
        inside = groups[self._inner_level(groups, level)]
        between = self.between.open(leaders, level, staging)
        if inside.size == groups[level].size:
            return StatelessReducer(exact(), inside, staging)
        return TwoLevelReducer(groups[level], inside, between, staging, weighs=self.lossy)

    def _inner_level(self, groups: LevelGroups, level: str) -> str:
        return min(self.level, level, key=groups.levels.index)


class TwoLevelReducer:
    """A reducer over two levels.

    Args:
        group: whose mean is taken.
        inside: this rank's part of it, whose first rank leads.
        between: reduces between leaders.
        staging: memory for what is sent.
        weighs: whether nodes' weights are sent too: residuals between are for a weight of 1.
    """

    def __init__(
        self, group: Group, inside: Group, between: Reducer, staging: Staging, *, weighs: bool
    ) -> None:
        self.group = group
        self._inside = inside
        self._leads = inside.rank == 0
        self._between = between
        self._staging = staging
        self._weighs = weighs

    def mean_(
        self, tensors: Tensors, divisor: Divisor | None = None, weights: Weights | None = None
    ) -> int:
        wide = {name: tensor.to(sent_as(tensor.dtype)) for name, tensor in tensors.items()}
        sent, node = self._reduce_to_leader(wide, weights)
        # Asked on all ranks: what it may raise, such as a disagreement, all have to hear.
        total = float(self.group.size) if divisor is None else divisor()
        if self._leads:
            sent += self._between.mean_(wide, lambda: total, node)
        mean = [WeightedTensor(tensor) for tensor in wide.values()]
        sent += weighted_mean_(mean, self._inside, _FromLeader(), lambda: 1.0, self._staging)
        for name, tensor in tensors.items():
            if wide[name] is not tensor:
                tensor.copy_(wide[name])
        return sent

    def drop_residuals(self, names: Iterable[str] | None = None) -> None:
        if self._inside.size == 1:
            self._between.drop_residuals(names)

    def _reduce_to_leader(
        self, wide: Tensors, weights: Weights | None
    ) -> tuple[int, Weights | None]:
        """Give the leader the node's weighted sums, or its means and their weights."""
        own = [weight_of(name, weights) for name in wide]
        sums = [
            WeightedTensor(tensor, weighting=Weighting(weight))
            for tensor, weight in zip(wide.values(), own, strict=True)
        ]
        if not self._weighs:
            return self._sum(sums), None
        totals = torch.tensor(own, device=next((t.device for t in wide.values()), None))
        sent = self._sum([*sums, WeightedTensor(totals)])
        if not self._leads:
            return sent, None
        node = dict(zip(wide, totals.tolist(), strict=True))
        for name, total in node.items():
            weigh_([wide[name]], 1 / total if total else 0.0)
        return sent, node

    def _sum(self, tensors: Sequence[WeightedTensor]) -> int:
        return weighted_mean_(tensors, self._inside, _ToLeader(), lambda: 1.0, self._staging)

    def state_dict(self) -> dict[str, Any]:
        return self._between.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._between.load_state_dict(state)


def _widened(tensor: Tensor) -> Tensor:
    """A tensor as it will be sent, without content where it has to be copied."""
    dtype = sent_as(tensor.dtype)
    if tensor.dtype == dtype:
        return tensor
    return torch.empty_like(tensor, dtype=dtype, device="meta")


@dataclass(frozen=True)
class _ToLeader(exact):
    """A reduce-scatter, and a gather of the sums at the first rank; others keep no sums."""

    def legs(self, numel: int, rank: int, size: int, dtype: torch.dtype) -> Sequence[Leg]:
        own, gathered = shard_numel(numel, rank, size), numel - shard_numel(numel, 0, size)
        scatter = Leg((numel - own) * dtype.itemsize, size)
        sent = own * dtype.itemsize if rank else 0
        return scatter, Leg(sent, size, "root", gathered * dtype.itemsize)

    def start(self, chunk: Chunk, group: Group, divisor: Divisor, staging: Staging) -> Exchange:
        return ExactExchange(chunk.pieces(), group, divisor, staging, readers=(0,))


@dataclass(frozen=True)
class _FromLeader(exact):
    """A broadcast of what the first rank holds."""

    def legs(self, numel: int, rank: int, size: int, dtype: torch.dtype) -> Sequence[Leg]:
        everything = (size - 1) * numel * dtype.itemsize
        return (Leg(0 if rank else everything, size, "root", everything),)

    def start(self, chunk: Chunk, group: Group, divisor: Divisor, staging: Staging) -> Exchange:
        return _Broadcast(chunk.pieces(), group)


class _Broadcast:
    """Values of the first rank under way to the others, from where they lie."""

    def __init__(self, pieces: Sequence[Tensor], group: Group) -> None:
        nothing: list[Sequence[Tensor]] = [[] for _ in range(group.size)]
        if group.rank == 0:
            self._work: Work = group.all_to_all([pieces] * group.size, nothing)
        else:
            self._work = group.all_to_all(nothing, [pieces, *nothing[1:]])

    def reduce(self) -> None:
        return None

    def wait(self) -> None:
        self._work.wait()
