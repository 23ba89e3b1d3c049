"""Tasks from outside the package: the example of docs/extend/task.md, and a metric of the agreement of annotators."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from kempnerforge.config import EvalConfig, load_config
from kempnerforge.config.plugins import load_plugins
from kempnerforge.eval.evaluate import evaluate
from kempnerforge.eval.exam import Exam
from kempnerforge.eval.predictions import write_predictions
from kempnerforge.eval.questions import HeldOut, examine
from kempnerforge.training.setup import assemble
from tests.dist import ROOT
from tests.eval.scripted import DEVICE, ENCODER, LEVELS, ListSource, Scripted, held_out
from tests.training.tiny import call, make_job, metrics, rows_of, write_rows

PAGE = (ROOT / "docs" / "extend" / "task.md").read_text(encoding="utf-8")
AGREEMENT = """
from dataclasses import dataclass

from kempnerforge.config import registry
from kempnerforge.eval.task import QuestionTask


@registry.register_task("agreement")
@dataclass
class Agreement(QuestionTask):
    def points(self, answer):
        given = answer.question.given
        return given.count(answer.text) / len(given)

    def question(self, question):
        return question if "left out" not in question.prompt else None

    def further(self, score):
        return {"_perfect": sum(points == 1 for points in score.points) / score.total}
"""


def block(kind: str) -> str:
    found = re.search(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    return found[1]


def word_job(folder: Path, extra: str = "") -> Path:
    """A job with what the page shows in it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "token_f1.py").write_text(block("python"))
    job = make_job(folder)
    plugins, _, sections = block("toml").partition("\n")
    job.write_text(f"{plugins}\n{job.read_text()}{sections}{extra}")
    return job


def f2(truth: str, said: str) -> float:
    """The page's metric with ``beta`` = 2, from precision and recall."""
    left, shared = truth.split(), 0
    for word in said.split():
        if word in left:
            left.remove(word)
            shared += 1
    if not shared:
        return 0.0
    precision, recall = shared / len(said.split()), shared / len(truth.split())
    return 5 * precision * recall / (4 * precision + recall)


def test_the_page_s_example_from_training_to_the_report(tmp_path: Path) -> None:
    """One file and five lines of TOML: recorded with its counts, recounted from the predictions, shown; the other keys stay as they are."""
    job, run = word_job(tmp_path), tmp_path / "run"
    rows = [row | {"answer": [row["answer"], "dark " + row["answer"]]} for row in rows_of(tmp_path)]
    write_rows(tmp_path / "test.jsonl", [*rows, rows[0] | {"image": "gone.png"}])
    ended = call("train", job, "--data.max_bad_fraction=0.5", "--eval.interval=4")
    assert ended.code == 0, ended
    last = metrics(run)[-1]
    assert (last["eval/token_f1_questions"], last["eval/token_f1_unreadable"], last["eval/token_f1_too_long"]) == (16, 1, 0)
    ended = call("eval", run, "--json", "--trust-plugins", "--predictions", tmp_path / "said.jsonl")
    assert ended.code == 0, ended
    found = json.loads(ended.out)
    assert all(found[key] == last[f"eval/{key}"] for key in ("token_f1", "token_f1_blind", "exact_match", "questions", "unreadable"))
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    exact, own = ([row for row in said if ("task" in row) is told and row["unreadable"] is None] for told in (False, True))
    assert [row["answer"] for row in exact] == [row["answer"] for row in own] and {row["task"] for row in own} == {"token_f1"}
    for key, points, answer in (("token_f1", "points", "answer"), ("token_f1_blind", "points_blind", "answer_blind")):
        assert found[key] == pytest.approx(sum(row[points] for row in own) / len(own))
        for row in own:
            truths = [row["truth"], *row["also_right"]]
            assert row[points] == pytest.approx(max(f2(truth, row[answer].lower()) for truth in truths))
    page = (run / "report.html").read_text().replace("\u00a0", " ")
    assert (
        ">F1 of words<" in page
        and "16 questions; 1 could not be asked" in page
        and ">Blind F1 of words<" in page
        and ">token f1<" not in page
    )
    assert "options.token_f1" in (run / "config.toml").read_text()


