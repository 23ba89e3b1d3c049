"""Every number that is said of an evaluation, counted again from the file of ``eval --predictions``; and what is said where it means little."""

from __future__ import annotations

import html
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from kempnerforge.eval.answers import Answer
from kempnerforge.eval.evaluate import Measured
from kempnerforge.eval.questions import Question, Truth
from kempnerforge.eval.task import Found, Score
from tests.training.tiny import CONFIG, call, make_job, metrics, rows_of, write_config, write_rows

LONG = "a red square that lies on the left side of a much larger blue one"


def recount(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """All that is said of an evaluation, from its file alone."""
    asked = [row for row in rows if row["unreadable"] is None]
    by_answer: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for row in asked:
        by_answer[row["compared"]][0] += row["right"]
        by_answer[row["compared"]][1] += 1
    found: dict[str, Any] = {
        "exact_match": sum(row["right"] for row in asked) / len(asked),
        "exact_match_blind": sum(row["right_blind"] for row in asked) / len(asked),
        "questions": len(asked),
        "unreadable": len(rows) - len(asked),
        "too_long": sum(row["too_long"] for row in asked),
        "by_answer": dict(sorted(by_answer.items())),
    }
    for kind in {row["kind"] for row in asked if row["kind"]}:
        own = [row for row in asked if row["kind"] == kind]
        found[f"exact_match/{kind}"] = sum(row["right"] for row in own) / len(own)
        found[f"exact_match_blind/{kind}"] = sum(row["right_blind"] for row in own) / len(own)
    return found


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def check_recount(run: Path, *more: object) -> list[dict[str, Any]]:
    """Recounts summary.json, the last evaluation in metrics.jsonl, ``eval --json`` and, by its tables, report.html. Returns the file's rows."""
    ended = call("eval", run, "--json", "--predictions", run / "said.jsonl", *more)
    assert ended.code == 0, ended
    rows = read(run / "said.jsonl")
    counted, found = recount(rows), json.loads(ended.out)
    by_answer = counted.pop("by_answer")
    assert found["by_answer"] == by_answer
    for row in (row for row in rows if row["unreadable"] is None):
        assert row["right"] == (" ".join(row["answer"].split()) == row["compared"])
        assert row["right_blind"] == (" ".join(row["answer_blind"].split()) == row["compared"])
    summary = json.loads((run / "summary.json").read_text())
    last = {key.removeprefix("eval/"): value for key, value in metrics(run)[-1].items()}
    for said in (found, summary, last):
        own = {key: value for key, value in said.items() if key in counted or key.startswith("exact_match")}
        assert own == counted
    page = html.unescape((run / "report.html").read_text()).replace("\u00a0", " ")
    right = round(counted["exact_match"] * counted["questions"])
    assert f"{right} of {counted['questions']} right" in page and f"{counted['unreadable']} could not be asked" in page
    assert f"{counted['too_long']} cannot be written" in page
    table = re.findall(r'<td class="name">(.*?)</td>.*?<td class="n">(\d+) of (\d+)</td>', page, re.DOTALL)
    assert {name: [int(a), int(b)] for name, a, b in table} == by_answer
    return rows


def test_every_number_is_a_count_of_the_predictions(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A model that has learned one answer is asked rows with all kinds of trouble. All evaluations, of fewer questions than ``eval.samples``, ask
    each once; in the end it is said that nothing was learned, and where the report is.
    """
    caplog.set_level("INFO", "kempnerforge")
    rows = rows_of(tmp_path)
    write_rows(tmp_path / "train.jsonl", [row | {"answer": "red"} for row in rows])
    (tmp_path / "bad.png").write_bytes((tmp_path / "9.png").read_bytes()[:-30])  # opens, and cannot be decoded
    odd = [
        {"image": "gone.png", "prompt": "what?", "answer": "red"},
        {"image": "bad.png", "prompt": "what?", "answer": "red"},
        {"image": "3.png", "prompt": "what?", "answer": LONG},
        {"image": "4.png", "prompt": "what?", "answer": "dark \n red"},
        {"image": "5.png", "prompt": "<image> or <image>?", "answer": "red"},
    ]
    write_rows(tmp_path / "test.jsonl", rows + odd)
    argv = ("--data.max_bad_fraction=0.5", "--train.max_steps=25", "--optimizer.lr=1e-2", "--eval.interval=20")
    ended = call("train", write_config(tmp_path), *argv)
    assert ended.code == 0, ended
    run = tmp_path / "run"
    found = check_recount(run)
    assert (
        len(found) == 21 and sum(row["unreadable"] is not None for row in found) == 3 and sum(bool(row["too_long"]) for row in found) == 1
    )
    assert {row["right"] for row in found} == {True, False, None}, "some right, some wrong"
    first, last = ({key: row[key] for key in row if key != "step"} for row in metrics(run) if "eval/questions" in row)
    assert first == last and first["eval/exact_match"] > 0
    assert "one answer, 'red', to all 18 questions" in caplog.text and "it has not learned" in (run / "report.html").read_text()
    assert f"report: {run / 'report.html'}" in caplog.messages
    part = json.loads(call("eval", run, "--json", "--limit=5", "--predictions", tmp_path / "five.jsonl").out)
    five = [(row["id"], row["prompt"]) for row in read(tmp_path / "five.jsonl") if row["prompt"] is not None]
    assert len(five) == len(set(five)) == 5 and set(five) <= {(row["id"], row["prompt"]) for row in found}
    assert part["questions"] + part["unreadable"] == len(read(tmp_path / "five.jsonl"))


def test_kinds_are_counts_of_the_predictions(tmp_path: Path) -> None:
    data = '[data]\nsource = "probe"\nsamples = 8\neval_samples = 24\ntokenizer_vocab_size = 300\n'
    config = CONFIG.split("[data]")[0] + data + "\n[train]" + CONFIG.split("[train]")[1]
    config = config.replace("max_text_len = 48", "max_text_len = 96").replace("seq_len = 64\nmixed", "seq_len = 160\nmixed")
    job = write_config(tmp_path, config=config.replace("max_seq_len = 64", "max_seq_len = 512"))
    ended = call("train", job, "--train.max_steps=2")
    assert ended.code == 0, ended
    assert len({row["kind"] for row in check_recount(tmp_path / "run")}) > 2


def test_predictions_that_cannot_be_written(tmp_path: Path) -> None:
    assert call("train", make_job(tmp_path), "--train.max_steps=1", "--eval.at_end=false").code == 0
    run = tmp_path / "run"
    for argv, says in (
        (("--predictions", tmp_path), "is a directory"),
        (("--predictions", tmp_path / "0.png" / "said.jsonl"), "cannot be written"),
        (("--predictions", tmp_path / "test.jsonl"), "holds something else, and would be lost"),
        (("--predictions", tmp_path / "0.png"), "holds something else, and would be lost"),
        (("--predictions", tmp_path / "said.jsonl", "--eval.exact_match=false"), "no question is asked"),
        (("--limit", -1), "argument --limit: -1: must be at least 0"),
    ):
        ended = call("eval", run, *argv)
        assert ended.code == 2 and says in ended.err, ended
    assert not (tmp_path / "said.jsonl").exists()


# ---- before step 0 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "argv", "code"),
    [
        (8, (), 2),  # none
        (2, (), 2),  # too many
        (2, ("--data.max_bad_fraction=0.3",), 0),
        (8, ("--data.max_bad_fraction=1",), 2),
        (8, ("--data.max_bad_fraction=1", "--eval.exact_match=false"), 2),
        (8, ("--eval.at_end=false",), 0),  # no one asks
    ],
)
def test_held_out_data_that_cannot_be_read_end_a_job_before_its_first_step(
    bad: int, argv: tuple[str, ...], code: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = make_job(tmp_path)
    rows = rows_of(tmp_path)[:8]
    write_rows(tmp_path / "test.jsonl", [row | {"image": "gone.png"} if k < bad else row for k, row in enumerate(rows)])
    for command in ("check", "train"):
        ended = call(command, job, *argv)
        assert ended.code == code, ended
        said = ended.err + caplog.text
        assert (f"{bad} of 8 samples cannot be read" in said and "gone.png" in said) or "--eval.at_end=false" in argv
    if code:
        assert not (tmp_path / "run" / "metrics.jsonl").exists() and not (tmp_path / "run" / "config.toml").exists()


def test_a_loss_says_what_it_could_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    job = make_job(tmp_path)
    rows = rows_of(tmp_path)[:8]
    write_rows(tmp_path / "test.jsonl", [row | {"image": "gone.png"} if k < 3 else row for k, row in enumerate(rows)])
    argv = ("--data.max_bad_fraction=0.5", "--eval.exact_match=false", "--eval.interval=2", "--train.max_steps=3")
    ended = call("train", job, *argv)
    assert ended.code == 0 and "3 of 8 samples cannot be read" in caplog.text and "eval/loss_unreadable 3" in ended.err, ended
    assert [row["eval/loss_samples"] for row in metrics(tmp_path / "run") if "eval/loss" in row] == [5, 5]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    found = json.loads(call("eval", tmp_path / "run", "--json").out)
    for said in (summary, found):
        assert (said["loss_samples"], said["loss_unreadable"]) == (5, 3)
    assert found["held_out"]["unreadable"] == 3
    assert "5 samples; 3 could not be read" in (tmp_path / "run" / "report.html").read_text()


def test_answers_that_no_model_can_write_are_said_by_every_command(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    job = make_job(tmp_path)
    write_rows(tmp_path / "test.jsonl", [row | {"answer": LONG} for row in rows_of(tmp_path)[:3]])
    want = "3 of 3 true answers take more than eval.max_new_tokens = 16 tokens"
    for argv in (
        ("check", job),
        ("data", "check", job),
        ("train", job),
        ("eval", tmp_path / "run"),
        ("data", "lm-eval", job, tmp_path / "task"),
    ):
        caplog.clear()
        ended = call(*argv)
        assert ended.code == 0 and want in ended.err + caplog.text, ended
    assert want in html.unescape((tmp_path / "run" / "report.html").read_text())
    assert want in html.unescape((tmp_path / "run" / "data-check" / "index.html").read_text())
    assert "  too_long: 3\n" in (tmp_path / "task" / "kempnerforge_vqa.yaml").read_text()
    longest = json.loads(call("check", job, "--json").out)["held_out"]["longest_answer"]
    for limit, count in ((longest, 0), (longest - 1, 3)):
        ended = call("data", "check", job, "--json", f"--eval.max_new_tokens={limit}")
        assert json.loads(ended.out)["sources"][1]["held_out"]["too_long"] == count


# ---- what is remarked in the end -------------------------------------------------------------------------------------


def score_of(said: list[str], truths: list[str]) -> Score:
    asked = [Question(str(k), (), "what?", truth) for k, truth in enumerate(truths)]
    answers = [Answer(q, k, text, Truth(q.truth, 1, False), False) for k, (q, text) in enumerate(zip(asked, said, strict=True))]
    return Score(dict(enumerate(asked)), answers, {}, [answer.right for answer in answers])


@pytest.mark.parametrize(
    ("seeing", "blind", "truths", "remarked"),
    [
        (["red"] * 3, ["red"] * 3, ["red", "blue", "red"], True),
        (["red"] * 3, ["blue"] * 3, ["red", "blue", "red"], False),  # one answer each: it sees something
        (["red", "blue", "red"], ["red"] * 3, ["red", "blue", "red"], False),
        (["red"] * 3, ["red"] * 3, ["red"] * 3, False),  # there is one answer
    ],
)
def test_one_answer_to_everything_is_remarked(seeing: list[str], blind: list[str], truths: list[str], remarked: bool) -> None:
    lines = Measured({"exact_match": Found({}, score_of(seeing, truths), score_of(blind, truths))}).remarks(1e-5)
    assert bool(lines) is remarked
    assert not lines or ("'red'" in lines[0] and "optimizer.lr (it was 1e-05)" in lines[0])
    assert Measured({"exact_match": Found({}, score_of(seeing, truths))}).remarks(1e-5) == []
