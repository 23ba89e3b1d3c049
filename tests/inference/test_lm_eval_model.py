"""A run as a model of lm-eval: likelihoods from the model's logits, and the answers of ``kempnerforge eval``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import kempnerforge
from kempnerforge.config.data import TextConfig
from kempnerforge.data.batching.collate import collate
from kempnerforge.data.sample import Sample, Text
from kempnerforge.data.text.encode import Encoder
from kempnerforge.data.text.interleave import Layout
from tests.training.tiny import call, make_job

CHOICES = """task: colours
dataset_path: json
dataset_kwargs:
  data_files: {{test: "{file}"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["red", "green", "blue and yellow"]
doc_to_target: 1
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    arch = ("--vlm.arch=cross_attention", "--vlm.cross_attention_every_n_layers=1")
    ended = call("train", make_job(folder), *arch, "--train.max_steps=80", "--optimizer.lr=1e-2", "--checkpoint.interval=0")
    assert ended.code == 0, ended
    return folder / "run"


def nats_of(run: Path, ids: list[int]) -> list[float]:
    """Of each token but the first, by the model's logits of one row."""
    model, processor = kempnerforge.load_pretrained(run)
    encoder = Encoder(processor.tokenizer, TextConfig(path="-"), Layout(0, 0, 64, 64, 64), seed=0)
    batch = collate([encoder.encode(Sample("", (), (Text("", tuple(ids)),)), seed=0)], processor.tokenizer.pad_id, None)
    with torch.no_grad():
        logs = model(batch).logits.float().log_softmax(-1)
    return [float(logs[k, id_]) for k, id_ in enumerate(ids[1:])]


def test_likelihoods_are_those_of_the_logits(run: Path) -> None:
    instance: Any = pytest.importorskip("lm_eval.api.instance").Instance
    from kempnerforge.inference.lm_eval_model import LMEvalModel

    lm = LMEvalModel(str(run), batch_size=2)
    pairs = [("what is on the left?", "\nred"), ("", "blue"), ("what is on the right?", "\nyellow green")]
    found = lm.loglikelihood([instance("loglikelihood", {}, pair, k) for k, pair in enumerate(pairs)])
    for (context, continuation), (nats, greedy) in zip(pairs, found, strict=True):
        before = lm.tok_encode(context) or [lm.prefix_token_id]
        ids = [*before, *lm.tok_encode(context + continuation)[len(lm.tok_encode(context)) :]]
        assert nats == pytest.approx(sum(nats_of(run, ids)[len(before) - 1 :]), rel=1e-4) and not greedy
    text = "what is on the left? red. " * 10
    ids = [lm.prefix_token_id, *lm.tok_encode(text)]
    assert len(ids) > 65, "more than one window"
    (rolled,) = lm.loglikelihood_rolling([instance("loglikelihood_rolling", {}, (text,), 0)])
    first, rest = ids[:65], len(ids) - 65
    want = sum(nats_of(run, first)) + sum(nats_of(run, ids[-65:])[-rest:])
    assert rolled == pytest.approx(want, rel=1e-4)


def test_lm_eval_scores_a_run_as_kempnerforge_does(run: Path, tmp_path: Path) -> None:
    """On the held-out questions with their images, and on a text task of its own."""
    lm_eval: Any = pytest.importorskip("lm_eval")
    from kempnerforge.inference.lm_eval_model import LMEvalModel

    assert call("data", "lm-eval", run, tmp_path / "task").code == 0
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"question": f"what is on the {side}?\n"}) + "\n" for side in ("left", "right"))
    )
    (tmp_path / "task" / "colours.yaml").write_text(CHOICES.format(file=tmp_path / "rows.jsonl"))
    theirs = lm_eval.simple_evaluate(
        model=LMEvalModel(str(run), batch_size=3),
        tasks=["kempnerforge_vqa", "colours"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path / "task")),
        bootstrap_iters=0,
    )
    ended = call("eval", run, "--json", "--predictions", tmp_path / "said.jsonl")
    assert ended.code == 0, ended
    said = [json.loads(line)["answer"] for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    samples = {sample["doc_id"]: sample["resps"][0][0] for sample in theirs["samples"]["kempnerforge_vqa"]}
    assert [samples[k] for k in range(len(said))] == said and any(said)
    assert theirs["results"]["kempnerforge_vqa"]["exact_match,none"] == json.loads(ended.out)["exact_match"]
    assert theirs["results"]["colours"]["acc,none"] in (0, 0.5, 1)
