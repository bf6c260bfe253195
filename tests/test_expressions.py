"""Strategies and axes as text: what is written is read back, and nothing else is."""

import copy
import math
import pickle
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from postlocal import codec, fragments, guard, outer, schedule, strategies, topology, wire
from postlocal.expressions import (
    AXES,
    ExpressionError,
    difference,
    expression,
    parameters_of,
    parse,
    read,
    read_all,
)
from postlocal.strategies import AXIS, Strategy

steps = st.integers(1, 10**6)
positive = st.floats(1e-9, 1e9)
share = st.floats(0, 1)
level = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5).filter(
    lambda name: name != "rank"
)

periodic = st.builds(schedule.periodic, steps, st.just("rank") | level, level)
plain_schedules = st.one_of(
    st.builds(schedule.every_step),
    periodic,
    st.builds(
        schedule.hierarchical,
        st.sampled_from([{"world": 4}, {"node": 2, "world": 8}, {"a": 1, "b'\"": 3, "c": 6}]),
        level,
    ),
    st.builds(
        schedule.quadratic, positive, steps, st.integers(0, 9), st.none() | steps, st.none() | steps
    ),
    st.builds(
        schedule.growing, st.integers(1, 9), st.floats(1.5, 9), steps, st.none() | st.just(9)
    ),
    st.builds(schedule.adaptive, positive, st.integers(2, 9), st.integers(1, 2)),
)
schedules = plain_schedules | st.builds(schedule.post_local, st.integers(0, 99), plain_schedules)

factors = st.one_of(
    st.builds(outer.cosine, st.integers(10, 99), share, st.integers(0, 9)),
    st.builds(outer.linear, st.integers(10, 99), share),
    st.builds(outer.piecewise, st.dictionaries(st.integers(0, 99), share, min_size=1, max_size=3)),
)
plain_outers = st.one_of(
    st.builds(outer.average),
    st.builds(outer.nesterov, positive, st.floats(0, 0.99)),
    st.builds(outer.slow_momentum, positive, st.floats(0, 0.99)),
)
outers = plain_outers | st.builds(outer.scheduled, plain_outers, factors)

codecs = st.one_of(
    st.builds(codec.int8, st.integers(1, 512), st.booleans()),
    st.builds(codec.int4, st.sampled_from([2, 256]), st.booleans()),
    st.builds(codec.fp8, st.integers(1, 512)),
    st.builds(codec.fp4, st.sampled_from([2, 256])),
    st.builds(codec.sign, st.sampled_from([8, 256])),
    st.builds(codec.affine, st.none() | steps),
    st.builds(codec.cast, st.sampled_from([torch.bfloat16, torch.float16, torch.float32])),
    st.builds(codec.top_k, st.integers(1, 8), st.sampled_from([64, 4096])),
)
sent = st.one_of(st.builds(wire.quantised, codecs), st.builds(wire.gathered, codecs))
plain_wires = st.one_of(
    st.sampled_from([make() for make in wire.NAMED.values()]),
    sent,
    st.builds(wire.error_feedback, sent, st.floats(0.1, 1)),
    st.builds(wire.powersgd, st.integers(1, 9), positive, st.integers(0, 9)),
)
wires = plain_wires | st.builds(wire.two_level, plain_wires, level)

kinds_of_fragments = st.one_of(
    st.builds(fragments.whole),
    st.builds(
        fragments.streaming,
        st.integers(1, 99),
        st.sampled_from(["strided", "sequential"]),
        st.integers(1, 9),
        share,
        st.none() | st.just(["a.0", "b"]),
        st.booleans(),
    ),
)
plain_guards = st.one_of(
    st.builds(guard.non_finite),
    st.builds(guard.trusting),
    st.builds(guard.clip, positive | st.just(math.inf)),
)
guards = plain_guards | st.one_of(
    st.builds(guard.clip, positive, plain_guards),
    st.builds(guard.outliers, positive, st.floats(0.01, 1), steps, positive, plain_guards),
)
topologies = st.one_of(
    st.builds(topology.world),
    st.builds(topology.nested, st.sampled_from([{"node": 2}, {"node": 2, "rack": 8}])),
    st.builds(topology.nodes, st.none() | steps),
    st.builds(topology.leaders, st.builds(topology.nodes, steps), level),
)

