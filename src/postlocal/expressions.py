"""Strategies and their axes as text, written as they are in Python, and read back without `eval`.

An **expression** is a call of a name that one of the axes' modules exports, with literals and
further expressions as arguments: ``diloco(period=32, wire=int4(), outer=nesterov(0.7, 0.5))``. A
name alone stands for the call without arguments. The parameter says which axis a name is looked up
in; a prefix says it too, as in ``codec.int8()``.

`parse` reads a value of one axis, `expression` writes one. `read` stops halfway, at a `Call` whose
arguments can still be changed.

Example:
    >>> parse("error_feedback(quantised(codec.int8(block=64)), decay=0.95)", "wire").decay
    0.95
    >>> expression(schedule.post_local(10, schedule.periodic(4)), "schedule")
    'post_local(10, periodic(4))'
"""

import ast
import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from functools import cache
from types import ModuleType
from typing import Any, get_args, get_origin

import torch
from torch.optim import Optimizer

from postlocal import codec, fragments, guard, outer, schedule, topology, wire

_LONGEST = 4096  # characters of an expression
_DEEPEST = 16  # calls and containers within one another
_SHOWN = 100  # characters of a line that a message shows
_DTYPES = {f"torch.{name}": getattr(torch, name) for name in (
    "bfloat16", "float16", "float32", "float64",
)}  # fmt: skip
_OWN_VALUES = "values of your own have no expression: build them in Python"

Factory = Callable[..., Any]


class _Unset:
    """The default of a parameter that keeps what a function chooses by itself."""

    def __repr__(self) -> str:
        return "its own"


UNSET = _Unset()


class ExpressionError(ValueError):
    """Text that is no expression, with the place where it goes wrong.

    Attributes:
        problem: what is wrong, and what would do.
        text: what was given.
        start: index of the first character at fault.
        end: index after the last one.
    """

    def __init__(self, problem: str, text: str, start: int = 0, end: int | None = None) -> None:
        end = len(text) if end is None else end
        super().__init__(problem, text, start, end)
        self.problem, self.text, self.start, self.end = problem, text, start, end

    def of(self, name: str) -> "ExpressionError":
        """The same, said of an argument or an option."""
        return ExpressionError(f"{name}: {self.problem}", self.text, self.start, self.end)

    def __str__(self) -> str:
        return f"{self.problem}\n{_pointed(self.text, self.start, self.end)}"


@dataclass(frozen=True)
class Axis:
    """What one kind of value can be written as.

    Attributes:
        name: of the axis, for `parse`.
        noun: what one such value is called in messages.
        prefix: name of the module, which may stand before a name and a dot.
        kind: annotation of the parameters that take such values.
        names: name in an expression -> what it calls.
        prefixed: whether the prefix is written too.
        keywords: whether all arguments are written with their names.
    """

    name: str
    noun: str
    prefix: str
    kind: Any
    names: Mapping[str, Factory]
    prefixed: bool = False
    keywords: bool = False


def _axis(
    name: str, noun: str, module: ModuleType, kind: Any, *more: str, gives: Any = None,
    prefixed: bool = False,
) -> Axis:  # fmt: skip
    """An axis of a module: its frozen dataclasses, its ``NAMED`` functions, and some more."""
    public = getattr(module, "__all__", [key for key in vars(module) if not key.startswith("_")])
    classes = {key: getattr(module, key) for key in public if _is_recipe(vars(module)[key], gives)}
    functions = {key: vars(module)[key] for key in more if key in public}
    names = classes | functions | dict(getattr(module, "NAMED", {}))
    return Axis(name, noun, module.__name__.rpartition(".")[2], kind, names, prefixed)


def _is_recipe(value: Any, gives: Any) -> bool:
    if not isinstance(value, type) or not is_dataclass(value) or not value.__name__.islower():
        return False
    called = inspect.signature(value.__call__) if gives else None
    return called is None or called.return_annotation is gives


