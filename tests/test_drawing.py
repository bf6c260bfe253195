"""Plots, and what is said where matplotlib is not installed."""

import sys
from pathlib import Path

import pytest

from postlocal import strategies
from postlocal.planning import Cluster, Job, Link, draw, drawing
from postlocal.train import make_config, train
from tests.calling import calling

EXTRA = r"pip install 'postlocal\[plot\]'"


@pytest.fixture
def without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = [name for name in sys.modules if name.split(".")[0] == "matplotlib"]
    for name in {"matplotlib", *loaded}:
        monkeypatch.setitem(sys.modules, name, None)


def test_figures_can_be_drawn_where_matplotlib_is_installed() -> None:
    drawing.require()


@pytest.mark.usefixtures("without_matplotlib")
def test_a_drawing_without_matplotlib_names_the_extra(tmp_path: Path) -> None:
    job = Job(parameters=1000, step=1.0, steps=10)
    cluster = Cluster(workers=2, links={"world": Link(1e9)})
    with pytest.raises(ImportError, match=f"plots need matplotlib .*: {EXTRA}"):
        draw({"ddp": strategies.ddp()}, job, cluster, tmp_path / "plot.png")


@pytest.mark.usefixtures("without_matplotlib")
@pytest.mark.parametrize("name", ["plan", "simulate"])
def test_a_command_refuses_a_plot_that_it_cannot_draw_before_it_computes(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def compute(*_: object) -> None:
        raise AssertionError("the command computed first")

    monkeypatch.setattr(sys.modules[f"postlocal.cli.{name}"], "Job", compute)
    code, out, err = calling(name)(capsys, monkeypatch, "--plot", "x.png")
    assert (code, out) == (2, "")
    assert "error: plot must be drawable, got 'x.png': plots need matplotlib" in err
    assert "pip install 'postlocal[plot]'" in err
    assert err.count("\n") == 1


@pytest.mark.usefixtures("without_matplotlib")
def test_a_run_without_matplotlib_ends_well_and_names_the_extra(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("plots are drawn where matplotlib is installed\n" * 110)
    config = make_config(
        workers=1, steps=2, data=(str(tmp_path / "text"),), out=tmp_path / "run",
        sequence_length=16, batch_size=2, eval_sequences=2, strategy="ddp",
    )  # fmt: skip
    train(config)
    out = capsys.readouterr().out
    assert "Plot: none, plots need matplotlib" in out
    assert "pip install 'postlocal[plot]'" in out
    assert (tmp_path / "run" / "summary.json").exists()
    assert not (tmp_path / "run" / "loss.png").exists()


def test_a_folder_with_brackets_in_its_name_is_printed_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plot = tmp_path / "[bold] plans.png"
    words = ("--steps", "20", "--strategy", "ddp", "--plot", str(plot))
    code, out, _ = calling("plan")(capsys, monkeypatch, *words)
    assert code == 0
    assert f"Drawn in {plot}." in out
