"""What is said of two runs at the end: where they ended, and when each was at one loss."""

import io
import json
import re
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from postlocal.train import make_config
from postlocal.train.metrics import Metrics, Summary
from postlocal.train.progress import race, results, verdict
from postlocal.train.run import _compare
from postlocal.train.tables import print_table


def summary(strategy: str, loss: float, sent: int, link: float | None = None) -> Summary:
    return Summary(
        strategy=strategy, strategy_details="", workers=4, model="tiny", parameters=10, steps=5,
        tokens=1000, seed=0, train_seconds=40.0, wait_seconds=1.0, payload_bytes=sent,
        ddp_payload_bytes=32_000_000, syncs=1, final_val_loss=loss, replicas_equal=True, link=link,
    )  # fmt: skip


def log(folder: Path, *evaluations: tuple[float, float]) -> Metrics:
    folder.mkdir(parents=True, exist_ok=True)
    metrics = Metrics(folder)
    metrics.start(0)
    for step, (seconds, loss) in enumerate(evaluations):
        metrics.add("step", step, loss=0.0, train_seconds=seconds)
        metrics.add("eval", step, val_loss=loss, train_seconds=seconds)
    return metrics


@pytest.mark.parametrize(
    ("loss", "seconds"), [(5.0, 2.0), (3.0, 5.0), (2.5, 8.0), (2.0, 10.0), (2.4, 8.4), (1.9, None)]
)
def test_the_time_to_a_loss_lies_on_a_line_between_two_evaluations(
    tmp_path: Path, loss: float, seconds: float | None
) -> None:
    metrics = log(tmp_path, (2.0, 5.0), (5.0, 3.0), (6.0, 3.0), (10.0, 2.0), (20.0, 2.1))
    found = metrics.seconds_to(loss)
    assert found == (seconds if seconds is None else pytest.approx(seconds))


def test_a_loss_that_is_not_a_number_is_never_reached(tmp_path: Path) -> None:
    assert log(tmp_path, (1.0, 3.0), (2.0, float("nan"))).seconds_to(2.0) is None
    assert log(tmp_path, (1.0, float("nan")), (2.0, 2.0)).seconds_to(2.0) == 2.0


def test_a_verdict_says_bytes_losses_and_times() -> None:
    run, other = summary("post_local_sgd", 2.04, 1_000_000), summary("ddp", 2.0, 32_000_000)
    assert verdict(run, other) == (
        "post_local_sgd sent 1 MB a worker, 32.0 times less than ddp (32 MB), and ended at a "
        "held-out loss of 2.0400 against 2.0000 (+2.0 %) after the same 1,000 tokens."
    )
    assert race(run, other, 2.04, seconds=60.0, others=210.0) == (
        "ddp reached a held-out loss of 2.040 after 210 s, post_local_sgd after 60 s: "
        "3.5 times sooner (the final loss of post_local_sgd, the higher of the two)."
    )
    assert "after 0.40 s, post_local_sgd after 1.2 s: 3.0 times later" in race(
        run, other, 2.04, seconds=1.2, others=0.4
    )
    assert "2.0 times later" in race(run, other, 2.04, seconds=60.0, others=30.0)
    assert "A single worker sends nothing" in verdict(summary("ddp", 2.0, 0), other)


def test_an_emulated_link_is_said_to_be_one() -> None:
    run, other = (summary(name, 2.0, 1_000_000, link=40e6) for name in ("post_local_sgd", "ddp"))
    assert "times sooner over an emulated link of 40 Mbit/s a worker (" in race(
        run, other, 2.0, seconds=1.0, others=2.0
    )
    console = Console(width=120)
    with console.capture() as shown:
        console.print(results({"ddp": other}))
    assert "emulated link of a worker" in shown.get()
    assert "40 Mbit/s" in shown.get()


@pytest.mark.parametrize("terminal", [True, False])
def test_a_table_of_results_is_never_cut(terminal: bool) -> None:
    labels = [f"diloco(period={period}, outer=average(), wire=int4())" for period in (40, 80)]
    file = io.StringIO()
    table = results({label: summary(label, 2.0, 123_456_789) for label in labels})
    print_table(Console(file=file, width=79, force_terminal=terminal), table)
    lines = file.getvalue().splitlines()
    assert "…" not in file.getvalue()
    assert file.getvalue().count("123 MB") == 2
    assert (max(map(cell_len, map(uncoloured, lines))) <= 79) is terminal


def uncoloured(line: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", line)


def test_runs_are_compared_at_the_higher_of_the_losses_they_ended_at(tmp_path: Path) -> None:
    config = make_config(out=tmp_path, compare="ddp")
    log(tmp_path, (1.0, 3.0), (40.0, 2.5))
    log(config.compared().out, (4.0, 3.0), (100.0, 2.5), (160.0, 2.2))
    sentences = _compare(config, summary("post_local_sgd", 2.5, 1000), summary("ddp", 2.2, 9000))
    assert "2.500 after 100 s, post_local_sgd after 40 s: 2.5 times sooner" in sentences[1]
    diverged = summary("post_local_sgd", float("nan"), 1000)
    assert len(_compare(config, diverged, summary("ddp", 2.2, 9000))) == 1


def test_a_summary_of_an_earlier_version_is_read_without_a_link(tmp_path: Path) -> None:
    summary("ddp", 2.0, 1).write(tmp_path)
    file = tmp_path / "summary.json"
    fields = json.loads(file.read_text())
    del fields["link"]
    file.write_text(json.dumps(fields))
    assert Summary.read(tmp_path).link is None
