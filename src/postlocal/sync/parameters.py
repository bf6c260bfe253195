"""The tensors of one replica, in the order and under the names that all ranks share."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from postlocal.sync import supported_tensors
from postlocal.sync.supported_wrappers import ignored, unwrap
from postlocal.tensors import flat_view
from postlocal.torch_versions import tensors_of, version_of


class Replica:
    """What has to be equal where replicas agree.

    Tied tensors, the same memory under several names, count once, under their first name.

    Args:
        model: a module, possibly wrapped by DistributedDataParallel or torch.compile.

    Attributes:
        module: the user's own, inside what wraps it.
        parameters: those that require grad, by name. Fixed from here on, whether or not a
            parameter has a gradient, or still requires one, at some moment.
        frozen: the other parameters.
        buffers: all buffers, as of the latest `refresh`.
        own: parameters and buffers that DistributedDataParallel was told to ignore: they belong to
            this rank, are in none of the above, and may have other shapes on other ranks.
        moving: names of the frozen parameters that the loop writes to, such as averages of others.

    Raises:
        ValueError: if nothing requires grad, or tensors overlap in memory without being the same.
        TypeError: if a parameter or a buffer is one that `supported_tensors.check` refuses.
    """

    def __init__(self, model: nn.Module) -> None:
        self.module = unwrap(model)
        supported_tensors.check(self.module)
        self._ignored = ignored(model)
        parameters = self._named_parameters()
        self.parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        self.frozen = {name: p for name, p in parameters.items() if not p.requires_grad}
        self.buffers = self._named_buffers()
        self.moving: set[str] = set()
        if not self.parameters:
            raise ValueError("model must have a parameter that requires grad, got none")
        _check_apart(parameters)
        self._kinds = {name: _kind(tensor) for name, tensor in self.tensors.items()}
        self.mark()

    def __str__(self) -> str:
        numel = sum(parameter.numel() for parameter in self.parameters.values())
        return (
            f"{len(self.parameters)} parameters of {numel:,} values, {len(self.frozen)} frozen, "
            f"{len(self.buffers)} buffers"
        )

    @property
    def own(self) -> dict[str, Tensor]:
        named = (*self.module.named_parameters(), *self.module.named_buffers())
        return {name: tensor for name, tensor in named if name in self._ignored}

    def mark(self) -> None:
        """Take the present values of frozen parameters as those that are not written to."""
        self._places = _places(self.module)
        self._samples = _Samples(self.frozen)
        self._sampled = self._samples.read()
        self._written = _versions(self.frozen)

    def refresh(self) -> str | None:
        """Follow tensors that were moved in memory, and buffers that were assigned anew.

        Returns:
            None; or, in words, a change of the model that cannot be followed, and the fix. It
            takes some microseconds for each tensor.
        """
        places = _places(self.module)
        if places != self._places:
            problem = self._follow()
            if problem is not None:
                return f"{problem}; {_FIX}"
            self._places = places
            self._samples = _Samples(self.frozen)
        self.moving |= self._samples.differing(self._sampled)
        # A loop may write to other values than those that are looked at.
        self.moving |= {name for name, _ in _versions(self.frozen) - self._written}
        return None

    def every_parameter(self) -> Iterator[Tensor]:
        """All parameters of the module, whether or not they are synchronized, each once."""
        return self.module.parameters()

    @property
    def averaged(self) -> dict[str, Tensor]:
        """What is averaged beside the parameters: buffers, and frozen parameters that move."""
        moving = {name: self.frozen[name].detach() for name in self.frozen if name in self.moving}
        return self.buffers | moving

    @property
    def compared(self) -> dict[str, Tensor]:
        """What is equal on all ranks where replicas agree, whatever ranks did to their buffers."""
        return self.parameters | self.frozen

    def _named_parameters(self) -> dict[str, Tensor]:
        return once(self._shared(self.module.named_parameters()))

    def _named_buffers(self) -> dict[str, Tensor]:
        return once(self._shared(self.module.named_buffers()))

    def _shared(self, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        return ((name, tensor) for name, tensor in named if name not in self._ignored)

    def _follow(self) -> str | None:
        parameters = self._named_parameters()
        buffers = self._named_buffers()
        problem = self._other_kind(parameters | buffers) or self._other_object(parameters)
        if problem is None:
            self.buffers = {name: buffers[name] for name in self.buffers}
        return problem

    def _other_kind(self, present: Mapping[str, Tensor]) -> str | None:
        for name in self.tensors:
            if name not in present:
                return f"{name!r} was in the model at attach and is not any more"
        for name, tensor in present.items():
            hint = "" if isinstance(tensor, nn.Parameter) else _CACHE
            if name not in self._kinds:
                new = "was not in the model at attach, or shared memory with another"
                return f"{name!r} {new}{hint}"
            if (kind := _kind(tensor)) != self._kinds[name]:
                return f"{name!r} was {self._kinds[name]} at attach and is {kind} now{hint}"
        return None

    def _other_object(self, present: Mapping[str, Tensor]) -> str | None:
        for name, tensor in (self.parameters | self.frozen).items():
            if present.get(name) is not tensor:
                return f"parameter {name!r} is not the object that it was at attach"
            if name in self.frozen and tensor.requires_grad:
                return f"parameter {name!r} requires grad now and did not at attach"
        return None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Everything: parameters, frozen ones and buffers."""
        return self.parameters | self.frozen | self.buffers

    def has_nan_buffer(self) -> bool:
        """Whether a buffer holds NaN; infinities are what masks are made of."""
        return any(bool(torch.isnan(buffer).any()) for buffer in floats(self.averaged.values()))

    def describe(self) -> list[str]:
        """One line a tensor, equal on all ranks that hold the same model."""
        return [
            f"{name}: shape {tuple(tensor.shape)}, stride {tensor.stride()}, {tensor.dtype}, "
            f"{'trained' if tensor.requires_grad else 'not trained'}"
            for name, tensor in self.tensors.items()
        ]


