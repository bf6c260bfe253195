"""Held-out loss at equal tokens: strategies against DDP, over several seeds.

    python -m benchmarks.convergence --settings 'ddp,diloco-*' --resume

Four workers train a small language model on the standard library's sources, as threads of one
process (`postlocal.virtual`). The control is one model that takes the batches of all four at once,
which is what DDP computes. Results are kept, run by run, under ``runs/convergence``.
"""

import re
import statistics
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.campaign import Campaign, Result
from benchmarks.comparison import choose, plot, said
from benchmarks.measure import write_record
from benchmarks.options import FirstSeed, Jobs, Record, Resume, Seeds
from benchmarks.pool import Cache, Run
from postlocal import Strategy, strategies, wire
from postlocal.train import make_config

FOLDER = Path("runs/convergence")
WORKERS = 4
CONTROL = "ddp"

MOMENTA = {0.0: (1.0, 1.5, 2.0), 0.5: (0.7, 1.0, 1.4), 0.9: (0.4, 0.7, 1.0)}
"""Outer momenta that are tried, each with outer learning rates; 0 and 1 is averaging."""
LR, MOMENTUM = 0.7, 0.9
"""Those of the DiLoCo paper, at which wires and delays are compared. The default of
`streaming_diloco` is 0.4 and 0.9."""


def _diloco(period: int, lr: float = LR, momentum: float = MOMENTUM, **axes: Any) -> Strategy:
    return replace(strategies.diloco(period, lr, momentum), **axes)


def _streaming(
    period: int,
    lr: float = LR,
    momentum: float = MOMENTUM,
    delay: int = 1,
    mix: float = 0.5,
    carry: bool = False,
    **axes: Any,
) -> Strategy:
    strategy = strategies.streaming_diloco(
        period, delay=delay, mix=mix, outer_lr=lr, outer_momentum=momentum, carry=carry
    )
    return replace(strategy, **{"wire": wire.fp32()} | axes)


def _settings() -> dict[str, Strategy]:
    settings = {CONTROL: strategies.ddp()}
    for period in (10, 30, 100):
        for momentum, lr in ((m, lr) for m, lrs in MOMENTA.items() for lr in lrs):
            outer = f"{period}-lr{lr}-m{momentum}"
            settings[f"diloco-{outer}"] = _diloco(period, lr, momentum)
            settings[f"streaming-{outer}"] = _streaming(period, lr, momentum)
        settings[f"streaming-{period}-fp4"] = _streaming(period, wire=wire.fp4())
    settings |= _streams()
    for name in ("int8", "int4", "fp4", "sign"):
        bare = getattr(wire, name)()
        settings[f"diloco-30-{name}"] = _diloco(30, wire=bare)
        settings[f"diloco-30-{name}-feedback"] = _diloco(30, wire=wire.error_feedback(bare))
    for lr in (1.0, 1.5, 2.0, 4.0, 6.0, 8.0):
        settings[f"sparse-30-lr{lr}"] = strategies.sparse_loco(30, outer_lr=lr)
        settings[f"sparse-30-k128-lr{lr}"] = strategies.sparse_loco(30, top_k=128, outer_lr=lr)
    forgetful = replace(strategies.sparse_loco(30, outer_lr=2.0), wire=wire.top_k())
    settings["sparse-30-lr2.0-no-feedback"] = forgetful
    return settings


def _streams() -> dict[str, Strategy]:
    """Streaming every 30 steps, by delay, mix and carry."""
    settings = {f"streaming-30-delay{delay}": _streaming(30, delay=delay) for delay in (0, 3, 5)}
    for delay in (0, 1, 3, 5, 20):
        for mix in (0.0, 0.25):
            settings[f"streaming-30-delay{delay}-mix{mix}"] = _streaming(30, delay=delay, mix=mix)
        if delay:
            carried = _streaming(30, delay=delay, mix=0.0, carry=True)
            settings[f"streaming-30-delay{delay}-mix0.0-carry"] = carried
    settings["streaming-30-fp4-mix0.0"] = _streaming(30, mix=0.0, wire=wire.fp4())
    return settings


SETTINGS = _settings()


