"""Schedules: pure functions of step and learning rate that decide when ranks communicate.

A schedule maps ``(step, lr)`` to a `Round`: take so many local steps, reducing gradients at one
level, then synchronize parameters at another. All ranks call the same function with the same two
numbers and get the same round, without communication.

Any callable of that form is a schedule. The ones below are frozen values that can be called, so
that they can be compared, printed and sent between processes.

A schedule can also depend on one measured number that all ranks know: `adaptive` changes a planned
round by the drift at the end of the round before.

Example:
    >>> from postlocal import schedule
    >>> when = schedule.post_local(warmup=100, then=schedule.periodic(16))
    >>> when(step=0, lr=0.1)
    Round(steps=100, gradients='world', parameters=None)
    >>> when(step=100, lr=0.1)
    Round(steps=16, gradients='rank', parameters='world')
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

from postlocal.checks import (
    count,
    function,
    no_steps_or_more,
    number,
    optional,
    pairs,
    positive,
    settle,
    shown,
    steps,
    text,
)

RANK = "rank"
WORLD = "world"


@dataclass(frozen=True)
class Round:
    """Some steps, and the synchronization that ends them.

    Args:
        steps: number of optimizer steps in the round, at least 1.
        gradients: level at which gradients are averaged in each of these steps; ``"rank"`` means
            not at all.
        parameters: level at which parameters are synchronized after the last step; None for no
            synchronization.

    Raises:
        TypeError: if ``steps`` is no whole number, or a level no string.
        ValueError: if ``steps`` is below 1, or ``parameters`` is ``"rank"``, a rank alone.
    """

    steps: int
    gradients: str = WORLD
    parameters: str | None = None

    def __post_init__(self) -> None:
        settle(self, steps=steps, gradients=text, parameters=optional(_meeting))

    @property
    def levels(self) -> frozenset[str]:
        """The levels that this round communicates at, without ``"rank"``."""
        return frozenset({self.gradients, self.parameters or RANK} - {RANK})


class Schedule(Protocol):
    """A pure function of a round's first step, and the learning rate there."""

    def __call__(self, step: int, lr: float) -> Round:
        """The round that starts after ``step`` optimizer steps, at learning rate ``lr``."""
        ...


@runtime_checkable
class Adapting(Protocol):
    """A schedule that also adapts rounds to the measured drift."""

    def adapt(self, planned: Round, before: Round, drift: float) -> Round:
        """The round to take after a synchronization, instead of the planned one.

        It depends only on its arguments, which are the same on all ranks.

        Args:
            planned: the round that the schedule gave.
            before: the round that has just ended.
            drift: root mean square distance of replicas from their mean at its end, relative to
                the norm of the mean; it can be infinite or NaN.
        """
        ...


@dataclass(frozen=True)
class every_step:
    """Gradients are averaged over the world at every step: plain data-parallel training.

    Example:
        >>> every_step()(step=7, lr=0.1)
        Round(steps=1, gradients='world', parameters=None)
    """

    shortest = 1
    follows_lr = False

    @property
    def levels(self) -> frozenset[str]:
        return frozenset({WORLD})

    def __call__(self, step: int, lr: float) -> Round:
        return Round(1, WORLD, None)


@dataclass(frozen=True)
class periodic:
    """A synchronization after every ``period`` steps (local SGD, Stich 2018, arXiv 1805.09767).

    Rounds end at multiples of the period, also after an early synchronization.

    Args:
        period: steps a round (H in the papers), at least 1.
        gradients: level at which gradients are averaged within a round.
        parameters: level of the synchronization.

    Raises:
        TypeError: if ``period`` is no whole number, or a level no string.
        ValueError: if ``period`` is below 1, or ``parameters`` is ``"rank"``.

    Example:
        >>> periodic(16)(step=16, lr=0.1)
        Round(steps=16, gradients='rank', parameters='world')
    """

    period: int
    gradients: str = RANK
    parameters: str = WORLD
    follows_lr = False

    def __post_init__(self) -> None:
        settle(self, period=steps, gradients=text, parameters=_meeting)

    @property
    def levels(self) -> frozenset[str]:
        return frozenset({self.gradients, self.parameters}) - {RANK}

    @property
    def shortest(self) -> int:
        return self.period

    def __call__(self, step: int, lr: float) -> Round:
        return Round(self.period - step % self.period, self.gradients, self.parameters)