custom = st.builds(
    Strategy,
    schedules,
    outers,
    wires,
    wires,
    guard=guards,
    optimizer_state=st.sampled_from(["keep", "average", "reset"]),
    name=st.just("custom") | level,
)
axes = st.fixed_dictionaries(
    {},
    optional={
        "outer": outers,
        "wire": wires,
        "gradient_wire": wires,
        "guard": guards,
        "optimizer_state": st.sampled_from(["keep", "reset"]),
        "fragments": st.builds(fragments.streaming, st.integers(1, 9), mix=share),
        "schedule": st.builds(schedule.periodic, st.integers(10, 99)),
    },
)
named = st.one_of(
    st.just(strategies.ddp()),
    st.builds(strategies.local_sgd, st.integers(2, 99)),
    st.builds(strategies.post_local_sgd, st.integers(0, 9), st.integers(2, 9), level, positive),
    st.just(strategies.hierarchical({"world": 8})),
    st.builds(strategies.slowmo, st.integers(2, 99), positive),
    st.builds(strategies.diloco, st.integers(2, 99), positive, st.floats(0, 0.9)),
    st.builds(strategies.streaming_diloco, st.integers(20, 99), st.integers(1, 9), mix=share),
    st.builds(strategies.sparse_loco, st.integers(2, 99), st.integers(1, 64)),
    st.builds(strategies.edit, st.integers(2, 99), st.integers(0, 9), max_norm=positive),
    st.builds(strategies.qsr, positive, st.integers(2, 9), total=st.none() | steps),
)


def vary(strategy: Strategy, changes: dict[str, Any]) -> Strategy:
    """A strategy with other axes; rounds of one step are too short for the delay of fragments."""
    if strategy == strategies.ddp() and "schedule" not in changes:
        changes.pop("fragments", None)
    return replace(strategy, **changes)


varied = st.builds(vary, named, axes)

VALUES = {
    "schedule": schedules,
    "outer": outers,
    "factor": factors,
    "wire": wires,
    "codec": codecs,
    "fragments": kinds_of_fragments,
    "guard": guards,
    "topology": topologies,
}


@pytest.mark.parametrize("axis", VALUES)
@settings(max_examples=60)
@given(data=st.data())
def test_a_value_of_an_axis_is_read_back_as_itself(axis: str, data: st.DataObject) -> None:
    value = data.draw(VALUES[axis])
    text = expression(value, axis)
    assert parse(text, axis) == value
    assert expression(parse(text, axis), axis) == text


@settings(max_examples=150)
@given(custom | varied)
def test_a_strategy_is_read_back_as_itself(strategy: Strategy) -> None:
    again = strategies.parse(str(strategy))
    assert again == strategy
    assert str(again) == str(strategy)


def test_every_name_of_every_axis_is_written_as_itself() -> None:
    assert set(AXES) == set(VALUES)
    for axis in AXES.values():
        for name, factory in axis.names.items():
            needs = [p for p in parameters_of(factory).values() if p.default is p.empty]
            if not needs:
                value = parse(name, axis)
                text = expression(value, axis)
                assert parse(text, axis) == value
                assert text.count("(") == 1


SHORT = {
    "diloco": "diloco()",
    "diloco(32, 0.7, wire=int4)": "diloco(period=32, wire=int4())",
    "diloco(period=100, outer=nesterov(0.7, 0.5))": "diloco(outer_momentum=0.5)",
    "diloco(outer=average())": "diloco(outer=average())",
    "diloco(wire=wire.bf16(), guard=guard.clip(3))": "diloco(wire=bf16(), guard=clip(3.0))",
    "diloco(wire=fp32)": "diloco()",
    "diloco(wire=quantised(cast(torch.bfloat16)))": "diloco(wire=bf16())",
    "diloco(wire=quantised(int8()))": "diloco(wire=quantised(codec.int8()))",
    "strategies.local_sgd(period=2)": "local_sgd(period=2)",
    "streaming_diloco(fragments=streaming(8, delay=5))": "streaming_diloco(fragments=8, delay=5)",
    "sparse_loco(wire=bf16)": "sparse_loco(wire=bf16())",
    "hierarchical({'node': 4, 'world': 16})": 'hierarchical(periods={"node": 4, "world": 16})',
    "post_local_sgd(\n  warmup=9,  # steps\n)": "post_local_sgd(warmup=9)",
    "Strategy(post_local(9, growing(2)), guard=clip(inf))": (
        "Strategy(schedule=post_local(9, growing(2)), guard=clip(inf))"
    ),
    "local_sgd(optimizer_state='reset')": 'local_sgd(optimizer_state="reset")',
}


