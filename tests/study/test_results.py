"""What is read of cells, and compared between them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from kempnerforge.config.data import JsonlConfig
from kempnerforge.study import results
from kempnerforge.study.cells import write_config
from kempnerforge.study.config import ScoreConfig, load_study
from kempnerforge.study.disputes import disputes
from kempnerforge.study.findings import Findings, late_gain
from kempnerforge.study.progress import look
from kempnerforge.study.results import Result, Spent, question_error, read_result, same_samples, same_weights
from kempnerforge.study.run import State
from kempnerforge.study.tune import score_of
from kempnerforge.util.errors import InputError
from tests.study.tiny import STUDY, make_study
from tests.training.tiny import call


def result(row: str = "a", directory: Path = Path(), **fields: Any) -> Result:
    cell: Any = SimpleNamespace(row=SimpleNamespace(name=row), dir=directory, name=f"{row}/seed-0")
    return Result(cell, 0, State("finished"), **fields)


def cell_with(directory: Path, *lines: str, steps: int = 6) -> Any:
    """A cell of ``steps`` steps whose ``metrics.jsonl`` has these lines."""
    (directory / "metrics.jsonl").write_text("\n".join(lines))
    job = SimpleNamespace(train=SimpleNamespace(seed=0), total_steps=lambda: steps)
    return SimpleNamespace(row=SimpleNamespace(name="a"), dir=directory, name="a/seed-0", job=job)


def test_only_the_evaluation_after_the_last_step_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The last line was cut: the evaluation on the way is not taken for the one at the end."""
    monkeypatch.setattr(results, "state_of", lambda cell: State("finished"))
    found = read_result(cell_with(tmp_path, '{"step": 2, "eval/x": 0.75}', '{"step": 6, "eval/', '{"step": 6, "train/loss": 1.0}'))
    assert (found.scores, found.unreadable) == ({}, 1)
    found = read_result(cell_with(tmp_path, '{"step": 2, "eval/x": 0.75}', '{"step": 6, "eval/x": 0.5, "eval/y": null}'))
    assert (found.scores, found.unreadable) == ({"eval/x": 0.5}, 0)


def test_a_trial_without_a_finite_score_is_none_that_lacks_it(tmp_path: Path):
    """JSON has no NaN: it is written as null. One trial that has diverged does not stop the study."""
    cell = cell_with(tmp_path, '{"step": 6, "eval/loss": null, "eval/x": 0.5}')
    assert math.isnan(score_of(cell, "eval/loss")) and score_of(cell, "eval/x") == 0.5
    with pytest.raises(InputError, match="has no eval/y, which .* names; it has eval/loss, eval/x"):
        score_of(cell, "eval/y")


def test_scores_that_cells_lack_are_named():
    cfg: Any = SimpleNamespace(seeds=[0], tune=None, scores=[ScoreConfig("eval/x"), ScoreConfig("eval/typo")], pairs=[])
    progress: Any = SimpleNamespace(planned=[SimpleNamespace(row=SimpleNamespace(name=name)) for name in "ab"], tuned=[])
    study: Any = SimpleNamespace(cfg=cfg, dir=Path("nowhere"))
    cells = [result("a", scores={"eval/x": 1.0}), result("b", scores={"eval/z": 1.0}, unreadable=2)]
    lines = Findings(study, progress, cells)._incomplete()
    assert "b/seed-0: 2 lines of its metrics cannot be read." in lines
    assert "eval/x: has no finite value in b/seed-0." in lines
    assert "eval/typo: has no finite value in any finished cell; there are eval/x, eval/z." in lines
    assert not [line for line in Findings(study, progress, [])._incomplete() if "finite" in line]