# ---- answers are shared ----------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def plugins(tmp_path: Path) -> None:
    (tmp_path / "agreement.py").write_text(AGREEMENT)
    load_plugins(["agreement.py"], tmp_path, "test")


def exam_of(model: Scripted, **changed: Any) -> Exam:
    cfg = EvalConfig(**{"batch_size": 3, "max_new_tokens": 4, "tasks": ["agreement"], **changed})
    return Exam(model, ENCODER, cfg, DEVICE, held_out=examine(ListSource(held_out(LEVELS)), ENCODER, cfg))


def test_tasks_that_ask_the_same_share_the_answers(tmp_path: Path) -> None:
    model = Scripted(lambda prompt, level: "red" if level == 10 else "blue")
    found = evaluate(exam_of(model))
    assert len(model.asked) == 5 + 2, "each question once, and blind each prompt once"
    assert list(found.tasks) == ["exact_match", "agreement"] and found.values["eval/agreement"] == 0.6
    assert found.values["eval/agreement_questions"] == 5 and found.values["eval/agreement_unreadable"] == 2
    alone = evaluate(exam_of(model, exact_match=False))
    assert list(alone.tasks) == ["agreement"], "no loss: something else is measured"
    model.asked.clear()
    evaluate(exam_of(model, options={"agreement": {"max_new_tokens": 2}}))
    assert len(model.asked) == 2 * (5 + 2), "answers of another length are others"
    rows = [json.loads(line) for line in write_predictions(tmp_path / "said", alone, [("x", "why")]).read_text().splitlines()]
    assert [row.get("points") for row in rows] == [1, 1, None, 0, 0, None, 1, None] and rows[-1]["unreadable"] == "why"


def test_all_annotators_reach_a_task(tmp_path: Path) -> None:
    answers = ["red", "red", "dark red", "red", "dark red"]
    job = make_job(tmp_path)
    write_rows(tmp_path / "test.jsonl", [rows_of(tmp_path)[0] | {"answer": answers}])
    known: HeldOut | None = assemble(load_config(job)).data.examined
    assert known is not None
    (question,) = known.questions
    assert [question.truth, *question.references] == answers and question.also_right == ["dark red"]


def test_a_task_with_nothing_to_measure_is_refused_before_the_first_step(tmp_path: Path) -> None:
    job = word_job(tmp_path, extra="[eval.options.agreement]\n").read_text().replace('["token_f1"]', '["token_f1", "agreement"]')
    (tmp_path / "job.toml").write_text(job)
    write_rows(tmp_path / "test.jsonl", [row | {"prompt": "left out"} for row in rows_of(tmp_path)])
    for argv, says in (
        ((), "eval.tasks: 'agreement' asks none of the 16 held-out questions"),
        (("--data.eval_path=",), "eval.tasks: 'token_f1' needs held-out data, and there are none"),
    ):
        for command in ("check", "train"):
            ended = call(command, tmp_path / "job.toml", *argv)
            assert ended.code == 2 and says in ended.err, ended
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert call("train", tmp_path / "job.toml", "--data.eval_path=", "--eval.at_end=false", "--train.max_steps=1").code == 0


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--eval.tasks=['token_f2']"], "[eval] tasks = 'token_f2': Unknown eval.tasks; registered: agreement, anls, "),
        (["--eval.tasks=['token_f1', 'token_f1']"], "'token_f1' is there already"),
        (["--eval.tasks=['loss']"], "'loss' is there already"),
        (["--eval.options.token_f1.betta=1"], "options.token_f1.betta = 1: unknown key; did you mean 'beta'?"),
        (["--eval.options.token_f1.beta='x'"], 'options.token_f1.beta = "x": must be a number, not a string'),
        (["--eval.options.token_f1.beta=0.0"], "beta = 0.0: must be above 0"),
        (["--eval.options.cider.n=4"], "options.cider: eval.tasks = ['token_f1'] does not name this task"),
    ],
)
def test_bad_options_of_a_task(words: list[str], says: str, tmp_path: Path) -> None:
    ended = call("check", word_job(tmp_path), *words)
    assert ended.code == 2 and says in ended.err, ended.err