AXES: Mapping[str, Axis] = {
    axis.name: axis
    for axis in (
        _axis("schedule", "schedule", schedule, schedule.Schedule),
        _axis("outer", "outer optimizer", outer, outer.Outer, gives=Optimizer),
        _axis("factor", "factor", outer, Callable[[int], float], gives=float),
        _axis("wire", "wire", wire, wire.Wire, "quantised", "gathered"),
        _axis("codec", "codec", codec, codec.Codec, prefixed=True),
        _axis(
            "fragments", "kind of fragments", fragments, fragments.Fragments, "whole", "streaming"
        ),
        _axis("guard", "guard", guard, guard.Guard),
        _axis("topology", "topology", topology, topology.Topology, "world"),
    )
}
"""The axes of strategies by name; `postlocal.strategies.AXIS` is that of strategies themselves."""


@dataclass(frozen=True)
class Call:
    """A call that has been read and not been made yet.

    Attributes:
        axis: that the name is of.
        name: of what is called.
        arguments: values by parameter.
        text: that it was read from.
        spans: where in the text each argument is, and under ``""`` the whole.
    """

    axis: Axis
    name: str
    arguments: Mapping[str, Any]
    text: str = ""
    spans: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """What it can take."""
        return parameters_of(self.axis.names[self.name])

    def with_arguments(self, arguments: Mapping[str, Any]) -> "Call":
        """The same with other values for some arguments, which need not have been given.

        Raises:
            ValueError: naming the first that it does not take, and those that it does.
        """
        for name in arguments:
            if name not in self.parameters:
                close = did_you_mean(name, self.parameters)
                raise ValueError(
                    f"{name} must not be given to {self.name}, which has no such argument"
                    f"{close or '.'} It has {', '.join(self.parameters) or 'none'}"
                )
        spans = {name: span for name, span in self.spans.items() if name not in arguments}
        return replace(self, arguments={**self.arguments, **arguments}, spans=spans)

    def with_defaults(self, arguments: Mapping[str, Any]) -> "Call":
        """The same with values for those arguments that it takes and that are not given.

        What is part of a given argument counts as given, as ``outer_lr`` beside ``outer``; so does
        the argument that a given one is part of.
        """
        parts = self._parts
        given = {*self.arguments, *(parts.get(name) for name in self.arguments)}
        known = {
            name: value
            for name, value in arguments.items()
            if name in self.parameters and parts.get(name) not in self.arguments
            and name not in given
        }  # fmt: skip
        return replace(self, arguments={**known, **self.arguments})

    def normal(self) -> "Call":
        """The same in the spelling of `expression`, with all arguments that were given.

        Raises:
            ValueError: as `make` does.

        Example:
            >>> from postlocal.strategies import AXIS
            >>> str(read("diloco(100, outer=nesterov(0.7, 0.5), wire=fp32)", AXIS).normal())
            'diloco(period=100, outer_momentum=0.5, wire=fp32())'
        """
        invert = getattr(self.axis.names[self.name], "arguments_of", None)
        found = invert(self.make()) if invert else None
        if found is None:
            return self
        written = {self._parts.get(name) for name in found}
        kept = {name: value for name, value in self.arguments.items() if name not in written}
        changed = {
            name: value
            for name, value in found.items()
            if name in self.arguments or not _is_default(value, self.parameters[name])
        }
        return replace(self, arguments={**kept, **changed})

    @property
    def _parts(self) -> Mapping[str, str]:
        """Arguments that are part of another one."""
        return getattr(self.axis.names[self.name], "parts", {})

    def make(self) -> Any:
        """The value.

        Raises:
            ValueError: if an argument is missing or refused; where it stands in the text, with
                its place.
        """
        for name, parameter in self.parameters.items():
            if parameter.default is parameter.empty and name not in self.arguments:
                raise self._error("", f"{self.name} needs the argument {name}")
        try:
            return self.axis.names[self.name](**self.arguments)
        except (TypeError, ValueError) as error:
            named = re.match(r"\w+", str(error))
            raise self._error(named[0] if named else "", str(error)) from error

    def _error(self, argument: str, problem: str) -> ValueError:
        whole = {} if argument in self.arguments else self.spans
        span = self.spans.get(argument) or whole.get("")
        return ExpressionError(problem, self.text, *span) if span else ValueError(problem)

    def __str__(self) -> str:
        """All arguments, those too that are the defaults."""
        return _call(self.name, self.arguments, self.axis, whole=True)


