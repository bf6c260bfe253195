"""Rules for values at construction: each returns the value it accepts, or raises with its name.

A rule takes the argument's name and the value given. A wrong type is a `TypeError`, a value out of
range a `ValueError`; both quote the name, the rule and the value. What is accepted comes back as a
plain ``int``, ``float``, ``bool`` or ``str``, so that equal values print alike, whichever library
they are from.

Example:
    >>> steps("period", 16)
    16
    >>> steps("period", 1.5)
    Traceback (most recent call last):
    TypeError: period must be a whole number, at least 1 step, got 1.5
"""

import math
import operator
import sys
from collections.abc import Callable, Collection, Mapping
from datetime import timedelta
from functools import partial
from numbers import Real
from typing import Any

Rule = Callable[[str, Any], Any]
Timeout = float | timedelta
"""Seconds, or a `datetime.timedelta`, as torch takes them."""
_LONGEST_SECONDS = 1e7


def count(name: str, value: Any, unit: str, least: int = 1) -> int:
    """A whole number of at least ``least``; booleans are none, nor are floats like 2.0.

    Args:
        name: of the argument.
        value: what was given.
        unit: what is counted, in the singular.
        least: the smallest number accepted.

    Example:
        >>> count("block", 256, "element")
        256
    """
    rule = f"at least {least} {unit}" + ("" if least == 1 else "s")
    number = _integer(value)
    if number is None:
        raise TypeError(f"{name} must be a whole number, {rule}, got {shown(value)}")
    if number < least:
        raise ValueError(f"{name} must be {rule}, got {shown(number)}")
    if number > sys.maxsize:
        raise ValueError(f"{name} must be at most {sys.maxsize} {unit}s, got {shown(number)}")
    return number


def steps(name: str, value: Any, least: int = 1) -> int:
    """A number of steps; see `count`."""
    return count(name, value, "step", least)


def whole(name: str, value: Any) -> int:
    """A whole number of any size and sign, such as a seed."""
    number = _integer(value)
    if number is None:
        raise TypeError(f"{name} must be a whole number, got {shown(value)}")
    return number


def number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
    below: float | None = None,
    finite: bool = True,
    unit: str = "",
) -> float:
    """A real number within bounds.

    Args:
        name: of the argument.
        value: what was given.
        above: it must be greater.
        least: it must be as great.
        most: it must be no greater.
        below: it must be smaller.
        finite: whether infinity is refused; NaN always is.
        unit: of the bounds, for the message.

    Example:
        >>> number("decay", 1, above=0, most=1)
        1.0
    """
    rule = _bounds(above, least, most, below) + (unit and f" {unit}")
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number{rule and ' ' + rule}, got {shown(value)}")
    try:
        real = float(value)
    except OverflowError:
        real = -math.inf if str(value).startswith("-") else math.inf
    within = (
        (above is None or real > above)
        and (least is None or real >= least)
        and (most is None or real <= most)
        and (below is None or real < below)
    )
    if not within or math.isnan(real):
        raise ValueError(f"{name} must be {rule or 'a number'}, got {value}")
    if finite and math.isinf(real):
        raise ValueError(f"{name} must be a finite number{rule and ' ' + rule}, got {value}")
    return real


def flag(name: str, value: Any) -> bool:
    """True or False, of Python's or numpy's."""
    if isinstance(value, bool) or (type(value).__module__ == "numpy" and _dtype(value) == "bool"):
        return bool(value)
    raise TypeError(f"{name} must be True or False, got {shown(value)}")


