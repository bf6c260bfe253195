"""Wires by name, for configuration files and command lines."""

from collections.abc import Callable, Iterator, Mapping

from postlocal import codec
from postlocal.checks import choice
from postlocal.wire.carrier import Wire
from postlocal.wire.error_feedback import error_feedback
from postlocal.wire.power_sgd import powersgd
from postlocal.wire.recipes import Coded, Gathered, bf16, fp16, fp32, gathered, quantised


def int8(block: int = 256) -> Coded:
    """8 bits a value and one scale a block, without error feedback.

    Example:
        >>> int8().payload_bytes(numel=2**20, size=2)
        1064960
    """
    return quantised(codec.int8(block))


def int4(block: int = 256) -> Coded:
    """4 bits a value and one scale a block, without error feedback.

    Example:
        >>> int4().payload_bytes(numel=2**20, size=2)
        540672
    """
    return quantised(codec.int4(block))


def fp8(block: int = 256) -> Coded:
    """Floating point numbers of 8 bits and one scale a block, without error feedback.

    Example:
        >>> fp8().payload_bytes(numel=2**20, size=2)
        1064960
    """
    return quantised(codec.fp8(block))


def fp4(block: int = 256) -> Coded:
    """Floating point numbers of 4 bits and one scale a block, without error feedback.

    Example:
        >>> fp4().payload_bytes(numel=2**20, size=2)
        540672
    """
    return quantised(codec.fp4(block))


def sign(block: int = 256) -> Coded:
    """One bit a value and one magnitude a block; to be wrapped in `error_feedback`.

    Example:
        >>> sign().payload_bytes(numel=2**20, size=2)
        147456
    """
    return quantised(codec.sign(block))


def top_k(k: int = 64, chunk: int = 4096, bits: int = 2) -> Gathered:
    """The greatest ``k`` of each ``chunk`` values, to everybody; to be wrapped in `error_feedback`.

    Example:
        >>> top_k().payload_bytes(numel=2**20, size=2)
        30720
    """
    return gathered(codec.top_k(k, chunk, bits))


def random_k(k: int = 64, chunk: int = 4096, bits: int = 32) -> Gathered:
    """``k`` random ones of each ``chunk`` values, to everybody; to be wrapped in `error_feedback`.

    Example:
        >>> random_k().payload_bytes(numel=2**20, size=2)
        65544
    """
    return gathered(codec.random_k(k, chunk, bits))


NAMED: Mapping[str, Callable[[], Wire]] = {
    "fp32": fp32,
    "bf16": bf16,
    "fp16": fp16,
    "int8": lambda: error_feedback(int8()),
    "int4": lambda: error_feedback(int4()),
    "fp8": lambda: error_feedback(fp8()),
    "fp4": lambda: error_feedback(fp4()),
    "sign": lambda: error_feedback(sign()),
    "top_k": lambda: error_feedback(top_k(), decay=0.95),
    "random_k": lambda: error_feedback(random_k()),
    "powersgd": powersgd,
}
"""Wires by name, as they are meant to be used: below 16 bits a value, with error feedback."""


def codecs(wire: Wire) -> Iterator[codec.Codec]:
    """The codecs within a wire.

    Example:
        >>> from postlocal.wire import relayed
        >>> [codec.block for codec in codecs(relayed(error_feedback(int8(block=64))))]
        [64]
    """
    own = getattr(wire, "codec", None)
    if own is not None:
        yield own
    for within in ("inner", "between"):
        if hasattr(wire, within):
            yield from codecs(getattr(wire, within))


def levels(wire: Wire) -> frozenset[str]:
    """The levels that a wire needs beside the one that it is opened at.

    Example:
        >>> from postlocal.wire import relayed
        >>> levels(relayed(bf16(), level="node")), levels(bf16())
        (frozenset({'node'}), frozenset())
    """
    own = {wire.level} if hasattr(wire, "level") else set()
    within = (getattr(wire, name, None) for name in ("inner", "between"))
    return frozenset(own).union(*(levels(inner) for inner in within if inner is not None))


def named(name: str) -> Wire:
    """A wire by name.

    Args:
        name: one of `NAMED`.

    Raises:
        TypeError: if the name is no string.
        ValueError: if the name is unknown.

    Example:
        >>> named("sign") == error_feedback(sign())
        True
    """
    return NAMED[choice("wire", name, NAMED)]()