def once(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors by name, those in the same memory once, under their first name."""
    seen = set()
    tensors = {}
    for name, tensor in named:
        place = (_address(tensor), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() == 0 or place not in seen:
            tensors[name] = tensor
            seen.add(place)
    return tensors


def floats(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Those of floating point; complex ones as pairs of floats, in their memory."""
    return [
        torch.view_as_real(tensor) if tensor.is_complex() else tensor
        for tensor in tensors
        if tensor.is_floating_point() or tensor.is_complex()
    ]


def others(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Those of integers and booleans."""
    return [t for t in tensors if not (t.is_floating_point() or t.is_complex())]


_FIX = (
    "call sync.finish() and sync.close() before such a change, and attach again after it, with a "
    "new DistributedDataParallel if there is one"
)
_CACHE = (
    "; a buffer that each rank keeps for itself, such as a cache, is left alone where it was named "
    "before attach in DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, "
    "names)"
)
_SAMPLE = 4  # values of a frozen parameter that are looked at: an average of others moves them all


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}, stride {tensor.stride()}"


def _places(module: nn.Module) -> list[tuple[int, int, bool]]:
    """What changes where a tensor of a module is replaced, moved, frozen or trained."""
    return [
        (id(tensor), tensor.data_ptr(), tensor.requires_grad)
        for layer in module.modules()
        for tensor in tensors_of(layer)
        if tensor is not None
    ]


def _versions(tensors: Mapping[str, Tensor]) -> set[tuple[str, int]]:
    """What changes where a tensor is written to, except through ``.data``."""
    return {(n, version_of(tensor)) for n, tensor in tensors.items() if not tensor.is_inference()}


class _Samples:
    """A few values of each of some tensors, to notice that a loop writes to them."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._views: dict[tuple[torch.dtype, torch.device], dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if tensor.numel():
                kind = tensor.dtype, tensor.device
                self._views.setdefault(kind, {})[name] = _few(tensor.detach())

    def read(self) -> list[Tensor]:
        """The values, as bytes."""
        return [torch.cat([*views.values()]).view(torch.uint8) for views in self._views.values()]

    def differing(self, before: list[Tensor]) -> set[str]:
        """Names of tensors whose values are not those that `read` gave before."""
        found = set()
        for views, then, now in zip(self._views.values(), before, self.read(), strict=True):
            if not torch.equal(then, now):
                sizes = [view.nbytes for view in views.values()]
                pairs = zip(views, torch.split(then, sizes), torch.split(now, sizes), strict=True)
                found |= {name for name, old, new in pairs if not torch.equal(old, new)}
        return found


def _few(tensor: Tensor) -> Tensor:
    """A 1-D view of some values of a tensor, evenly spaced where it has no gaps."""
    flat = flat_view(tensor)
    values = tensor[(0,) * (tensor.dim() - 1)] if flat is None else flat
    return values[:: max(1, values.numel() // _SAMPLE)]


def _check_apart(parameters: dict[str, Tensor]) -> None:
    spans = sorted(
        (_address(tensor), _address(tensor) + _extent(tensor), name)
        for name, tensor in parameters.items()
        if tensor.numel()
    )
    for (_, end, before), (start, _, name) in pairwise(spans):
        if start < end:
            raise ValueError(
                f"parameters {before!r} and {name!r} overlap in memory and are not the same: "
                "give each its own memory"
            )


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr()


def _extent(tensor: Tensor) -> int:
    last = sum(
        (length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return (last + 1) * tensor.element_size()
