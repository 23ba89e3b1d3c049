"""A run as a model of lmms-eval, found by its entry point: losses of answers from the model's logits, and the scores of ``kempnerforge eval``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from kempnerforge.inference.model import TrainedModel
from kempnerforge.model.transformer import Cache
from kempnerforge.util.errors import InputError
from tests.training.tiny import COLOURS, call, make_job

evaluator: Any = pytest.importorskip("lmms_eval.evaluator", reason="lmms-eval, or what it imports, is not installed")

TASK = """task: {task}
dataset_path: {kind}
dataset_kwargs:
  data_files: {{test: "{file}"}}
test_split: test
output_type: {output}
doc_to_text: question
doc_to_target: answer
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
"""
IMAGES = "doc_to_visual: !function visuals.images\n"
CHOICES = f"doc_to_choice: {json.dumps([*COLOURS])}\n"
WRITTEN = """process_results: !function vqa.score
generation_kwargs: {until: [], max_new_tokens: 16, do_sample: false, temperature: 0}
"""
CHOSEN = ('--eval.tasks=["choice_likelihood"]', f'--eval.options.choice_likelihood={{choices = {json.dumps([*COLOURS])}, per = "tokens"}}')


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its data mark an image otherwise than lmms-eval does."""
    folder = tmp_path_factory.mktemp("run")
    keys = ("--vlm.arch=cross_attention", "--vlm.cross_attention_every_n_layers=1", "--data.image_placeholder=<picture>")
    ended = call("train", make_job(folder), *keys, "--train.max_steps=80", "--optimizer.lr=1e-2", "--checkpoint.interval=0")
    assert ended.code == 0, ended
    return folder / "run"


def loss_of(run: Path, images: list[Path], prompt: str, answer: str) -> float:
    """Mean loss of an answer and the token that ends it, each predicted as generation does it."""
    found = TrainedModel.load(run, device="cpu")
    processor, nats = found.processor, 0.0
    asked = processor.prompt(prompt, images)
    ids = [*processor.tokenizer.encode(answer), processor.tokenizer.eos_id]
    for k, token in enumerate(ids):
        batch = processor.batch([asked._replace(ids=[*asked.ids, *ids[:k]])], [images])
        with torch.no_grad():
            nats -= float(found.model(batch, Cache()).logits[0].log_softmax(-1)[token])
    return nats / len(ids)


def model(run: Path, docs: list[dict[str, Any]], batch_size: int = 2) -> Any:
    from kempnerforge.inference.lmms_eval_model import LMMSEvalModel

    lm = LMMSEvalModel(str(run), batch_size=batch_size, device="cpu")
    lm.task_dict = {"t": {"test": docs}}
    return lm


def request(kind: str, *arguments: Any) -> Any:
    number = arguments[-1]
    instance: Any = pytest.importorskip("lmms_eval.api.instance")
    return instance.Instance(kind, (*arguments, "t", "test"), 0, {"task": "t", "doc_id": number, "repeats": 1})


def least(losses: list[tuple[float, bool]]) -> str:
    """The colour with the smallest loss."""
    return min(zip(losses, COLOURS, strict=True))[1]


def test_losses_are_those_of_the_logits(run: Path) -> None:
    """With an image, with its place in the prompt, without one; an answer may come from the row."""
    files = [run.parent / f"{k}.png" for k in range(3)]
    docs = [{"images": [Image.open(file)], "answer": "blue"} for file in files[:2]] + [{"images": None, "answer": "yellow"}]
    asked = [("what is on the left?", " red", 0), ("<image>what is on the right?", lambda doc: doc["answer"], 1), ("what?", " green", 2)]
    visual = lambda doc: doc["images"]
    found = model(run, docs).loglikelihood([request("loglikelihood", prompt, answer, visual, k) for prompt, answer, k in asked])
    want = [
        loss_of(run, [files[0]], "what is on the left?", "red"),
        loss_of(run, [files[1]], "<picture>what is on the right?", "blue"),
        loss_of(run, [], "what?", "green"),
    ]
    assert [one.text[0] for one in found] == pytest.approx(want, rel=1e-4)
    greedy = TrainedModel.load(run, device="cpu").ask(asked[0][0], [files[0]], 16).finish()
    (likely,) = model(run, docs).loglikelihood([request("loglikelihood", asked[0][0], greedy, visual, 0)])
    assert likely.text[1] and greedy.strip() and not found[2].text[1]


