"""Named algorithms, each a composition of schedule, wire, outer optimizer, fragments and guard.

A `Strategy` is a frozen value. The functions below return one; `dataclasses.replace` varies it::

    replace(diloco(period=100), wire=wire.bf16())

Example:
    >>> from postlocal import strategies
    >>> strategies.diloco(period=500).schedule
    periodic(period=500, gradients='rank', parameters='world')
"""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

from postlocal import codec
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
    """When replicas communicate, how values travel, and what is done with their mean.

    ``outer``, ``wire``, ``fragments`` and ``guard.scale`` act where all replicas meet, at level
    ``"world"``. Synchronizations of narrower levels, over the fast links, are plain fp32 averages.

    Args:
        schedule: when, and with whom.
        outer: what is done with the mean at level ``"world"``.
        wire: how parameters travel at level ``"world"``.
        gradient_wire: how gradients travel.
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

    @property
    def fingerprint(self) -> str:
        """All that ranks must have in common, as text."""
        return re.sub(r" at 0x[0-9a-f]+", "", repr(self))


def ddp() -> Strategy:
    """Plain data-parallel training: the control, bit-identical to torch's DDP."""
    return Strategy(schedules.every_step(), name="ddp")


def local_sgd(period: int = 16) -> Strategy:
    """Local SGD: average parameters every ``period`` steps (Stich 2018, arXiv 1805.09767)."""
    return Strategy(schedules.periodic(period), name="local_sgd")


def post_local_sgd(
    warmup: int,
    period: int = 16,
    gradients: str = "node",
    outer_lr: float = 1.0,
    outer_momentum: float = 0.0,
) -> Strategy:
    """Post-local SGD: DDP for ``warmup`` steps, local SGD after (Lin et al., arXiv 1808.07217).

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


def hierarchical(periods: Mapping[str, int], gradients: str = "rank") -> Strategy:
    """Hierarchical local SGD: a period for each level (arXiv 2010.12998)."""
    return Strategy(schedules.hierarchical(periods, gradients), name="hierarchical")


def slowmo(period: int = 12, slow_lr: float = 1.0, slow_momentum: float = 0.6) -> Strategy:
    """SlowMo: local steps, then momentum over rounds (Wang et al. 2019, arXiv 1910.00643).

    The paper zeroes the inner momentum at a synchronization for SGD and keeps Adam's state;
    for the former use ``replace(slowmo(), optimizer_state="reset")``.
    """
    outer = outers.slow_momentum(
        positive("slow_lr", slow_lr), outers.momentum_of("slow_momentum", slow_momentum)
    )
    return Strategy(schedules.periodic(period), outer, name="slowmo")


def diloco(period: int = 100, outer_lr: float = 0.7, outer_momentum: float = 0.9) -> Strategy:
    """DiLoCo: Nesterov momentum on pseudo-gradients (Douillard et al., arXiv 2311.08105)."""
    outer = _nesterov(outer_lr, outer_momentum)
    return Strategy(schedules.periodic(period), outer, name="diloco")


def streaming_diloco(
    period: int = 100,
    fragments: int = 4,
    delay: int = 1,
    mix: float = 0.5,
    order: parts.Order = "strided",
    outer_lr: float = 0.4,
    outer_momentum: float = 0.9,
    keep_delayed_steps: bool = False,
) -> Strategy:
    """Streaming DiLoCo: fragments, overlap and 4 bits (Douillard et al., arXiv 2501.18512).

    Replicas differ until ``finish``; evaluate within ``sync.agreed_parameters()``.

    Args:
        period: steps between two synchronizations of a fragment.
        fragments: number of fragments, spread over the period.
        delay: steps from sending a fragment to applying the result (tau); the paper goes up to 5.
        mix: share of its own value that a replica then keeps (alpha).
        order: how layers are dealt to fragments.
        outer_lr: outer learning rate.
        outer_momentum: outer Nesterov momentum.
        keep_delayed_steps: whether steps taken during the delay are kept on top of the result; not
            in the paper.
    """
    count = parts.is_count("fragments", fragments)
    return Strategy(
        schedules.periodic(period),
        _nesterov(outer_lr, outer_momentum),
        wires.quantised(codec.fp4()),
        fragments=parts.streaming(count, order, delay, mix, keep_delayed_steps=keep_delayed_steps),
        name="streaming_diloco",
    )


def sparse_loco(
    period: int = 30,
    top_k: int = 64,
    chunk: int = 4096,
    bits: int = 2,
    feedback: float = 0.95,
    outer_lr: float = 1.0,
) -> Strategy:
    """SparseLoCo: the largest moves only, the rest remembered (Sarfi et al., arXiv 2508.15706).

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


def edit(
    period: int = 128,
    warmup: int = 0,
    outer_lr: float = 0.7,
    outer_momentum: float = 0.9,
    max_norm: float = 10.0,
) -> Strategy:
    """EDiT: DiLoCo that weighs replicas by how far they went (Cheng et al., arXiv 2412.07210).

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


def qsr(alpha: float, base: int = 4, lr_warmup: int = 0, total: int | None = None) -> Strategy:
    """Quadratic synchronization rule: rounds grow as the learning rate falls (arXiv 2310.14423).

    The paper's ViT-B: ``base`` 4 and ``alpha`` 0.0175 at a peak learning rate of 0.008.
    """
    return Strategy(schedules.quadratic(alpha, base, lr_warmup, total=total), name="qsr")


NAMED: Mapping[str, Callable[..., Strategy]] = {
    function.__name__: function
    for function in (
        ddp, local_sgd, post_local_sgd, hierarchical, slowmo, diloco, streaming_diloco,
        sparse_loco, edit, qsr,
    )
}  # fmt: skip
"""The functions above by name."""


def named(name: str, **parameters: Any) -> Strategy:
    """A strategy by name, for configuration files and command lines.

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
        TypeError: strategy must be a Strategy, got 'diloco': pass strategies.diloco(period=...)...
    """
    if isinstance(value, Strategy):
        return value
    called = value if isinstance(value, str) and value in NAMED else None
    called = called or next((key for key, made in NAMED.items() if made is value), "local_sgd")
    example = "" if called == "ddp" else "period=..."
    raise TypeError(
        f"{name} must be a Strategy, got {shown(value)}: pass strategies.{called}({example}); "
        f"there are {', '.join(NAMED)}"
    )


def parameters_of(name: str) -> Mapping[str, inspect.Parameter]:
    """The parameters that a named strategy takes.

    Raises:
        TypeError: if the name is no string.
        ValueError: if the name is unknown.

    Example:
        >>> list(parameters_of("diloco"))
        ['period', 'outer_lr', 'outer_momentum']
    """
    return inspect.signature(NAMED[choice("strategy", name, NAMED)]).parameters


def _nesterov(lr: Any, momentum: Any) -> outers.nesterov:
    """Under the names that the functions above have for its arguments."""
    return outers.nesterov(positive("outer_lr", lr), outers.momentum_of("outer_momentum", momentum))