def test_pairs_that_were_named_late_are_told(tmp_path: Path):
    """The page warns if the pairs are not the ones that were asked about when the first cell was run."""
    cfg: Any = SimpleNamespace(seeds=[0], tune=None, scores=[ScoreConfig("eval/x")], pairs=[["a", "b"]])
    progress: Any = SimpleNamespace(planned=[SimpleNamespace(row=SimpleNamespace(name=name)) for name in "ab"], tuned=[])
    study: Any = SimpleNamespace(cfg=cfg, dir=tmp_path)
    lines = lambda: [line for line in Findings(study, progress, [])._incomplete() if "asked about" in line]
    assert lines() == [], "no cell was run"
    (tmp_path / "cells").mkdir()
    told = "When the first cell was run, the study asked about all pairs; now it asks about a and b."
    assert lines() == [told], "by a version that knew no pairs"
    (tmp_path / "pairs.json").write_text('{"pairs": [["a", "b"]]}')
    assert lines() == []
    cfg.pairs = []
    assert lines() == [told.replace("all pairs", "a and b", 1).replace("now it asks about a and b", "now it asks about all pairs")]


def test_streams_are_compared_wherever_both_have_seen_as_many_samples():
    """Batches of 4 and of 8; the second row stops earlier."""
    four = [(4, 10), (8, 30), (12, 60), (16, 100), (20, 150)]
    same = same_samples([result("a", stream=four), result("b", stream=[(8, 30), (16, 100)])])
    assert same.same and same.compared == 16 and len(same.digests) == 2
    assert not same_samples([result("a", stream=four), result("b", stream=[(8, 31), (16, 100)])]).same
    assert same_samples([result("a")]).compared == 0


def test_weights_are_compared_by_name_and_shape():
    a = result("a", initial={"w": "(2,) 00", "v": "(3,) 11", "own": "(1,) 22"})
    b = result("b", initial={"w": "(2,) 00", "v": "(4,) 33", "other": "(1,) 44"})
    assert same_weights([a, b]) == (1, [])
    assert same_weights([a, b, result("c", initial={"w": "(2,) 99"})]) == (0, ["w"])


def test_rows_that_are_not_compared_may_begin_otherwise(tmp_path: Path):
    """With named pairs the warnings are about these; one line for all seeds."""
    cfg: Any = SimpleNamespace(pairs=[])
    progress: Any = SimpleNamespace(planned=[SimpleNamespace(row=SimpleNamespace(name=name)) for name in "abc"])
    study: Any = SimpleNamespace(cfg=cfg)
    cells = [
        replace(result(row, initial={"w": f"(2,) {weight}"}, stream=[(4, data)]), seed=seed)
        for seed in (0, 3)
        for row, weight, data in (("a", "00", 7), ("b", "00", 8), ("c", "99", 7))
    ]
    lines = lambda: Findings(study, progress, cells)._starts()
    assert lines() == [
        "Seeds 0 and 3: the rows did not see the same samples in the same order.",
        "Seeds 0 and 3: the rows: 1 parameter of the same name and shape began differently, as w.",
    ]
    cfg.pairs = [["a", "b"]]
    assert lines() == ["Seeds 0 and 3: a and b did not see the same samples in the same order."]
    cfg.pairs = [["a", "c"]]
    assert lines() == ["Seeds 0 and 3: a and c: 1 parameter of the same name and shape began differently, as w."]


def test_a_row_that_still_rises():
    curve = [(Spent(steps=step), {"eval/x": value}) for step, value in ((20, 0.0), (60, 0.5), (80, 0.6), (100, 0.8))]
    assert late_gain([result(curve=curve, spent=Spent(steps=100))], "eval/x") == pytest.approx(0.25)
    assert late_gain([result(curve=curve[-1:], spent=Spent(steps=100))], "eval/x") == 0.0


