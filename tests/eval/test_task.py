"""Tasks from outside the package: the example of docs/extend/task.md, and VQA accuracy, which counts annotators."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kempnerforge.config import EvalConfig, load_config, registry
from kempnerforge.config.plugins import load_plugins
from kempnerforge.eval.answers import Answer
from kempnerforge.eval.evaluate import evaluate
from kempnerforge.eval.exam import Exam
from kempnerforge.eval.predictions import write_predictions
from kempnerforge.eval.questions import HeldOut, Question, Truth, examine
from kempnerforge.training.setup import assemble
from tests.dist import ROOT
from tests.eval.scripted import DEVICE, ENCODER, LEVELS, ListSource, Scripted, held_out
from tests.training.tiny import call, make_job, metrics, rows_of, two_ranks, write_rows
from tests.vlm.tiny import ONE, THREE, all_logits, tiny

PAGE = (ROOT / "docs" / "extend" / "task.md").read_text(encoding="utf-8")
VQA = '''
import re
from dataclasses import dataclass

from kempnerforge.config import registry
from kempnerforge.eval.task import QuestionTask


@registry.register_task("vqa_accuracy")
@dataclass
class VQAAccuracy(QuestionTask):
    """Antol et al. 2015, equation 1, over all subsets of nine of ten annotators."""

    def points(self, answer):
        plain = lambda text: " ".join(re.sub(r"[^\\w\\s]", "", text.lower()).split())
        given = [plain(text) for text in (answer.question.truth, *answer.question.references)]
        same = given.count(plain(answer.text))
        others = lambda own: min(1.0, (same - own) / 3)
        return sum(others(text == plain(answer.text)) for text in given) / len(given)

    def question(self, question):
        return question if "left out" not in question.prompt else None

    def further(self, score):
        return {"_perfect": sum(points == 1 for points in score.points) / score.total}
'''
CHOICE = """
from dataclasses import dataclass, field, replace

from kempnerforge.config import registry
from kempnerforge.data.sample import Sample, SampleError
from kempnerforge.eval.answers import answers_of, spread
from kempnerforge.eval.loss import log_likelihoods
from kempnerforge.eval.task import QuestionTask


@registry.register_task("choice")
@dataclass
class Choice(QuestionTask):
    \"\"\"The likeliest of some answers is the truth.\"\"\"

    choices: list[str] = field(default_factory=lambda: ["a", "b"])

    def points(self, answer):
        return answer.text == answer.question.truth

    def answers(self, exam, asked, blind):
        write = lambda chunk, failed: self.likeliest(exam, chunk, failed, blind)
        return answers_of(asked, spread(exam, asked, write, exam.cfg.max_new_tokens))

    def likeliest(self, exam, chunk, failed, blind):
        found = {key: [] for key, _ in chunk}
        for choice in self.choices:
            rows = {}
            for key, question in chunk:
                text = replace(question, truth=choice).answered
                try:
                    rows[key] = exam.encoder.encode(Sample(question.sample_id, tuple(question.images), (text,), question.part), seed=0)
                except SampleError as error:
                    failed[key] = str(error)
            for key, nats in zip(rows, log_likelihoods(exam, list(rows.values()), blind=blind), strict=True):
                found[key].append(nats)
        return {key: self.choices[nats.index(max(nats))] for key, nats in found.items() if key not in failed}
"""


def block(kind: str) -> str:
    found = re.search(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    return found[1]


def anls_job(folder: Path, extra: str = "") -> Path:
    """A job with what the page shows in it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "anls.py").write_text(block("python"))
    job = make_job(folder)
    plugins, _, sections = block("toml").partition("\n")
    job.write_text(f"{plugins}\n{job.read_text()}{sections}{extra}")
    return job


def near(truth: str, said: str, threshold: float) -> float:
    """ANLS by a table of all distances."""
    table = {(i, 0): i for i in range(len(said) + 1)} | {(0, j): j for j in range(len(truth) + 1)}
    for i, a in enumerate(said, 1):
        for j, b in enumerate(truth, 1):
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (a != b))
    share = table[len(said), len(truth)] / max(len(said), len(truth), 1)
    return 1 - share if share < threshold else 0.0


