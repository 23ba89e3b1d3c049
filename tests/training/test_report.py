from __future__ import annotations

import base64
import io
import json
import math
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kempnerforge.report.charts import Band
from kempnerforge.report.page import TEMPLATES
from kempnerforge.training.report import Example, write_report
from kempnerforge.util.metrics import read_metrics
from kempnerforge.util.numbers import wilson_interval
from tests.dist import ROOT

VOID = {"meta", "link", "img", "br", "circle", "line", "rect", "path"}
STAGES = [Band(0, 50, "captions"), Band(50, 100, "questions")]


class Page(HTMLParser):
    """Checks that tags are balanced; gathers links, headings and visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href", "action", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data


def write_metrics(run_dir: Path, lines: list[dict[str, float]], tail: str = "") -> None:
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)


def train_lines(images: bool = True) -> list[dict[str, float]]:
    rows = []
    for step in range(10, 101, 10):
        row = {"step": step, "train/loss": 3.0 / step, "train/lr": 1e-3, "train/tokens_per_s": 5000.0, "train/grad_norm": 1.0}
        rows.append(row | ({"train/images_per_s": 300.0} if images else {}))
    return rows


def example(answer: str = "red", truth: str = "red", blind: str | None = "blue", side: int = 8) -> Example:
    return Example(np.full((side, side, 3), 200, dtype=np.uint8), "what color?", truth, answer, answer == truth, blind)


def report(run_dir: Path, **changes: object) -> str:
    given: dict = {"config_toml": "[run]\n", "stages": STAGES, "examples": [example()], "summary": {"arch": "joint_decoder"}} | changes
    path = write_report(run_dir, **given)
    assert path == run_dir / "report.html"
    return path.read_text(encoding="utf-8")


def test_full_run(tmp_path: Path) -> None:
    evals = [{"step": 50, "eval/exact_match": 0.3, "eval/exact_match_blind": 0.25}, {"step": 100, "eval/exact_match": 0.9}]
    write_metrics(tmp_path, train_lines() + evals)
    summary = {
        "arch": "joint_decoder",
        "parameters": 1_271_040,
        "steps": 100,
        "train_s": 184.2,
        "exact_match": 0.9,
        "exact_match_blind": 0.25,
        "by_answer": {"red": (9, 10), "blue": (9, 10)},
        "bad_samples": 3,
    }
    html = report(tmp_path, summary=summary, examples=[example(), example("green", "red")], config_toml="[train]\nseed = 7\n")
    page = Page(html)
    for shown in (tmp_path.name, "joint_decoder", "1.27M", "3 min 04 s", "90.0", "25.0", "+65.0", "18 of 20 right", "5k", "1.8 s a step"):
        assert shown in page.text, shown
    assert "captions (50 steps), questions (50 steps)" in page.text and "bad samples" in page.text
    assert page.tags.count("img") == 2 and "✓ right" in page.text and "✗ wrong" in page.text and "image blanked: blue" in page.text
    assert "1 of the 2 shown are right" in page.text and "seed = 7" in page.text
    assert html.count('<svg class="kf-chart"') == 6
    assert "always the most frequent answer: 50" in page.text  # the reference line where no prior is given


def test_opens_without_a_network_and_runs_nothing(tmp_path: Path) -> None:
    write_metrics(tmp_path, train_lines())
    html = report(tmp_path)
    page = Page(html)
    assert page.links and all(link.startswith("data:") for link in page.links)
    assert "script" not in page.tags and "@import" not in html and not re.search(r"url\((?!data:)", html)
    assert "default-src 'none'" in html
    assert set(re.findall(r"https?://[^\"' )<]+", html)) <= {"http://www.w3.org/2000/svg"}


def test_text_only_run_has_no_image_and_no_accuracy_section(tmp_path: Path) -> None:
    write_metrics(tmp_path, [*train_lines(images=False), {"step": 100, "eval/loss": 2.0, "train/images_per_s": 0.0}])
    html = report(tmp_path, examples=[], stages=[Band(0, 100, "all")], summary={"arch": "text_only", "loss": 2.0})
    page = Page(html)
    assert "img" not in page.tags and html.count('<svg class="kf-chart"') == 4
    assert "perplexity 7.39" in page.text
    for absent in ("Accuracy", "xact match", "Held-out examples", "blank", "Images"):
        assert absent not in page.text, absent


@pytest.mark.parametrize("exists", [True, False])
def test_a_run_without_metrics(tmp_path: Path, exists: bool) -> None:
    if exists:
        write_metrics(tmp_path, [])
    page = Page(report(tmp_path, examples=[], summary={}, stages=[], config_toml=""))
    assert tmp_path.name in page.text and "svg" not in page.tags and "details" not in page.tags


def test_everything_that_comes_from_data_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>&\"'\x1b\ud800"
    write_metrics(tmp_path, train_lines())
    one = Example(np.zeros((4, 4, 3), np.uint8), evil, evil, evil, True, evil)
    summary = {"name": evil, "arch": evil, "device": evil, "note": evil, "by_answer": {evil: (1, 2), "b": (1, 1)}}
    html = report(tmp_path, config_toml=evil, stages=[Band(0, 50, evil), Band(50, 100, evil)], examples=[one], summary=summary)
    page = Page(html)
    assert "script" not in page.tags and "<script" not in html and "\x1b" not in html
    assert page.text.count("<script>alert(1)</script>&\"'") >= 8


def test_images_are_in_the_page_losslessly_and_large_ones_shrunk(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3)).astype(np.uint8)
    large = np.zeros((600, 900, 3), np.uint8)
    html = report(tmp_path, examples=[Example(pixels, "q", "a", "a", True), Example(large, "q", "a", "a", True)])
    found = [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in re.findall(r"base64,([^\"]+)", html)]
    assert np.array_equal(found[0], pixels)
    assert found[1].shape[1] == 320 and "image blanked:" not in Page(html).text
    with pytest.raises(ValueError, match="uint8"):
        report(tmp_path, examples=[Example(pixels.astype(np.float32), "q", "a", "a", True)])


def test_a_report_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = report(tmp_path)

    def fail(source: Path, target: Path) -> None:
        raise OSError("disk")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk"):
        report(tmp_path, summary={"arch": "mot"})
    assert (tmp_path / "report.html").read_text() == old and [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_metrics_last_line_wins_and_broken_lines_are_left_out(tmp_path: Path) -> None:
    lines = [{"step": 20, "train/loss": 9.0}, {"step": 10, "train/loss": 2.0}, {"step": 20, "train/loss": 1.0}, {"step": 20, "eval/x": 0.5}]
    tail = '[1]\n{"loss": 1}\n{"step": true}\n{"step": 30, "train/loss": NaN, "note": "text"}\n\n{"step": 40, "train/lo'
    write_metrics(tmp_path, lines, tail)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\xfe\n")
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert list(metrics.rows) == [10, 20, 30] and metrics.unreadable == 4
    assert metrics.rows[20] == {"step": 20, "train/loss": 1.0, "eval/x": 0.5} and set(metrics.rows[30]) == {"step", "train/loss"}
    assert metrics.values("train/loss") == [2.0, 1.0]
    steps, losses = metrics.points("train/loss")
    assert steps == [10, 20, 30] and math.isnan(losses[2]) and metrics.points("train/none") == ([], [])
    assert "left out: 4" in Page(report(tmp_path)).text


def test_answers_are_listed_weakest_first_and_capped(tmp_path: Path) -> None:
    groups = {f"answer{i}-": (i, 100) for i in range(100)} | {"empty": (0, 0)}
    page = Page(report(tmp_path, examples=[], summary={"by_answer": groups}))
    shown = re.findall(r"answer(\d+)-", page.text)
    assert shown == [str(i) for i in range(40)] and "40 weakest of 100" in page.text


def test_wilson_interval_matches_its_defining_equation() -> None:
    for right, total in ((0, 10), (7, 10), (9623, 9673), (5, 5)):
        for bound in wilson_interval(right, total):
            # the bounds p solve (right/total - p)^2 = z^2 p (1 - p) / total
            assert (right / total - bound) ** 2 == pytest.approx(1.96**2 * bound * (1 - bound) / total, abs=1e-12)


def test_a_score_out_of_the_metrics_has_its_counts_beside_it(tmp_path: Path) -> None:
    """Of the last evaluation alone: what an earlier one counted says nothing of it."""
    row = {"eval/exact_match": 0.5, "eval/questions": 40, "eval/unreadable": 3, "eval/too_long": 2}
    write_metrics(tmp_path, [{"step": 1, **row, "eval/loss": 2.0, "eval/loss_samples": 9}, {"step": 2, **row, "eval/questions": 20}])
    html = report(tmp_path, summary={})
    assert "10 of 20 right" in html and "3 could not be asked; 2 cannot be written" in html and "9 samples" not in html


def test_remarks_stand_under_the_scores_as_text(tmp_path: Path) -> None:
    write_metrics(tmp_path, [{"step": 1, "eval/exact_match": 0.5}])
    assert '<p class="note">1 of 2 &lt;b&gt;</p>' in report(tmp_path, summary={}, remarks=["1 of 2 <b>"])


def test_templates_are_installed() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["kempnerforge.report"]
    names = TEMPLATES.list_templates(filter_func=lambda name: name.endswith(".html"))
    assert {"base.html", "report.html", "inspect.html", "data.html"} <= set(names)
    assert all(any(Path("templates", name).match(pattern) for pattern in patterns) for name in names)
