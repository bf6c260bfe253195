"""Settings of a training run, checked before it starts."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from postlocal import strategies, topology, wire
from postlocal.expressions import Call, ExpressionError, parse, read
from postlocal.strategies import Strategy
from postlocal.train.model import SIZES

_FLAGS = ("period", "warmup", "outer_lr", "outer_momentum")
_WIRES = ("wire", "gradient_wire")
_QSR = 0.0175 / 0.008  # alpha over the peak learning rate, of arXiv 2310.14423's ViT-B
_PERIODS = {"node": 4, "world": 16}
_WRITTEN = ("parameters", "optimizer_state")  # arguments of the expression that are no settings


class TrainConfig(BaseModel):
    """Settings of `postlocal train`; its flags, with the same names and defaults.

    ``strategy`` is an expression, such as ``"diloco(period=32, wire=int4())"``; so is ``compare``,
    and ``wire`` and ``gradient_wire`` are expressions of wires. ``period``, ``warmup``,
    ``outer_lr``, ``outer_momentum`` and the wires replace arguments of the strategy.

    Raises:
        ValueError: naming the setting, the value and the rule.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    workers: Annotated[int, Field(ge=1, le=1_000_000)] = 4
    node_size: Annotated[int, Field(ge=1)] = 1
    data: tuple[str, ...] = ()
    model: str = "tiny"
    strategy: str = "post_local_sgd"
    period: int | None = None
    warmup: int | None = None
    outer_lr: float | None = None
    outer_momentum: float | None = None
    wire: str | None = None
    gradient_wire: str | None = None
    steps: Annotated[int, Field(ge=1, lt=2**63)] = 100
    batch_size: Annotated[int, Field(ge=1)] = 32
    accumulate: Annotated[int, Field(ge=1)] = 1
    sequence_length: Annotated[int, Field(ge=2)] = 128
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 3e-3
    lr_warmup: Annotated[int | None, Field(ge=0)] = None
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    clip: Annotated[float, Field(gt=0)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    out: Path = Path("runs/train")
    resume: bool = False
    overwrite: bool = False
    checkpoint_every: Annotated[int, Field(ge=1)] = 50
    keep: Annotated[int, Field(ge=1)] = 3
    log_every: Annotated[int, Field(ge=1)] = 10
    eval_every: Annotated[int | None, Field(ge=1)] = None
    eval_sequences: Annotated[int, Field(ge=1)] = 256
    compare: str | None = None
    timeout: Annotated[float, Field(gt=0, le=1e7)] = 300.0
    link: Annotated[float | None, Field(gt=0, allow_inf_nan=False)] = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_written(cls, settings: Any) -> Any:
        for name in _WRITTEN if isinstance(settings, Mapping) else ():
            if name in settings:
                raise ValueError(
                    f"{name} must be written in the strategy, as in "
                    "strategy=\"diloco(period=8, optimizer_state='reset')\", "
                    f"got {name}={settings[name]!r}"
                )
        return settings

    @field_validator("strategy", "compare")
    @classmethod
    def _check_strategy(cls, text: str | None) -> str | None:
        if text is not None:
            read(text, strategies.AXIS)
        return text

    @field_validator(*_WIRES)
    @classmethod
    def _check_wire(cls, text: str | None) -> str | None:
        if text is not None:
            parse(text, "wire")
        return text

    @property
    def rising_steps(self) -> int:
        """Steps in which the learning rate rises: a tenth of the run unless given."""
        return self.steps // 10 if self.lr_warmup is None else self.lr_warmup

    @property
    def eval_interval(self) -> int:
        """Steps between evaluations: a tenth of the run unless given."""
        return self.eval_every or max(1, self.steps // 10)

    def lr_at(self, step: int) -> float:
        """Learning rate of a step: a linear rise, then a half cosine to a twentieth of the peak."""
        if step < self.rising_steps:
            return self.lr * (step + 1) / self.rising_steps
        progress = (step - self.rising_steps) / max(1, self.steps - self.rising_steps)
        return self.lr * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))

    @property
    def label(self) -> str:
        """Name of the strategy in tables: its expression, without the brackets of a bare name.

        Arguments in it that settings override have their values.
        """
        call = read(self.strategy, strategies.AXIS)
        own = {name: value for name, value in self._overriding.items() if name in call.arguments}
        return str(call.with_arguments(own)).removesuffix("()")

    @property
    def given_call(self) -> Call:
        """The strategy as given: its expression, and the settings that replace arguments.

        Raises:
            ValueError: if the strategy does not take a setting, with those that it takes.
        """
        return read(self.strategy, strategies.AXIS).with_arguments(self._overriding)

    @property
    def _overriding(self) -> dict[str, Any]:
        """Settings that take the place of the strategy's own arguments."""
        flags = {name: getattr(self, name) for name in _FLAGS}
        flags |= {name: text and parse(text, "wire") for name, text in self._wires()}
        return {name: value for name, value in flags.items() if value is not None}

    @property
    def call(self) -> Call:
        """The same, with the trainer's defaults for arguments that are not given.

        Lossless wires become bf16. The spelling is that of ``str(strategy)``.
        """
        call = self.given_call
        call = call.with_defaults(self._suited(call.name))
        own = call.make()
        exact = [name for name in _WIRES if not getattr(own, name).lossy]
        return call.with_defaults(dict.fromkeys(exact, wire.bf16())).normal()

    def _wires(self) -> Iterator[tuple[str, str | None]]:
        return ((name, getattr(self, name)) for name in _WIRES)

    def _suited(self, name: str) -> dict[str, Any]:
        suited = {
            "lr_warmup": self.rising_steps,
            "total": self.steps,
            "alpha": _QSR * self.lr,
            "periods": _PERIODS,
        }
        return suited | ({"warmup": 3 * self.steps // 10} if name == "post_local_sgd" else {})

    def make_strategy(self) -> Strategy:
        """The strategy, with the trainer's defaults for arguments that are not given.

        Raises:
            ValueError: if the strategy does not take a setting, or a value is out of its range.

        Example:
            >>> str(make_config(strategy="local_sgd(period=8, wire=int4)").make_strategy())
            'local_sgd(period=8, wire=int4(), gradient_wire=bf16())'
        """
        strategy: Strategy = self.call.make()
        return strategy

    def make_topology(self) -> topology.Topology:
        """Nodes of ``node_size`` ranks."""
        return topology.nodes(self.node_size)

    def compared(self) -> "TrainConfig":
        """The compared run: the same training under another strategy.

        It uses the given plain arguments, wires and optimizer state that its strategy has; ddp
        uses fp32 wires. A strategy that is compared with itself uses none of them.

        Raises:
            ValueError: if both runs would be the same.
        """
        assert self.compare is not None
        other, own = read(self.compare, strategies.AXIS), self.given_call
        if other.name == "ddp":
            other = other.with_defaults(dict.fromkeys(_WIRES, wire.fp32()))
        elif other.name != own.name:
            other = other.with_defaults(
                {key: value for key, value in own.arguments.items() if _is_shared(key)}
            )
        changes: dict[str, Any] = dict.fromkeys((*_FLAGS, *_WIRES, "compare"))
        changes |= {"strategy": str(other), "out": self.out / "compare" / other.name}
        config = self.model_copy(update=changes)
        if config.make_strategy() == self.make_strategy():
            raise ValueError(
                f"compare must differ from the run itself, got {self.compare!r}, which would be "
                f"{config.call} as well: name another strategy, or give this one other arguments"
            )
        return config

    @property
    def not_compared(self) -> list[str]:
        """Given arguments that the compared run does not use."""
        if self.compare is None:
            return []
        taken = self.compared().given_call.arguments
        own = self.given_call.arguments
        return [name for name, value in own.items() if name not in taken or taken[name] != value]

    def runs(self) -> dict[str, "TrainConfig"]:
        """The runs in order, the main one last: label -> settings."""
        name = self.given_call.name
        if self.compare is None:
            return {name: self}
        other = self.compared()
        if other.given_call.name != name:
            return {other.given_call.name: other, name: self}
        return {str(other.given_call): other, str(self.given_call): self}

    def resolved(self) -> "TrainConfig":
        """The same, with values that follow from the number of steps filled in.

        A run with another number of steps then keeps its warm-ups. ``total`` is left out, because
        the last round always ends with the run.
        """
        call = self.given_call
        fixed = {k: v for k, v in self._suited(call.name).items() if k != "total"}
        changes: dict[str, Any] = dict.fromkeys((*_FLAGS, *_WIRES))
        changes |= {"strategy": str(call.with_defaults(fixed).normal())}
        return self.model_copy(update=changes | {"lr_warmup": self.rising_steps})

    def describe(self) -> list[str]:
        """One line for each setting that must be equal on all ranks."""
        local = {"out", "data", "resume", "overwrite"}
        return [f"{name}: {value!r}" for name, value in self if name not in local]


def _is_shared(argument: str) -> bool:
    """Whether a compared run uses an argument: plain ones, wires and optimizer state."""
    own = {"schedule", "name"} | set(strategies.Axes.__annotations__)
    return argument not in own - {*_WIRES, "optimizer_state"}


def make_config(**settings: Any) -> TrainConfig:
    """Checked settings, or an error of one line.

    Raises:
        ValueError: naming the first bad setting, its value and the rule.
    """
    try:
        config = TrainConfig(**settings)
    except ValidationError as error:
        raise first_problem(error) from None
    _check(config)
    return config


def first_problem(error: ValidationError) -> ValueError:
    """The first of the settings that are refused, with its value and the rule."""
    first = error.errors()[0]
    name = ".".join(map(str, first["loc"])).replace("_", "-")
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, ExpressionError):
        return cause.of(name)
    if cause is not None:
        return ValueError(str(cause))
    rule = first["msg"].removeprefix("Input should be ")
    if rule == first["msg"]:
        return ValueError(f"{name}: {rule[0].lower()}{rule[1:]}")
    return ValueError(f"{name} must be {rule}, got {first['input']!r}")


def _check(config: TrainConfig) -> None:
    if config.model not in SIZES:
        raise ValueError(f"model must be one of {', '.join(SIZES)}, got {config.model!r}")
    if config.batch_size % config.accumulate:
        raise ValueError(
            f"accumulate must divide the batch size {config.batch_size}, got {config.accumulate}"
        )
    if config.rising_steps > config.steps:
        raise ValueError(
            f"lr-warmup must be at most the {config.steps} steps of the run, got "
            f"{config.rising_steps}"
        )
    name = "strategy"
    try:
        config.make_strategy()
        if config.compare is not None:
            name = "compare"
            config.compared()
    except ExpressionError as error:
        raise error.of(name) from None
