"""``postlocal strategies``."""

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, get_args

import typer
from rich.console import Console
from rich.table import Table

from postlocal.checks import choice
from postlocal.expressions import axis_of
from postlocal.strategies import AXIS, NAMED, parameters_of


def strategies(
    name: Annotated[
        str | None,
        typer.Argument(help="Name of one strategy, to explain in full.", show_default="all"),
    ] = None,
) -> None:
    """List the strategies with their arguments, and when to use each.

    A strategy is given as listed, with the arguments to change, as in
    --strategy 'diloco(period=32, wire=int4(), outer=nesterov(0.7, 0.5))'.
    """
    console = Console()
    if name is not None:
        _show(console, Described.of(choice("strategy", name, NAMED)))
    elif console.is_terminal:
        console.print(_table(map(Described.of, NAMED)))
    else:
        for each in map(Described.of, NAMED):
            what = each.what + (each.source and f" ({each.source})")
            for line in (each.signature, f"  {what}", f"  {each.when}"):
                _say(console, line)


@dataclass(frozen=True)
class Described:
    """The documentation of a strategy's function.

    Attributes:
        name: as `postlocal.strategies.NAMED` has it.
        signature: its name and arguments, with defaults.
        what: what it does, in one line.
        source: the paper; empty: there is none.
        when: when to take it.
        more: the paragraphs after that.
        arguments: its own arguments and their meaning.
    """

    name: str
    signature: str
    what: str
    source: str
    when: str
    more: tuple[str, ...]
    arguments: Mapping[str, str]

    @classmethod
    def of(cls, name: str) -> "Described":
        """The documentation of a named strategy."""
        text = inspect.getdoc(NAMED[name]) or ""
        prose, _, listed = text.partition("\nArgs:\n")
        what, when, *more = (_plain(part) for part in prose.strip().split("\n\n"))
        found = re.fullmatch(r"(.*?)(?: \(([^()]*arXiv[^()]*)\))?\.", what)
        assert found is not None, name
        return cls(
            name=name,
            signature=f"{name}({', '.join(map(_written, _own(name).values()))})",
            what=found[1],
            source=found[2] or "",
            when=when,
            more=tuple(more),
            arguments={key: _plain(said) for key, said in _arguments(listed)},
        )


def _own(name: str) -> Mapping[str, inspect.Parameter]:
    """The arguments that not all strategies have."""
    return {
        key: each for key, each in parameters_of(name).items() if each.kind is not each.KEYWORD_ONLY
    }


def _written(parameter: inspect.Parameter) -> str:
    if parameter.default is parameter.empty:
        return parameter.name
    return f"{parameter.name}={parameter.default!r}"


def _arguments(listed: str) -> Iterator[tuple[str, str]]:
    """Names and texts of the section of a docstring."""
    for entry in re.split(r"\n(?=    \w)", f"\n{listed}")[1:]:
        key, _, said = entry.partition(":")
        yield key.strip(), said


def _plain(text: str) -> str:
    """A paragraph on one line, without marks."""
    return re.sub(r"`+([^`]*)`+", r"\1", " ".join(text.split()))


def _table(described: Iterator[Described]) -> Table:
    table = Table("strategy", "what it does", "take it", show_lines=True)
    for each in described:
        what = f"{each.what}\n{each.source}"
        table.add_row(each.signature, what, each.when.removeprefix("Take it "))
    return table


def _show(console: Console, described: Described) -> None:
    _say(console, described.signature)
    _say(console, described.what + (described.source and f" ({described.source})"))
    for paragraph in (described.when, *described.more):
        _say(console, f"\n{paragraph}")
    _say(console, "\nArguments:" if described.arguments else "\nIt has no arguments of its own.")
    for name, said in described.arguments.items():
        _say(console, f"  {name}: {said}")
    _say(console, "\nArguments of all strategies:")
    for name, names in _axes(described.name):
        _say(console, f"  {name}: {', '.join(names)}")


def _axes(name: str) -> Iterator[tuple[str, list[str]]]:
    """The values that the axes of a strategy can have."""
    for key, parameter in parameters_of(name).items():
        axis = axis_of(parameter, AXIS)
        if axis is not None:
            yield key, sorted(axis.names)
        elif parameter.kind is parameter.KEYWORD_ONLY:
            yield key, [repr(each) for each in get_args(parameter.annotation)]


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