def test_lmms_eval_scores_a_run_as_kempnerforge_does(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out questions, answered and chosen by likelihood; and a task without images."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "task"
    assert call("data", "lm-eval", run, folder).code == 0
    (folder / "kempnerforge_vqa.yaml").unlink()  # a task for lm-eval
    (folder / "visuals.py").write_text("def images(doc):\n    return doc['images']\n")
    rows = [{"question": f"what is on the {side}?", "answer": "red"} for side in ("left", "right")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for task, kind, file, output, metric, more in (
        ("written", "parquet", folder / "questions.parquet", "generate_until", "exact_match", IMAGES + WRITTEN),
        ("chosen", "parquet", folder / "questions.parquet", "multiple_choice", "acc", IMAGES + CHOICES),
        ("texts", "json", tmp_path / "rows.jsonl", "multiple_choice", "acc", CHOICES),
    ):
        (folder / f"{task}.yaml").write_text(TASK.format(task=task, kind=kind, file=file, output=output, metric=metric) + more)
    tasks: Any = pytest.importorskip("lmms_eval.tasks").TaskManager(include_path=str(folder), include_defaults=False)
    theirs = evaluator.simple_evaluate(
        "kempnerforge",
        f"path={run}",
        tasks=["written", "chosen", "texts"],
        task_manager=tasks,
        batch_size=3,
        device="cpu",
        bootstrap_iters=0,
    )
    ended = call("eval", run, "--json", "--predictions", tmp_path / "said.jsonl", *CHOSEN)
    assert ended.code == 0, ended
    ours, scores = json.loads(ended.out), theirs["results"]
    lines = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    said, likeliest = ([line["answer"] for line in lines if line.get("task") == task] for task in (None, "choice_likelihood"))
    samples = {task: {one["doc_id"]: one["filtered_resps"] for one in theirs["samples"][task]} for task in theirs["samples"]}
    assert [samples["written"][k][0].strip() for k in range(len(said))] == said and any(said)
    assert scores["written"]["exact_match,none"] == ours["exact_match"]
    assert [least(samples["chosen"][k]) for k in range(len(said))] == likeliest and len(set(likeliest)) > 1
    assert scores["chosen"]["acc,none"] == ours["choice_likelihood"]
    for k, row in enumerate(rows):
        want = [loss_of(run, [], row["question"], colour) for colour in COLOURS]
        assert [loss for loss, _ in samples["texts"][k]] == pytest.approx(want, rel=1e-4)
    assert scores["texts"]["acc,none"] == sum(least(losses) == "red" for losses in samples["texts"].values()) / 2


def test_rounds_and_options(run: Path) -> None:
    """The task writes the next question; a long prompt does not shorten the answers beside it."""
    docs = [{"images": [Image.open(run.parent / "1.png")]}]
    visual, options = (lambda doc: doc["images"]), {"max_new_tokens": 16, "until": []}
    lm = model(run, docs)

    def next_round(doc: Any, previous_output: list[str], round_idx: int, previous_round_info: Any) -> tuple[Any, ...]:
        assert len(previous_output) == round_idx and previous_round_info == (None if round_idx == 1 else "seen")
        return doc["images"], "what is on the right?", round_idx == 2, tuple(previous_output), "seen"

    both = [request("generate_until", f"what is on the {side}?", options, visual, 0) for side in ("left", "right")]
    alone = lm.generate_until(both)
    first = "what is on the left?"
    (rounds,) = lm.generate_until_multi_round([request("generate_until_multi_round", first, options, visual, next_round, 0)])
    assert rounds.text == alone
    assert all(alone)
    assert lm.generate_until([request("generate_until", first, options | {"until": alone[0][1:]}, visual, 0)]) == [alone[0][:1]]
    for words in (*range(5, 16), 40):  # with room for sixteen tokens, for fewer, for none
        long = request("generate_until", "what? " * words, options, visual, 0)
        assert lm.generate_until([both[0], long]) == [alone[0], *lm.generate_until([long])]
    assert lm.generate_until([long]) == [""]
    beams = [request("generate_until", text, options | {"num_beams": 3}, visual, 0) for text in (first, "what? " * 12)]
    assert lm.generate_until(beams) == [*lm.generate_until(beams[:1]), *lm.generate_until(beams[1:])]
    with pytest.raises(InputError, match="beams = 4: a beam search draws nothing"):
        lm.generate_until([request("generate_until", "what?", {"num_beams": 4, "temperature": 1.0}, visual, 0)])
    with pytest.raises(InputError, match="--model_args pretrained: unknown; allowed are path"):
        type(lm)(str(run), pretrained="x")
    with pytest.raises(InputError, match="batch_size = 'auto': must be a whole number"):
        type(lm)(str(run), batch_size="auto")
