"""``postlocal train``."""

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from postlocal.cli.units import parse_bandwidth
from postlocal.strategies import NAMED
from postlocal.train import make_config
from postlocal.train import train as run
from postlocal.train.config import TrainConfig
from postlocal.train.model import SIZES
from postlocal.train.run import check_before_launch
from postlocal.train.world import launch, launched
from postlocal.wire import NAMED as WIRES


def _option(panel: str, text: str, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, **settings)


_run = partial(_option, "The run")
_axis = partial(_option, "The strategy")
_fit = partial(_option, "Training")
_kept = partial(_option, "Output")
_D = TrainConfig()
_OWN_WIRE = "the strategy's own, or bf16"


def train(
    workers: Annotated[
        int, _run("Workers to start on this machine; under torchrun its own count.")
    ] = _D.workers,
    node_size: Annotated[
        int, _run("Workers that count as one node, for levels and gradients.")
    ] = _D.node_size,
    data: Annotated[
        list[str] | None,
        _run(
            "File, folder or glob of text; may be repeated.",
            show_default="Python's standard library",
        ),
    ] = None,
    model: Annotated[str, _run(f"Size: {', '.join(SIZES)}.")] = _D.model,
    seed: Annotated[int, _run("Of data order and initialization.")] = _D.seed,
    compare: Annotated[
        str | None, _run("Train under this strategy too, first, such as ddp.")
    ] = None,
    link: Annotated[
        str | None,
        _run(
            "Emulate a link of this rate between workers, such as 100Mbit (delays what is sent; "
            "for demonstrations).",
            show_default="none",
        ),
    ] = None,
    strategy: Annotated[str, _axis(f"One of {', '.join(NAMED)}.")] = _D.strategy,
    period: Annotated[int | None, _axis("Steps a round.")] = None,
    warmup: Annotated[
        int | None,
        _axis(
            "Synchronous steps of post_local_sgd (three tenths) and edit (none).",
            show_default=False,
        ),
    ] = None,
    gradients: Annotated[
        str | None, _axis("Level at which gradients meet in a round: rank, node.")
    ] = None,
    outer_lr: Annotated[float | None, _axis("Of the DiLoCo family.")] = None,
    outer_momentum: Annotated[float | None, _axis("Of the DiLoCo family.")] = None,
    fragments: Annotated[int | None, _axis("Parts that streaming_diloco sends.")] = None,
    delay: Annotated[
        int | None, _axis("Steps that streaming_diloco goes on before a result is applied.")
    ] = None,
    mix: Annotated[
        float | None, _axis("Share of its own value that a worker of streaming_diloco keeps.")
    ] = None,
    carry: Annotated[
        bool | None,
        _axis("Whether a worker of streaming_diloco keeps what it did during a delay above 0."),
    ] = None,
    order: Annotated[
        str | None, _axis("Of layers in streaming_diloco: strided, sequential.")
    ] = None,
    top_k: Annotated[int | None, _axis("Values that sparse_loco sends of each chunk.")] = None,
    chunk: Annotated[int | None, _axis("Values in a chunk of sparse_loco.")] = None,
    bits: Annotated[int | None, _axis("Bits a value of sparse_loco.")] = None,
    feedback: Annotated[
        float | None, _axis("Share of what sparse_loco did not send that it adds next time.")
    ] = None,
    max_norm: Annotated[float | None, _axis("Greatest norm of a layer's move in edit.")] = None,
    slow_lr: Annotated[float | None, _axis("Of slowmo.")] = None,
    slow_momentum: Annotated[float | None, _axis("Of slowmo.")] = None,
    alpha: Annotated[float | None, _axis("Growth coefficient of qsr.")] = None,
    base: Annotated[int | None, _axis("Shortest period of qsr.")] = None,
    periods: Annotated[str | None, _axis("Of hierarchical, such as node=4,world=16.")] = None,
    wire: Annotated[
        str | None,
        _axis(f"How parameters travel: {', '.join(WIRES)}.", show_default=_OWN_WIRE),
    ] = None,
    gradient_wire: Annotated[
        str | None, _axis("How gradients travel, as above.", show_default=_OWN_WIRE)
    ] = None,
    optimizer_state: Annotated[
        str, _axis("At a synchronization: keep, average or reset.")
    ] = _D.optimizer_state,
    steps: Annotated[int, _fit("Optimizer steps.")] = _D.steps,
    batch_size: Annotated[int, _fit("Sequences a step for each worker.")] = _D.batch_size,
    accumulate: Annotated[
        int, _fit("Parts that a worker's batch is taken in, to save memory.")
    ] = _D.accumulate,
    sequence_length: Annotated[int, _fit("Bytes a sequence.")] = _D.sequence_length,
    lr: Annotated[float, _fit("Peak learning rate of AdamW.")] = _D.lr,
    lr_warmup: Annotated[
        int | None,
        _fit("Steps in which it rises.", show_default="a tenth"),
    ] = None,
    weight_decay: Annotated[float, _fit("Of AdamW.")] = _D.weight_decay,
    clip: Annotated[float, _fit("Largest gradient norm.")] = _D.clip,
    timeout: Annotated[float, _fit("Seconds to wait for a missing worker.")] = _D.timeout,
    out: Annotated[Path, _kept("Folder for all that the run leaves.")] = _D.out,
    resume: Annotated[bool, _kept("Go on from the newest checkpoint.", "--resume")] = False,
    overwrite: Annotated[
        bool, _kept("Replace an earlier run in the folder.", "--overwrite")
    ] = False,
    checkpoint_every: Annotated[int, _kept("Steps between checkpoints.")] = _D.checkpoint_every,
    keep: Annotated[int, _kept("Newest checkpoints to keep.")] = _D.keep,
    log_every: Annotated[int, _kept("Steps between log lines.")] = _D.log_every,
    eval_every: Annotated[
        int | None, _kept("Steps between evaluations.", show_default="a tenth")
    ] = None,
    eval_sequences: Annotated[
        int, _kept("Held-out sequences an evaluation looks at.")
    ] = _D.eval_sequences,
) -> None:
    """Train a language model on bytes of text, with workers that communicate seldom.

    Alone it starts its own workers; under torchrun it joins that world. It leaves metrics.jsonl,
    summary.json, loss.png, checkpoints and model.safetensors in the output folder.
    """
    settings = dict(locals())
    given = {name: settings.pop(name) for name in _PARAMETERS}
    parameters = {name: value for name, value in given.items() if value is not None}
    if periods is not None:
        parameters["periods"] = _parse_periods(periods)
    settings["link"] = None if link is None else parse_bandwidth(link, "link")
    config = make_config(**settings | {"data": tuple(data or ()), "parameters": parameters})
    if launched() or workers == 1:
        run(config)
        return
    check_before_launch(config)
    code = launch(workers, sys.argv[1:])
    if code:
        raise typer.Exit(code)


_PARAMETERS = (
    "period", "warmup", "gradients", "outer_lr", "outer_momentum", "fragments", "delay", "mix",
    "carry", "order", "top_k", "chunk", "bits", "feedback", "max_norm", "slow_lr", "slow_momentum",
    "alpha", "base", "periods",
)  # fmt: skip


def _parse_periods(text: str) -> dict[str, int]:
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {level.strip(): int(steps) for level, steps in pairs}
    except ValueError:
        raise ValueError(
            f"periods must be level=steps pairs such as node=4,world=16, got {text!r}"
        ) from None
