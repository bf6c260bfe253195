"""Seconds to a loss from the reports of workers, and plans beside measured steps."""

from pathlib import Path

import pytest
import torch
import typer
from benchmarks.cluster import network
from benchmarks.cluster.links import measured_link
from benchmarks.planned import Prediction, compare, predict
from benchmarks.planned import table as planned_table
from benchmarks.time_to_loss.__main__ import methods_of
from benchmarks.time_to_loss.analysis import (
    Measurements,
    Pace,
    crossing,
    merged,
    paces,
    time_to_loss,
)
from benchmarks.time_to_loss.launches import Launch, Results, launch_groups, measure
from benchmarks.time_to_loss.methods import ALONE, DDP, METHODS, PLANNED, named
from benchmarks.time_to_loss.table import plot, table
from benchmarks.time_to_loss.worker import Report, stretch_of
from rich.console import Console

from postlocal.planning import Link
from postlocal.train import make_config
from postlocal.train.model import SIZES, Transformer

OURS = "local_sgd 8, postlocal"


def curve(name: str, *losses: tuple[int, float, float]) -> Report:
    return Report(name, 0, losses[-1][1], losses[-1][0], 1000, list(losses))


def stretch(name: str, index: int, seconds: float) -> Report:
    return Report(name, index, seconds, 10, 1000)


def test_the_slowest_rank_tells_the_time_and_all_of_them_the_loss() -> None:
    ranks = [curve(DDP, (10, 2.0, 3.0)), curve(DDP, (10, 2.5, 1.0))]
    together = merged(ranks)
    assert together.seconds == 2.5
    assert together.losses == [(10, 2.5, 2.0)]


def test_a_share_of_computing_is_taken_within_each_round() -> None:
    reports = [stretch(ALONE, 0, 1.0), stretch(DDP, 0, 2.0), stretch(DDP, 1, 8.0)]
    measured = paces([*reports, stretch(ALONE, 1, 2.0)])
    assert measured[DDP].computing == (0.5, 0.25)
    assert measured[DDP].median == pytest.approx(0.5)
    assert measured[DDP].bytes_up == 100


POINTS = [(10, 1.0, 3.0), (20, 2.0, 2.0), (30, 3.0, 2.5), (40, 4.0, 1.0)]


@pytest.mark.parametrize(
    ("target", "steps"), [(3.5, 10), (3.0, 10), (2.5, 15), (2.0, 20), (1.75, 35), (0.5, None)]
)
def test_the_first_time_that_a_loss_comes_down_to_the_target_counts(
    target: float, steps: float | None
) -> None:
    crossed = crossing(POINTS, target)
    assert (crossed and crossed[0]) == steps


def test_a_time_is_composed_unless_the_run_was_made() -> None:
    def pace(steps: float) -> float:
        return steps / 2

    composed = time_to_loss(curve(OURS, *POINTS), pace, None, target=2.0)
    assert composed is not None
    assert (composed.steps, composed.seconds, composed.composed) == (20, 10.0, True)
    run = time_to_loss(curve(OURS, *POINTS), pace, curve(OURS, (20, 9.0, 2.0)), target=2.0)
    assert run is not None
    assert (run.seconds, run.composed) == (9.0, False)


def measured(losses: tuple[float, float]) -> Measurements:
    of = Measurements(seeds=[0, 1])
    alone = (0.1, 0.1)
    of.paces["10mbit"] = {
        ALONE: Pace(alone, alone, 0),
        DDP: Pace((1.0, 1.0), alone, 2e6),
        OURS: Pace((0.2, 0.2), alone, 1e6),
    }
    for seed, loss in zip(of.seeds, losses, strict=True):
        of.curves[DDP, seed] = curve(DDP, (50, 5.0, 3.0), (100, 10.0, 2.0))
        of.curves[OURS, seed] = curve(OURS, (100, 5.0, 3.0), (200, 10.0, loss))
    return of


def test_time_to_the_loss_is_compared_seed_by_seed() -> None:
    row = measured((2.0, 1.0)).row(OURS, "10mbit")
    assert row["steps"] == (175, 150, 200)
    assert row["sooner_than_ddp"] == pytest.approx(((100 / 40 + 100 / 30) / 2, 2.5, 100 / 30))
    assert row["over_its_limit"] == pytest.approx((2, 2, 2))
    assert row["computing"] == pytest.approx((0.5, 0.5, 0.5))