def test_the_error_over_questions_keeps_those_of_an_image_together(tmp_path: Path):
    """Two seeds; two images with two questions each: the points of a question are its mean over seeds."""
    points = {"0": {"p0": (1, 1), "p1": (0, 0)}, "1": {"p0": (1, 0), "p1": (0, 0)}}
    for seed, of in points.items():
        rows = [
            {"id": f"image-{k}", "prompt": prompt, "truth": "t", "right": bool(value)}
            for prompt, values in of.items()
            for k, value in enumerate(values)
        ]
        rows.append({"id": "image-0", "prompt": "p0", "truth": "t", "task": "anls", "points": 0.25})
        (tmp_path / seed).mkdir()
        (tmp_path / seed / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cells = [result(directory=tmp_path / seed) for seed in points]
    a, b = 1.0 + 0.0, 0.5 + 0.0  # sums of image 0 and image 1
    mean = (a + b) / 4
    expected = math.sqrt(2 * ((a - 2 * mean) ** 2 + (b - 2 * mean) ** 2)) / 4
    assert question_error(cells, "eval/exact_match") == pytest.approx(expected)
    assert math.isnan(question_error(cells, "eval/loss"))


def test_the_questions_on_which_rows_disagree_most(tmp_path: Path):
    """One question of a sample; those on which all agree are left out; the most frequent answer of each row is shown."""

    first = "test.jsonl:1 (one)"

    def cell(row: str, seed: int, *answers: tuple[str, str, str, bool]) -> Result:
        folder = tmp_path / f"{row}{seed}"
        folder.mkdir()
        lines = [{"id": id_, "prompt": prompt, "truth": "yes", "answer": answer, "right": right} for id_, prompt, answer, right in answers]
        (folder / "predictions.jsonl").write_text("\n".join(map(json.dumps, lines)))
        found = result(row, folder)
        found.cell.job = SimpleNamespace(resolved_stages=lambda: [SimpleNamespace(data=data)])
        return found

    Image.new("RGB", (8, 8), (200, 0, 0)).save(tmp_path / "x.png")
    (tmp_path / "test.jsonl").write_text(json.dumps({"image": "x.png", "prompt": "p", "answer": "yes", "id": "one"}) + "\n")
    data = JsonlConfig(path=str(tmp_path / "test.jsonl"), eval_path=str(tmp_path / "test.jsonl"), prompt_column="prompt")
    by_row = {
        "a": [cell("a", 0, (first, "p", "yes", True), (first, "q", "yes", True), ("two", "p", "no", False), ("three", "p", "yes", True))],
        "b": [
            cell(
                "b",
                seed,
                (first, "p", "no", False),
                (first, "q", "yes", seed > 0),
                ("two", "p", "no", False),
                ("three", "p", "yes", seed > 0),
            )
            for seed in range(3)
        ],
    }
    found = disputes(by_row, "eval/exact_match")
    assert [(one.prompt, one.truth, round(one.spread, 3)) for one in found] == [("p", "yes", 1.0), ("p", "yes", 0.333)]
    assert found[0].answers == [("a", "yes", 1.0), ("b", "no", 0.0)] and found[1].answers[1] == ("b", "yes", 2 / 3)
    assert ["<img" in str(one.pictures) for one in found] == [True, False]


TUNE = """
[study.tune]
trials = 1
validation = 0.25
keys = { "optimizer.lr" = { low = 1e-3, high = 1e-1, log = true } }
"""


@pytest.mark.parametrize("tuned", [False, True], ids=["cells", "trials"])
def test_a_study_that_was_changed_has_no_report(tuned: bool, tmp_path: Path):
    """``report`` and ``status`` judge it as ``run`` does, and the page that is there stays."""
    path = make_study(tmp_path, STUDY + TUNE * tuned)
    progress = look(load_study(path))
    first, *_ = begun = progress.trials if tuned else progress.cells
    assert begun
    for cell in begun:
        write_config(cell)
    for argv in (["report"], ["status"]):
        assert call("study", *argv, path).code == 0
    page = tmp_path / "study" / "report.html"
    before = page.read_bytes()
    page.write_bytes(before + b"as it was")
    said = f"{first.dir}: is there already, of another study:\n  model.dim: 32 -> 48\nchange the study back"
    for action in ("report", "status", "run"):
        ended = call("study", action, path, "--model.dim=48")
        assert ended.code == 2 and said in ended.err, (action, ended)
    assert page.read_bytes() == before + b"as it was"
    for harmless in ("--data.num_workers=1", "--study.seeds=[0, 1, 2]"):
        assert call("study", "report", path, harmless).code == 0
