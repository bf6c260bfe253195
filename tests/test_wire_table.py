"""The table of bytes in the documentation is what wires predict."""

import re
from pathlib import Path

import pytest

from postlocal import wire

PAGE = Path(__file__).parents[1] / "docs" / "wire.md"
ROW = re.compile(
    r"^\| `(\w+)` \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+)( \(W - 1\))? \|$", re.M
)
ROWS = {name: columns for name, *columns in ROW.findall(PAGE.read_text())}
NUMEL = 2**24


def test_every_named_wire_has_a_row() -> None:
    assert list(ROWS) == list(wire.NAMED)


@pytest.mark.parametrize("name", wire.NAMED)
def test_a_row_holds_bytes_a_parameter(name: str) -> None:
    *sizes, many, factor = ROWS[name]
    recipe = wire.named(name)
    predicted = [f"{recipe.payload_bytes(NUMEL, size) / NUMEL:.3g}" for size in (2, 4, 8)]
    assert sizes == predicted
    ranks = 2**12
    at_most = recipe.payload_bytes(NUMEL, ranks) / NUMEL
    assert many == f"{at_most / (ranks - 1 if factor else 1):.3g}"
