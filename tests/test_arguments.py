"""Every value is checked where it is constructed, and what is refused is refused by name."""

import copy
import logging
import math
import re
from collections.abc import Callable
from dataclasses import is_dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import Optimizer

import postlocal
from postlocal import (
    DisagreementError,
    Strategy,
    checks,
    codec,
    fragments,
    guard,
    meter,
    outer,
    schedule,
    strategies,
    topology,
    virtual,
    wire,
)
from postlocal.comm.group import Group
from tests.models import mlp, sgd

COUNT, NUMBER, LEVEL, FLAG, OTHER = "count", "number", "level", "flag", "other"
PERIOD = {"period": 16}
LEVELS = {"gradients": LEVEL, "parameters": LEVEL}

# Constructor, valid arguments, and the kind of each argument that is varied.
TABLE: list[tuple[Callable[..., Any], dict[str, Any], dict[str, str]]] = [
    (schedule.Round, {"steps": 4}, {"steps": COUNT, **LEVELS}),
    (schedule.periodic, PERIOD, {"period": COUNT, **LEVELS}),
    (schedule.hierarchical, {"periods": {"world": 4}}, {"periods": OTHER, "gradients": LEVEL}),
    (
        schedule.post_local,
        {"warmup": 4, "then": schedule.periodic(4)},
        {"warmup": COUNT, "then": OTHER},
    ),
    (
        schedule.quadratic,
        {"alpha": 0.1, "base": 4},
        {
            "alpha": NUMBER, "base": COUNT, "lr_warmup": COUNT, "initial": COUNT, "total": COUNT,
            **LEVELS,
        },
    ),
    (
        schedule.growing,
        {"start": 2},
        {"start": COUNT, "factor": NUMBER, "every": COUNT, "limit": COUNT, **LEVELS},
    ),
    (
        schedule.adaptive,
        {"target_drift": 0.1, "initial": 4},
        {"target_drift": NUMBER, "initial": COUNT, "shortest": COUNT, "longest": COUNT, **LEVELS},
    ),
    (outer.nesterov, {}, {"lr": NUMBER, "momentum": NUMBER}),
    (outer.slow_momentum, {}, {"lr": NUMBER, "momentum": NUMBER}),
    (
        outer.scheduled,
        {"inner": outer.nesterov(), "factor": outer.cosine(9)},
        {"inner": OTHER, "factor": OTHER},
    ),
    (outer.cosine, {"total": 9}, {"total": COUNT, "final": NUMBER, "warmup": COUNT}),
    (outer.linear, {"total": 9}, {"total": COUNT, "final": NUMBER, "warmup": COUNT}),
    (outer.piecewise, {"factors": {1: 0.5}}, {"factors": OTHER}),
    (guard.clip, {"max_norm": 1.0}, {"max_norm": NUMBER, "inner": OTHER}),
    (
        guard.outliers,
        {},
        {
            "threshold": NUMBER, "decay": NUMBER, "warmup": COUNT, "max_norm": NUMBER,
            "inner": OTHER,
        },
    ),
    (
        fragments.streaming,
        {"count": 2},
        {
            "count": COUNT, "order": OTHER, "delay": COUNT, "mix": NUMBER, "layers": OTHER,
            "keep_delayed_steps": FLAG,
        },
    ),
    (topology.nested, {"sizes": {"node": 2}}, {"sizes": OTHER}),
    (topology.nodes, {}, {"size": COUNT}),
    (topology.from_mesh, {}, {"mesh": OTHER}),
    (
        topology.leaders,
        {"topology": topology.nodes(2), "level": "node"},
        {"topology": OTHER, "level": LEVEL},
    ),
    (codec.int8, {}, {"block": COUNT, "stochastic": FLAG}),
    (codec.int4, {}, {"block": COUNT, "stochastic": FLAG}),
    (codec.fp8, {}, {"block": COUNT}),
    (codec.fp4, {}, {"block": COUNT, "stochastic": FLAG}),
    (codec.sign, {}, {"block": COUNT}),
    (codec.affine, {}, {"channel": COUNT}),
    (codec.cast, {"dtype": torch.bfloat16}, {"dtype": OTHER}),
    (codec.top_k, {}, {"k": COUNT, "chunk": COUNT, "bits": COUNT}),
    (codec.random_k, {}, {"k": COUNT, "chunk": COUNT, "bits": COUNT}),
    (wire.quantised, {"codec": codec.int8()}, {"codec": OTHER}),
    (wire.gathered, {"codec": codec.int8()}, {"codec": OTHER}),
    (wire.error_feedback, {"inner": wire.bf16()}, {"inner": OTHER, "decay": NUMBER}),
    (wire.powersgd, {}, {"rank": COUNT, "min_compression": NUMBER, "seed": COUNT}),
    (wire.two_level, {"between": wire.bf16()}, {"between": OTHER, "level": LEVEL}),
    (wire.int8, {}, {"block": COUNT}),
    (wire.int4, {}, {"block": COUNT}),
    (wire.fp8, {}, {"block": COUNT}),
    (wire.fp4, {}, {"block": COUNT}),
    (wire.sign, {}, {"block": COUNT}),
    (wire.top_k, {}, {"k": COUNT, "chunk": COUNT, "bits": COUNT}),
    (wire.random_k, {}, {"k": COUNT, "chunk": COUNT, "bits": COUNT}),
    (meter.Meter, {}, {"history": COUNT}),
    (strategies.local_sgd, {}, {"period": COUNT}),
    (
        strategies.post_local_sgd,
        {"warmup": 4},
        {
            "warmup": COUNT, "period": COUNT, "gradients": LEVEL, "outer_lr": NUMBER,
            "outer_momentum": NUMBER,
        },
    ),
    (strategies.hierarchical, {"periods": {"world": 4}}, {"periods": OTHER, "gradients": LEVEL}),
    (strategies.slowmo, {}, {"period": COUNT, "slow_lr": NUMBER, "slow_momentum": NUMBER}),
    (
        strategies.diloco,
        {},
        {
            "period": COUNT, "outer_lr": NUMBER, "outer_momentum": NUMBER, "outer": OTHER,
            "wire": OTHER, "gradient_wire": OTHER, "fragments": OTHER, "guard": OTHER,
            "optimizer_state": OTHER,
        },
    ),
    (
        strategies.streaming_diloco,
        {},
        {
            "period": COUNT, "fragments": COUNT, "delay": COUNT, "mix": NUMBER, "order": OTHER,
            "outer_lr": NUMBER, "outer_momentum": NUMBER, "keep_delayed_steps": FLAG,
        },
    ),
    (
        strategies.sparse_loco,
        {},
        {
            "period": COUNT, "top_k": COUNT, "chunk": COUNT, "bits": COUNT, "feedback": NUMBER,
            "outer_lr": NUMBER,
        },
    ),
    (
        strategies.edit,
        {},
        {
            "period": COUNT, "warmup": COUNT, "outer_lr": NUMBER, "outer_momentum": NUMBER,
            "max_norm": NUMBER,
        },
    ),
    (
        strategies.qsr,
        {"alpha": 0.1},
        {"alpha": NUMBER, "base": COUNT, "lr_warmup": COUNT, "total": COUNT},
    ),
    (
        Strategy,
        {"schedule": schedule.periodic(4)},
        {
            "schedule": OTHER, "outer": OTHER, "wire": OTHER, "gradient_wire": OTHER,
            "fragments": OTHER, "guard": OTHER, "optimizer_state": OTHER, "name": LEVEL,
        },
    ),
]  # fmt: skip
ARGUMENTS = [
    pytest.param(make, valid, name, kind, id=f"{make.__module__}.{make.__qualname__}-{name}")
    for make, valid, kinds in TABLE
    for name, kind in kinds.items()
]
anything = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 300), st.floats(), st.text(max_size=4),
    st.binary(max_size=3), st.complex_numbers(), st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
    st.sampled_from([
        object(), int, torch.float32, torch.tensor(2), torch.tensor(2.5), torch.tensor(True),
        np.int64(8), np.float64(0.5), np.bool_(True), 10**400, -(10**400), nn.Linear, len,
    ]),
)  # fmt: skip
FITTING: dict[str, Callable[[Any], bool]] = {
    COUNT: lambda value: type(value) is int or value is None,
    NUMBER: lambda value: type(value) is float and not math.isnan(value),
    LEVEL: lambda value: (isinstance(value, str) and value != "") or value is None,
    FLAG: lambda value: type(value) is bool,
    OTHER: lambda value: True,
}