def summarize(campaign: Campaign, results: Mapping[Run, Result]) -> dict[str, dict[str, Any]]:
    """Over seeds: losses, penalties in percent of the control's loss of the same seed, bytes."""
    rows = {}
    for name in campaign.settings:
        own = [results[name, seed] for seed in campaign.seeds]
        control = [results[CONTROL, seed] for seed in campaign.seeds]
        rows[name] = {
            "strategy": campaign.settings[name].fingerprint,
            "losses": [result.loss for result in own],
            "penalties": [100 * (a.loss / b.loss - 1) for a, b in zip(own, control, strict=True)],
            "payload_bytes": own[0].payload_bytes,
            "ddp_over_payload": own[0].ddp_bytes / max(1, own[0].payload_bytes),
            "tokens_per_second": statistics.median(r.tokens / r.seconds for r in own),
            "source": sorted({result.source for result in own}),
        }
    return rows


def table(campaign: Campaign, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The summary in Markdown."""
    config = campaign.config
    tokens = config.steps * config.workers * config.batch_size * config.sequence_length
    lines = [
        f"Model `{config.model}`, {config.workers} workers, {config.steps} steps of "
        f"{config.batch_size} x {config.sequence_length} bytes each ({tokens / 1e6:.2f} M tokens "
        f"in all), AdamW, peak learning rate {config.lr:g}, {said(campaign.seeds)}. Loss is held "
        "out, in nats a byte, with its standard deviation over seeds; the penalty is against DDP "
        "of the same seed, mean (least..greatest).",
        "",
        "| setting | loss | penalty, % | MB a worker | fewer bytes than DDP |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        losses, penalties = row["losses"], row["penalties"]
        spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        lines.append(
            f"| {name} | {statistics.mean(losses):.4f}{spread} | {statistics.mean(penalties):+.2f} "
            f"({min(penalties):+.2f}..{max(penalties):+.2f}) | {row['payload_bytes'] / 1e6:.2f} "
            f"| {row['ddp_over_payload']:.1f} |"
        )
    sources = {source for row in rows.values() for source in row["source"]}
    if len(sources) > 1:
        lines += ["", f"The runs are of {len(sources)} states of the source."]
    return "\n".join(lines) + "\n"


def name_and_title(model: str, steps: int, label: str) -> tuple[str, str]:
    """Those of a record; the label sets it apart from others of this model and length."""
    about = [model, f"{steps} steps", *filter(None, [label])]
    name = "-".join(["convergence", *about]).replace(" ", "-")
    return name, f"Convergence at equal tokens, {', '.join(about)}"


def _label(value: str) -> str:
    if value and not re.fullmatch(r"[a-z0-9]+( [a-z0-9]+)*", value):
        raise typer.BadParameter(
            f"label is {value!r}: it must be words of a-z and 0-9 with single spaces, such as "
            "'long periods'"
        )
    return value


def main(
    model: Annotated[str, typer.Option(help="Size of the model: tiny or small.")] = "tiny",
    steps: Annotated[int, typer.Option(help="Steps a run.")] = 600,
    batch_size: Annotated[int, typer.Option(help="Sequences a step for each worker.")] = 1,
    lr: Annotated[float, typer.Option(help="Peak learning rate of the inner optimizer.")] = 3e-3,
    settings: Annotated[str, typer.Option(help="Names, or patterns such as 'diloco-*'.")] = "*",
    seeds: Seeds = 3,
    first_seed: FirstSeed = 0,
    jobs: Jobs = 2,
    resume: Resume = False,
    record: Record = True,
    label: Annotated[
        str, typer.Option(callback=_label, help="Words for the record's title and file name.")
    ] = "",
) -> None:
    """Train each setting with several seeds, and compare held-out losses with DDP's."""
    console = Console()
    config = make_config(
        model=model, steps=steps, lr=lr, workers=WORKERS, batch_size=batch_size, eval_sequences=512
    )
    campaign = Campaign(
        config, choose(SETTINGS, settings, CONTROL), range(first_seed, first_seed + seeds)
    )
    results = campaign.train(Cache(FOLDER / "results.jsonl", Result), jobs, resume)
    rows = summarize(campaign, results)
    text = table(campaign, rows)
    console.print(text, markup=False, soft_wrap=True)
    draw = partial(
        plot,
        {name: row["penalties"] for name, row in rows.items()},
        f"held-out loss above DDP's, % ({model}, {steps} steps, equal tokens)",
    )
    drawn = FOLDER / f"{model}-{steps}-steps.png"
    draw(drawn)
    console.print(f"Plot: {drawn}")
    if record:
        name, title = name_and_title(model, steps, label)
        path = write_record(name, title, {"settings": rows}, text, draw)
        console.print(f"Record: {path}")


if __name__ == "__main__":
    typer.run(main)
