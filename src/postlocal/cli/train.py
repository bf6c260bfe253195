"""``postlocal train``."""

import sys
from functools import partial
from typing import Annotated

import typer

from postlocal.cli.options import (
    GradientWire,
    OuterLr,
    OuterMomentum,
    Period,
    StrategyText,
    Warmup,
    WireName,
    option,
)
from postlocal.cli.units import parse_bandwidth
from postlocal.train import make_config
from postlocal.train import train as run
from postlocal.train.config import TrainConfig
from postlocal.train.config_file import CHANGEABLE
from postlocal.train.model import SIZES
from postlocal.train.preparation import check_before_launch, prepare_run
from postlocal.train.world import launch, launched

_run = partial(option, "The run")
_fit = partial(option, "Training")
_kept = partial(option, "Output")
_D = TrainConfig()


def train(
    ctx: typer.Context,
    workers: Annotated[
        int, _run("Number of workers to start on this machine; not used under torchrun.")
    ] = _D.workers,
    node_size: Annotated[
        int, _run("Workers per node, for strategies that use nodes.")
    ] = _D.node_size,
    data: Annotated[
        list[str] | None,
        _run(
            "File, folder or glob of text; may be repeated. Files with NUL bytes are skipped.",
            show_default="Python's standard library",
        ),
    ] = None,
    model: Annotated[str, _run(f"Size of the model: {', '.join(SIZES)}.")] = _D.model,
    seed: Annotated[int, _run("Random seed of data order and initialization.")] = _D.seed,
    compare: Annotated[
        str | None,
        _run(
            "Strategy to train first, for comparison, such as ddp. It uses the given options that "
            "it has; ddp uses fp32 wires.",
            show_default="none",
        ),
    ] = None,
    link: Annotated[
        str | None,
        _run(
            "Emulate a slow network: the bandwidth of each worker's link, such as 100Mbit.",
            show_default="none",
        ),
    ] = None,
    strategy: StrategyText = _D.strategy,
    period: Period = None,
    warmup: Warmup = None,
    outer_lr: OuterLr = None,
    outer_momentum: OuterMomentum = None,
    wire: WireName = None,
    gradient_wire: GradientWire = None,
    steps: Annotated[int, _fit("Optimizer steps.")] = _D.steps,
    batch_size: Annotated[int, _fit("Batch size of each worker, in sequences.")] = _D.batch_size,
    accumulate: Annotated[
        int, _fit("Gradient accumulation: micro-batches per batch, to save memory.")
    ] = _D.accumulate,
    sequence_length: Annotated[int, _fit("Sequence length, in bytes.")] = _D.sequence_length,
    lr: Annotated[float, _fit("Peak learning rate of AdamW.")] = _D.lr,
    lr_warmup: Annotated[
        int | None,
        _fit("Learning rate warm-up, in steps.", show_default="a tenth of the run"),
    ] = None,
    weight_decay: Annotated[float, _fit("Weight decay of AdamW.")] = _D.weight_decay,
    clip: Annotated[float, _fit("Maximum gradient norm.")] = _D.clip,
    timeout: Annotated[
        float, _fit("Seconds to wait for a missing worker before the run fails.")
    ] = _D.timeout,
    out: Annotated[str, _kept("Output folder.")] = str(_D.out),
    resume: Annotated[
        bool,
        _kept(
            "Resume from the newest checkpoint with the saved settings. These may change: "
            f"{', '.join(sorted(name.replace('_', '-') for name in CHANGEABLE))}.",
            "--resume",
        ),
    ] = False,
    overwrite: Annotated[
        bool, _kept("Replace an earlier run in the output folder.", "--overwrite")
    ] = False,
    checkpoint_every: Annotated[int, _kept("Steps between checkpoints.")] = _D.checkpoint_every,
    keep: Annotated[int, _kept("Number of checkpoints to keep.")] = _D.keep,
    log_every: Annotated[int, _kept("Steps between log lines.")] = _D.log_every,
    eval_every: Annotated[
        int | None, _kept("Steps between evaluations.", show_default="a tenth of the run")
    ] = None,
    eval_sequences: Annotated[int, _kept("Held-out sequences per evaluation.")] = _D.eval_sequences,
) -> None:
    """Train a language model on bytes of text, with workers that communicate seldom.

    Without torchrun, the command starts its own workers; under torchrun, each
    process is one. It writes config.json, metrics.jsonl, summary.json,
    loss.png, checkpoints and model.safetensors to the output folder.
    """
    if not out:
        raise ValueError("out must name a folder, got ''")
    if resume and overwrite:
        raise ValueError("resume and overwrite must not be given together: one keeps what is there")
    # Only given options are passed on, so that a resumed run can tell them from defaults.
    given = {name: value for name, value in ctx.params.items() if _was_given(ctx, name)}
    if link is not None:
        given["link"] = parse_bandwidth(link, "link")
    config = make_config(**given)
    if launched():
        run(config)
        return
    prepared = prepare_run(config)
    check_before_launch(prepared.config)
    for line in prepared.lines(prepared.config.workers):
        typer.echo(line)
    if prepared.config.workers == 1:
        run(config, announce=False)
    elif code := launch(prepared.config.workers, sys.argv[1:]):
        raise typer.Exit(code)


def _was_given(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