def parse(text: str, axis: str | Axis) -> Any:
    """The value that an expression stands for.

    Args:
        text: the expression.
        axis: one of `AXES`, by name or itself.

    Raises:
        TypeError: if ``text`` is no string.
        ExpressionError: a ValueError: if it is no expression of that axis, or an argument is
            refused; with the place and what would do.

    Example:
        >>> parse("nesterov(0.7, 0.5)", "outer")
        nesterov(lr=0.7, momentum=0.5)
        >>> parse("nesterof", "outer")
        Traceback (most recent call last):
        postlocal.expressions.ExpressionError: there is no outer optimizer nesterof: did you mean \
nesterov? There are average, nesterov, scheduled, slow_momentum
          nesterof
          ^^^^^^^^
    """
    return read(text, axis).make()


def read(text: str, axis: str | Axis) -> Call:
    """The call that an expression stands for, not made yet; its arguments are.

    Raises:
        TypeError, ExpressionError: as `parse` does, but for what its own arguments must be.

    Example:
        >>> str(read("clip(5, inner=trusting)", "guard").with_arguments({"max_norm": 2}))
        'clip(2, inner=trusting())'
    """
    calls = read_all(text, axis)
    if len(calls) != 1:
        raise ExpressionError("there must be one expression, got several", text.strip())
    return calls[0]


def read_all(text: str, axis: str | Axis) -> list[Call]:
    """The same for several expressions with commas between them.

    Example:
        >>> [str(call) for call in read_all("periodic(4), every_step", "schedule")]
        ['periodic(4)', 'every_step()']
    """
    chosen = AXES[axis] if isinstance(axis, str) else axis
    what = f"{_a(chosen.noun)}, such as {next(iter(chosen.names))}()"
    reader = _Reader(_normal(text), what)
    node = reader.tree()
    nodes = node.elts if isinstance(node, ast.Tuple) else [node]
    if not nodes:
        raise reader.error(node, f"there must be {what}")
    return [reader.call(each, chosen, "text") for each in nodes]


def expression(value: Any, axis: str | Axis) -> str:
    """The shortest expression of a value: only what differs from defaults.

    What has no expression, such as a function of your own, is there as its repr, without memory
    addresses; `parse` refuses that.

    Args:
        value: of the axis.
        axis: one of `AXES`, by name or itself.

    Example:
        >>> expression(guard.clip(5.0), "guard"), expression(wire.named("int4"), "wire")
        ('clip(5.0)', 'int4()')
    """
    chosen = AXES[axis] if isinstance(axis, str) else axis
    found = [_call(name, arguments, chosen) for name, arguments in _ways(value, chosen)]
    return min(found, key=len) if found else _address_free(repr(value))


def difference(one: str, other: str) -> str:
    """The arguments in which two expressions differ, in words; empty if nothing can be named.

    Example:
        >>> difference("diloco(period=4, outer=nesterov(0.7, 0.5))", "diloco(period=8)")
        'period: 4 and 8; outer: nesterov(0.7, 0.5) and default'
    """
    try:
        left, right = (_Reader(text).tree() for text in (one, other))
        return "; ".join(_differences("", left, right))
    except (ExpressionError, RecursionError):  # of values that have no expression
        return ""


def parameters_of(factory: Factory) -> Mapping[str, inspect.Parameter]:
    """What a function or class takes."""
    return _signature(factory)


@cache
def _signature(factory: Factory) -> Mapping[str, inspect.Parameter]:
    parameters = dict(inspect.signature(factory).parameters)
    for each in fields(factory) if is_dataclass(factory) else ():
        if each.default_factory is not MISSING:  # the signature has a marker instead
            default = each.default_factory()
            parameters[each.name] = parameters[each.name].replace(default=default)
    return parameters


def axis_of(parameter: inspect.Parameter, within: Axis) -> Axis | None:
    """The axis of a parameter's values, from its annotation; None: it takes literals.

    Args:
        parameter: whose.
        within: the axis of what has the parameter; that of wires within wires, say.
    """
    kinds = [parameter.annotation, *get_args(parameter.annotation)]
    for axis in AXES.values():
        if axis.kind in kinds:
            return axis
    ours = (each.__module__ for each in kinds if isinstance(each, type))
    return within if any(module.startswith("postlocal.") for module in ours) else None


