"""Which tensors of a model can be synchronized: those that cannot are refused by name."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from postlocal.tensors import is_dtensor
from postlocal.torch_versions import GradBucket


def check(model: nn.Module) -> None:
    """Refuse parameters and buffers that have no plain memory, or no mean.

    Args:
        model: the user's own module, without wrappers.

    Raises:
        TypeError: naming the first of them, why, and what to do.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> model.register_buffer("mask", torch.ones(1).expand(4))
        >>> check(model)
        Traceback (most recent call last):
        TypeError: buffer 'mask' is expanded: several of its elements share memory; give it ...
    """
    for name, parameter in model.named_parameters():
        _check("parameter", name, parameter)
        if parameter.is_complex():
            raise TypeError(f"parameter {name!r} is complex: keep it as two real parameters")
        if parameter.requires_grad and parameter.dtype.itemsize < 2:
            raise TypeError(
                f"parameter {name!r} is of {parameter.dtype} and trained: train in 16 bits or more"
            )
    for name, buffer in model.named_buffers():
        _check("buffer", name, buffer)
        if not is_dtensor(buffer) and buffer.dtype not in _MEETING:
            raise TypeError(
                f"buffer {name!r} is of {buffer.dtype}, of which no mean or maximum is taken: keep "
                "it in another dtype, such as torch.int64 or torch.float32"
            )


def check_dense(model: nn.Module) -> None:
    """Refuse embeddings whose gradients are sparse, where gradients are sent as codes.

    Args:
        model: the user's own module, without wrappers.

    Raises:
        TypeError: naming the parameter.
    """
    for name, module in model.named_modules():
        sparse = isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse
        if sparse and module.weight.requires_grad:
            weight = f"{name}.weight" if name else "weight"
            raise TypeError(
                f"parameter {weight!r} has sparse gradients, which only the wire fp32 sends: "
                "make the embedding with sparse=False, or leave gradient_wire at fp32()"
            )


def dense(bucket: GradBucket) -> Tensor:
    """The buffer of a bucket of gradients, which a hook is about to compress.

    Raises:
        TypeError: if the gradients are sparse, with the shape of their parameter.
    """
    buffer = bucket.buffer()
    if buffer.is_sparse:
        raise TypeError(
            f"the gradient of a parameter of shape {tuple(buffer.shape)} is sparse, which no hook "
            "that compresses sends: make the embedding with sparse=False, or take allreduce_hook"
        )
    return buffer


def _check(role: str, name: str, tensor: Tensor) -> None:
    if is_dtensor(tensor):  # a shard has rules of its own
        return
    for odd, reason in _ODD:
        if odd(tensor):
            raise TypeError(f"{role} {name!r} is {reason}")


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether elements may share memory: a step along a dimension ends within narrower ones."""
    reach = 0
    lengths = sorted(
        (stride, length)
        for stride, length in zip(tensor.stride(), tensor.shape, strict=True)
        if length > 1
    )
    for stride, length in lengths:
        if stride <= reach:
            return tensor.numel() > 0
        reach += stride * (length - 1)
    return False


def _is_foreign(tensor: Tensor) -> bool:
    """Whether its values are not in memory of its own dtype, as in some subclasses of tensors."""
    try:
        return tensor.numel() > 0 and tensor.data_ptr() == 0
    except RuntimeError:
        return True


_MEETING = frozenset(
    {
        torch.float64, torch.float32, torch.float16, torch.bfloat16,
        torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz,
        torch.float8_e8m0fnu,
        torch.complex32, torch.complex64, torch.complex128, torch.bool,
        torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32,
    }
)  # fmt: skip
"""Dtypes of buffers, which are averaged, or of which the greatest is taken."""

# In this order: what is asked later may fail on what is refused before.
_ODD: tuple[tuple[Callable[[Tensor], bool], str], ...] = (
    (is_lazy, "not initialized: run the model once before, so that its shape is known"),
    (lambda tensor: tensor.is_meta, "on the meta device: materialize the model first"),
    (lambda tensor: tensor.is_nested, "nested: keep it as one tensor for each length"),
    (lambda tensor: tensor.is_quantized, "quantized: keep integers and scale as two tensors"),
    (
        lambda tensor: tensor.layout != torch.strided,
        "sparse or of another special layout: keep it dense, or its indices and values as two "
        "tensors",
    ),
    (
        lambda tensor: tensor.is_conj() or tensor.is_neg(),
        "a view that is conjugated or negated when it is read: give it .resolve_conj() or "
        ".resolve_neg()",
    ),
    (
        _overlaps_itself,
        "expanded: several of its elements share memory; give it .contiguous()",
    ),
    (_is_foreign, "of a kind that has no memory of its own: keep its parts as plain tensors"),
)