@dataclass(frozen=True, init=False)
class hierarchical:
    """A period for each level (arXiv 2010.12998, Algorithm 1).

    After each multiple of the shortest period, parameters are synchronized at the level with the
    longest period that divides the step.

    Args:
        periods: level -> steps between synchronizations at that level, from the narrowest level
            to the widest; each period is a proper multiple of the one before.
        gradients: level at which gradients are averaged within a round.

    Raises:
        TypeError: if ``periods`` is no mapping, or a level or a period of another type.
        ValueError: if ``periods`` is empty, below 1, unsorted or not nested, has ``"rank"``, or
            ``"world"`` before another level.

    Example:
        >>> when = hierarchical({"node": 4, "world": 16})
        >>> [when(step, lr=0.1).parameters for step in (0, 4, 8, 12)]
        ['node', 'node', 'node', 'world']
    """

    periods: tuple[tuple[str, int], ...]
    gradients: str = RANK
    follows_lr = False

    def __init__(self, periods: Mapping[str, int], gradients: str = RANK) -> None:
        object.__setattr__(self, "periods", _periods(periods))
        object.__setattr__(self, "gradients", text("gradients", gradients))

    @property
    def levels(self) -> frozenset[str]:
        return frozenset({level for level, _ in self.periods} | {self.gradients}) - {RANK}

    @property
    def shortest(self) -> int:
        return self.periods[0][1]

    def __call__(self, step: int, lr: float) -> Round:
        end = step - step % self.shortest + self.shortest
        due = [level for level, period in self.periods if end % period == 0]
        return Round(end - step, self.gradients, due[-1])


@dataclass(frozen=True)
class post_local:
    """Synchronous steps, then another schedule (post-local SGD, Lin et al., arXiv 1808.07217).

    Args:
        warmup: number of steps with gradients averaged over the world, at least 0.
        then: schedule after the warm-up; it counts steps from the end of the warm-up.

    Raises:
        TypeError: if ``warmup`` is no whole number, or ``then`` no schedule.
        ValueError: if ``warmup`` is negative.

    Example:
        >>> post_local(warmup=10, then=periodic(4))(step=10, lr=0.1)
        Round(steps=4, gradients='rank', parameters='world')
    """

    warmup: int
    then: Schedule

    def __post_init__(self) -> None:
        settle(self, warmup=no_steps_or_more, then=is_schedule)

    @property
    def levels(self) -> frozenset[str]:
        return levels(self.then) | {WORLD}

    @property
    def shortest(self) -> int:
        return shortest(self.then)

    @property
    def follows_lr(self) -> bool:
        return follows_lr(self.then)

    def __call__(self, step: int, lr: float) -> Round:
        if step < self.warmup:
            return Round(self.warmup - step, WORLD, None)
        return self.then(step - self.warmup, lr)

    def adapt(self, planned: Round, before: Round, drift: float) -> Round:
        # Rounds of the warm-up synchronize no parameters and so have no drift.
        return planned if before.parameters is None else adapt(self.then, planned, before, drift)


