"""Which parts of the parameters are synchronized on their own.

A **fragment** is a set of whole layers. Sent one after the other, spread over the round, fragments
need a fraction of the network's peak rate; applied some steps after they were sent, they need not
be waited for (Streaming DiLoCo, arXiv 2501.18512).

**Layers** are the children of the model's outermost lists of modules (`torch.nn.ModuleList`,
`torch.nn.Sequential`): the blocks of a transformer, the blocks of a ResNet's stages.

Example:
    >>> from torch import nn
    >>> model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(4)))
    >>> sizes = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    >>> streaming(count=2).split(model, sizes)
    (('0.weight', '2.weight'), ('1.weight', '3.weight'))
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import accumulate, combinations, pairwise
from typing import Any, Literal, get_args

from torch import nn

from postlocal.checks import choice, count, flag, fraction, no_steps_or_more, settle, shown

Order = Literal["strided", "sequential"]
Names = tuple[str, ...]


@dataclass(frozen=True)
class Fragments:
    """A way to cut parameters into parts; `whole` and `streaming` make one.

    Args:
        count: number of fragments, at least 1.
        order: how layers are dealt to fragments.
        delay: steps between sending a fragment and applying the result, at least 0.
        mix: share of the local value that is kept where the result is applied, from 0 to 1.
        layers: prefixes of the layers' names; None: found in the model.
        keep_delayed_steps: whether the steps taken during the delay are kept on top of the result.

    Raises:
        TypeError: if an argument is of another type.
        ValueError: if an argument is out of its range, or two layers hold each other.
    """

    count: int = 1
    order: Order = "strided"
    delay: int = 0
    mix: float = 0.0
    layers: Sequence[str] | None = None
    keep_delayed_steps: bool = False

    def __post_init__(self) -> None:
        settle(
            self, count=is_count, order=partial(choice, choices=get_args(Order)), mix=fraction,
            delay=no_steps_or_more, keep_delayed_steps=flag, layers=_prefixes,
        )  # fmt: skip
        if self.keep_delayed_steps and not self.delay:
            raise ValueError(
                "keep_delayed_steps needs a delay of at least 1 step, got 0: a result that is "
                "applied at once loses no step; leave keep_delayed_steps out"
            )
        if self.layers is not None:
            _check_apart(self.layers)

    def __repr__(self) -> str:
        """The call that makes it."""
        if self == Fragments():
            return "whole()"
        values = (f"{each.name}={getattr(self, each.name)!r}" for each in fields(self))
        return f"streaming({', '.join(values)})"

    @property
    def streams(self) -> bool:
        """Whether parameters come in parts, late, or mixed, so that replicas always differ."""
        return self.count > 1 or self.delay > 0 or self.mix > 0

    def split(self, model: nn.Module, sizes: Mapping[str, int]) -> tuple[Names, ...]:
        """Names of the parameters of each fragment, in the model's order.

        Args:
            model: the user's own module, without wrappers.
            sizes: name of each trained parameter, tied ones once -> its bytes.

        Raises:
            ValueError: if the model cannot be cut in this way.
        """
        layers, others = _owners(model, sizes, self.layers)
        if self.count > max(1, len(layers)):  # one fragment takes everything, layers or none
            raise ValueError(
                f"count must be at most the number of layers: got {self.count} fragments of "
                f"{len(layers)} layers; lower count, or name smaller modules in layers="
            )
        weights = [_total(sizes, layer) for layer in layers]
        parts = self._deal(layers, weights)
        loads = [_total(sizes, part) for part in parts]
        for other in sorted(others, key=lambda names: -_total(sizes, names)):
            lightest = loads.index(min(loads))
            parts[lightest] |= set(other)
            loads[lightest] += _total(sizes, other)
        return tuple(tuple(name for name in sizes if name in part) for part in parts)

    def _deal(self, layers: Sequence[Names], weights: Sequence[int]) -> list[set[str]]:
        if self.order == "strided":
            hands = [layers[part :: self.count] for part in range(self.count)]
        else:
            cuts = _cuts(weights, self.count)
            hands = [layers[start:end] for start, end in pairwise(cuts)]
        return [{name for layer in hand for name in layer} for hand in hands]


def whole() -> Fragments:
    """One part, applied at once: all parameters are synchronized together.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> whole().split(model, {"weight": 8, "bias": 4})
        (('weight', 'bias'),)
    """
    return Fragments()


def streaming(
    count: int,
    order: Order = "strided",
    delay: int = 1,
    mix: float = 0.5,
    layers: Sequence[str] | None = None,
    keep_delayed_steps: bool = False,
) -> Fragments:
    """Fragments of layers, each sent at its own step (Streaming DiLoCo, arXiv 2501.18512).

    What belongs to no layer, such as an embedding or a head, goes to the lightest fragments, the
    largest first.

    Args:
        count: number of fragments, at least 1 and at most the number of layers. The paper has 3
            layers a fragment.
        order: ``"strided"`` puts layer ``i`` in fragment ``i % count``; ``"sequential"`` makes
            runs of neighbouring layers, of about equal bytes.
        delay: steps between sending a fragment and applying the result (tau in the paper, which
            goes up to 5), at least 0.
        mix: share of the local value that is kept where the result is applied (alpha in the
            paper), from 0 to 1.
        layers: prefixes of names, such as ``"blocks.0"``, in order; None: found in the model.
        keep_delayed_steps: whether what a replica did during the delay, of at least 1 step, is
            added to the result, so that no step is lost, as in Delayed Gradient Averaging (Zhu et
            al., NeurIPS 2021). It takes memory for one more fp32 copy of each fragment under way.

    Raises:
        TypeError: if an argument is of another type.
        ValueError: if an argument is out of its range, or two layers hold each other.

    Example:
        >>> streaming(count=3, delay=2)
        streaming(count=3, order='strided', delay=2, mix=0.5, layers=None, keep_delayed_steps=False)
    """
    return Fragments(count, order, delay, mix, layers, keep_delayed_steps)


is_count = partial(count, unit="fragment")
"""The rule for a number of fragments."""


def are_fragments(name: str, value: Any) -> Any:
    """The rule for an argument that takes fragments.

    Raises:
        TypeError: if it is none, with what to pass instead.
    """
    if isinstance(value, Fragments):
        return value
    hint = ": call it" if callable(value) else ""
    raise TypeError(
        f"{name} must be a value such as fragments.streaming(count=4), got {shown(value)}{hint}"
    )


def modules(
    model: nn.Module, names: Collection[str], layers: Sequence[str] | None = None
) -> tuple[Names, ...]:
    """The layers, and the modules outside of all layers, that a set of parameters consists of.

    Args:
        model: the user's own module, without wrappers.
        names: of parameters, each in exactly one of the tuples that are returned.
        layers: as in `streaming`.

    Raises:
        ValueError: if one of ``layers`` holds none of the model's parameters.

    Example:
        >>> body = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> model = nn.ModuleDict({"body": body, "head": nn.Linear(2, 1)})
        >>> modules(model, ["body.1.weight", "head.weight", "head.bias"])
        (('body.1.weight',), ('head.weight', 'head.bias'))
    """
    every = dict.fromkeys([*names, *(name for name, _ in model.named_parameters())])
    found, others = _owners(model, every, layers)
    wanted = set(names)
    cut = (tuple(name for name in owner if name in wanted) for owner in (*found, *others))
    return tuple(names for names in cut if names)


def _owners(
    model: nn.Module, names: Iterable[str], layers: Sequence[str] | None
) -> tuple[list[Names], list[Names]]:
    """Names by layer; then, by the largest modules that hold no layer, those of no layer."""
    prefixes = _found(model) if layers is None else layers
    held: dict[str, list[str]] = {prefix: [] for prefix in prefixes}
    above = {start for prefix in prefixes for start in _starts(prefix) if start != prefix}
    others: dict[str, list[str]] = {}
    for name in names:
        starts = list(_starts(name))
        layer = next((start for start in starts if start in held), None)
        if layer is not None:
            held[layer].append(name)
        else:
            owner = next(start for start in starts if start not in above)
            others.setdefault(owner, []).append(name)
    empty = [prefix for prefix, owned in held.items() if not owned]
    if layers is not None and empty:
        raise ValueError(
            f"layers must be prefixes of names of trained parameters, tied ones under their first "
            f"name; got {empty[0]!r}, which holds none"
        )
    return [tuple(owned) for owned in held.values() if owned], [*map(tuple, others.values())]


def _found(model: nn.Module) -> list[str]:
    """Prefixes of the layers: children of the outermost lists, or, with no list, of the model.

    A layer that holds more than half of the parameters, as in ``Sequential(embedding, encoder,
    head)``, is looked into in its turn.
    """
    half = _numel(model) / 2
    return list(_layers(model, "", half)) or [name for name, _ in model.named_children()]


def _layers(module: nn.Module, prefix: str, half: float) -> Iterator[str]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            yield from _layers(child, f"{path}.", half)
        elif _numel(child) > half:
            yield from list(_layers(child, f"{path}.", half)) or [path]
        else:
            yield path


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _starts(name: str) -> Iterator[str]:
    """The prefixes of a dotted name, from the shortest to itself."""
    return accumulate(name.split("."), lambda start, part: f"{start}.{part}")


def _prefixes(name: str, value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a list of names, such as ['blocks.0'], got {shown(value)}")
    prefixes = tuple(value)
    for prefix in prefixes:
        if not isinstance(prefix, str):
            raise TypeError(f"{name} must be names, such as 'blocks.0', got {shown(prefix)}")
    return prefixes


def _check_apart(layers: Sequence[str]) -> None:
    for first, second in combinations(layers, 2):
        if f"{first}.".startswith(f"{second}.") or f"{second}.".startswith(f"{first}."):
            raise ValueError(
                f"layers must not hold each other, got {first!r} and {second!r}: name one of them"
            )


def _total(sizes: Mapping[str, int], names: Iterable[str]) -> int:
    return sum(sizes[name] for name in names)


def _cuts(weights: Sequence[int], count: int) -> list[int]:
    """Where runs of about equal weight begin, and the end; no run is empty."""
    sums = list(accumulate(weights, initial=0))
    cuts = [0]
    for part in range(1, count):
        room = range(cuts[-1] + 1, len(weights) - count + part + 1)
        cuts.append(min(room, key=lambda cut: abs(count * sums[cut] - part * sums[-1])))
    return [*cuts, len(weights)]