def test_who_does_not_come_to_the_loss_has_no_time(tmp_path: Path) -> None:
    of = measured((2.0, 2.5))
    assert "seconds" not in of.row(OURS, "10mbit")
    assert "not reached by 1 of 2" in table(of)
    plot(of, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_peers_that_need_a_lighthouse_have_a_launch_of_their_own() -> None:
    for names in launch_groups(list(METHODS)):
        assert names[0] == ALONE
        assert len({named(name).replica_groups for name in names[1:]}) == 1


def test_stretches_are_whole_periods() -> None:
    for method in [*METHODS.values(), *map(named, PLANNED)]:
        assert stretch_of(method) % method.period == 0


def test_results_that_are_known_are_not_run_again(tmp_path: Path) -> None:
    launch = Launch((ALONE,), make_config(steps=1), "10mbit")
    path, console = tmp_path / "new" / "results.jsonl", Console(quiet=True)
    known = [curve(ALONE, (1, 1.0, 2.0))]
    Results(path, resume=False, console=console).keep(launch, known)
    again = Results(path, resume=True, console=console).of(launch)
    assert [(r.method, list(map(tuple, r.losses))) for r in again] == [(ALONE, [(1, 1.0, 2.0)])]


def test_launches_are_known_by_what_they_are_asked_for(tmp_path: Path) -> None:
    """Nothing is run here: a launch that is not known would need hosts."""
    config = make_config(steps=2, seed=0)
    results = Results(tmp_path / "results.jsonl", resume=False, console=Console(quiet=True))
    names = [ALONE, DDP, OURS]
    results.keep(
        Launch((ALONE, DDP, OURS), config, "10mbit", rounds=2),
        [stretch(name, index, 1.0 + index) for name in names for index in (0, 1)],
    )
    for name, rate in ((DDP, None), (OURS, None), (OURS, "10mbit")):
        curved = curve(name, (1, 1.0, 3.0), (2, 2.0, 2.0 if rate is None else 1.5))
        results.keep(Launch((name,), config, rate), [curved])
    whole = [f"{OURS} @ *"]
    of = measure(names, config, ["10mbit"], 2, [0], whole, results)
    assert list(of.paces["10mbit"]) == names
    assert of.paces["10mbit"][OURS].seconds == (0.1, 0.2)
    assert set(of.curves) == {(DDP, 0), (OURS, 0)}
    assert list(of.wholes) == [(OURS, 0, "10mbit")]
    assert of.row(OURS, "10mbit")["composed"] is False
    assert of.row(DDP, "10mbit")["composed"] is True


def test_plans_are_set_beside_the_strategies_that_ran() -> None:
    measured = {ALONE: Pace((0.3,), (0.3,), 0), "ddp": Pace((4.0, 5.0), (0.3, 0.3), 1)}
    link = Link(10e6)
    (prediction,) = compare("tiny", "10mbit", link, measured)
    assert (prediction.measured, prediction.least, prediction.most) == (4.5, 4.0, 5.0)
    assert prediction.planned == predict("ddp", "tiny", link, alone=0.3)
    assert prediction.error == pytest.approx(prediction.planned / 4.5 - 1)


def test_methods_are_chosen_by_pattern() -> None:
    assert methods_of("local_sgd*") == [ALONE, DDP, OURS]
    with pytest.raises(typer.BadParameter, match="'slow' is none of"):
        methods_of("slow")


def test_the_plan_of_ddp_is_its_bytes_over_the_rate_beside_what_hides() -> None:
    parameters = sum(map(torch.numel, Transformer(SIZES["tiny"]).parameters()))
    seconds = predict("ddp", "tiny", Link(10e6), alone=0.3)
    travelling = 8 * 2 * 3 / 4 * 4 * parameters / 10e6
    first = 2**20 / (4 * parameters)  # of the gradients, are there before anything travels
    assert seconds == pytest.approx(0.3 + travelling - (1 - first) * 0.2, rel=0.01)


def test_errors_of_plans_are_told_as_median_and_worst() -> None:
    predictions = [Prediction("ddp", "tiny", "10mbit", p, 1.0, 0.9, 1.1) for p in (1.1, 0.8, 1.0)]
    said = planned_table(predictions, {"10mbit": Link(9.3e6, 0.0005)}, rounds=3)
    assert "off by 10.0 % (median) and 20.0 % (worst)" in said
    assert "Links as measured: 9.3 Mbit/s and 0.50 ms for 10mbit." in said


@pytest.mark.cluster
@pytest.mark.timeout(method="signal")
@pytest.mark.skipif(network.missing() is not None, reason=str(network.missing()))
def test_a_slow_link_slows_down_who_sends_much_and_changes_no_loss() -> None:
    config = make_config(model="tiny", workers=2, steps=4, batch_size=1, eval_sequences=8)
    stretches = Launch((ALONE, DDP), config, "20mbit", rounds=1).run()
    measured = paces(stretches)
    assert measured[DDP].median > 8 * 3.4e6 / 20e6 > measured[ALONE].median
    slow, fast = (Launch((DDP,), config, rate, evaluations=2).run()[0] for rate in ("50mbit", None))
    assert [steps for steps, _, _ in slow.losses] == [2, 4]
    assert [loss for *_, loss in slow.losses] == [loss for *_, loss in fast.losses]
    assert slow.losses[0][2] > slow.losses[1][2]


@pytest.mark.cluster
@pytest.mark.timeout(method="signal")
@pytest.mark.skipif(network.missing() is not None, reason=str(network.missing()))
def test_a_link_is_measured_a_little_below_its_nominal_rate() -> None:
    link = measured_link(hosts=2, rate="50mbit")
    assert 25e6 < link.bandwidth < 50e6
    assert 0 <= link.latency < 0.1