@pytest.mark.parametrize(("make", "valid", "name", "kind"), ARGUMENTS)
@settings(max_examples=40)
@given(value=anything)
def test_whatever_is_given_is_accepted_as_what_it_should_be_or_refused_by_name(
    make: Callable[..., Any], valid: dict[str, Any], name: str, kind: str, value: Any
) -> None:
    made, refusal = None, ""
    try:
        made = make(**valid | {name: value})
    except (TypeError, ValueError) as error:
        refusal = str(error)
    if refusal:
        assert name in refusal
        return
    if kind == COUNT:
        assert value is None or not isinstance(value, bool | float | str)
    if kind == NUMBER:
        assert not isinstance(value, bool | str | None)
    if is_dataclass(make):
        assert FITTING[kind](getattr(made, name))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a period of a step and a half": (
        lambda: strategies.diloco(period=1.5),  # type: ignore[arg-type]
        "period must be a whole number, at least 1 step, got 1.5",
    ),
    "a period that is true": (lambda: schedule.periodic(True), "a whole number, .* got True"),
    "a count as text": (
        lambda: strategies.post_local_sgd("100"),  # type: ignore[arg-type]
        "warmup must be a whole number, at least 0 steps, got '100'",
    ),
    "a number for a mapping of periods": (
        lambda: strategies.hierarchical(4),  # type: ignore[arg-type]
        "periods must be a mapping such as .*, got 4",
    ),
    "a number for a mapping of sizes": (
        lambda: topology.nested(4),  # type: ignore[arg-type]
        "sizes must be a mapping such as .*, got 4",
    ),
    "a level that is a number": (
        lambda: topology.nested({3: 2}),  # type: ignore[dict-item]
        "each level of sizes must be a string, got 3",
    ),
    "parameters that meet nobody": (
        lambda: schedule.periodic(4, parameters="rank"),
        "parameters must be a level at which ranks communicate, such as 'world', got 'rank'",
    ),
    "the world before a narrower level": (
        lambda: schedule.hierarchical({"world": 4, "node": 16}),
        "from the narrowest level to the widest, got 'world' before 'node'",
    ),
    "a wire by name": (
        lambda: replace(strategies.diloco(), wire="int4"),  # type: ignore[arg-type]
        r"wire must be a value such as wire.named\('int4'\), got 'int4'",
    ),
    "a wire that is not called": (
        lambda: Strategy(schedule.periodic(4), wire=wire.bf16),  # type: ignore[arg-type]
        "got the function bf16, .*: call it",
    ),
    "a schedule that is a number": (
        lambda: Strategy(schedule=3),  # type: ignore[arg-type]
        r"schedule must be a function such as schedule.periodic\(16\), got 3",
    ),
    "a schedule that is not called": (
        lambda: Strategy(schedule.periodic),  # type: ignore[arg-type]
        "got the class periodic: call it",
    ),
    "a guard by name": (
        lambda: Strategy(schedule.periodic(4), guard="clip"),  # type: ignore[arg-type]
        r"guard must be a value such as guard.clip\(max_norm=10.0\), got 'clip'",
    ),
    "fragments as a number": (
        lambda: Strategy(schedule.periodic(4), fragments=3),  # type: ignore[arg-type]
        r"fragments must be a value such as fragments.streaming\(count=4\), got 3",
    ),
    "an outer optimizer that is not called": (
        lambda: Strategy(schedule.periodic(4), outer=outer.nesterov),  # type: ignore[arg-type]
        "outer must be a value such as .*, got the class nesterov: call it",
    ),
    "an optimizer for an outer optimizer": (
        lambda: Strategy(schedule.periodic(4), outer=sgd(mlp())),  # type: ignore[arg-type]
        "outer must make an optimizer of the anchor, got one that is made already, SGD",
    ),
    "layers as one name": (
        lambda: fragments.streaming(1, layers="blocks"),
        r"layers must be a list of names, such as \['blocks.0'\], got 'blocks'",
    ),
    "more values kept than there are": (
        lambda: strategies.sparse_loco(top_k=9, chunk=8),
        r"top_k must be from 1 to chunk \(8\) elements, got 9",
    ),
    "more than all remembered": (
        lambda: strategies.sparse_loco(feedback=1.5),
        "feedback must be above 0 and at most 1, got 1.5",
    ),
    "an outer rate of zero": (
        lambda: strategies.diloco(outer_lr=0), "outer_lr must be above 0, got 0"
    ),
    "an infinite rate": (
        lambda: outer.nesterov(lr=math.inf), "lr must be a finite number above 0, got inf"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_refused_with_argument_rule_and_value(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_integers_of_other_libraries_make_equal_values_that_print_alike() -> None:
    plain = strategies.diloco(period=8, outer_lr=0.5)
    others = strategies.diloco(period=np.int64(8), outer_lr=np.float64(0.5))  # type: ignore[arg-type]
    assert plain == others
    assert str(plain) == str(others)
    assert schedule.periodic(torch.tensor(8)) == schedule.periodic(8)  # type: ignore[arg-type]


def test_a_class_of_torch_is_an_outer_optimizer() -> None:
    strategy = Strategy(schedule.periodic(2), outer=torch.optim.Adagrad)  # type: ignore[arg-type]
    model = mlp()
    assert postlocal.attach(model, sgd(model), strategy).strategy is strategy


def test_an_outer_optimizer_may_ask_for_parameters_of_some_shape() -> None:
    model = nn.Linear(4, 4, bias=False)
    strategy = Strategy(schedule.periodic(2), outer=partial(torch.optim.Muon, lr=0.1))
    assert postlocal.attach(model, sgd(model), strategy).strategy is strategy


def test_long_values_are_not_printed_whole() -> None:
    with pytest.raises(TypeError, match="got a value of type Tensor"):
        checks.steps("period", torch.zeros(1000))
    with pytest.raises(TypeError, match="got a value of type str"):
        checks.steps("period", "x" * 1000)


def attach_with(group: Group, case: str, odd: bool) -> str:
    model = mlp()
    optimizer: Any = sgd(model)
    given: dict[str, Any] = {"strategy": strategies.local_sgd(2), "timeout": 20.0}
    if odd and case == "swapped":
        model, optimizer = optimizer, model
    elif odd and case == "outer":
        given["strategy"] = Strategy(schedule.periodic(2), outer=lambda anchor: 3)  # type: ignore
    elif odd and case == "schedule":
        given["strategy"] = Strategy(lambda step, lr: 4)  # type: ignore[arg-type]
    elif odd:
        name, value = ODD[case][0]
        given[name] = value
    try:
        postlocal.attach(model, optimizer, given.pop("strategy"), process_group=group, **given)
    except (TypeError, ValueError, KeyError, DisagreementError) as error:
        return f"{type(error).__name__}: {error}"
    return "attached"


class Broken:
    """A topology of one's own that fails."""

    def partition(self, size: int) -> dict[str, topology.Partition]:
        raise KeyError("no such machine")


ODD: dict[str, tuple[tuple[str, Any], str]] = {
    "strategy": (
        ("strategy", "diloco"),
        r"TypeError: strategy must be a Strategy, got 'diloco': pass strategies.parse\('diloco'\)"
        r"; there are ddp, local_sgd, post_local_sgd",
    ),
    "expression": (
        ("strategy", "diloco(period=3)"),
        r"TypeError: strategy must be a Strategy, .*pass strategies.parse\('diloco\(period=3\)'\)",
    ),
    "function": (
        ("strategy", strategies.slowmo),
        r"TypeError: strategy must be a Strategy, got the function slowmo: .*slowmo\(period=...\)",
    ),
    "topology": (
        ("topology", "node"),
        r"TypeError: topology must be a value such as topology.nodes\(\), got 'node'",
    ),
    "timeout": (("timeout", "5"), "TypeError: timeout must be a number above 0 seconds, got '5'"),
    "endless": (("timeout", math.inf), "ValueError: timeout must be a finite number above 0 sec"),
    "ages": (("timeout", 1e18), r"ValueError: timeout must be at most 1e\+07 seconds, got 1e\+18"),
    "days": (
        ("timeout", timedelta(days=1000)),
        r"ValueError: timeout must be at most 1e\+07 seconds, got 86400000.0",
    ),
    "initial": (("initial", ["refuse"]), "TypeError: initial must be one of broadcast, refuse"),
    "swapped": (("", None), "TypeError: model must be a torch.nn.Module, got a value of type SGD"),
    "outer": (("", None), "TypeError: outer must make a torch.optim.Optimizer .* got 3"),
    "schedule": (("", None), "TypeError: schedule must give a Round, got 4"),
    "broken": (("topology", Broken()), "KeyError: 'no such machine'"),
}


@pytest.mark.parametrize("case", ODD)
def test_what_one_rank_gives_attach_wrongly_is_an_error_on_all(case: str) -> None:
    said = virtual.run(2, lambda group: attach_with(group, case, group.rank == 1))
    assert re.match(ODD[case][1], said[1]), said
    assert said[0] == f"DisagreementError: another rank cannot go on: {said[1]} (rank 1)"


def test_a_timeout_is_seconds_or_a_timedelta() -> None:
    assert checks.timeout("timeout", timedelta(seconds=8)) == checks.timeout("timeout", 8) == 8.0
    with pytest.raises(ValueError, match="above 0 seconds, got 0"):
        checks.timeout("timeout", timedelta())
    attached: list[postlocal.Sync] = virtual.run(
        2,
        lambda group: postlocal.attach(
            model := mlp(), sgd(model), strategies.local_sgd(2), process_group=group,
            timeout=timedelta(seconds=8),
        ),
        timeout=timedelta(seconds=20),
    )  # fmt: skip
    assert len(attached) == 2


class Plain(Optimizer):
    """An optimizer whose groups have no learning rate."""

    def __init__(self, params: Any, **defaults: Any) -> None:
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad, alpha=0.1)


NO_RATE: dict[str, Callable[[nn.Module], Optimizer]] = {
    "absent": lambda model: Plain(model.parameters()),
    "none": lambda model: Plain(model.parameters(), lr=None),
}


MODEL = mlp()


def trained(group: Group, make: Callable[[nn.Module], Optimizer], strategy: Strategy) -> Any:
    model = copy.deepcopy(MODEL)
    optimizer = make(model)
    sync = postlocal.attach(model, optimizer, strategy, process_group=group)
    for _ in range(6):
        model(torch.full((2, 8), float(group.rank))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        sync.step()
    sync.finish()
    sync.close()
    return sync, [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("make", NO_RATE.values(), ids=NO_RATE)
def test_an_optimizer_without_a_learning_rate_trains_where_nothing_follows_it(
    make: Callable[[nn.Module], Optimizer],
) -> None:
    strategy = strategies.diloco(2)
    with_rate = virtual.run(2, lambda group: trained(group, sgd, strategy)[1])
    without = virtual.run(2, lambda group: trained(group, make, strategy)[1])
    for mine, expected in zip(without[0], with_rate[0], strict=True):
        torch.testing.assert_close(mine, expected)


def unsaid(step: int, lr: float) -> schedule.Round:
    return schedule.Round(2, "rank", "world")


FOLLOWING = {
    "qsr": (strategies.qsr(0.1), "since schedule quadratic"),
    "qsr after a warm-up": (
        Strategy(schedule.post_local(4, schedule.quadratic(0.1, 2))),
        "since schedule post_local",
    ),
    "slowmo": (strategies.slowmo(), "since outer slow_momentum"),
    "slowmo with a decay": (
        Strategy(
            schedule.periodic(2), outer.scheduled(outer.slow_momentum(), outer.cosine(total=9))
        ),
        "since outer scheduled",
    ),
    "a schedule that does not say": (Strategy(unsaid), "set its attribute follows_lr to False"),
}


@pytest.mark.parametrize("case", FOLLOWING)
@pytest.mark.parametrize("make", NO_RATE.values(), ids=NO_RATE)
def test_what_follows_the_learning_rate_needs_one(
    make: Callable[[nn.Module], Optimizer], case: str
) -> None:
    strategy, message = FOLLOWING[case]
    model = mlp()
    with pytest.raises(ValueError, match=f"optimizer must have an 'lr' .*{message}"):
        postlocal.attach(model, make(model), strategy)
    postlocal.attach(model, sgd(model), strategy).close()


def test_a_schedule_that_says_it_does_not_follow_needs_no_learning_rate() -> None:
    def mine(step: int, lr: float) -> schedule.Round:
        return schedule.Round(2, "rank", "world")

    mine.follows_lr = False  # type: ignore[attr-defined]
    model = mlp()
    assert postlocal.attach(model, NO_RATE["none"](model), Strategy(mine)).round.steps == 2


def test_the_greatest_learning_rate_of_all_groups_is_the_one_that_counts() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    frozen, trained = ({"params": layer.parameters()} for layer in model)
    groups: list[dict[str, Any]] = [frozen | {"lr": 0.0}, trained | {"lr": torch.tensor(0.0625)}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    sync = postlocal.attach(model, optimizer, strategies.qsr(alpha=0.25, base=2))
    assert sync.inner.lr == 0.0625
    assert sync.round.steps == 16  # (0.25 / 0.0625) ** 2, where the first group's would be endless


def test_a_buffer_with_nan_as_a_placeholder_is_equal_to_itself() -> None:
    model = mlp()

    def work(group: Group) -> str:
        replica = copy.deepcopy(model)
        replica.register_buffer("unset", torch.full((3,), math.nan))
        replica.register_buffer("zero", torch.zeros(2) * (-1.0 if group.rank == other else 1.0))
        try:
            strategy = strategies.local_sgd(2)
            postlocal.attach(replica, sgd(replica), strategy, process_group=group, initial="refuse")
        except DisagreementError as error:
            return str(error)
        return "attached"

    other = -1
    assert virtual.run(2, work) == ["attached", "attached"]
    other = 1  # bits are compared: minus zero is not zero
    for said in virtual.run(2, work):
        assert "'zero' on rank 1 is not rank 0's" in said


def test_nodes_of_one_machine_are_ranks_and_rank_0_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, logger="postlocal"):
        strategy = strategies.post_local_sgd(warmup=2, period=2)
        sizes = virtual.run(3, lambda group: levels_of(group, strategy))
    assert sizes == [{"rank": 1, "node": 1, "world": 3}] * 3
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        "all 3 ranks share one machine"
    ]


def levels_of(group: Group, strategy: Strategy) -> dict[str, int]:
    model = mlp()
    # No DDP: a level of more than one rank for gradients is refused.
    levels = replace(strategy, schedule=schedule.hierarchical({"node": 2, "world": 4}))
    sync = postlocal.attach(model, sgd(model), levels, process_group=group)
    return {level: sync.groups[level].size for level in sync.groups.levels}


def test_without_levels_below_the_world_there_is_the_world_only() -> None:
    model = mlp()
    assert postlocal.attach(model, sgd(model), strategies.diloco()).groups.levels == (
        "rank",
        "world",
    )


def test_a_wire_that_names_a_level_needs_it_as_a_schedule_does() -> None:
    strategy = replace(strategies.diloco(2), wire=wire.two_level(wire.bf16(), "rack"))
    assert strategy.levels == {"world", "rack"}
    model = mlp()
    with pytest.raises(ValueError, match=r"got 'rack': pass .* topology=topology.nested\(\{'rack'"):
        postlocal.attach(model, sgd(model), strategy)
