"""``postlocal strategies``."""

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_args

import torch
import typer
from rich.console import Console
from rich.table import Table

from postlocal.expressions import AXES, Axis, Factory, axis_of, did_you_mean, parameters_of
from postlocal.strategies import AXIS, NAMED
from postlocal.train.tables import print_table

_MORE = (
    f"`postlocal strategies AXIS` lists the values of one of {', '.join(AXES)}; "
    "`postlocal strategies NAME` explains a strategy or such a value."
)


def strategies(
    name: Annotated[
        str | None,
        typer.Argument(
            help="A strategy or a value of an axis, to explain in full; or an axis, to list: "
            f"{', '.join(AXES)}.",
            show_default="all strategies",
        ),
    ] = None,
) -> None:
    """List the strategies with their arguments, and when to use each.

    A strategy is given as listed, with the arguments to change, as in
    --strategy 'diloco(period=32, wire=int4(), outer=nesterov(0.7, 0.5))'.
    """
    console = Console()
    if name is None:
        _list_strategies(console)
    elif name in AXES:
        _list_axis(console, AXES[name])
    else:
        _show_all(console, name)


@dataclass(frozen=True)
class Described:
    """The documentation of what an expression calls.

    Attributes:
        signature: its name and own arguments, with defaults.
        paragraphs: of the docstring.
        arguments: its own arguments and their meaning.
    """

    signature: str
    paragraphs: tuple[str, ...]
    arguments: Mapping[str, str]

    @classmethod
    def of(cls, name: str, axis: Axis) -> "Described":
        """The documentation of a name of an axis."""
        factory = axis.names[name]
        text = inspect.getdoc(factory) or ""
        prose, *sections = re.split(r"\n(?=(?:Args|Returns|Raises|Attributes|Example)s?:\n)", text)
        listed = next((each for each in sections if each.startswith("Args:")), "")
        prefix = f"{axis.prefix}." if axis.prefixed else ""
        own = ", ".join(map(_written, _own(factory, axis)))
        return cls(
            signature=f"{prefix}{name}({own})",
            paragraphs=tuple(map(_plain, prose.strip().split("\n\n"))),
            arguments={key: _plain(said) for key, said in _arguments(listed)},
        )

    @property
    def what(self) -> tuple[str, str]:
        """What a strategy does, in one line, and the paper, if there is one."""
        found = re.fullmatch(r"(.*?)(?: \(([^()]*arXiv[^()]*)\))?\.", self.paragraphs[0])
        assert found is not None, self.signature
        return found[1], found[2] or ""


def _own(factory: Factory, axis: Axis) -> Iterator[inspect.Parameter]:
    """Its arguments; of a strategy those that not all strategies have."""
    for parameter in parameters_of(factory).values():
        if axis is not AXIS or parameter.kind is not parameter.KEYWORD_ONLY:
            yield parameter


def _written(parameter: inspect.Parameter) -> str:
    if parameter.default is parameter.empty:
        return parameter.name
    return f"{parameter.name}={parameter.default!r}"


def _arguments(listed: str) -> Iterator[tuple[str, str]]:
    """Names and texts of the section of a docstring."""
    for entry in re.split(r"\n(?=    \w)", listed)[1:]:
        key, _, said = entry.partition(":")
        yield key.strip(), said


def _plain(text: str) -> str:
    """A paragraph on one line, without marks."""
    return re.sub(r"`+([^`]*)`+", r"\1", " ".join(text.split()))


def _list_strategies(console: Console) -> None:
    described = [Described.of(name, AXIS) for name in NAMED]
    if console.is_terminal:
        print_table(console, _table(described))
    else:
        for each in described:
            for line in (each.signature, f"  {each.paragraphs[0][:-1]}", f"  {each.paragraphs[1]}"):
                _say(console, line)
    _say(console, f"\n{_MORE}")


def _table(described: Iterable[Described]) -> Table:
    table = Table(show_lines=True)
    for heading in ("strategy", "what it does", "take it"):
        table.add_column(heading, overflow="fold")
    for each in described:
        table.add_row(
            each.signature, "\n".join(each.what), each.paragraphs[1].removeprefix("Take it ")
        )
    return table


def _list_axis(console: Console, axis: Axis) -> None:
    for name in _writable(axis):
        described = Described.of(name, axis)
        _say(console, described.signature)
        _say(console, f"  {described.paragraphs[0]}")


def _writable(axis: Axis) -> list[str]:
    """The names that an expression can call: their needed arguments can be written."""
    return [
        name
        for name, factory in sorted(axis.names.items())
        if all(
            each.default is not each.empty or _is_written(each, axis)
            for each in parameters_of(factory).values()
        )
    ]


def _is_written(parameter: inspect.Parameter, axis: Axis) -> bool:
    kind: Any = parameter.annotation
    foreign = isinstance(kind, type) and kind.__module__ != "builtins" and not get_args(kind)
    return not foreign or kind is torch.dtype or axis_of(parameter, axis) is not None


def _show_all(console: Console, name: str) -> None:
    """Explain a name on each axis that has it.

    Raises:
        ValueError: if none has it.
    """
    having = [axis for axis in (AXIS, *AXES.values()) if name in axis.names]
    if not having:
        known = [*NAMED, *AXES, *(each for axis in AXES.values() for each in axis.names)]
        raise ValueError(
            f"name must be a strategy ({', '.join(NAMED)}), an axis ({', '.join(AXES)}) or a value "
            f"of an axis, got {name!r}{did_you_mean(name, known)}"
        )
    for axis in having:
        if axis is not having[0]:
            _say(console, "")
        if having != [AXIS]:
            _say(console, f"{axis.noun.capitalize()}:")
        _show(console, Described.of(name, axis))
        if axis is AXIS:
            _say(console, "\nArguments of all strategies:")
            for key, names in _axes(axis.names[name]):
                _say(console, f"  {key}: {', '.join(names)}")


def _show(console: Console, described: Described) -> None:
    first, *more = described.paragraphs
    _say(console, described.signature)
    _say(console, first)
    for paragraph in more:
        _say(console, f"\n{paragraph}")
    if described.signature.endswith("()"):
        _say(console, "\nIt has no arguments of its own.")
    elif described.arguments:
        _say(console, "\nArguments:")
    for key, said in described.arguments.items():
        _say(console, f"  {key}: {said}")


def _axes(factory: Factory) -> Iterator[tuple[str, list[str]]]:
    """The values that the axes of a strategy can have."""
    for key, parameter in parameters_of(factory).items():
        axis = axis_of(parameter, AXIS)
        if axis is not None:
            yield key, sorted(axis.names)
        elif parameter.kind is parameter.KEYWORD_ONLY:
            yield key, [repr(each) for each in get_args(parameter.annotation)]


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