@dataclass(frozen=True)
class quadratic:
    """The period grows as the learning rate falls (QSR, arXiv 2310.14423, Algorithm 2).

    A round has ``max(base, floor((alpha / lr) ** 2))`` steps. The low learning
    rates of a warm-up would make the first rounds the longest, so these have ``initial`` steps.

    Args:
        alpha: growth coefficient, in units of the learning rate, above 0.
        base: the shortest period in steps, at least 1.
        lr_warmup: number of first steps in which the learning rate rises; a round ends with
            them.
        initial: steps a round while the learning rate warms up; None: ``base``. The paper takes
            the length of the first round after the warm-up.
        total: number of steps of the whole run, at which the last round ends; None: unknown.
        gradients: level at which gradients are averaged within a round.
        parameters: level of the synchronization.

    Raises:
        TypeError: if an argument is of another type.
        ValueError: if ``alpha`` is not above 0, ``base``, ``initial`` or ``total`` is below 1,
            or ``lr_warmup`` is negative; when called, if the learning rate is NaN.

    Example:
        >>> when = quadratic(alpha=0.02, base=4)
        >>> [when(step=100, lr=lr).steps for lr in (0.01, 0.005, 0.001)]
        [4, 16, 400]
    """

    alpha: float
    base: int
    lr_warmup: int = 0
    initial: int | None = None
    total: int | None = None
    gradients: str = RANK
    parameters: str = WORLD
    follows_lr = True

    def __post_init__(self) -> None:
        settle(
            self, alpha=positive, base=steps, lr_warmup=no_steps_or_more, initial=optional(steps),
            total=optional(steps), gradients=text, parameters=_meeting,
        )  # fmt: skip

    @property
    def levels(self) -> frozenset[str]:
        return frozenset({self.gradients, self.parameters}) - {RANK}

    @property
    def shortest(self) -> int:
        return min(self.base, self.initial or self.base)

    def __call__(self, step: int, lr: float) -> Round:
        return Round(self._period(step, lr), self.gradients, self.parameters)

    def _period(self, step: int, lr: float) -> int:
        if math.isnan(lr):
            raise ValueError(f"lr must be a number where the period follows it, got {lr}")
        if step < self.lr_warmup:
            return min(self.initial or self.base, self.lr_warmup - step)
        left = math.inf if self.total is None else max(1, self.total - step)
        wanted = (self.alpha / lr) ** 2 if lr > 0 else math.inf
        period = min(max(self.base, wanted), left)
        # At a learning rate of 0 without a known end, the rule gives no period.
        return self.base if math.isinf(period) else math.floor(period + 1e-9)


@dataclass(frozen=True)
class growing:
    """The period is multiplied by a factor after a number of rounds, at any learning rate.

    A growing period suits a learning rate that falls in stages (STL-SGD, arXiv 2006.06377);
    arXiv 1910.13598 has a condition on periods that change from round to round.

    The ends of rounds depend only on the arguments, also after an early synchronization.

    Args:
        start: steps of the first rounds, at least 1.
        factor: factor on the period, above 1; periods are rounded down.
        every: number of rounds of equal length, at least 1.
        limit: the longest period, at least ``start``; None: there is none.
        gradients: level at which gradients are averaged within a round.
        parameters: level of the synchronization.

    Raises:
        TypeError: if an argument is of another type.
        ValueError: if an argument is out of its range.

    Example:
        >>> when = growing(start=2, every=2, limit=8)
        >>> [each.steps for _, each in rollout(when, steps=40)]
        [2, 2, 4, 4, 8, 8, 8, 4]
    """

    start: int
    factor: float = 2.0
    every: int = 1
    limit: int | None = None
    gradients: str = RANK
    parameters: str = WORLD
    follows_lr = False

    def __post_init__(self) -> None:
        settle(
            self, start=steps, factor=partial(number, above=1), every=partial(count, unit="round"),
            limit=optional(steps), gradients=text, parameters=_meeting,
        )  # fmt: skip
        if self.limit is not None and self.limit < self.start:
            raise ValueError(f"limit must be at least start ({self.start} steps), got {self.limit}")

    @property
    def levels(self) -> frozenset[str]:
        return frozenset({self.gradients, self.parameters}) - {RANK}

    @property
    def shortest(self) -> int:
        return self.start

    def __call__(self, step: int, lr: float) -> Round:
        begin, period = self._stage(step)
        return Round(period - (step - begin) % period, self.gradients, self.parameters)

    def _stage(self, step: int) -> tuple[int, int]:
        """First step and period of the stage that a step is in."""
        begin, length, limit = 0, float(self.start), self.limit or math.inf
        # Repeated multiplication has the same bits on every machine, unlike a power.
        while length < limit and begin + self.every * math.floor(length) <= step:
            begin += self.every * math.floor(length)
            length *= self.factor
        return begin, math.floor(min(length, limit))


