"""Answers about several images, of a model that was trained on rows with images among the words."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from kempnerforge.inference.model import TrainedModel
from tests.training.tiny import CONFIG, Ended, call, make_job, rows_of, write_config, write_rows

ASKED = "is <image> left of <image>?"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run in it."""
    folder = tmp_path_factory.mktemp("pairs")
    single = rows_of(folder)
    pairs = [
        {"image": [a["image"], b["image"]], "prompt": ASKED, "answer": ("no", "yes")[k % 2]} for k, (a, b) in enumerate(pairwise(single))
    ]
    write_rows(folder / "train.jsonl", [*pairs, *single, {"image": None, "prompt": "and now?", "answer": "yes"}])
    write_rows(folder / "test.jsonl", [*pairs[:4], *single[:2], {**pairs[0], "image": single[0]["image"]}])
    ended = call("train", write_config(folder, config=CONFIG), "--data.max_bad_fraction=0.5")
    assert ended.code == 0, ended.err
    return folder


def ask(folder: Path, *argv: object) -> Ended:
    return call("generate", folder / "run", *argv)


def test_images_are_taken_in_groups(trained: Path) -> None:
    images = [str(trained / f"{k}.png") for k in range(4)]
    argv = (*images, "--prompt", ASKED, "--temperature=3", "--seed=1")
    found = json.loads(ask(trained, *argv, "--json").out)["answers"]
    assert [answer["images"] for answer in found] == [images[:2], images[2:]]
    assert [answer["image"] for answer in found] == [None, None]
    streamed = ask(trained, *argv)
    assert streamed.out == "".join(f"{', '.join(answer['images'])}: {answer['answer']}\n" for answer in found)
    alone = json.loads(ask(trained, *images, "--prompt", "what is on the left?", "--json").out)["answers"]
    assert [answer["images"] for answer in alone] == [[image] for image in images]
    assert [answer["image"] for answer in alone] == images


@pytest.mark.parametrize("count", [0, 1, 3])
def test_images_that_cannot_be_shared_out(trained: Path, count: int) -> None:
    ended = ask(trained, *[trained / f"{k}.png" for k in range(count)], "--prompt", ASKED)
    assert ended.code == 2 and f"{count} images, and a prompt with 2 of '<image>'" in ended.err and ended.out == ""


def test_room_is_what_all_images_leave(trained: Path) -> None:
    model = TrainedModel.restore(trained / "run")
    images = [trained / "0.png", trained / "1.png"]
    taken = len(model.processor.encoder.encode_prompt(ASKED, 2).ids) + 2 * 4
    model.ask(ASKED, images, 64 - taken).finish()
    with pytest.raises(ValueError, match=f"with the prompt's {taken} positions"):
        model.ask(ASKED, images, 65 - taken)


def test_evaluation_and_inspection_of_interleaved_rows(trained: Path) -> None:
    ended = call("eval", trained / "run", "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert (found["questions"], found["unreadable"]) == (6, 1)
    shown = call("inspect", trained / "job.toml", "-n", "12", "--out", trained / "sheet")
    assert shown.code == 0, shown.out
    assert "<bos>is [image x4] left of [image x4]?\\n[" in shown.out and (trained / "sheet" / "contact-sheet-train.png").is_file()


def test_a_model_of_text_alone_takes_no_image(trained: Path) -> None:
    config = CONFIG.replace(CONFIG[CONFIG.index("[vision_encoder]") : CONFIG.index("[data]")], "").replace("/run", "/text")
    ended = call("train", write_config(trained, "text.toml", config=config))
    assert ended.code == 0, ended.err
    assert call("generate", trained / "text", "--prompt", ASKED).code == 0, "placeholders vanish"
    ended = call("generate", trained / "text", trained / "0.png", trained / "1.png", "--prompt", ASKED)
    assert ended.code == 2 and "takes no image" in ended.err


def test_a_restored_model_normalises_as_it_did_in_training(tmp_path: Path) -> None:
    """Its weights are in the compute dtype, its buffers are not: rounded to bf16, CLIP's mean of 0.48145 would be 0.4805."""
    overrides = (
        "--vision_encoder.mean=[0.48145, 0.45782, 0.40821]",
        "--train.mixed_precision=bf16",
        "--train.max_steps=1",
        "--eval.at_end=false",
    )
    assert call("train", make_job(tmp_path), *overrides).code == 0
    model = TrainedModel.restore(tmp_path / "run").assembly.model
    assert model.vision_encoder.mean.flatten().tolist() == pytest.approx([0.48145, 0.45782, 0.40821], abs=1e-7)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