class _Reader:
    """Turns the nodes of one text into values; nothing in the text is run."""

    def __init__(self, text: str, what: str = "an expression") -> None:
        self._text = text
        self._what = what
        self._lines = text.split("\n")
        self._depth = 0

    def tree(self) -> ast.expr:
        """The text as a tree of Python's grammar."""
        if len(self._text) > _LONGEST:
            raise ExpressionError(
                f"an expression must have at most {_LONGEST} characters, got {len(self._text)}",
                self._text, end=0,
            )  # fmt: skip
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of odd literals, which become errors below
                return ast.parse(self._text, mode="eval").body
        except SyntaxError as error:
            start = self._index(error.lineno or 1, max(0, (error.offset or 1) - 1))
            problem = error.msg if self._text else "there is no text"
            hint = f"; {_OWN_VALUES}" if "<" in self._text else ""
            raise ExpressionError(
                f"this must be {self._what}: {problem}{hint}",
                self._text, start, start + 1,
            ) from None  # fmt: skip
        except (ValueError, RecursionError, MemoryError) as error:
            words = "it is nested too deeply" if not isinstance(error, ValueError) else str(error)
            raise ExpressionError(f"this cannot be read: {words}", self._text) from None

    def call(self, node: ast.expr, axis: Axis, parameter: str) -> Call:
        """A call of a name of an axis."""
        called = node.func if isinstance(node, ast.Call) else node
        name = self._name(called, axis, parameter)
        arguments = {}
        spans = {"": self._span(node)}
        given = self._arguments(node, axis, name) if isinstance(node, ast.Call) else {}
        taken = parameters_of(axis.names[name])
        for key, value in given.items():
            arguments[key] = self._value(value, axis_of(taken[key], axis), key)
            spans[key] = self._span(value)
        return Call(axis, name, arguments, self._text, spans)

    def error(self, node: ast.expr | ast.keyword, problem: str) -> ExpressionError:
        """A problem with a node."""
        return ExpressionError(problem, self._text, *self._span(node))

    def _value(self, node: ast.expr, axis: Axis | None, parameter: str) -> Any:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise self.error(node, f"expressions must be nested at most {_DEEPEST} deep")
        if axis is not None and isinstance(node, ast.Name | ast.Attribute | ast.Call):
            value = self.call(node, axis, parameter).make()
        else:
            value = self._literal(node, parameter)
        self._depth -= 1
        return value

    def _literal(self, node: ast.expr, parameter: str) -> Any:
        match node:
            case ast.Constant(value=None | bool() | int() | float() | str()):
                return node.value
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return self._negated(node, operand, parameter)
            case ast.List() | ast.Tuple():
                return [self._value(each, None, parameter) for each in node.elts]
            case ast.Dict():
                return self._mapping(node, parameter)
            case ast.Name(id="inf"):
                return math.inf
            case ast.Attribute() if self._source(node) in _DTYPES:
                return _DTYPES[self._source(node)]
            case ast.Name(id=name):
                hint = f'the name {name}: strings have quotes, "{name}"'
            case _:
                hint = _shortened(self._source(node))
        raise self.error(node, f"{parameter} must be a literal, got {hint}")

    def _negated(self, node: ast.expr, operand: ast.expr, parameter: str) -> Any:
        value = self._value(operand, None, parameter)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(node, f"{parameter} must be a literal, and only numbers have a sign")
        return -value

    def _mapping(self, node: ast.Dict, parameter: str) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for key, value in zip(node.keys, node.values, strict=True):
            if not isinstance(key, ast.Constant):
                raise self.error(value if key is None else key,
                                 f"{parameter} must have literals as keys")  # fmt: skip
            name = self._literal(key, parameter)
            if name in found:
                raise self.error(key, f"{parameter} must have each key once, got {name!r} again")
            found[name] = self._value(value, None, parameter)
        return found

    def _name(self, node: ast.expr, axis: Axis, parameter: str) -> str:
        """The name that is called, which the axis has."""
        match node:
            case ast.Name(id=name):
                prefix = axis.prefix
            case ast.Attribute(value=ast.Name(id=prefix), attr=name) if prefix in _prefixes(axis):
                pass
            case ast.Name() | ast.Attribute() | ast.Call():
                words = _shortened(self._source(node))
                raise self.error(node, f"there is no {axis.noun} {words}: {_OWN_VALUES}")
            case _:
                raise self.error(node, f"{parameter} must be {_a(axis.noun)}, such as "
                                       f"{next(iter(axis.names))}()")  # fmt: skip
        if prefix != axis.prefix or name not in axis.names:
            raise self.error(node, _no_such_name(name, prefix, axis))
        return name

    def _arguments(self, node: ast.Call, axis: Axis, name: str) -> dict[str, ast.expr]:
        taken = parameters_of(axis.names[name])
        by_place = [key for key, each in taken.items() if each.kind is not each.KEYWORD_ONLY]
        if len(node.args) > len(by_place):
            raise self.error(
                node.args[len(by_place)],
                f"{name} takes {len(by_place)} arguments without a name ({', '.join(by_place)}), "
                f"got {len(node.args)}",
            )
        given = dict(zip(by_place, node.args, strict=False))
        for keyword in node.keywords:
            key = keyword.arg
            if key is None or key not in taken:
                raise self.error(keyword, _no_such_argument(name, key, taken))
            if key in given:
                raise self.error(keyword, f"{key} must be given once, got it again")
            given[key] = keyword.value
        for value in given.values():
            if isinstance(value, ast.Starred):
                raise self.error(value, "arguments must be given one by one, got a *")
        return given

    def _source(self, node: ast.expr) -> str:
        start, end = self._span(node)
        return self._text[start:end]

    def _span(self, node: ast.expr | ast.keyword) -> tuple[int, int]:
        end = self._index(node.end_lineno or node.lineno, node.end_col_offset or 0, raw=True)
        return self._index(node.lineno, node.col_offset, raw=True), end

    def _index(self, line: int, column: int, raw: bool = False) -> int:
        """Where a place is in the text; a raw column counts bytes of UTF-8, as in trees."""
        before = self._lines[: line - 1]
        if raw:
            column = len(self._lines[line - 1].encode()[:column].decode(errors="ignore"))
        return min(len(self._text), sum(len(each) + 1 for each in before) + column)