@pytest.mark.parametrize("text", SHORT)
def test_what_is_written_is_short_and_has_one_form(text: str) -> None:
    assert str(strategies.parse(text)) == SHORT[text]
    assert strategies.parse(SHORT[text]) == strategies.parse(text)


def test_an_expression_is_what_python_makes_of_the_same_words() -> None:
    python = strategies.diloco(period=32, wire=wire.named("int4"), outer=outer.nesterov(0.7, 0.5))
    assert strategies.parse("diloco(period=32, wire=int4(), outer=nesterov(0.7, 0.5))") == python
    assert pickle.loads(pickle.dumps(python)) == copy.deepcopy(python) == python


def double(step: int) -> float:
    return 2.0


@pytest.mark.parametrize(
    "strategy",
    [
        Strategy(lambda step, lr: schedule.Round(2)),
        strategies.diloco(outer=partial(torch.optim.Adam, lr=0.01)),
        strategies.diloco(outer=torch.optim.Adagrad),  # type: ignore[arg-type]
        strategies.diloco(outer=outer.scheduled(outer.nesterov(), double)),
    ],
)
def test_what_has_no_expression_is_shown_without_addresses_and_not_read_back(
    strategy: Strategy,
) -> None:
    text = str(strategy)
    assert text == str(copy.copy(strategy))
    assert " at 0x" not in text
    with pytest.raises(ExpressionError, match="values of your own have no expression"):
        strategies.parse(text)


def test_strings_of_numpy_are_written_as_strings() -> None:
    strategy = strategies.hierarchical({np.str_("node"): 2, "world": 4})
    assert str(strategy) == 'hierarchical(periods={"node": 2, "world": 4})'
    assert strategies.parse(str(strategy)) == strategy


def test_a_value_of_a_class_of_the_same_name_is_not_written_as_ours() -> None:
    class nesterov(outer.nesterov):
        pass

    assert expression(nesterov(0.5), "outer").startswith("test_a_value")


WRONG = {
    "dilco": ("there is no strategy dilco: did you mean diloco? There are Strategy, ddp,", "dilco"),
    "DiLoCo(3)": ("there is no strategy DiLoCo: did you mean diloco?", "DiLoCo"),
    "diloco(perod=3)": ("diloco has no argument perod: did you mean period? It takes ", "perod=3"),
    "diloco(period=0)": ("period must be at least 1 step, got 0", "0"),
    "diloco(outer=nesterov(0.7, 1))": ("momentum must be at least 0 and below 1, got 1", "1"),
    "diloco(wire=int5)": ("there is no wire int5: did you mean int", "int5"),
    "diloco(wire=codec.int8())": ("this must be a wire, and int8 is a codec.", "codec.int8"),
    "diloco(outer=cosine(9))": ("an outer optimizer, and cosine is a factor.", "cosine"),
    "diloco(wire='int4')": ("wire must be a value such as", "'int4'"),
    "diloco(period=x)": ('got the name x: strings have quotes, "x"', "x"),
    "diloco(1, 2, 3, 4)": ("diloco takes 3 arguments without a name (period, outer_lr,", "4"),
    "diloco(1, period=2)": ("period must be given once, got it again", "period=2"),
    "diloco(outer_lr=0.3, outer=average)": (
        "outer must not be given to diloco beside outer_lr, which is a part of it", "average"
    ),
    "diloco(\n  wire=bf16,\n  guard=clip(0))": ("max_norm must be above 0, got 0", "0"),
    "diloco(période=3)": ("diloco has no argument période: did you mean period?", "période=3"),
    "qsr": ("qsr needs the argument alpha", "qsr"),
    "hierarchical({'a': 1, 'a': 2})": ("must have each key once, got 'a' again", "'a'"),
    "diloco, ddp": ("there must be one expression, got several", "diloco, ddp"),
    "diloco(": ("this must be a strategy, such as ddp(): '(' was never closed", "("),
    "5": ("text must be a strategy, such as ddp()", "5"),
    "wire.powersgd()": ("this must be a strategy, and powersgd is a wire.", "wire.powersgd"),
}  # fmt: skip


