"""Runs the arithmetic of blocks over whole tensors: compiled where that pays, else tile by tile.

Both ways give the same bits. Compiled is several times faster; it needs a C++ compiler, and half a
minute when a machine uses a codec for the first time.

The environment variable ``POSTLOCAL_KERNELS`` or `use` chooses:

- ``auto`` (default): compiled after `warm_up`, which `postlocal.attach` calls for models of some
  size; tile by tile before it and where compiling fails, with one warning once that has cost time.
- ``compiled``: compile at the first use; fail if that does not work.
- ``eager``: tile by tile.

Tensors of accelerators go the same way, through the compiler that torch has for them; that is
not tested.
"""

import os
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from postlocal.codec.compiling import CompileError, Kernels, compiled

if TYPE_CHECKING:
    from postlocal.codec.blockwise import Blockwise

Mode = Literal["auto", "compiled", "eager"]

_TILE = 2**17  # elements worked on at a time, that stay in a processor's cache
_FEW = 2**13  # elements for which calling what is compiled does not pay
_CLEAN = "delete postlocal/kernels in $XDG_CACHE_HOME or ~/.cache, or give it room"
_PATIENCE = 2**30  # elements after which the slow way has cost seconds

_lock = threading.Lock()
_mode: Mode | None = None  # None: what the environment says
_loaded: dict[tuple["Blockwise", torch.dtype, str], Kernels | None] = {}
_warned: set[str] = set()  # reasons
_slowly: Counter["Blockwise"] = Counter()  # elements that took the slow way unasked


def use(mode: Mode) -> None:
    """Choose how codecs are run, for the whole process.

    Raises:
        ValueError: if ``mode`` is not one of the choices.

    Example:
        >>> use("fast")
        Traceback (most recent call last):
        ValueError: kernels must be one of auto, compiled, eager, got 'fast'
    """
    global _mode
    _mode = _checked(mode, "kernels")


def warm_up(
    codec: object, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> None:
    """Compile what a codec needs, so that the first synchronization does not wait for it.

    Nothing happens for codecs that are not compiled, or where ``eager`` is chosen.

    Args:
        codec: any.
        dtype: of the values that it will be given.
        device: where they will be.

    Raises:
        RuntimeError: if ``compiled`` is chosen and does not work.
    """
    if _compiles(codec):
        _kernels(codec, dtype, torch.device(device).type)  # type: ignore[arg-type]


def encode(codec: "Blockwise", blocks: Tensor, parameters: Tensor, codes: Tensor) -> None:
    """Write parameters and codes of blocks, shape ``(n, block)``."""
    if kernels := _fast(codec, blocks):
        (measured,) = kernels.encode(blocks, codes)
        parameters[:] = finite_or_nan(measured)
        return
    for first, part in _tiles(blocks):
        measured, codes[part] = codec.quantise(blocks[part].float(), first, codec.block)
        parameters[part] = finite_or_nan(measured)


def finite_or_nan(parameters: Tensor) -> Tensor:
    """Parameters, NaN with the same bits for all that are not finite.

    Example:
        >>> finite_or_nan(torch.tensor([1.0, -torch.inf]))
        tensor([1., nan])
    """
    return torch.where(parameters.isfinite(), parameters, torch.nan)


def decode(codec: "Blockwise", parameters: Tensor, codes: Tensor, blocks: Tensor) -> None:
    """Write what parameters and codes stand for to blocks, shape ``(n, block)``."""
    if kernels := _fast(codec, blocks):
        kernels.decode(parameters, codes, *codec.sections(blocks))
        return
    for _, part in _tiles(blocks):
        numbers, scales = codec.restore(parameters[part], codes[part])
        for section, number in zip(codec.sections(blocks[part]), numbers, strict=True):
            if section.dtype == torch.float32:
                section.copy_(number).mul_(scales)
            else:
                section.copy_(number.float() * scales)


def accumulate(
    codec: "Blockwise", parameters: Tensor, codes: Tensor, blocks: Tensor, weight: Tensor
) -> None:
    """Add what parameters and codes stand for, times a weight, to blocks, shape ``(n, block)``."""
    if kernels := _fast(codec, blocks):
        kernels.accumulate(parameters, codes, *codec.sections(blocks), weight)
        return
    for _, part in _tiles(blocks):
        numbers, scales = codec.restore(parameters[part], codes[part])
        for section, number in zip(codec.sections(blocks[part]), numbers, strict=True):
            section.add_(number.float() * (scales * weight))


def _tiles(blocks: Tensor) -> Iterator[tuple[int, slice]]:
    rows = max(1, _TILE // blocks.shape[1])
    for first in range(0, len(blocks), rows):
        yield first, slice(first, first + rows)


def _fast(codec: "Blockwise", blocks: Tensor) -> Kernels | None:
    if not _compiles(codec) or blocks.numel() < _FEW or len(blocks) < 2:
        return None
    if _chosen() != "auto" or (codec, blocks.dtype, blocks.device.type) in _loaded:
        return _kernels(codec, blocks.dtype, blocks.device.type)
    _slowly[codec] += blocks.numel()
    if _slowly[codec] > _PATIENCE:
        _warn(f"{codec} was not warmed up", "call postlocal.codec.kernels.warm_up before training")
    return None


def _compiles(codec: object) -> bool:
    """Whether a codec is one of the package's, which a compiling process finds by name."""
    kind = type(codec)
    return getattr(codec, "compiled", False) and kind.__module__.startswith("postlocal.codec.")


def _chosen() -> Mode:
    return _mode or _checked(os.environ.get("POSTLOCAL_KERNELS", "auto"), "POSTLOCAL_KERNELS")


def _kernels(codec: "Blockwise", dtype: torch.dtype, device: str) -> Kernels | None:
    """Compiled functions, or None if they are not wanted or cannot be had; made by one thread."""
    mode = _chosen()
    if mode == "eager":
        return None
    key = (codec, dtype, device)
    with _lock:
        if _loaded.get(key) is None and (key not in _loaded or mode == "compiled"):
            _loaded[key] = _compile(codec, dtype, device, mode)
        return _loaded[key]


def _compile(codec: "Blockwise", dtype: torch.dtype, device: str, mode: Mode) -> Kernels | None:
    try:
        return compiled(codec, dtype, device)
    except (CompileError, OSError, RuntimeError) as error:  # torch raises these for bad packages
        if mode == "compiled":
            raise
        _warn(str(error), getattr(error, "remedy", _CLEAN))
        return None


def _warn(reason: str, remedy: str) -> None:
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"codecs run eagerly, with the same results in 2 to 5 times the time: {reason}. For "
            f"the fast way {remedy}; to be without this warning set POSTLOCAL_KERNELS=eager",
            RuntimeWarning,
            stacklevel=2,
        )


def _checked(mode: str, name: str) -> Mode:
    if mode not in get_args(Mode):
        raise ValueError(f"{name} must be one of {', '.join(get_args(Mode))}, got {mode!r}")
    return mode  # type: ignore[return-value]