@dataclass(frozen=True)
class adaptive:
    """The period follows the measured drift: longer rounds while replicas stay close.

    After a synchronization the period is multiplied by ``target_drift`` over the measured drift,
    but at least by a half and at most by 2. An infinite drift halves it, a drift of 0 doubles it,
    and NaN keeps it.

    Dynamic averaging (arXiv 1807.03210) also lets the divergence of replicas decide, with a
    threshold that ranks check at every step. Here the drift of each synchronization sets the next
    period, without additional communication.

    Args:
        target_drift: root mean square distance of replicas from their mean at the end of a round,
            relative to the norm of the mean; above 0.
        initial: steps of the first round, from ``shortest`` to ``longest``.
        shortest: the shortest period, at least 1.
        longest: the longest period, at least ``shortest``.
        gradients: level at which gradients are averaged within a round.
        parameters: level of the synchronization.

    Raises:
        TypeError: if an argument is of another type.
        ValueError: if an argument is out of its range.

    Example:
        >>> when = adaptive(target_drift=0.01, initial=16)
        >>> first = when(step=0, lr=0.1)
        >>> when.adapt(planned=when(step=16, lr=0.1), before=first, drift=0.008)
        Round(steps=20, gradients='rank', parameters='world')
    """

    target_drift: float
    initial: int
    shortest: int = 1
    longest: int = 1000
    gradients: str = RANK
    parameters: str = WORLD
    follows_lr = False

    def __post_init__(self) -> None:
        settle(
            self, target_drift=positive, initial=steps, shortest=steps, longest=steps,
            gradients=text, parameters=_meeting,
        )  # fmt: skip
        if self.longest < self.shortest:
            raise ValueError(
                f"longest must be at least shortest ({self.shortest} steps), got {self.longest}"
            )
        if not self.shortest <= self.initial <= self.longest:
            raise ValueError(
                f"initial must be from shortest to longest ({self.shortest} to {self.longest} "
                f"steps), got {self.initial}"
            )

    @property
    def levels(self) -> frozenset[str]:
        return frozenset({self.gradients, self.parameters}) - {RANK}

    def __call__(self, step: int, lr: float) -> Round:
        return Round(self.initial, self.gradients, self.parameters)

    def adapt(self, planned: Round, before: Round, drift: float) -> Round:
        wanted = round(before.steps * self._change(drift))
        return replace(planned, steps=min(max(wanted, self.shortest), self.longest))

    def _change(self, drift: float) -> float:
        if math.isnan(drift):
            return 1.0
        return 2.0 if drift == 0 else min(max(self.target_drift / drift, 0.5), 2.0)


def planned(schedule: Schedule, step: int, lr: float) -> Round:
    """The round that a schedule gives.

    Raises:
        TypeError: if it gives anything else.

    Example:
        >>> planned(periodic(16), step=0, lr=0.1).steps
        16
    """
    given = schedule(step, lr)
    if not isinstance(given, Round):
        raise TypeError(
            f"schedule must give a Round, got {shown(given)} from {schedule} at step {step}"
        )
    return given


def adapt(schedule: Schedule, planned: Round, before: Round, drift: float) -> Round:
    """The round to take after a synchronization: the planned one, unless the schedule adapts it.

    Args:
        schedule: the schedule that planned; it may be `Adapting`.
        planned: the round that it gave for this step.
        before: the round that has just ended.
        drift: as in `Adapting`.

    Example:
        >>> adapt(periodic(16), planned=Round(16), before=Round(16), drift=0.5).steps
        16
        >>> adapt(adaptive(0.1, initial=16), planned=Round(16), before=Round(16), drift=0.5).steps
        8
    """
    if not isinstance(schedule, Adapting):
        return planned
    return schedule.adapt(planned, before, drift)


def adapts(schedule: Schedule) -> bool:
    """Whether a schedule, or the one after its warm-up, depends on the drift.

    Example:
        >>> adapts(post_local(8, adaptive(0.1, initial=4))), adapts(post_local(8, periodic(4)))
        (True, False)
    """
    if isinstance(schedule, post_local):
        return adapts(schedule.then)
    return isinstance(schedule, Adapting)