def test_the_page_s_example_from_training_to_the_report(tmp_path: Path) -> None:
    """One file and five lines of TOML: recorded with its counts, recounted from the predictions, shown; the other keys stay as they are."""
    job, run = anls_job(tmp_path), tmp_path / "run"
    rows = [row | {"answer": [row["answer"], "dark " + row["answer"]]} for row in rows_of(tmp_path)]
    write_rows(tmp_path / "test.jsonl", [*rows, rows[0] | {"image": "gone.png"}])
    ended = call("train", job, "--data.max_bad_fraction=0.5", "--eval.interval=4")
    assert ended.code == 0, ended
    last = metrics(run)[-1]
    assert (last["eval/anls_questions"], last["eval/anls_unreadable"], last["eval/anls_too_long"]) == (16, 1, 0)
    ended = call("eval", run, "--json", "--trust-plugins", "--predictions", tmp_path / "said.jsonl")
    assert ended.code == 0, ended
    found = json.loads(ended.out)
    assert all(found[key] == last[f"eval/{key}"] for key in ("anls", "anls_blind", "exact_match", "questions", "unreadable"))
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    exact, own = ([row for row in said if ("task" in row) is told and row["unreadable"] is None] for told in (False, True))
    assert [row["answer"] for row in exact] == [row["answer"] for row in own] and {row["task"] for row in own} == {"anls"}
    for key, points, answer in (("anls", "points", "answer"), ("anls_blind", "points_blind", "answer_blind")):
        assert found[key] == pytest.approx(sum(row[points] for row in own) / len(own))
        for row in own:
            truths = [row["truth"], *row["also_right"]]
            assert row[points] == pytest.approx(max(near(truth, row[answer].strip().lower(), 0.4) for truth in truths))
    page = (run / "report.html").read_text().replace("\u00a0", " ")
    assert ">ANLS<" in page and "16 questions; 1 could not be asked" in page and ">Blind ANLS<" in page and ">anls<" not in page
    assert "options.anls" in (run / "config.toml").read_text()


def test_tasks_on_two_ranks_are_those_on_one(tmp_path: Path) -> None:
    """Generated and by likelihood; one rank has a question less than the other."""
    plugin = tmp_path / "choice.py"
    for name, train in (("one", call), ("two", two_ranks)):
        job = anls_job(tmp_path / name, extra='[eval.options.choice]\nchoices = ["red", "blue", "a green one"]\n')
        job.write_text(job.read_text().replace('["anls.py"]', f'["anls.py", "{plugin}"]').replace('["anls"]', '["anls", "choice"]'))
        write_rows(tmp_path / name / "test.jsonl", rows_of(tmp_path / name)[:7])
        ended = train("train", job, "--optimizer.lr=0", "--train.max_steps=2", "--eval.interval=1", "--eval.batch_size=1")
        assert ended.code == 0, ended
    rows = [metrics(tmp_path / name / "run")[-1] for name in ("one", "two")]
    keys = [key for key in rows[0] if key.startswith("eval/")]
    assert {"eval/anls", "eval/choice", "eval/choice_blind"} <= set(keys) and all(rows[0][key] == rows[1][key] for key in keys)
    assert rows[0]["eval/choice_questions"] == 7


# ---- answers are shared ----------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def plugins(tmp_path: Path) -> None:
    for name, code in (("vqa.py", VQA), ("choice.py", CHOICE)):
        (tmp_path / name).write_text(code)
    load_plugins(["vqa.py", "choice.py"], tmp_path, "test")


def exam_of(model: Scripted, **changed: Any) -> Exam:
    cfg = EvalConfig(**{"batch_size": 3, "max_new_tokens": 4, "tasks": ["vqa_accuracy"], **changed})
    return Exam(model, ENCODER, cfg, DEVICE, held_out=examine(ListSource(held_out(LEVELS)), ENCODER, cfg))


def test_tasks_that_ask_the_same_share_the_answers(tmp_path: Path) -> None:
    model = Scripted(lambda prompt, level: "red" if level == 10 else "blue")
    found = evaluate(exam_of(model))
    assert len(model.asked) == 5 + 2, "each question once, and blind each prompt once"
    assert list(found.tasks) == ["exact_match", "vqa_accuracy"] and found.values["eval/vqa_accuracy"] == 0
    assert found.values["eval/vqa_accuracy_questions"] == 5 and found.values["eval/vqa_accuracy_unreadable"] == 2
    alone = evaluate(exam_of(model, exact_match=False))
    assert list(alone.tasks) == ["vqa_accuracy"], "no loss: something else is measured"
    model.asked.clear()
    evaluate(exam_of(model, options={"vqa_accuracy": {"max_new_tokens": 2}}))
    assert len(model.asked) == 2 * (5 + 2), "answers of another length are others"
    rows = [json.loads(line) for line in write_predictions(tmp_path / "said", alone, [("x", "why")]).read_text().splitlines()]
    assert [row.get("points") for row in rows] == [0, 0, None, 0, 0, None, 0, None] and rows[-1]["unreadable"] == "why"


