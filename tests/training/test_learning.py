"""Does it learn? Pictures are memorised and told again by generation, text alone is learnt, and both from the same command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.training.tiny import CONFIG, assert_same_tensors, call, losses, make_job, metrics, rows_of, tensors, write_config, write_rows

STORIES = [
    "a red house", "two blue birds on a wire", "rain", "the green train is late", "a yellow cup of tea", "no one", "snow on the hill",
    "three small boats",
]  # fmt: skip
TOLD = "tell me what you see."


@pytest.fixture(scope="module")
def memorised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with eight pictures, one prompt, eight answers, and a run that has overfitted to them."""
    folder = tmp_path_factory.mktemp("memorised")
    make_job(folder)
    rows = [row | {"prompt": TOLD, "answer": story} for row, story in zip(rows_of(folder, 8), STORIES, strict=True)]
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "test.jsonl", rows)
    ended = call(
        "train", folder / "job.toml", "--train.max_steps=150", "--train.batch_size=8", "--optimizer.name=muon", "--checkpoint.interval=0"
    )
    assert ended.code == 0, ended
    return folder


def test_labels_are_the_answers(memorised: Path):
    """What is marked as trained, read from the labels of real batches."""
    ended = call("inspect", memorised / "job.toml", "-n", 8, "--train.batch_size=8", "--out", memorised / "seen")
    assert ended.code == 0, ended
    texts = [line.split("<bos>")[1] for line in ended.out.splitlines() if "<bos>" in line]
    assert sorted(texts) == sorted(f"{TOLD}\\n[{story}<eos>]" for story in STORIES)


def test_answers_come_back_by_generation(memorised: Path):
    found = json.loads(call("eval", memorised / "run", "--json").out)
    assert found["exact_match"] == 1.0 and found["questions"] == 8
    assert found["by_answer"] == {story: [1, 1] for story in STORIES}
    assert metrics(memorised / "run")[-1]["eval/exact_match"] == 1.0


def test_blind_it_knows_one_of_them_at_most(memorised: Path):
    """One prompt for all: without the picture every answer is the same."""
    assert json.loads(call("eval", memorised / "run", "--json").out)["exact_match_blind"] <= 1 / 8
    assert json.loads((memorised / "run" / "summary.json").read_text())["question_only_prior"] == 1 / 8


def test_one_picture_after_the_other(memorised: Path):
    images = [memorised / f"{k}.png" for k in range(8)]
    found = json.loads(call("generate", memorised / "run", *images, "--prompt", TOLD, "--json").out)
    assert [answer["answer"] for answer in found["answers"]] == STORIES
    streamed = call("generate", memorised / "run", images[3], "--prompt", TOLD)
    assert streamed.out == STORIES[3] + "\n"


# ---- text alone ------------------------------------------------------------------------------------------------------

TEXT = """\
[data]
source = "text"
path = "{folder}/text.txt"
eval_path = "{folder}/text.txt"
tokenizer_vocab_size = 320

[train]
max_steps = 150
batch_size = 8
seq_len = 32
mixed_precision = "fp32"

[optimizer]
name = "muon"
lr = 5e-3

[checkpoint]
interval = 50

[metrics]
interval = 1
tensorboard = false
"""
RHYME = "one for sorrow, two for mirth, three for a funeral, four for a birth.\n"


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text(RHYME * 40)
    job = write_config(folder, config=CONFIG.split("[vision_encoder]")[0] + TEXT)
    ended = call("train", job)
    assert ended.code == 0, ended
    return folder


def test_text_alone_is_learnt(text_run: Path):
    curve = losses(text_run / "run")
    assert curve[0] > 5 and curve[-1] < 0.5
    summary = json.loads((text_run / "run" / "summary.json").read_text())
    assert summary["arch"] == "text_only" and summary["loss"] < 0.5
    assert metrics(text_run / "run")[-1]["eval/loss"] == summary["loss"]


def test_text_alone_goes_on_from_a_prompt(text_run: Path):
    ended = call("generate", text_run / "run", "--prompt", "one for sorrow, two", "--max-new-tokens=6", "--data.prompt_template={prompt}")
    assert ended.code == 0 and ended.out.startswith(" for mirth"), ended
    image = call("generate", text_run / "run", text_run / "text.txt", "--prompt", "one")
    assert image.code == 2 and "takes no image" in image.err


def test_text_alone_resumes(text_run: Path):
    argv = ("train", text_run / "job.toml", f"--run.dir={text_run}/stopped")
    stages = ("--train.max_steps=150",)
    shutil.copytree(text_run / "run", text_run / "stopped")
    for path in (text_run / "stopped" / "checkpoints" / "step-00000150").iterdir():
        if path.name == "manifest.json":
            path.unlink()  # as if killed while it was written
    (text_run / "stopped" / "report.html").unlink()
    ended = call(*argv, *stages)
    assert ended.code == 0, ended
    assert_same_tensors(tensors(text_run / "stopped"), tensors(text_run / "run"))
    assert metrics(text_run / "stopped") == metrics(text_run / "run")


def test_text_alone_is_checked_and_inspected(text_run: Path):
    found = json.loads(call("check", text_run / "job.toml", "--json").out)["stages"][0]
    assert "vision_encoder" not in found["modules"] and found["useful_share"] > 0.9
    ended = call("inspect", text_run / "job.toml", "-n", 2, "--out", text_run / "seen")
    assert ended.code == 0 and [path.name for path in (text_run / "seen").iterdir()] == ["index.html"], "no picture, no contact sheet"
    rows = [line for line in ended.out.splitlines() if line.endswith("]") and "sorrow" in line]
    assert rows and "images:" not in ended.out
