"""Losses over seeds beside those of the control, and the title that they get."""

import statistics
from collections.abc import Mapping
from typing import Any

from benchmarks.convergence.campaign import Campaign, Result
from benchmarks.convergence.comparison import seeds_in_words, with_deviation, with_range
from benchmarks.convergence.pool import Run
from benchmarks.convergence.settings import CONTROL
from benchmarks.report import markdown_table


def summarize(campaign: Campaign, results: Mapping[Run, Result]) -> dict[str, dict[str, Any]]:
    """Over seeds: losses, penalties in percent of the control's loss of the same seed, bytes."""
    rows = {}
    for name in campaign.settings:
        own = [results[name, seed] for seed in campaign.seeds]
        control = [results[CONTROL, seed] for seed in campaign.seeds]
        rows[name] = {
            "strategy": str(campaign.settings[name]),
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
    about = (
        f"Model `{config.model}`, {config.workers} workers, {config.steps} steps of "
        f"{config.batch_size} x {config.sequence_length} bytes each ({tokens / 1e6:.2f} M tokens "
        f"in all), AdamW, peak learning rate {config.lr:g}, {seeds_in_words(campaign.seeds)}. "
        "Loss is held out, in nats a byte, with its standard deviation over seeds; the penalty is "
        "against DDP of the same seed, mean (least..greatest)."
    )
    figures = markdown_table(
        ["setting", "loss", "penalty, %", "MB a worker", "fewer bytes than DDP"],
        [
            [
                name,
                with_deviation(row["losses"], 4),
                with_range(row["penalties"]),
                f"{row['payload_bytes'] / 1e6:.2f}",
                f"{row['ddp_over_payload']:.1f}",
            ]
            for name, row in rows.items()
        ],
    )
    sources = {source for row in rows.values() for source in row["source"]}
    several = f"The runs are of {len(sources)} states of the source." if len(sources) > 1 else ""
    return "\n\n".join(filter(None, [about, figures, several])) + "\n"


def name_and_title(model: str, steps: int, label: str) -> tuple[str, str]:
    """Those of a record; the label sets it apart from others of this model and length."""
    about = [model, f"{steps} steps", *filter(None, [label])]
    name = "-".join(["convergence", *about]).replace(" ", "-")
    return name, f"Convergence at equal tokens, {', '.join(about)}"