def follows_lr(schedule: Schedule) -> bool:
    """Whether a schedule depends on the learning rate.

    The schedules of this module declare it. Any other callable is assumed to, unless it has an
    attribute ``follows_lr`` that is False.

    Example:
        >>> follows_lr(post_local(8, quadratic(0.02, 4))), follows_lr(periodic(4))
        (True, False)
        >>> follows_lr(lambda step, lr: Round(4))
        True
    """
    return bool(getattr(schedule, "follows_lr", True))


def nests(schedule: Schedule) -> bool:
    """Whether a schedule of this module synchronizes parameters at more than one level.

    Example:
        >>> nests(hierarchical({"node": 4, "world": 16})), nests(periodic(16, gradients="node"))
        (True, False)
    """
    if isinstance(schedule, post_local):
        return nests(schedule.then)
    return isinstance(schedule, hierarchical) and len(schedule.periods) > 1


def shortest(schedule: Schedule) -> int:
    """The least number of steps of a full round that synchronizes parameters.

    The schedules of this module declare it; of any other callable only the first round is known.
    A round that ends early, by a synchronization or the end of a run, can have fewer.

    Example:
        >>> shortest(post_local(warmup=100, then=hierarchical({"node": 4, "world": 16})))
        4
    """
    known = getattr(schedule, "shortest", None)
    return planned(schedule, 0, 1.0).steps if known is None else int(known)


def levels(schedule: Schedule) -> frozenset[str]:
    """The levels that a schedule communicates at, without ``"rank"``.

    The schedules of this module declare them; of any other callable only the first round is known.

    Example:
        >>> sorted(levels(hierarchical({"node": 4, "world": 16})))
        ['node', 'world']
    """
    known = getattr(schedule, "levels", None)
    return planned(schedule, 0, 1.0).levels if known is None else frozenset(known)


def rollout(
    schedule: Schedule, steps: int, lr: float | Callable[[int], float] = 1.0
) -> Iterator[tuple[int, Round]]:
    """The rounds of a whole run, without a cluster or training: pairs of first step and round.

    Args:
        schedule: the schedule.
        steps: number of steps of the run, at which the last round ends.
        lr: learning rate, a number or a function of the step.

    Example:
        >>> [start for start, _ in rollout(periodic(4), steps=10)]
        [0, 4, 8]
    """
    is_schedule("schedule", schedule)
    end, step = no_steps_or_more("steps", steps), 0
    while step < end:
        current = schedule(step, lr(step) if callable(lr) else lr)
        yield step, Round(min(current.steps, end - step), current.gradients, current.parameters)
        step += current.steps


def is_schedule(name: str, value: Any) -> Any:
    """The rule for an argument that takes a schedule.

    Raises:
        TypeError: if it cannot be called, or is a class or function that makes a schedule.
    """
    return function(name, value, "schedule.periodic(16)")


def _meeting(name: str, value: Any) -> str:
    """The rule for a level at which ranks communicate."""
    level = text(name, value)
    if level == RANK:
        raise ValueError(
            f"{name} must be a level at which ranks communicate, such as {WORLD!r}, got {RANK!r}, "
            "which is a rank alone"
        )
    return level


def _periods(given: Any) -> tuple[tuple[str, int], ...]:
    periods = pairs("periods", given, '{"node": 4, "world": 16}')
    if not periods:
        raise ValueError("periods must name at least one level, got none")
    for level, period in periods:
        _meeting(f"level {shown(level)} of periods", level)
        steps(f"periods[{level!r}]", period)
    for (inner, short), (outer, long) in pairwise(periods):
        if inner == WORLD:
            raise ValueError(
                f"periods must go from the narrowest level to the widest, got {WORLD!r} before "
                f"{outer!r}"
            )
        if long <= short or long % short:
            raise ValueError(
                f"periods must grow from level to level, each a multiple of the one before; "
                f"got {inner!r}: {short}, then {outer!r}: {long}"
            )
    return tuple((level, int(period)) for level, period in periods)