@pytest.mark.parametrize("text", WRONG)
def test_a_mistake_is_said_with_its_place_and_what_would_do(text: str) -> None:
    message, place = WRONG[text]
    with pytest.raises(ExpressionError) as error:
        strategies.parse(text)
    problem, line, carets = str(error.value).splitlines()
    assert message in problem
    assert line[carets.index("^") : carets.rindex("^") + 1] == place
    assert error.value.text[error.value.start : error.value.end] == place
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


HOSTILE = [
    "__import__('os').system('true')", "diloco(period=__import__('os').getpid())",
    "diloco.__class__", "diloco.__globals__['x']", "wire.__builtins__", "codec.int8.__init__",
    "strategies.expressions.ast", "strategies.sys", "wire.torch", "wire.mean_()", "wire.named('x')",
    "topology.default(['node'], 1)", "schedule.rollout(every_step, 9)", "schedule.Round(1)",
    "(lambda: ddp())()", "[x for x in 'a']", "diloco(*[1])", "diloco(**{'period': 3})",
    "hierarchical({**{}})", "hierarchical({int4(): 3})", "f'{1}'", "diloco(period=f'{1}')",
    "(y := ddp())", "ddp() if 1 else diloco()", "ddp() or diloco()", "await ddp()", "x = ddp()",
    "diloco(period=1j)", "diloco(period=...)", "diloco(period=b'1')", "diloco(period=not 1)",
    "diloco(period=-True)", "diloco(period=--'x')", "diloco(period=1+1)", "diloco(period={1, 2})",
    "diloco(period='\0')", "", " ", "()", "#", "\\", "\ud800", "diloco(period=0x)", "0_",
    "diloco()()",
    "diloco(wire=int4()())", "diloco(period=" + "9" * 4000 + ")", "diloco(period=1e999)",
    "(" * 4000, "[" * 150 + "]" * 150, "-" * 4000 + "1", "a." * 2000 + "b", "1" + "+1" * 2000,
    "diloco(period=" + "-" * 99 + "1)", "diloco(period=" + "[" * 50 + "]" * 50 + ")",
    "local_sgd(wire=" + "two_level(" * 99 + "bf16" + ")" * 100, "ddp()" * 1000, "ddp " * 10**6,
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:30]))
def test_hostile_text_is_refused_shortly_and_runs_nothing(text: str) -> None:
    with pytest.raises(ExpressionError) as error:
        strategies.parse(text)
    assert len(str(error.value)) < 1000
    assert len(str(error.value).splitlines()) == 3


@settings(max_examples=300)
@given(
    st.text(max_size=60)
    | st.lists(
        st.sampled_from(
            ["diloco", "(", ")", "period", "=", "wire", "int4", ",", "-", "1", "{", "}", ":", ".",
             "codec", "'", "é", "\n", " ", "*", "[", "]", "lambda", "if", "1e5", "inf", "torch"]
        ),
        max_size=14,
    ).map("".join)
)  # fmt: skip
@example("diloco(period=3\n")
def test_any_text_is_a_strategy_or_an_expression_error(text: str) -> None:
    try:
        strategy = strategies.parse(text)
    except ExpressionError as error:
        said = str(error)
    else:
        assert strategies.parse(str(strategy)) == strategy
        return
    assert len(said.splitlines()) == 3


def test_nothing_is_no_expression_and_the_axis_says_what_would_do() -> None:
    with pytest.raises(ExpressionError, match=r"must be a wire, such as \w+\(\): there is no text"):
        parse(" ", "wire")


@pytest.mark.parametrize("given_instead", [None, 3, b"ddp", strategies.ddp()])
def test_what_is_no_text_is_refused(given_instead: Any) -> None:
    with pytest.raises(TypeError, match="an expression must be a string, got"):
        strategies.parse(given_instead)