def text(name: str, value: Any) -> str:
    """A string that is not empty."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {shown(value)}")
    if not value:
        raise ValueError(f"{name} must be a string that is not empty, got {value!r}")
    return value


def choice(name: str, value: Any, choices: Collection[str]) -> str:
    """One of some strings.

    Example:
        >>> choice("order", "random", ("strided", "sequential"))
        Traceback (most recent call last):
        ValueError: order must be one of strided, sequential, got 'random'
    """
    rule = f"{name} must be one of {', '.join(choices)}, got {shown(value)}"
    if not isinstance(value, str):
        raise TypeError(rule)
    if value not in choices:
        raise ValueError(rule)
    return value


def pairs(name: str, value: Any, example: str) -> list[tuple[Any, Any]]:
    """The items of a mapping.

    Args:
        name: of the argument.
        value: what was given.
        example: of what is meant.
    """
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a mapping such as {example}, got {shown(value)}")
    return list(value.items())


def made(name: str, value: Any, needs: Collection[str], example: str) -> Any:
    """A value that has what its protocol asks for, and no class or function that would make one.

    Args:
        name: of the argument.
        value: what was given.
        needs: names of attributes.
        example: an expression that makes such a value.
    """
    # Strings have a method or two of the names that protocols have.
    lacks = [need for need in needs if isinstance(value, str) or not hasattr(value, need)]
    if isinstance(value, type):
        raise TypeError(f"{name} must be a value such as {example}, got {shown(value)}: call it")
    if lacks:
        hint = ": call it" if callable(value) else ""
        raise TypeError(
            f"{name} must be a value such as {example}, got {shown(value)}, which has no "
            f"{lacks[0]}{hint}"
        )
    return value


def function(name: str, value: Any, example: str) -> Any:
    """Something that can be called as it is, and no class.

    Args:
        name: of the argument.
        value: what was given.
        example: an expression that makes such a value.
    """
    if isinstance(value, type):
        raise TypeError(f"{name} must be a value such as {example}, got {shown(value)}: call it")
    if not callable(value):
        raise TypeError(f"{name} must be a function such as {example}, got {shown(value)}")
    return value


def optional(rule: Rule) -> Rule:
    """A rule that lets None pass.

    Example:
        >>> optional(steps)("limit", None) is None
        True
    """

    def check(name: str, value: Any) -> Any:
        return None if value is None else rule(name, value)

    return check


def settle(instance: Any, **rules: Rule) -> None:
    """Put what rules make of its fields in a frozen dataclass.

    Args:
        instance: the value under construction.
        rules: by field.
    """
    for name, rule in rules.items():
        object.__setattr__(instance, name, rule(name, getattr(instance, name)))


def shown(value: Any) -> str:
    """A value as a message quotes it: whole if it is short and plain, or else its kind."""
    if isinstance(value, type):
        return f"the class {value.__qualname__}"
    if hasattr(value, "__qualname__"):
        return f"the function {value.__qualname__}"
    if (
        isinstance(value, int) and value.bit_length() > 256
    ):  # too long for `repr`, from some size on
        return "an integer of more than 77 digits"
    if value is None or isinstance(value, str | Real | complex | list | tuple | dict):
        words = repr(value)
        if len(words) <= 80:
            return words
    return f"a value of type {type(value).__name__}"


def timeout(name: str, value: Any) -> float:
    """The seconds that a rank waits for another: above 0, and at most 1e7, about 16 weeks.

    A `datetime.timedelta` becomes its seconds. Longer ones overflow in torch or in Python, on the
    ranks that come to wait.

    Example:
        >>> timeout("timeout", timedelta(minutes=2))
        120.0
        >>> timeout("timeout", float("inf"))
        Traceback (most recent call last):
        ValueError: timeout must be a finite number above 0 seconds, got inf
    """
    real = value.total_seconds() if isinstance(value, timedelta) else value
    given: float = seconds(name, real)
    if given > _LONGEST_SECONDS:
        raise ValueError(f"{name} must be at most {_LONGEST_SECONDS:g} seconds, got {real}")
    return given


no_steps_or_more: Rule = partial(steps, least=0)
"""A number of steps that may be 0."""
positive: Rule = partial(number, above=0)
"""A finite number above 0."""
seconds: Rule = partial(number, above=0, unit="seconds")
"""A finite number of seconds above 0."""
fraction: Rule = partial(number, least=0, most=1)
"""A number from 0 to 1."""


def _integer(value: Any) -> int | None:
    """An integer of Python, numpy or torch as Python's; None for anything else."""
    if isinstance(value, bool) or _dtype(value) == "bool":
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _dtype(value: Any) -> str:
    return str(getattr(value, "dtype", "")).removeprefix("torch.")


def _bounds(
    above: float | None, least: float | None, most: float | None, below: float | None
) -> str:
    if least is not None and most is not None:
        return f"from {least} to {most}"
    bounds = {"above": above, "at least": least, "at most": most, "below": below}
    return " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)
