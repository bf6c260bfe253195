"""The floor plan of the package in figures: rooms, layers, import arrows, sizes of functions.

    python -m tools.house [ROOT]

A room is a module or a package directly within ``src/postlocal``. The layers are ``ROWS`` of
``tests/test_architecture.py``, from the lowest on. Nothing is imported: sources are read as syntax
trees. So ROOT can be any state of the repository, such as one that ``git archive`` wrote.
"""

import ast
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = "postlocal"
SURFACE = {"__init__", "__main__"}
"""Rooms that only re-export; they may import every other one, and are left out of the arrows."""

Rows = Sequence[set[str]]
Arrow = tuple[str, str]
"""The room that imports, and the room that is imported."""


def room_of(file: Path, source: Path) -> str:
    """The module, or the package within ``source``, that a file belongs to."""
    return file.relative_to(source).parts[0].removesuffix(".py")


def imports_of(file: Path) -> set[str]:
    """The rooms that a file imports, at its top or within a function.

    Names that ``from postlocal import ...`` takes may also be those that the package re-exports.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        found.update(name for name in _imported(node) if name.startswith(f"{PACKAGE}."))
    return {name.split(".")[1] for name in found}


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module == PACKAGE:
        return [f"{PACKAGE}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    return []


def arrows(source: Path) -> set[Arrow]:
    """Every pair of rooms of which the first imports the second."""
    files = sorted(source.rglob("*.py"))
    rooms = {room_of(file, source) for file in files}
    found = {(room_of(file, source), name) for file in files for name in imports_of(file) & rooms}
    return {(one, other) for one, other in found if one != other and one not in SURFACE}


def rows_in(file: Path) -> Rows:
    """The sets of the tuple ``ROWS`` that a file assigns.

    Raises:
        ValueError: if it assigns none.
    """
    for node in ast.parse(file.read_text()).body:
        match node:
            case ast.Assign(targets=[ast.Name(id="ROWS")], value=ast.Tuple(elts=rows)):
                return [set(_texts(row)) for row in rows]
    raise ValueError(f"{file} must assign the layers to ROWS, as a tuple of sets of names")


def _texts(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def upward(rows: Rows, found: Iterable[Arrow]) -> list[Arrow]:
    """The arrows that do not lead to a lower row.

    Example:
        >>> upward([{"errors"}, {"wire"}], [("wire", "errors"), ("errors", "wire")])
        [('errors', 'wire')]
    """
    row_of = {room: index for index, row in enumerate(rows) for room in row}
    return sorted(arrow for arrow in found if row_of[arrow[1]] >= row_of[arrow[0]])


def cycle(found: Iterable[Arrow]) -> list[str]:
    """Rooms that import each other in a circle; none if there is no circle.

    Example:
        >>> cycle([("a", "b"), ("b", "c")])
        []
        >>> sorted(set(cycle([("a", "b"), ("b", "a")])))
        ['a', 'b']
    """
    graph: dict[str, set[str]] = {}
    for one, other in found:
        graph.setdefault(one, set()).add(other)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def bodies(source: Path) -> dict[str, int]:
    """Lines of each function's body, by place and name; its docstring does not count."""
    return {
        f"{file.relative_to(source)}:{node.lineno} {node.name}": _lines(node)
        for file in sorted(source.rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def _lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    documented = ast.get_docstring(function) is not None
    body = function.body[1:] if documented else function.body
    if not body:  # nothing but a docstring
        return 0
    last = body[-1]
    return (last.end_lineno or last.lineno) - body[0].lineno + 1


@dataclass(frozen=True)
class House:
    """What there is to say of a state of the package.

    Attributes:
        modules: number of files.
        entries: modules and packages at the top level.
        rows: the layers, from the lowest on.
        arrows: between rooms.
        bodies: lines of functions, by place and name.
    """

    modules: int
    entries: Sequence[str]
    rows: Rows
    arrows: set[Arrow]
    bodies: Mapping[str, int]

    def __str__(self) -> str:
        wrong = [f"{one} imports {other}" for one, other in upward(self.rows, self.arrows)]
        longest = max(self.bodies, key=lambda name: self.bodies[name])
        return "\n".join(
            [
                f"modules            {self.modules}",
                f"top-level entries  {len(self.entries)}",
                f"layers             {len(self.rows)}",
                f"import arrows      {len(self.arrows)}",
                f"upward imports     {', '.join(wrong) or 'none'}",
                f"cycles             {' -> '.join(cycle(self.arrows)) or 'none'}",
                f"functions          {len(self.bodies)}",
                f"longest body       {self.bodies[longest]} lines, {longest}",
                f"median body        {statistics.median(self.bodies.values()):g} lines",
            ]
        )


def survey(root: Path) -> House:
    """The house that stands in a copy of the repository."""
    source = root / "src" / PACKAGE
    files = sorted(source.rglob("*.py"))
    return House(
        modules=len(files),
        entries=sorted({room_of(file, source) for file in files}),
        rows=rows_in(root / "tests" / "test_architecture.py"),
        arrows=arrows(source),
        bodies=bodies(source),
    )


def main() -> None:
    """Print the figures of this repository, or of the copy that is named."""
    print(survey(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1]))


if __name__ == "__main__":
    main()
