"""When fragments are sent and applied, when replicas agree, and how a run ends: one pure rule.

A `Timeline` is a frozen value: it knows neither tensors nor ranks nor seconds. A caller steps it
and carries out the events that come back: `postlocal.sync.clock.Sync` on the parameters of a
replica, `postlocal.planning` on a model of seconds. So what is planned is what is run.

Example:
    >>> from postlocal.fragments import streaming
    >>> timeline = Timeline.new(streaming(count=2, delay=1), Round(4, "rank", "world"))
    >>> for _ in range(4):
    ...     timeline, events = timeline.step()
    ...     print(timeline.steps, *events)
    1
    2 Start(fragment=0)
    3 Apply(fragment=0)
    4 Start(fragment=1)
    >>> timeline, events = timeline.finish()
    >>> print(*events)
    Apply(fragment=1) Synchronize(fragment=0, final=True) Restore(fragment=1) Agree()
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from postlocal.fragments import Fragments
from postlocal.schedule import WORLD, Round


@dataclass(frozen=True)
class Start:
    """A fragment is sent; its result is applied later."""

    fragment: int


@dataclass(frozen=True)
class Apply:
    """The result of a fragment that was sent earlier is applied."""

    fragment: int


@dataclass(frozen=True)
class Synchronize:
    """A fragment is sent, and its result is applied at once.

    Attributes:
        fragment: number of the fragment.
        final: whether the run ends here, so that replicas keep no share of their own values.
    """

    fragment: int
    final: bool = False


@dataclass(frozen=True)
class Average:
    """All parameters are averaged at a level below ``"world"``."""

    level: str


@dataclass(frozen=True)
class Restore:
    """The parameters of a fragment take its anchor, which the run ends with."""

    fragment: int


@dataclass(frozen=True)
class Agree:
    """All replicas hold equal parameters now."""


Event = Start | Apply | Synchronize | Average | Restore | Agree


@dataclass(frozen=True)
class Timeline:
    """Where a run stands in its rounds; `new` makes one at the start of a run.

    Each round starts each fragment once, evenly spread, the last one at its end. The result is
    applied ``delay`` steps later, or before the same fragment is started again. Where parameters
    are not cut, delayed or mixed, replicas agree at the end of a round.

    Attributes:
        fragments: how parameters are cut.
        round: the round under way.
        begun: steps taken when it began.
        steps: steps taken.
        started: for each fragment, steps taken when it was started last; 0 before.
        under_way: numbers of the fragments that were started and not applied, the oldest first.
        synchronous: whether gradients were averaged over all ranks in each step so far.
        agreed_at: steps taken when replicas last held equal parameters.
    """

    fragments: Fragments
    round: Round
    begun: int
    steps: int
    started: tuple[int, ...]
    under_way: tuple[int, ...]
    synchronous: bool
    agreed_at: int

    @classmethod
    def new(cls, fragments: Fragments, first: Round) -> "Timeline":
        """The timeline at the start of a run.

        Args:
            fragments: how parameters are cut.
            first: the first round.
        """
        return cls(fragments, first, 0, 0, (0,) * fragments.count, (), True, 0)

    @property
    def end(self) -> int:
        """Steps taken when the round ends."""
        return self.begun + self.round.steps

    @property
    def ended(self) -> bool:
        """Whether all steps of the round are taken: the next one has to begin."""
        return self.steps >= self.end

    @property
    def diverges(self) -> bool:
        """Whether replicas are equal, and part in the first step of the round under way."""
        return self.synchronous and self.round.gradients != WORLD

    @property
    def steps_to_next(self) -> int:
        """Number of steps until a fragment is due, or the round ends; 0 where it has ended."""
        applied = [self.started[number] + self.fragments.delay for number in self.under_way]
        later = [each for each in (*applied, *self._starts(), self.end) if each > self.steps]
        return min(later) - self.steps if not self.ended else 0

    def begin(self, following: Round) -> "Timeline":
        """The timeline where a round begins, whether or not the one before has ended."""
        return replace(self, round=following, begun=self.steps)

    def step(self, count: int = 1) -> tuple["Timeline", tuple[Event, ...]]:
        """Take steps.

        Args:
            count: number of steps, from 1 to `steps_to_next`, so that no event is passed by.

        Returns:
            The timeline after these steps, and what is to be done then, in order.

        Raises:
            ValueError: if ``count`` is out of its range.
        """
        if not 1 <= count <= self.steps_to_next:
            raise ValueError(
                f"count must be from 1 to the {self.steps_to_next} steps until the next event, got "
                f"{count}: take fewer steps, or begin the next round where this one has ended"
            )
        synchronous = self.synchronous and self.round.gradients == WORLD
        now = replace(self, steps=self.steps + count, synchronous=synchronous)
        if synchronous:
            now = replace(now, agreed_at=now.steps)
        now, applied = now._apply_due()
        now, started = now._start_due()
        now, last = now._end_round()
        return now, (*applied, *started, *last)

    def finish(self) -> tuple["Timeline", tuple[Event, ...]]:
        """End the run, or a part of it, with equal replicas; the next round has to begin.

        Fragments under way are applied. Unless replicas agree already, fragments that were started
        before this step are synchronized once more, for what was learned since.

        Returns:
            The timeline after it, and what is to be done, in order.
        """
        events: list[Event] = [Apply(number) for number in self.under_way]
        if self.agreed_at != self.steps:
            events += [
                Restore(number) if started == self.steps else Synchronize(number, final=True)
                for number, started in enumerate(self.started)
            ]
        return self.agreeing(), (*events, Agree())

    def agreeing(self) -> "Timeline":
        """The timeline where all replicas hold equal parameters, and nothing is under way."""
        started = (self.steps,) * len(self.started)
        return replace(self, started=started, under_way=(), agreed_at=self.steps)

    def state_dict(self) -> dict[str, Any]:
        """All but the fragments, as plain values."""
        state = asdict(self)
        del state["fragments"]
        return state

    def resumed(self, state: Mapping[str, Any]) -> "Timeline":
        """The timeline, with these fragments, that `state_dict` was taken of.

        Example:
            >>> from postlocal.fragments import streaming
            >>> timeline, _ = Timeline.new(streaming(count=2), Round(4, "rank", "world")).step(2)
            >>> timeline.resumed(timeline.state_dict()) == timeline
            True
        """
        queues = {name: tuple(state[name]) for name in ("started", "under_way")}
        return replace(self, **{**state, **queues, "round": Round(**state["round"])})

    def _starts(self) -> tuple[int, ...]:
        """Steps taken when each fragment is started in this round; none where none is."""
        if self.round.parameters != WORLD:
            return ()
        offsets = start_steps(self.round.steps, len(self.started))
        return tuple(self.begun + offset for offset in offsets)

    def _apply_due(self) -> tuple["Timeline", list[Event]]:
        last = self.steps - self.fragments.delay
        due = [number for number in self.under_way if self.started[number] <= last]
        under_way = self.under_way[len(due) :]  # the oldest are due first
        return replace(self, under_way=under_way), [Apply(number) for number in due]

    def _start_due(self) -> tuple["Timeline", list[Event]]:
        events: list[Event] = []
        started, under_way = list(self.started), list(self.under_way)
        for number, start in enumerate(self._starts()):
            if start != self.steps:
                continue
            started[number] = self.steps
            if not self.fragments.delay:
                events.append(Synchronize(number))
                continue
            while number in under_way:  # after a round that was cut short
                events.append(Apply(under_way.pop(0)))
            under_way.append(number)
            events.append(Start(number))
        return replace(self, started=tuple(started), under_way=tuple(under_way)), events

    def _end_round(self) -> tuple["Timeline", list[Event]]:
        level = self.round.parameters
        if not self.ended or level is None:
            return self, []
        if level != WORLD:
            return self, [Average(level)]
        if self.fragments.streams:
            return self, []
        return replace(self, agreed_at=self.steps), [Agree()]


def start_steps(steps: int, count: int) -> tuple[int, ...]:
    """After which step of a round each fragment is started: evenly spread, the last at its end.

    Args:
        steps: steps of the round, at least 1.
        count: number of fragments, at least 1.

    Returns:
        For each fragment a step, from 1 to ``steps``, never falling.

    Example:
        >>> start_steps(steps=10, count=4)
        (3, 5, 8, 10)
    """
    return tuple(-(-part * steps // count) for part in range(1, count + 1))
