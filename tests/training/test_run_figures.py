"""``kempnerforge report``: which figures runs give, and what is in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kempnerforge.training.figures import figures_of, read_run
from tests.training.tiny import call, make_job

LOSSES, SCORES = [4.0, 2.0, 0.1], [0.25, 0.75]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two runs that were evaluated at steps 10 and 20; the second learns nothing, and has a line that is no JSON."""
    for name in ("first", "second"):
        run = tmp_path / name
        make_job(run).rename(run / "config.toml")
        rows = [{"step": 10 * k, "train/loss": loss, "train/elapsed_s": 3.0 * k} for k, loss in enumerate(LOSSES)]
        rows += [{"step": 10 * k, "eval/exact_match": score, "eval/exact_match_blind": 0.25} for k, score in enumerate(SCORES, 1)]
        rows += [{"step": 10, "train/lr": 1.0, "eval/questions": 40}]
        lines = "".join(json.dumps(row | ({"train/loss": 4.0} if name == "second" else {})) + "\n" for row in rows)
        (run / "metrics.jsonl").write_text(lines + ("broken\n" if name == "second" else ""))
    return tmp_path


def test_one_run_has_the_curves_of_its_report(runs: Path) -> None:
    loss, accuracy = figures_of({"first": read_run(runs / "first")})
    assert (loss.name, accuracy.name) == ("train-loss", "eval-exact_match")
    (axes,) = loss.figure.axes
    assert list(axes.lines[0].get_xdata()) == [0, 10, 20] and list(axes.lines[0].get_ydata()) == LOSSES
    assert axes.get_yscale() == "log" and axes.get_xlabel() == "optimizer step", "from 4 to 0.1 nats"
    (axes,) = accuracy.figure.axes
    assert [line.get_label() for line in axes.lines] == ["exact match", "image blanked"]
    assert list(axes.lines[0].get_ydata()) == SCORES and axes.get_ylim() == (0, 1)


def test_several_runs_have_a_figure_for_each_value(runs: Path) -> None:
    both = {name: read_run(runs / name) for name in ("first", "second")}
    figures = {one.name: one.figure.axes[0] for one in figures_of(both, over="seconds")}
    assert list(figures) == ["train-loss", "eval-exact_match", "eval-exact_match_blind"]
    assert all([line.get_label() for line in axes.lines] == ["first", "second"] for axes in figures.values())
    blind = figures["eval-exact_match_blind"]
    assert blind.get_title() == "Accuracy: image blanked" and blind.get_xlabel() == "seconds of training"
    assert list(blind.lines[1].get_xdata()) == [3.0, 6.0]


def test_the_command_writes_both_formats(runs: Path) -> None:
    out = runs / "out"
    ended = call("report", runs / "first", f"other={runs / 'second'}", "--pdf", out, "--png", out, "--json")
    assert ended.code == 0 and "other: 1 unreadable lines" in ended.err, ended.err
    names = [f"{stem}.{kind}" for stem in ("train-loss", "eval-exact_match", "eval-exact_match_blind") for kind in ("pdf", "png")]
    assert json.loads(ended.out) == {"written": [str(out / name) for name in names]}
    assert all((out / name).read_bytes()[:4] in (b"%PDF", b"\x89PNG") for name in names)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{}/first"], "give --pdf DIR or --png DIR"),
        (["{}/first", "{}/first", "--pdf={}/out"], "are both called 'first': give names, as in first="),
        (["{}", "--pdf={}/out"], "has no metrics.jsonl; name a run directory"),
        (["{}/empty", "--pdf={}/out"], "no values to draw over steps yet"),
    ],
)
def test_what_cannot_be_drawn_is_named(runs: Path, words: list[str], said: str) -> None:
    make_job(runs / "empty").rename(runs / "empty" / "config.toml")
    (runs / "empty" / "metrics.jsonl").write_text("")
    ended = call("report", *(word.format(runs) for word in words))
    assert ended.code == 2 and said in ended.err and not (runs / "out").exists(), ended.err