def test_a_call_can_be_changed_before_it_is_made() -> None:
    call = read("diloco(period=4, outer_lr=0)", AXIS)
    changed = call.with_arguments({"outer_lr": 0.5}).with_defaults({"period": 9, "alpha": 1.0})
    assert str(changed) == "diloco(period=4, outer_lr=0.5)"
    assert changed.make() == strategies.diloco(4, 0.5)
    with pytest.raises(ExpressionError, match="outer_lr must be above 0, got 0"):
        call.make()
    with pytest.raises(ValueError, match=r"period must be at least 1 step, got 0$"):
        changed.with_arguments({"period": 0}).make()
    with pytest.raises(ValueError, match=r"peroid must not .* to diloco.*did you mean period"):
        call.with_arguments({"peroid": 0})
    assert [str(each) for each in read_all("ddp, slowmo(2)", AXIS)] == ["ddp()", "slowmo(period=2)"]


def test_the_arguments_that_differ_are_named() -> None:
    one = "diloco(period=4, wire=int4(), guard=clip(1.0))"
    assert difference(one, one) == ""
    assert difference(one, "local_sgd(period=8)") == ""
    assert difference(one, "diloco(period=8, wire=int4())") == (
        "period: 4 and 8; guard: clip(1.0) and default"
    )
    assert difference("f(a=g(b=1, c=2))", "f(a=g(b=2, c=2))") == "a.b: 1 and 2"
    assert difference("f(a=<lambda>)", "f(a=1)") == ""


def test_reading_needs_no_eval() -> None:
    source = sys.modules["postlocal.expressions"].__file__
    assert source is not None
    with open(source) as file:
        text = file.read()
    assert not any(word in text for word in ("eval(", "exec(", "compile(", "import_module"))


@pytest.mark.parametrize("name", strategies.NAMED)
def test_every_named_strategy_takes_the_axes(name: str) -> None:
    given_too = {"qsr": "alpha=0.1, ", "post_local_sgd": "warmup=2, "}.get(name, "")
    given_too = "periods={'world': 8}, " if name == "hierarchical" else given_too
    strategy = strategies.parse(f"{name}({given_too}gradient_wire=bf16, optimizer_state='reset')")
    assert (strategy.name, strategy.gradient_wire) == (name, wire.bf16())
    assert strategy.optimizer_state == "reset"


def test_an_unknown_argument_is_named_in_python_too() -> None:
    with pytest.raises(TypeError, match=r"diloco: .*'perod'; it takes period, outer_lr, "):
        strategies.diloco(perod=3)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="wire must not be given to sparse_loco beside top_k"):
        strategies.sparse_loco(top_k=3, wire=wire.bf16())
    with pytest.raises(ValueError, match="fragments must be a number where order, delay, mix or"):
        strategies.streaming_diloco(fragments=fragments.whole(), delay=3)


@pytest.mark.parametrize(
    ("written", "normal"),
    [
        ("diloco(outer=nesterov(0.7, 0.5))", "diloco(outer_momentum=0.5)"),
        ("diloco(100, outer=nesterov, wire=fp32)", "diloco(period=100, wire=fp32())"),
        ("diloco(outer=average)", "diloco(outer=average())"),
        ("edit(guard=outliers(3, max_norm=2))", "edit(max_norm=2.0)"),
        (
            "streaming_diloco(fragments=streaming(2, delay=5))",
            "streaming_diloco(fragments=2, delay=5)",
        ),
        ("Strategy(periodic(4))", "Strategy(schedule=periodic(4))"),
    ],
)
def test_a_strategy_that_is_written_in_two_ways_has_one_spelling(written: str, normal: str) -> None:
    call = read(written, AXIS)
    assert str(call.normal()) == normal
    assert call.normal().make() == call.make()
    assert str(call.normal().normal()) == normal


def test_a_default_is_not_added_beside_what_it_is_part_of() -> None:
    whole, part = "diloco(outer=nesterov(momentum=0.5))", "diloco(outer_momentum=0.5)"
    for one, other in ((whole, part), (part, whole)):
        assert str(read(one, AXIS).with_defaults(read(other, AXIS).arguments)) == one
