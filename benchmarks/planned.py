"""The planner's seconds a step beside measured ones.

    python -m benchmarks.planned

Models train on four hosts of an emulated cluster, under several strategies and at several rates.
The planner is given what `postlocal plan --measure` finds out: the model, seconds of a step with no
communication, measured in the same rounds, and bandwidth and latency of the links, by all-reduces
on a cluster of its own. No strategy's time is fitted. Needs root and iproute2.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import typer
from rich.console import Console

from benchmarks.cluster.links import measured_link
from benchmarks.cluster.network import missing
from benchmarks.options import Record, Resume, Rounds
from benchmarks.report import drawing, markdown_table, write_record
from benchmarks.time_to_loss.analysis import Pace, paces
from benchmarks.time_to_loss.launches import Launch, Results
from benchmarks.time_to_loss.methods import ALONE, PLANNED
from postlocal.planning import Cluster, Job, Link, plan
from postlocal.train import make_config
from postlocal.train.model import SIZES, Transformer

HOSTS = 4
FOLDER = Path("runs/planned")
PLACES: Mapping[str, Sequence[str]] = {
    "tiny": ("100mbit", "25mbit"),
    "small": ("100mbit",),
}
"""Rates at which each size is trained."""
STEPS = 960
"""Steps that the planner replays: many rounds of each strategy."""


@dataclass(frozen=True)
class Prediction:
    """One strategy on one network.

    Attributes:
        strategy: its name.
        model: size of the model.
        rate: of each host's link.
        planned: seconds a step.
        measured: seconds a step, the median of rounds.
        least: measured in the fastest round.
        most: measured in the slowest one.
    """

    strategy: str
    model: str
    rate: str
    planned: float
    measured: float
    least: float
    most: float

    @property
    def error(self) -> float:
        """How far the plan is off, as a share of what was measured; above 0 if too slow."""
        return self.planned / self.measured - 1


def predict(name: str, model: str, link: Link, alone: float) -> float:
    """Seconds a step by the planner, from seconds that it computes."""
    job = Job(Transformer(SIZES[model]), step=alone, steps=STEPS)
    return plan(PLANNED[name], job, Cluster(HOSTS, {"world": link})).seconds_a_step


def compare(model: str, rate: str, link: Link, measured: Mapping[str, Pace]) -> list[Prediction]:
    """The strategies of one launch."""
    alone = statistics.median(measured[ALONE].seconds)
    return [
        Prediction(
            name, model, rate, predict(name, model, link, alone),
            pace.median, min(pace.seconds), max(pace.seconds),
        )
        for name, pace in measured.items()
        if name != ALONE
    ]  # fmt: skip


def table(predictions: Sequence[Prediction], links: Mapping[str, Link], rounds: int) -> str:
    """In Markdown, with the median and the worst error."""
    seen = "; ".join(
        f"{link.bandwidth / 1e6:.1f} Mbit/s and {1e3 * link.latency:.2f} ms for {rate}"
        for rate, link in links.items()
    )
    errors = [abs(each.error) for each in predictions]
    about = (
        f"Seconds a step on {HOSTS} hosts of one rank; measured: median (least..greatest) of "
        f"{rounds} rounds. Over {len(errors)} combinations the plan is off by "
        f"{100 * statistics.median(errors):.1f} % (median) and {100 * max(errors):.1f} % (worst). "
        f"Links as measured: {seen}."
    )
    figures = markdown_table(
        ["strategy", "model", "rate", "planned", "measured", "off by, %"],
        [
            [
                each.strategy,
                each.model,
                each.rate,
                f"{each.planned:.3f}",
                f"{each.measured:.3f} ({each.least:.3f}..{each.most:.3f})",
                f"{100 * each.error:+.1f}",
            ]
            for each in predictions
        ],
    )
    return f"{about}\n\n{figures}\n"


def plot(predictions: Sequence[Prediction], to: Path) -> None:
    """Draw planned against measured seconds."""
    measured = [each.measured for each in predictions]
    ends = [min(measured), max(measured)]
    with drawing(to, width=6, height=5.5) as figure:
        axes = figure.subplots()
        for index, name in enumerate(PLANNED):
            own = [each for each in predictions if each.strategy == name]
            points = [each.measured for each in own], [each.planned for each in own]
            axes.plot(*points, "os^Dv"[index % 5], label=name)
        axes.plot(ends, ends, color="grey", linewidth=1)
        axes.fill_between(
            ends, [0.75 * end for end in ends], [1.25 * end for end in ends],
            color="grey", alpha=0.15, label="within 25 %",
        )  # fmt: skip
        axes.set(
            xscale="log", yscale="log", xlabel="measured, s a step", ylabel="planned, s a step"
        )
        axes.legend()
        axes.grid(alpha=0.3)


def main(
    rounds: Rounds = 2,
    resume: Resume = False,
    record: Record = True,
) -> None:
    """Compare planned with measured times of a step."""
    console = Console()
    if reason := missing():
        console.print(f"Skipped: {reason}")
        return
    results = Results(FOLDER / "results.jsonl", resume, console)
    links: dict[str, Link] = {}
    predictions: list[Prediction] = []
    for model, rates in PLACES.items():
        config = make_config(model=model, steps=STEPS, batch_size=4, workers=HOSTS)
        for rate in rates:
            launch = Launch((ALONE, *PLANNED), config, rate, rounds)
            measured = paces(results.of(launch))
            if rate not in links:
                links[rate] = measured_link(HOSTS, rate)
            predictions += compare(model, rate, links[rate], measured)
    text = table(predictions, links, rounds)
    console.print(text, markup=False, soft_wrap=True)
    draw = partial(plot, predictions)
    draw(FOLDER / "planned.png")
    if record:
        rows = [asdict(each) | {"error": each.error} for each in predictions]
        seen = {rate: asdict(link) for rate, link in links.items()}
        results_of = {"predictions": rows, "links": seen}
        write_record("planned", "Planned and measured steps", results_of, text, draw)


if __name__ == "__main__":
    typer.run(main)