def test_multiple_choice_by_likelihood() -> None:
    """By hand, from the logits of each question alone with each choice; one image cannot be read."""
    it = tiny("joint_decoder", noise=0.3)
    asked = [replace(sample, texts=sample.texts[:1]) for sample in (ONE, THREE)]
    asked.append(replace(ONE, id="broken", images=(b"no image",), texts=(replace(ONE.texts[0], prompt="what?"),)))
    choices = ["red", "blue square", "no"]
    cfg = EvalConfig(exact_match=False, tasks=["choice"], options={"choice": {"choices": choices}})
    exam = Exam(it.model, it.encoder, cfg, DEVICE, held_out=examine(ListSource(asked), it.encoder, cfg, pictures=0))
    found = evaluate(exam).tasks["choice"].seeing
    assert found is not None and len(found.answers) == 2 and len(found.unreadable) == 1
    for answer, sample in zip(found.answers, asked, strict=False):
        nats = []
        for choice in choices:
            batch = it.batch(replace(sample, texts=(replace(sample.texts[0], answer=choice),)))
            kept = batch.labels >= 0
            nats.append(float(all_logits(it.model, batch)[kept].log_softmax(-1).gather(-1, batch.labels[kept][:, None]).sum()))
        assert answer.text == choices[nats.index(max(nats))]


@pytest.mark.parametrize(("same", "want"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_counts_annotators(same: int, want: float) -> None:
    """The closed form for ten annotators (the official code's): min(1, 0.3 n)."""
    given = ["Red!"] * same + ["blue"] * (10 - same)
    question = Question("s", (), "what?", given[0], references=tuple(given[1:]))
    answer = Answer(question, 0, "red", Truth("", 1, False), False)
    assert registry.tasks.get("vqa_accuracy")().points(answer) == pytest.approx(want)


def test_all_annotators_reach_a_task(tmp_path: Path) -> None:
    answers = ["red", "red", "dark red", "red", "dark red"]
    job = make_job(tmp_path)
    write_rows(tmp_path / "test.jsonl", [rows_of(tmp_path)[0] | {"answer": answers}])
    known: HeldOut | None = assemble(load_config(job)).examined
    assert known is not None
    (question,) = known.questions
    assert [question.truth, *question.references] == answers and question.also_right == ["dark red"]


def test_a_task_with_nothing_to_measure_is_refused_before_the_first_step(tmp_path: Path) -> None:
    job = anls_job(tmp_path, extra="[eval.options.vqa_accuracy]\n").read_text().replace('["anls"]', '["anls", "vqa_accuracy"]')
    (tmp_path / "job.toml").write_text(job)
    write_rows(tmp_path / "test.jsonl", [row | {"prompt": "left out"} for row in rows_of(tmp_path)])
    for argv, says in (
        ((), "eval.tasks: 'vqa_accuracy' asks none of the 16 held-out questions"),
        (("--data.eval_path=",), "eval.tasks: 'anls' needs held-out data, and there are none"),
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
        (["--eval.tasks=['anis']"], "[eval] tasks = 'anis': Unknown eval.tasks; registered: anls, "),
        (["--eval.tasks=['anls', 'anls']"], "'anls' is there already"),
        (["--eval.tasks=['loss']"], "'loss' is there already"),
        (["--eval.options.anls.treshold=1"], "options.anls.treshold = 1: unknown key; did you mean 'threshold'?"),
        (["--eval.options.anls.threshold='x'"], 'options.anls.threshold = "x": must be a number, not a string'),
        (["--eval.options.anls.threshold=2.0"], "threshold = 2.0: must lie in (0, 1]"),
        (["--eval.options.cider.n=4"], "options.cider: eval.tasks = ['anls'] does not name this task"),
    ],
)
def test_bad_options_of_a_task(words: list[str], says: str, tmp_path: Path) -> None:
    ended = call("check", anls_job(tmp_path), *words)
    assert ended.code == 2 and says in ended.err, ended.err
