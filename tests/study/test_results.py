"""What is read of cells, and compared between them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kempnerforge.study.findings import late_gain
from kempnerforge.study.results import Result, Spent, question_error, same_samples, same_weights
from kempnerforge.study.run import State


def result(row: str = "a", directory: Path = Path(), **fields: Any) -> Result:
    cell: Any = SimpleNamespace(row=SimpleNamespace(name=row), dir=directory, name=f"{row}/seed-0")
    return Result(cell, 0, State("finished"), **fields)


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
