"""Named algorithms, each a composition of schedule, wire, outer optimizer, fragments and guard.

A `Strategy` is a frozen value. The functions below return one, and each takes the axes too, as in
``diloco(period=100, wire=wire.bf16())``. `parse` reads a strategy from text, and `str` writes it.

Example:
    >>> from postlocal import strategies
    >>> strategies.diloco(period=500).schedule
    periodic(period=500, gradients='rank', parameters='world')
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from typing import Any, Literal, ParamSpec, TypedDict, Unpack, get_args

from postlocal import codec, expressions
from postlocal import fragments as parts
from postlocal import guard as guards
from postlocal import outer as outers
from postlocal import schedule as schedules
from postlocal import wire as wires
from postlocal.checks import choice, no_steps_or_more, positive, settle, shown, text, whole
from postlocal.codec.sparse import check_kept
from postlocal.wire.api import is_wire
from postlocal.wire.error_feedback import decay_of

OptimizerState = Literal["keep", "average", "reset"]


@dataclass(frozen=True)
class Strategy:
    """When replicas communicate, how values are sent, and what is done with their mean.

    ``outer``, ``wire``, ``fragments`` and ``guard.scale`` act at level ``"world"``.
    Synchronizations of narrower levels, over the fast links, are plain fp32 averages.

    Args:
        schedule: when, and with whom.
        outer: what is done with the mean at level ``"world"``.
        wire: how parameters are sent at level ``"world"``.
        gradient_wire: how gradients are sent.
        fragments: which parameters are synchronized together, and how long after they were sent
            the result is applied.
        guard: weighs contributions and limits their mean.
        optimizer_state: what happens to the inner optimizer's state at a synchronization:
            ``"keep"`` it local, ``"average"`` it as well, or ``"reset"`` it.
        name: for tables and messages.

    Raises:
        TypeError: if an axis is of another kind, such as a name instead of a value.
        ValueError: if ``optimizer_state`` is none of the three; if ``fragments`` go with nested
            levels, or their delay is as long as a round, or goes with averaged optimizer state or
            a schedule that follows the drift.
    """

    schedule: schedules.Schedule
    outer: outers.Outer = field(default_factory=outers.average)
    wire: wires.Wire = field(default_factory=wires.fp32)
    gradient_wire: wires.Wire = field(default_factory=wires.fp32)
    fragments: parts.Fragments = field(default_factory=parts.whole)
    guard: guards.Guard = field(default_factory=guards.non_finite)
    optimizer_state: OptimizerState = "keep"
    name: str = "custom"

    def __post_init__(self) -> None:
        settle(
            self, schedule=schedules.is_schedule, outer=outers.is_outer, wire=is_wire,
            gradient_wire=is_wire, fragments=parts.are_fragments, guard=guards.is_guard,
            optimizer_state=partial(choice, choices=get_args(OptimizerState)), name=text,
        )  # fmt: skip
        if self.streams:
            self._check_streaming()

    def _check_streaming(self) -> None:
        if schedules.nests(self.schedule):
            raise ValueError(
                "fragments must be those of a schedule that synchronizes parameters at one level, "
                f"got {self.schedule}: take a periodic one, or fragments.whole()"
            )
        delay, shortest = self.fragments.delay, schedules.shortest(self.schedule)
        if delay and delay >= shortest:
            raise ValueError(
                f"delay must be shorter than a round, of {shortest} steps in {self.schedule}, got "
                f"{delay}: lower the delay of fragments, or take a longer period"
            )
        if delay and schedules.adapts(self.schedule):
            raise ValueError(
                f"delay must be 0 where the schedule follows the drift, got {delay}: the drift of "
                "a round is not known before its result is applied"
            )
        if delay and self.optimizer_state == "average":
            raise ValueError(
                "optimizer_state must be 'keep' or 'reset' where parameters are applied after a "
                f"delay, got 'average' with a delay of {delay}: use delay=0, or keep it"
            )

    @property
    def anchored(self) -> bool:
        """Whether the parameters last agreed on are kept, one fp32 copy of the model."""
        plain = isinstance(self.outer, outers.average)
        return not plain or self.streams or self.wire.lossy or self.guard.anchored

    @property
    def levels(self) -> frozenset[str]:
        """The levels that its schedule and its wires name, ``"rank"`` left out."""
        within = self.wire.levels | self.gradient_wire.levels
        return (schedules.levels(self.schedule) | within) - {schedules.RANK}

    @property
    def streams(self) -> bool:
        """Whether parameters come in parts, late, or mixed, so that replicas always differ."""
        return self.fragments.streams

    def __str__(self) -> str:
        """The expression that `parse` reads back, or, of what has none, its repr within it."""
        return expressions.expression(self, AXIS)


class Axes(TypedDict, total=False):
    """Axes of a `Strategy` that every named one takes too, in place of its own."""

    outer: outers.Outer
    wire: wires.Wire
    gradient_wire: wires.Wire
    fragments: parts.Fragments
    guard: guards.Guard
    optimizer_state: OptimizerState


_P = ParamSpec("_P")
_NAMED: dict[str, Callable[..., Strategy]] = {}


def _named(**paths: str) -> Callable[[Callable[_P, Strategy]], Callable[_P, Strategy]]:
    """Have a function take `Axes` as well, and tell the arguments from what it has made.

    Args:
        paths: parameter -> where its value is in the strategy, alternatives separated by spaces.
            Its first part is the axis that it goes into, and that must not be given beside it.
    """

    def decorate(function: Callable[_P, Strategy]) -> Callable[_P, Strategy]:
        name = function.__name__
        own = [each for each in inspect.signature(function).parameters if each in paths]
        signature = _with_axes(function, own)

        @wraps(function)
        def made(*args: _P.args, **kwargs: _P.kwargs) -> Strategy:
            try:
                given = signature.bind(*args, **kwargs).arguments
            except TypeError as error:
                raise TypeError(
                    f"{name}: {error}; it takes {', '.join(signature.parameters) or 'nothing'}"
                ) from None
            axes = {key: given.pop(key) for key in Axes.__annotations__
                    if key in given and key not in own}  # fmt: skip
            for key in given:
                if (axis := paths[key].split(".")[0]) in axes:
                    raise ValueError(
                        f"{axis} must not be given to {name} beside {key}, which is a part of it: "
                        "leave one out"
                    )
            return replace(function(**given), **axes)  # type: ignore[call-arg]

        made.__signature__ = signature  # type: ignore[attr-defined]
        made.arguments_of = partial(_arguments_of, made, paths)  # type: ignore[attr-defined]
        axes = {key: path.split(".")[0] for key, path in paths.items()}
        made.parts = {  # type: ignore[attr-defined]
            key: axis for key, axis in axes.items() if axis not in own
        }
        _NAMED[name] = made
        return made

    return decorate


def _with_axes(function: Callable[..., Strategy], own: list[str]) -> inspect.Signature:
    known = inspect.signature(function).parameters
    axes = [
        inspect.Parameter(
            key, inspect.Parameter.KEYWORD_ONLY, default=expressions.UNSET, annotation=annotation
        )
        for key, annotation in Axes.__annotations__.items()
        if key not in own
    ]
    return inspect.Signature([*(known[key] for key in own), *axes], return_annotation=Strategy)


def _arguments_of(
    function: Callable[..., Strategy], paths: Mapping[str, str], value: Any
) -> Mapping[str, Any] | None:
    """What a named function has to be given to make a strategy; None if it cannot."""
    if not isinstance(value, Strategy) or value.name != function.__name__:
        return None
    found = {key: _at(value, path) for key, path in paths.items()}
    arguments = {key: held[0] for key, held in found.items() if held}
    try:
        made = function(**arguments)
    except (TypeError, ValueError):
        return None
    others = [axis for axis in Axes.__annotations__ if getattr(made, axis) != getattr(value, axis)]
    kept = {k: v for k, v in arguments.items() if paths[k].split(".")[0] not in others}
    return kept | {axis: getattr(value, axis) for axis in others}


def _at(value: Any, paths: str) -> list[Any]:
    """What is found at the first of some paths that leads anywhere."""
    for path in paths.split():
        found = value
        for step in path.split("."):
            found = getattr(found, step, _at)
        if found is not _at:
            # A mapping is kept as pairs, so that the schedule can be hashed.
            return [dict(found) if path == "schedule.periods" else found]
    return []


@_named()
def ddp(**axes: Unpack[Axes]) -> Strategy:
    """Plain data-parallel training: the control, bit-identical to torch's DDP.

    Take it on a fast network, where there is nothing to save.
    """
    return Strategy(schedules.every_step(), name="ddp")


@_named(period="schedule.period")
def local_sgd(period: int = 16, **axes: Unpack[Axes]) -> Strategy:
    """Local SGD: average parameters every ``period`` steps (Stich 2018, arXiv 1805.09767).

    Take it as the simplest strategy with few messages, and as a base to vary.

    Args:
        period: steps a round.
    """
    return Strategy(schedules.periodic(period), name="local_sgd")


@_named(
    warmup="schedule.warmup", period="schedule.then.period", gradients="schedule.then.gradients",
    outer_lr="outer.lr", outer_momentum="outer.momentum",
)  # fmt: skip
def post_local_sgd(
    warmup: int,
    period: int = 16,
    gradients: str = "node",
    outer_lr: float = 1.0,
    outer_momentum: float = 0.0,
    **axes: Unpack[Axes],
) -> Strategy:
    """Post-local SGD: DDP for ``warmup`` steps, local SGD after (Lin et al., arXiv 1808.07217).

    Take it on a network that is a few times too slow, or with fast links inside nodes.

    Args:
        warmup: number of synchronous steps; the paper goes on until the first drop of the
            learning rate.
        period: steps a round after that; the paper uses 16 or 32.
        gradients: level at which gradients are still averaged in each local step.
        outer_lr: outer learning rate; 1 with no momentum is the paper's averaging.
        outer_momentum: Nesterov momentum over rounds, which helps where local steps are noisy.
    """
    then = schedules.periodic(period, gradients)
    outer: outers.Outer = _nesterov(outer_lr, outer_momentum)
    if (outer_lr, outer_momentum) == (1.0, 0.0):
        outer = outers.average()
    return Strategy(schedules.post_local(warmup, then), outer, name="post_local_sgd")


@_named(periods="schedule.periods", gradients="schedule.gradients")
def hierarchical(
    periods: Mapping[str, int], gradients: str = "rank", **axes: Unpack[Axes]
) -> Strategy:
    """Hierarchical local SGD: a period for each level (arXiv 2010.12998).

    Take it with fast links inside nodes and slow ones between.

    Args:
        periods: level -> steps between synchronizations at that level, narrowest level first.
        gradients: level at which gradients are averaged within a round.
    """
    return Strategy(schedules.hierarchical(periods, gradients), name="hierarchical")


@_named(period="schedule.period", slow_lr="outer.lr", slow_momentum="outer.momentum")
def slowmo(
    period: int = 12, slow_lr: float = 1.0, slow_momentum: float = 0.6, **axes: Unpack[Axes]
) -> Strategy:
    """SlowMo: local steps, then momentum over rounds (Wang et al. 2019, arXiv 1910.00643).

    Take it where local SGD lags behind DDP.

    The paper zeroes the inner momentum at a synchronization for SGD and keeps Adam's state;
    for the former use ``slowmo(optimizer_state="reset")``.

    Args:
        period: steps a round.
        slow_lr: outer learning rate, in units of the inner one (alpha in the paper).
        slow_momentum: outer momentum (beta in the paper).
    """
    outer = outers.slow_momentum(
        positive("slow_lr", slow_lr), outers.momentum_of("slow_momentum", slow_momentum)
    )
    return Strategy(schedules.periodic(period), outer, name="slowmo")


@_named(period="schedule.period", outer_lr="outer.lr", outer_momentum="outer.momentum")
def diloco(
    period: int = 100, outer_lr: float = 0.7, outer_momentum: float = 0.9, **axes: Unpack[Axes]
) -> Strategy:
    """DiLoCo: Nesterov momentum on pseudo-gradients (Douillard et al., arXiv 2311.08105).

    Take it between regions or homes: momentum over rounds makes long periods pay.

    Args:
        period: steps a round.
        outer_lr: outer learning rate.
        outer_momentum: outer Nesterov momentum; lower it in short runs.
    """
    outer = _nesterov(outer_lr, outer_momentum)
    return Strategy(schedules.periodic(period), outer, name="diloco")


@_named(
    period="schedule.period", fragments="fragments.count", delay="fragments.delay",
    mix="fragments.mix", order="fragments.order", outer_lr="outer.lr",
    outer_momentum="outer.momentum", keep_delayed_steps="fragments.keep_delayed_steps",
)  # fmt: skip
def streaming_diloco(  # type: ignore[misc]  # fragments are an axis too
    period: int = 100,
    fragments: int | parts.Fragments = 4,
    delay: int = 1,
    mix: float = 0.5,
    order: parts.Order = "strided",
    outer_lr: float = 0.4,
    outer_momentum: float = 0.9,
    keep_delayed_steps: bool = False,
    **axes: Unpack[Axes],
) -> Strategy:
    """Streaming DiLoCo: fragments, overlap and 4 bits (Douillard et al., arXiv 2501.18512).

    Take it where DiLoCo would do and there is no time to wait for the network.

    Replicas differ until ``finish``; evaluate within ``sync.agreed_parameters()``.

    Args:
        period: steps between two synchronizations of a fragment.
        fragments: number of fragments, spread over the period; or `fragments.streaming` itself,
            in place of the four arguments that make it.
        delay: steps from sending a fragment to applying the result (tau); the paper goes up to 5.
        mix: share of its own value that a replica then keeps (alpha).
        order: how layers are dealt to fragments.
        outer_lr: outer learning rate.
        outer_momentum: outer Nesterov momentum.
        keep_delayed_steps: whether steps taken during the delay are kept on top of the result; not
            in the paper.
    """
    return Strategy(
        schedules.periodic(period),
        _nesterov(outer_lr, outer_momentum),
        wires.quantised(codec.fp4()),
        fragments=_streaming(fragments, order, delay, mix, keep_delayed_steps),
        name="streaming_diloco",
    )


@_named(
    period="schedule.period", top_k="wire.inner.codec.k", chunk="wire.inner.codec.chunk",
    bits="wire.inner.codec.bits", feedback="wire.decay", outer_lr="outer.lr",
)  # fmt: skip
def sparse_loco(
    period: int = 30,
    top_k: int = 64,
    chunk: int = 4096,
    bits: int = 2,
    feedback: float = 0.95,
    outer_lr: float = 1.0,
    **axes: Unpack[Axes],
) -> Strategy:
    """SparseLoCo: only the largest moves are sent (Sarfi et al., arXiv 2508.15706).

    Take it on uplinks of a few Mbit/s; what is not sent is added to later rounds.

    Args:
        period: steps a round.
        top_k: values sent of each chunk.
        chunk: values in a chunk.
        bits: bits a value sent.
        feedback: share of what was not sent that is added the next time (beta); it takes the
            place of outer momentum.
        outer_lr: outer learning rate.
    """
    check_kept("top_k", whole("top_k", top_k), whole("chunk", chunk))
    wire = wires.gathered(codec.top_k(top_k, chunk, bits))
    return Strategy(
        schedules.periodic(period),
        _nesterov(outer_lr, momentum=0.0),
        wires.error_feedback(wire, decay_of("feedback", feedback)),
        name="sparse_loco",
    )


@_named(
    period="schedule.then.period schedule.period", warmup="schedule.warmup", outer_lr="outer.lr",
    outer_momentum="outer.momentum", max_norm="guard.max_norm",
)  # fmt: skip
def edit(
    period: int = 128,
    warmup: int = 0,
    outer_lr: float = 0.7,
    outer_momentum: float = 0.9,
    max_norm: float = 10.0,
    **axes: Unpack[Axes],
) -> Strategy:
    """EDiT: DiLoCo that weighs replicas by how far they went (Cheng et al., arXiv 2412.07210).

    Take it where single replicas may diverge: layers that leap are left out.

    The paper shards the model too and synchronizes it layer by layer during the forward pass;
    here all layers are synchronized together, and judged one by one.

    Args:
        period: steps a round.
        warmup: number of synchronous steps before the first round.
        outer_lr: outer learning rate; the default is DiLoCo's.
        outer_momentum: outer Nesterov momentum; the default is DiLoCo's.
        max_norm: greatest norm of a layer's mean pseudo-gradient.
    """
    schedule: schedules.Schedule = schedules.periodic(period)
    warmup = no_steps_or_more("warmup", warmup)
    return Strategy(
        schedules.post_local(warmup, schedule) if warmup else schedule,
        _nesterov(outer_lr, outer_momentum),
        guard=guards.outliers(max_norm=max_norm),
        name="edit",
    )


@_named(
    alpha="schedule.alpha", base="schedule.base", lr_warmup="schedule.lr_warmup",
    total="schedule.total",
)  # fmt: skip
def qsr(
    alpha: float,
    base: int = 4,
    lr_warmup: int = 0,
    total: int | None = None,
    **axes: Unpack[Axes],
) -> Strategy:
    """Quadratic synchronization rule: rounds grow as the learning rate falls (arXiv 2310.14423).

    Take it with a learning rate that decays, when replicas drift apart less.

    The paper's ViT-B: ``base`` 4 and ``alpha`` 0.0175 at a peak learning rate of 0.008.

    Args:
        alpha: growth coefficient: a round has ``(alpha / lr) ** 2`` steps.
        base: the shortest period in steps.
        lr_warmup: number of first steps in which the learning rate rises.
        total: number of steps of the whole run, at which the last round ends; None: unknown.
    """
    return Strategy(schedules.quadratic(alpha, base, lr_warmup, total=total), name="qsr")


NAMED: Mapping[str, Callable[..., Strategy]] = _NAMED
"""The functions above by name."""

AXIS = expressions.Axis(
    "strategy", "strategy", "strategies", Strategy, {**NAMED, "Strategy": Strategy}, keywords=True
)
"""Expressions of strategies: the functions above, and `Strategy` itself."""


def parse(text: str) -> Strategy:
    """The strategy that an expression stands for; `str` of a strategy gives the expression.

    Expressions are calls as in Python, of the functions above or of `Strategy`, with literals and
    expressions of the axes' modules as arguments. A name alone is a call with the defaults.

    Args:
        text: such as ``diloco(period=32, wire=int4(), outer=nesterov(0.7, 0.5))``.

    Raises:
        TypeError: if it is no string.
        ValueError: if it is no expression, or a value is refused; with the place of the mistake,
            as `postlocal.expressions.ExpressionError`.

    Example:
        >>> parse("diloco(period=32, outer=nesterov(0.7, 0.5))") == diloco(32, outer_momentum=0.5)
        True
        >>> str(parse("diloco(period=100, outer=nesterov(0.7, 0.5), wire=bf16)"))
        'diloco(outer_momentum=0.5, wire=bf16())'
        >>> str(Strategy(schedules.growing(2), guard=guards.clip(1.0)))
        'Strategy(schedule=growing(2), guard=clip(1.0))'
    """
    strategy: Strategy = expressions.parse(text, AXIS)
    return strategy


def named(name: str, **parameters: Any) -> Strategy:
    """A strategy by name and parameters; `parse` reads one from text.

    Args:
        name: one of `NAMED`.
        parameters: of that function.

    Raises:
        TypeError: if the name is no string, or a value is of another type.
        ValueError: if the name or a parameter is unknown, one is missing, or a value is out of
            range.

    Example:
        >>> named("local_sgd", period=8) == local_sgd(8)
        True
    """
    known = parameters_of(name)
    for parameter in parameters:
        if parameter not in known:
            raise ValueError(
                f"{parameter} is not a parameter of {name}, which takes "
                f"{', '.join(known) or 'none'}"
            )
    for parameter, details in known.items():
        if details.default is details.empty and parameter not in parameters:
            raise ValueError(f"{name} needs the parameter {parameter}")
    return NAMED[name](**parameters)


def is_strategy(name: str, value: Any) -> Any:
    """The rule for an argument that takes a strategy.

    Raises:
        TypeError: if it is none, with what to pass instead.

    Example:
        >>> is_strategy("strategy", "diloco")
        Traceback (most recent call last):
        TypeError: strategy must be a Strategy, got 'diloco': pass strategies.parse('diloco')...
    """
    if isinstance(value, Strategy):
        return value
    raise TypeError(
        f"{name} must be a Strategy, got {shown(value)}: pass strategies.{_instead_of(value)}; "
        f"there are {', '.join(NAMED)}"
    )


def _instead_of(value: Any) -> str:
    """The call that makes a strategy, from what was given in its place."""
    if isinstance(value, str):
        return f"parse({shown(value) if len(value) < 70 else 'text'})"
    called = next((key for key, made in NAMED.items() if made is value), "local_sgd")
    return f"{called}({'' if called == 'ddp' else 'period=...'})"


def parameters_of(name: str) -> Mapping[str, inspect.Parameter]:
    """The parameters that a named strategy takes.

    Raises:
        TypeError: if the name is no string.
        ValueError: if the name is unknown.

    Example:
        >>> list(parameters_of("diloco"))[:4]
        ['period', 'outer_lr', 'outer_momentum', 'outer']
    """
    return inspect.signature(NAMED[choice("strategy", name, NAMED)]).parameters


def _streaming(
    given: int | parts.Fragments,
    order: parts.Order,
    delay: int,
    mix: float,
    keep_delayed_steps: bool,
) -> parts.Fragments:
    """Fragments by their number, or as they are, where no argument says otherwise."""
    if not hasattr(given, "split"):
        count = parts.is_count("fragments", given)
        return parts.streaming(count, order, delay, mix, keep_delayed_steps=keep_delayed_steps)
    if (order, delay, mix, keep_delayed_steps) != ("strided", 1, 0.5, False):
        raise ValueError(
            "fragments must be a number where order, delay, mix or keep_delayed_steps are given, "
            f"got {given}: write these within it"
        )
    return parts.are_fragments("fragments", given)  # type: ignore[no-any-return]


def _nesterov(lr: Any, momentum: Any) -> outers.nesterov:
    """Under the names that the functions above have for its arguments."""
    return outers.nesterov(positive("outer_lr", lr), outers.momentum_of("outer_momentum", momentum))
