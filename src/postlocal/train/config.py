"""What a training run is made of, checked before anything starts."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from postlocal import strategies, topology, wire
from postlocal.strategies import Strategy
from postlocal.train.model import SIZES


class TrainConfig(BaseModel):
    """Settings of `postlocal train`; its flags, with the same names and defaults.

    Raises:
        ValueError: naming the setting, the value and the rule.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    workers: Annotated[int, Field(ge=1, le=1_000_000)] = 4
    node_size: Annotated[int, Field(ge=1)] = 1
    data: tuple[str, ...] = ()
    model: str = "tiny"
    strategy: str = "post_local_sgd"
    parameters: dict[str, Any] = {}
    wire: str | None = None
    gradient_wire: str | None = None
    optimizer_state: Literal["keep", "average", "reset"] = "keep"
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
    def strategy_parameters(self) -> dict[str, Any]:
        """Parameters of the strategy: its own defaults, those that suit the run, those given."""
        taken = strategies.parameters_of(self.strategy)
        chosen = self._suited() | self.parameters
        return {name: chosen.get(name, details.default) for name, details in taken.items()}

    def _suited(self) -> dict[str, Any]:
        taken = strategies.parameters_of(self.strategy)
        suited = {
            "warmup": 3 * self.steps // 10 if self.strategy == "post_local_sgd" else 0,
            "lr_warmup": self.rising_steps,
            "total": self.steps,
        }
        return {name: value for name, value in suited.items() if name in taken}

    def make_strategy(self) -> Strategy:
        """The strategy by name, with the parameters given and defaults that suit the run.

        Raises:
            ValueError: if the name or a parameter is unknown, or a value out of its range.
        """
        named = strategies.named(self.strategy, **self._suited() | self.parameters)
        return replace(
            named,
            wire=_wire(self.wire, named.wire),
            gradient_wire=_wire(self.gradient_wire, named.gradient_wire),
            optimizer_state=self.optimizer_state,
        )

    def describe_strategy(self) -> str:
        """The strategy with its parameters.

        Example:
            >>> make_config(strategy="local_sgd", parameters={"period": 8}).describe_strategy()
            'local_sgd(period=8)'
        """
        given = ", ".join(f"{name}={value}" for name, value in self.strategy_parameters.items())
        return f"{self.strategy}({given})"

    def describe_wires(self) -> str:
        """How values travel.

        Example:
            >>> make_config(strategy="local_sgd", wire="int4").describe_wires()
            'parameters as int4, gradients as bf16'
        """
        names = {make(): name for name, make in wire.NAMED.items()}
        strategy = self.make_strategy()
        parameters, gradients = (
            names.get(each, "its own wire") for each in (strategy.wire, strategy.gradient_wire)
        )
        return f"parameters as {parameters}, gradients as {gradients}"

    def make_topology(self) -> topology.Topology:
        """Nodes of ``node_size`` ranks."""
        return topology.nodes(self.node_size)

    def compared(self) -> "TrainConfig":
        """The run to compare with: the same training under another strategy.

        It takes the parameters given that its strategy has, and wires and optimizer state as given;
        ddp takes fp32 wires. Compared with itself, a strategy takes none of them.

        Raises:
            ValueError: if both runs would be the same.
        """
        assert self.compare is not None
        axes: dict[str, Any] = {"strategy": self.compare, "compare": None}
        if self.compare == self.strategy:
            axes |= {"parameters": {}, "wire": None, "gradient_wire": None}
            axes |= {"optimizer_state": "keep"}
        else:
            taken = strategies.parameters_of(self.compare)
            given = {name: value for name, value in self.parameters.items() if name in taken}
            axes |= {"parameters": given}
        if self.compare == "ddp":
            axes |= {"wire": "fp32", "gradient_wire": "fp32", "optimizer_state": "keep"}
        other = self.model_copy(update=axes | {"out": self.out / "compare" / self.compare})
        if other.make_strategy() == self.make_strategy():
            raise ValueError(
                f"compare must differ from the run itself, got {self.compare!r}, which would be "
                f"{other.describe_strategy()} as well: name another strategy, or give this one "
                "other options than its defaults"
            )
        return other

    @property
    def not_compared(self) -> list[str]:
        """Options given that the compared run does not take."""
        if self.compare is None:
            return []
        other = self.compared()
        names = [name for name in self.parameters if name not in other.parameters]
        axes = ("wire", "gradient_wire", "optimizer_state")
        default = TrainConfig()
        own = [n for n in axes if getattr(self, n) not in (getattr(default, n), getattr(other, n))]
        return [name.replace("_", "-") for name in [*names, *own]]

    def runs(self) -> dict[str, "TrainConfig"]:
        """What is trained, in order: a label for each run."""
        if self.compare is None:
            return {self.strategy: self}
        other = self.compared()
        label = other.strategy if other.strategy != self.strategy else f"{self.strategy} (defaults)"
        return {label: other, self.strategy: self}

    def resolved(self) -> "TrainConfig":
        """The same, with what follows from the number of steps spelled out.

        A run that is made longer or shorter keeps its warm-ups. Where its last round ends is left
        out: that follows the steps.
        """
        fixed = {name: value for name, value in self._suited().items() if name != "total"}
        return self.model_copy(
            update={"lr_warmup": self.rising_steps, "parameters": fixed | self.parameters}
        )

    def describe(self) -> list[str]:
        """One line a setting that all ranks must have in common."""
        local = {"out", "data", "resume", "overwrite"}
        return [f"{name}: {value!r}" for name, value in self if name not in local]


def _wire(name: str | None, own: wire.Wire) -> wire.Wire:
    """The wire by name, or the strategy's own if that is a narrow one, or bf16."""
    if name is None:
        return own if own.lossy else wire.bf16()
    return wire.named(name)


def make_config(**settings: Any) -> TrainConfig:
    """A checked config, or an error of one line.

    Raises:
        ValueError: naming the first bad setting, its value and the rule.
    """
    try:
        config = TrainConfig(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])).replace("_", "-")
        rule = first["msg"].removeprefix("Input should be ")
        raise ValueError(f"{name} must be {rule}, got {first['input']!r}") from None
    _check(config)
    return config


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
    config.make_strategy()
    if config.compare is not None:
        config.compared().make_strategy()
