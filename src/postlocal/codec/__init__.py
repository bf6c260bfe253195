"""How values become bytes and back: pure tensor math, with sizes known before it runs.

Quantising codecs cut values into blocks that share their parameters, and work on tiles that stay
in a processor's cache, so that a whole tensor passes through memory once each way.
"""

from postlocal.codec.floats import fp4, fp8
from postlocal.codec.integers import affine, int4, int8
from postlocal.codec.plain import cast, exact
from postlocal.codec.protocol import Codec
from postlocal.codec.signs import sign
from postlocal.codec.sparse import random_k, top_k

__all__ = [
    "Codec",
    "affine",
    "cast",
    "exact",
    "fp4",
    "fp8",
    "int4",
    "int8",
    "random_k",
    "sign",
    "top_k",
]
