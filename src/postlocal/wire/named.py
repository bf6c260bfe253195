"""Wires by name: what command lines and configuration files call them."""

from collections.abc import Callable, Mapping

import torch

from postlocal import codec
from postlocal.checks import choice
from postlocal.wire.api import Wire
from postlocal.wire.error_feedback import error_feedback
from postlocal.wire.exact import fp32
from postlocal.wire.gathered import gathered
from postlocal.wire.power_sgd import powersgd
from postlocal.wire.quantised import quantised


def bf16() -> quantised:
    """2 bytes a value, 8 bits of precision, the range of fp32; sums are taken in fp32.

    Example:
        >>> bf16().payload_bytes(numel=1000, size=2)
        2000
    """
    return quantised(codec.cast(torch.bfloat16))


def fp16() -> quantised:
    """2 bytes a value, 11 bits of precision; finite ones beyond 65504 are sent as 65504.

    Example:
        >>> fp16().lossy
        True
    """
    return quantised(codec.cast(torch.float16))


def int8(block: int = 256) -> error_feedback:
    """8 bits a value and one scale a block, with error feedback.

    Example:
        >>> int8().payload_bytes(numel=2**20, size=2)
        1064960
    """
    return error_feedback(quantised(codec.int8(block)))


def int4(block: int = 256) -> error_feedback:
    """4 bits a value and one scale a block, with error feedback.

    Example:
        >>> int4().payload_bytes(numel=2**20, size=2)
        540672
    """
    return error_feedback(quantised(codec.int4(block)))


def fp8(block: int = 256) -> error_feedback:
    """Floating point numbers of 8 bits and one scale a block, with error feedback.

    Example:
        >>> fp8().payload_bytes(numel=2**20, size=2)
        1064960
    """
    return error_feedback(quantised(codec.fp8(block)))


def fp4(block: int = 256) -> error_feedback:
    """Floating point numbers of 4 bits and one scale a block, with error feedback.

    Example:
        >>> fp4().payload_bytes(numel=2**20, size=2)
        540672
    """
    return error_feedback(quantised(codec.fp4(block)))


def sign(block: int = 256) -> error_feedback:
    """One bit a value and one magnitude a block, with error feedback.

    Example:
        >>> sign().payload_bytes(numel=2**20, size=2)
        147456
    """
    return error_feedback(quantised(codec.sign(block)))


def top_k(k: int = 64, chunk: int = 4096, bits: int = 2) -> error_feedback:
    """The greatest ``k`` of each ``chunk`` values, gathered, with error feedback that decays.

    Example:
        >>> top_k().payload_bytes(numel=2**20, size=2), top_k().decay
        (30720, 0.95)
    """
    return error_feedback(gathered(codec.top_k(k, chunk, bits)), decay=0.95)


def random_k(k: int = 64, chunk: int = 4096, bits: int = 32) -> error_feedback:
    """``k`` random ones of each ``chunk`` values, gathered, with error feedback.

    Example:
        >>> random_k().payload_bytes(numel=2**20, size=2)
        65544
    """
    return error_feedback(gathered(codec.random_k(k, chunk, bits)))


NAMED: Mapping[str, Callable[..., Wire]] = {
    make.__name__: make
    for make in (fp32, bf16, fp16, int8, int4, fp8, fp4, sign, top_k, random_k, powersgd)
}
"""Wires by name: those that send less than 16 bits a value have error feedback."""


def named(name: str) -> Wire:
    """A wire by name.

    Args:
        name: one of `NAMED`.

    Raises:
        TypeError: if the name is no string.
        ValueError: if the name is unknown.

    Example:
        >>> named("sign") == error_feedback(quantised(codec.sign()))
        True
    """
    return NAMED[choice("wire", name, NAMED)]()