def _normal(text: Any) -> str:
    if not isinstance(text, str):
        raise TypeError(f"an expression must be a string, got a value of {type(text).__name__}")
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def _prefixes(axis: Axis) -> set[str]:
    return {axis.prefix, *(each.prefix for each in AXES.values())}


def _no_such_name(name: str, prefix: str, axis: Axis) -> str:
    there = f"There are {', '.join(sorted(axis.names))}"
    elsewhere = next((each for each in AXES.values() if name in each.names
                      and (prefix in (axis.prefix, each.prefix))), None)  # fmt: skip
    if elsewhere is not None and (prefix != axis.prefix or name not in axis.names):
        return f"this must be {_a(axis.noun)}, and {name} is {_a(elsewhere.noun)}. {there}"
    close = did_you_mean(name, axis.names)
    reason = close or f": {_OWN_VALUES}"
    return f"there is no {axis.noun} {name}{reason}{'' if close else '.'} {there}"


def _no_such_argument(
    name: str, argument: str | None, taken: Mapping[str, inspect.Parameter]
) -> str:
    if argument is None:
        return f"arguments of {name} must be given one by one, got **"
    close = did_you_mean(argument, taken)
    return (
        f"{name} has no argument {argument}{close or '.'} It takes {', '.join(taken) or 'nothing'}"
    )


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The end of a message with the name that was probably meant; empty: none is close."""
    plain = {each.lower(): each for each in names}
    found = get_close_matches(name.lower(), plain, n=1)
    return f": did you mean {plain[found[0]]}?" if found else ""


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _pointed(text: str, start: int, end: int) -> str:
    """The line of a place, with carets below it."""
    begin = text.rfind("\n", 0, start) + 1
    line = text[begin:].partition("\n")[0]
    skipped = max(0, start - begin - _SHOWN // 2)
    line = line[skipped : skipped + _SHOWN]
    place = start - begin - skipped
    carets = "^" * max(1, min(end - start, len(line) - place))
    readable = "".join(letter if letter.isprintable() else "?" for letter in line)
    return f"  {readable}\n  {' ' * place}{carets}"


def _ways(value: Any, axis: Axis) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Calls that make an equal value."""
    for name, factory in axis.names.items():
        arguments = _arguments_of(value, factory)
        if arguments is not None and _makes(factory, arguments, value):
            yield name, arguments


