"""``postlocal train``."""

import sys
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

import typer

from postlocal.cli.options import GradientWire, WireName, of_strategy, option, takes_strategy
from postlocal.cli.units import parse_bandwidth
from postlocal.strategies import NAMED
from postlocal.train import make_config
from postlocal.train import train as run
from postlocal.train.config import TrainConfig
from postlocal.train.model import SIZES
from postlocal.train.opening import check_before_launch, open_run
from postlocal.train.saved import CHANGEABLE
from postlocal.train.world import launch, launched

_run = partial(option, "The run")
_fit = partial(option, "Training")
_kept = partial(option, "Output")
_D = TrainConfig()


@takes_strategy
def train(
    ctx: typer.Context,
    workers: Annotated[
        int, _run("Workers to start on this machine; under torchrun its own count.")
    ] = _D.workers,
    node_size: Annotated[int, _run("Workers that count as one node.")] = _D.node_size,
    data: Annotated[
        list[str] | None,
        _run(
            "File, folder or glob of text; may be repeated. Files with NUL bytes are skipped.",
            show_default="Python's standard library",
        ),
    ] = None,
    model: Annotated[str, _run(f"Size of the model: {', '.join(SIZES)}.")] = _D.model,
    seed: Annotated[int, _run("Seed of data order and initialization.")] = _D.seed,
    compare: Annotated[
        str | None,
        _run(
            "Train under this strategy first, and compare. It takes those of the given options "
            "that it has; ddp takes fp32 wires."
        ),
    ] = None,
    link: Annotated[
        str | None,
        _run(
            "Emulate a link of this rate between workers, such as 100Mbit (delays what is sent; "
            "for demonstrations).",
            show_default="none",
        ),
    ] = None,
    strategy: Annotated[str, of_strategy(f"One of {', '.join(NAMED)}.")] = _D.strategy,
    *,
    given: Mapping[str, Any],
    wire: WireName = None,
    gradient_wire: GradientWire = None,
    optimizer_state: Annotated[
        str,
        of_strategy(
            "What a synchronization does with the optimizer's state: keep, average or reset."
        ),
    ] = _D.optimizer_state,
    steps: Annotated[int, _fit("Optimizer steps.")] = _D.steps,
    batch_size: Annotated[int, _fit("Sequences that each worker takes in a step.")] = _D.batch_size,
    accumulate: Annotated[
        int, _fit("Micro-batches that a worker's batch is split into, to save memory.")
    ] = _D.accumulate,
    sequence_length: Annotated[int, _fit("Bytes in a sequence.")] = _D.sequence_length,
    lr: Annotated[float, _fit("Peak learning rate of AdamW.")] = _D.lr,
    lr_warmup: Annotated[
        int | None,
        _fit("Steps in which the learning rate rises to its peak.", show_default="a tenth"),
    ] = None,
    weight_decay: Annotated[float, _fit("Weight decay of AdamW.")] = _D.weight_decay,
    clip: Annotated[float, _fit("Norm that gradients are clipped to.")] = _D.clip,
    timeout: Annotated[float, _fit("Seconds to wait for a missing worker.")] = _D.timeout,
    out: Annotated[str, _kept("Folder for all that the run leaves.")] = str(_D.out),
    resume: Annotated[
        bool,
        _kept(
            "Go on from the newest checkpoint, with the settings of the run. May be given anew: "
            f"{', '.join(sorted(name.replace('_', '-') for name in CHANGEABLE))}.",
            "--resume",
        ),
    ] = False,
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
        int, _kept("Held-out sequences in an evaluation.")
    ] = _D.eval_sequences,
) -> None:
    """Train a language model on bytes of text, with workers that communicate seldom.

    Alone it starts its own workers; under torchrun it joins that world. It
    leaves config.json, metrics.jsonl, summary.json, loss.png, checkpoints and
    model.safetensors in the output folder.
    """
    settings = dict(locals())
    if not out:
        raise ValueError("out must name a folder, got ''")
    if resume and overwrite:
        raise ValueError("resume and overwrite must not be given together: one keeps what is there")
    settings["link"] = None if link is None else parse_bandwidth(link, "link")
    # Only what was given is passed on, so that a resumed run knows it from defaults.
    config = make_config(
        **{name: value for name, value in settings.items() if _was_given(ctx, name)},
        parameters=dict(given),
    )
    if launched():
        run(config)
        return
    opening = open_run(config)
    check_before_launch(opening.config)
    for line in opening.lines(opening.config.workers):
        typer.echo(line)
    if opening.config.workers == 1:
        run(config, announce=False)
    elif code := launch(opening.config.workers, sys.argv[1:]):
        raise typer.Exit(code)


def _was_given(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
