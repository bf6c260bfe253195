"""Error feedback: what coding loses of values, kept and added to the next ones."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor

from postlocal.codec import Codec
from postlocal.tensors import flat_view, weigh_
from postlocal.wire.chunks import Chunk, Weighting, sent_as


class CompensatedValues:
    """Flat values of a chunk that are sent as codes, and a flat residual, if one is kept.

    A shard that another rank reduces is sent as ``(value + residual) * weight``, and its residual
    is then what was lost over ``weight``, so that it stays valid when the weight changes. The shard
    that this rank reduces loses nothing on the way there. Its residual is what encoding the mean
    lost, and is added to the next mean, whatever weights and divisor. It is stored times the number
    of ranks: where another rank reduces these values next, as in new buckets, it serves as what was
    lost of a contribution.

    Args:
        chunk: its values are changed in place, and its residual is replaced by what is lost now.

    Attributes:
        values: shape ``(n,)``.

    Source: error feedback of workers and of the server, arXiv 1905.05957.
    """

    def __init__(self, chunk: Chunk) -> None:
        self._chunk = chunk
        self.values, self._residual = chunk.pack()
        self._runs: list[tuple[int, int, Weighting]] = []
        start = 0
        for shared, run in groupby(chunk.weightings, key=lambda entry: entry[1]):
            stop = start + sum(numel for numel, _ in run)
            self._runs.append((start, stop, shared))
            start = stop

    def weigh(self, shard: slice) -> Tensor:
        """Values of a shard times their weights."""
        for span, weighting in self._within(shard):
            weigh_([self.values[span]], weighting.weight)
        return self.values[shard]

    def encode(self, shard: slice, payload: Tensor, codec: Codec) -> None:
        """Encode values of a shard plus their residual, times their weights; keep what is lost.

        Each value that another rank reduces is encoded once.

        Args:
            shard: which values.
            payload: uint8, shape ``(codec.nbytes(n, values.dtype),)`` for ``n`` values.
            codec: encodes them.
        """
        codec.encode(self._compensate(shard), payload)
        self._keep_loss(shard, payload, codec)
        self._chunk.residual_left = False

    def _compensate(self, shard: slice) -> Tensor:
        if self._residual is not None:
            for span, weighting in self._within(shard):
                if weighting.drop_residual:
                    self._residual[span].zero_()
                elif weighting.weight:
                    weigh_([self._residual[span]], weighting.decay)
                    self.values[span].add_(self._residual[span])
        return self.weigh(shard)

    def _keep_loss(self, shard: slice, payload: Tensor, codec: Codec) -> None:
        """Keep what the payload of a compensated shard lacks of it, for a weight of 1."""
        if self._residual is None:
            return
        spans = list(self._within(shard))
        waiting = [(span, self._residual[span].clone()) for span, w in spans if not w.weight]
        self._subtract(self._residual, shard, payload, codec)
        for span, weighting in spans:
            if weighting.weight:
                weigh_([self._residual[span]], 1 / weighting.weight)
        for span, residual in waiting:
            self._residual[span].copy_(residual)

    def encode_mean(self, shard: slice, payload: Tensor, codec: Codec, size: int) -> None:
        """Encode a mean of ``size`` ranks plus what earlier ones lost; keep what is lost now."""
        if self._residual is not None:
            for span, weighting in self._within(shard):
                self.values[span].add_(self._residual[span], alpha=weighting.decay / size)
        codec.encode(self.values[shard], payload)
        if self._residual is not None:
            self._subtract(self._residual, shard, payload, codec)
            self._residual[shard].mul_(size)

    def _subtract(self, residual: Tensor, shard: slice, payload: Tensor, codec: Codec) -> None:
        residual[shard].copy_(self.values[shard])
        codec.accumulate(payload, residual[shard], -1.0)

    def _within(self, shard: slice) -> Iterator[tuple[slice, Weighting]]:
        for start, stop, weighting in self._runs:
            first, last = max(start, shard.start), min(stop, shard.stop)
            if first < last:
                yield slice(first, last), weighting


class Residuals:
    """A residual for each tensor, by its name, zeros at first.

    Example:
        >>> residuals = Residuals()
        >>> residuals.of("weight", torch.ones(2, dtype=torch.bfloat16))
        tensor([0., 0.])
        >>> list(residuals.state_dict())
        ['weight']
    """

    def __init__(self) -> None:
        self._residuals: dict[str, Tensor] = {}
        self._loaded: dict[str, Tensor] = {}

    def of(self, name: str, like: Tensor) -> Tensor:
        """The residual of a tensor, of its shape, in the dtype that it is sent in.

        It has the tensor's strides, or is contiguous where the tensor has gaps in memory.

        Raises:
            ValueError: if what was loaded for the name has another shape.
        """
        known = self._residuals.get(name)
        if known is None:
            gaps = flat_view(like.detach()) is None
            layout = torch.contiguous_format if gaps else torch.preserve_format
            known = torch.zeros_like(like, dtype=sent_as(like.dtype), memory_format=layout)
            if name in self._loaded:
                _check_shape(name, self._loaded[name], like)
                known.copy_(self._loaded.pop(name))
            self._residuals[name] = known
        return known

    @property
    def names(self) -> set[str]:
        """Of which tensors there are residuals."""
        return {*self._residuals, *self._loaded}

    def drop(self, names: Iterable[str] | None = None) -> None:
        """Drop residuals; all for None."""
        for name in self.names if names is None else names:
            self._residuals.pop(name, None)
            self._loaded.pop(name, None)

    def state_dict(self) -> dict[str, Tensor]:
        """The residuals, not copied."""
        return self._loaded | self._residuals

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on with copies of what `state_dict` gave."""
        self.drop()
        # They take the strides of their tensors, which a file does not keep, where these come.
        self._loaded = {name: residual.clone() for name, residual in state.items()}


def zero_nonfinite_(residuals: Sequence[Tensor]) -> None:
    """Zero what is not finite: a gradient that overflowed once would be sent for ever.

    Example:
        >>> residuals = [torch.tensor([1.0, torch.inf]), torch.ones(1)]
        >>> zero_nonfinite_(residuals)
        >>> residuals
        [tensor([1., 0.]), tensor([1.])]
    """
    known = [residual for residual in residuals if residual.numel()]
    if known and not torch.stack([residual.norm() for residual in known]).isfinite().all():
        for residual in known:
            residual.nan_to_num_(0.0, 0.0, 0.0)


def _check_shape(name: str, loaded: Tensor, like: Tensor) -> None:
    if loaded.shape != like.shape:
        raise ValueError(
            f"the state that was loaded has shape {tuple(loaded.shape)} for {name!r}, the tensor "
            f"has {tuple(like.shape)}: load the state of the same model"
        )
