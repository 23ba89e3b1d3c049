"""The plain loop around transformers beside which ``kempnerforge bench`` measures: the same model, loss and samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kempnerforge.config import load_config
from kempnerforge.convert.commands import import_model
from kempnerforge.convert.peer import TransformersLoop
from kempnerforge.inference.model import JOB_FILE
from kempnerforge.training.initial_weights import initialise
from kempnerforge.training.setup import assemble
from kempnerforge.util.errors import InputError
from tests.interop.tiny_vlms import save
from tests.training.tiny import call, make_job

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")
CPU = torch.device("cpu")
TEXT = """
[run]
dir = "{folder}/run"
[model]
dim = 32
n_layers = 2
n_heads = 2
max_seq_len = 64
[data]
source = "text"
path = "{folder}/words.txt"
tokenizer_vocab_size = 300
[train]
max_steps = 40
batch_size = 4
seq_len = 24
mixed_precision = "fp32"
"""


def text_job(folder: Path) -> Path:
    (folder / "words.txt").write_text("red and blue, a circle or a square\n" * 40)
    return make_job(folder, config=TEXT)


@pytest.mark.parametrize("kind", ["text", "paligemma", "llava"])
def test_the_peer_trains_the_same_model_on_the_same_loss(kind: str, tmp_path: Path) -> None:
    words: list[str] = []
    if kind == "text":
        config = text_job(tmp_path)
    else:
        save(kind, tmp_path / "theirs")
        import_model(tmp_path / "theirs", tmp_path / "ours")
        make_job(tmp_path)
        config = tmp_path / "ours" / JOB_FILE
        words = ["--vlm.freeze=[]", f"--data.path={tmp_path}/train.jsonl", "--data.prompt_column=prompt", f"--data.root={tmp_path}"]
        words += ["--train.batch_size=3", "--eval.at_end=false"]
    assembly = assemble(load_config(config, words))
    initialise(assembly.model, assembly.tokenizer)
    ours = assembly.model
    loop = TransformersLoop(assembly, assembly.stages[0], CPU, torch.float32, 40 if kind == "text" else 0)
    batch = loop.batch()
    assert batch.input_ids.shape[1] == 40 or kind != "text"
    with torch.no_grad():
        want = ours(batch).loss / batch.num_targets
        torch.testing.assert_close(loop.loss(batch), want, rtol=1e-4, atol=1e-5)
    steps = [loop.step() for _ in range(12)]
    assert steps[0].samples == assembly.stages[0].train.batch_size and all(step.tokens > 0 < step.seconds for step in steps)
    assert sum(step.loss for step in steps[-3:]) < sum(step.loss for step in steps[:3]), "it trains"


def test_beside_ours(tmp_path: Path) -> None:
    ended = call("bench", text_job(tmp_path), "--steps=2", "--warmup=1", "--against=transformers", "--pad-to=30", "--json")
    assert ended.code == 0, ended.err
    peer = json.loads(ended.out)["peer"]
    assert peer["name"] == "LlamaForCausalLM"
    assert peer["samples_ratio"] == pytest.approx(peer["our_samples_per_s"] / peer["samples_per_s"])
    assert peer["tokens_per_s"] < 31 * peer["samples_per_s"], "padding is not counted"


def test_rows_that_are_longer_than_what_they_are_padded_to(tmp_path: Path) -> None:
    ended = call("bench", text_job(tmp_path), "--steps=2", "--warmup=1", "--against=transformers", "--pad-to=12")
    assert ended.code == 2 and "--pad-to = 12: a row has 24 positions; set at least the length of the longest" in ended.err, ended.err


@pytest.mark.parametrize(("key", "value"), [("shots", 2), ("beams", 4)])
def test_running_text_asks_no_questions(key: str, value: int, tmp_path: Path) -> None:
    ended = call("check", text_job(tmp_path), f"--eval.{key}={value}")
    assert ended.code == 2 and f"[eval] {key} = {value}: data.source = 'text' asks no questions" in ended.err, ended.err


def test_what_has_no_peer(tmp_path: Path) -> None:
    ended = call("bench", make_job(tmp_path), "--against=transformers", "--train.max_steps=90")
    assert ended.code == 2 and "no class of transformers is this model" in ended.err
    ended = call("bench", tmp_path / "job.toml", "--pad-to=30", "--train.max_steps=90")
    assert ended.code == 2 and "--pad-to: only --against reads it" in ended.err
    assembly = assemble(load_config(text_job(tmp_path)))
    frozen = assembly.stages[0].__class__(**{**vars(assembly.stages[0]), "freeze": ("x",)})
    with pytest.raises(InputError, match="trains all parameters"):
        TransformersLoop(assembly, frozen, CPU, torch.float32)