def _arguments_of(value: Any, factory: Factory) -> Mapping[str, Any] | None:
    """What a call has to be given to make a value, as far as the value's fields tell."""
    inverted = getattr(factory, "arguments_of", None)
    if inverted is not None:
        return inverted(value)  # type: ignore[no-any-return]
    if isinstance(factory, type):
        if type(value) is not factory:
            return None
        held = {name: getattr(value, name) for name in factory.__dataclass_fields__}
    else:
        held = _leaves(value)
    taken = parameters_of(factory)
    return {name: _plain(held[name], taken[name]) for name in taken if name in held}


def _leaves(value: Any) -> dict[str, Any]:
    """Fields of a frozen value and of those within it by name; outer ones come first."""
    if not is_dataclass(value) or isinstance(value, type):
        return {}
    own = {each.name: getattr(value, each.name) for each in fields(value)}
    within: dict[str, Any] = {}
    for each in own.values():
        within = _leaves(each) | within
    return within | own


def _plain(value: Any, parameter: inspect.Parameter) -> Any:
    """A field as its parameter takes it: mappings are kept as pairs."""
    return dict(value) if get_origin(parameter.annotation) is Mapping else value


def _makes(factory: Factory, arguments: Mapping[str, Any], value: Any) -> bool:
    try:
        made = factory(**arguments)
    except (TypeError, ValueError):
        return False
    return type(made) is type(value) and bool(made == value)


def _call(name: str, arguments: Mapping[str, Any], axis: Axis, whole: bool = False) -> str:
    """A call as text; without arguments that are the defaults, unless it is to be whole."""
    words: list[str] = []
    by_place = not axis.keywords
    for key, parameter in parameters_of(axis.names[name]).items():
        if key not in arguments or (not whole and _is_default(arguments[key], parameter)):
            by_place = False
            continue
        word = _text(arguments[key], axis_of(parameter, axis))
        by_place = by_place and parameter.default is parameter.empty
        words.append(word if by_place else f"{key}={word}")
    prefix = f"{axis.prefix}." if axis.prefixed else ""
    return f"{prefix}{name}({', '.join(words)})"


def _is_default(value: Any, parameter: inspect.Parameter) -> bool:
    return type(value) is type(parameter.default) and bool(value == parameter.default)


def _text(value: Any, axis: Axis | None) -> str:
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, str):
        words = str.__repr__(value)  # also of a subclass, such as numpy's
        return f'"{words[1:-1]}"' if words[0] == "'" and '"' not in words else words
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_text(k, None)}: {_text(v, None)}' for k, v in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_text(each, None) for each in value)}]"
    if value is None or isinstance(value, int | float) or axis is None:
        return _address_free(repr(value))
    return expression(value, axis)


def _address_free(text: str) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def _differences(path: str, one: ast.expr, other: ast.expr) -> Iterator[str]:
    if ast.dump(one) == ast.dump(other):
        return
    if not _comparable(one, other):
        if path:
            yield f"{path}: {ast.unparse(one)} and {ast.unparse(other)}"
        return
    left, right = _keywords(one), _keywords(other)
    for name in {**left, **right}:
        inner = f"{path}.{name}" if path else name
        if name in left and name in right:
            yield from _differences(inner, left[name], right[name])
        else:
            words = [ast.unparse(each[name]) if name in each else "default"
                     for each in (left, right)]  # fmt: skip
            yield f"{inner}: {words[0]} and {words[1]}"


def _comparable(one: ast.expr, other: ast.expr) -> bool:
    """Whether both are calls of the same name, argument by argument."""
    return (
        isinstance(one, ast.Call)
        and isinstance(other, ast.Call)
        and ast.dump(one.func) == ast.dump(other.func)
        and one.args == other.args == []
    )


def _keywords(node: ast.expr) -> dict[str, ast.expr]:
    assert isinstance(node, ast.Call)
    return {each.arg or "**": each.value for each in node.keywords}
