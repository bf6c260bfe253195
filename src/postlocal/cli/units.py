"""Quantities with units, as written on a command line."""

import math
import re
from collections.abc import Callable

_THOUSANDS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}
_BITS = {"bit": 1.0, "b": 1.0, "B": 8.0}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_DURATIONS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_MOST = 1e18
_NUMBER = r"(\d+\.?\d*(?:e[+-]?\d+)?)\s*"


def parse_count(text: str, name: str) -> int:
    """A whole number, such as ``350M``.

    Raises:
        ValueError: naming the option, what it got and what it takes.

    Example:
        >>> parse_count("1e9", "parameters"), parse_count("1.5B", "parameters")
        (1000000000, 1500000000)
    """
    found = re.fullmatch(_NUMBER + "([kKmMgGbBtT]?)", text.strip())
    if not found:
        raise ValueError(f"{name} must be a number such as 1e9, 350M or 7B, got {text!r}")
    count = float(found[1]) * _THOUSANDS[found[2].lower()]
    if count > _MOST:
        raise ValueError(f"{name} must be at most {_MOST:g}, got {text!r}")
    return round(count)


def parse_bandwidth(text: str, name: str = "bandwidth") -> float:
    """bit/s; ``b`` is a bit, ``B`` a byte.

    Raises:
        ValueError: naming the option, what it got and what it takes.

    Example:
        >>> parse_bandwidth("100Mbit"), parse_bandwidth("12.5 MB/s")
        (100000000.0, 100000000.0)
    """
    found = re.fullmatch(_NUMBER + "([kKmMgGtT]?)(bit|b|B)(?:/s|ps)?", text.strip())
    if not found or not 0 < float(found[1]) < math.inf:
        raise ValueError(
            f"{name} must be above 0 and have a unit, such as 100Mbit, 10Gbit/s or 1.2GB/s, "
            f"got {text!r}"
        )
    return float(found[1]) * _THOUSANDS[found[2].lower()] * _BITS[found[3]]


def parse_latency(text: str) -> float:
    """Seconds.

    Raises:
        ValueError: with what it takes.

    Example:
        >>> parse_latency("20ms"), parse_latency("0")
        (0.02, 0.0)
    """
    found = re.fullmatch(_NUMBER + "(s|ms|us)?", text.strip())
    if not found or float(found[1]) == math.inf or (found[2] is None and float(found[1])):
        raise ValueError(f"latency must have a unit, such as 20ms, 50us or 0.1s, got {text!r}")
    return float(found[1]) * _SECONDS[found[2] or "s"]


def parse_duration(text: str, name: str) -> float:
    """Seconds, from a time of seconds, minutes, hours or days.

    Raises:
        ValueError: naming the option, what it got and what it takes.

    Example:
        >>> parse_duration("90s", "away"), parse_duration("1.5h", "away")
        (90.0, 5400.0)
    """
    found = re.fullmatch(_NUMBER + "([smhd])", text.strip())
    if not found or float(found[1]) == math.inf:
        raise ValueError(f"{name} must have a unit, such as 90s, 30m, 2h or 7d, got {text!r}")
    return float(found[1]) * _DURATIONS[found[2]]


def parse_shares(text: str, parse: Callable[[str], float]) -> list[tuple[float, float]]:
    """``value:share`` pairs, or one value with a share of 1.

    Raises:
        ValueError: if a part is neither, or of no value that ``parse`` takes.

    Example:
        >>> parse_shares("10Mbit:0.25,1Gbit:0.75", parse_bandwidth)
        [(10000000.0, 0.25), (1000000000.0, 0.75)]
    """
    if ":" not in text:
        return [(parse(text), 1.0)]
    pairs = [part.partition(":") for part in text.split(",")]
    if not all(re.fullmatch(_NUMBER, share) for _, _, share in pairs):
        raise ValueError(f"shares must be value:share pairs such as 10Mbit:0.1, got {text!r}")
    return [(parse(value), float(share)) for value, _, share in pairs]


def by_level(text: str, parse: Callable[[str], float]) -> dict[str, float]:
    """``level=value`` pairs, or one value for the level ``"world"``.

    Raises:
        ValueError: if a part is neither, or of no value that ``parse`` takes.

    Example:
        >>> by_level("node=100Gbit,world=1Gbit", parse_bandwidth)
        {'node': 100000000000.0, 'world': 1000000000.0}
    """
    if "=" not in text:
        return {"world": parse(text)}
    pairs = [part.partition("=") for part in text.split(",")]
    for level, equals, _ in pairs:
        if not (level.strip() and equals):
            raise ValueError(f"levels must be level=value pairs such as node=1ms, got {text!r}")
    return {level.strip(): parse(value) for level, _, value in pairs}
