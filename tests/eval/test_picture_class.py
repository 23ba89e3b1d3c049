"""Pictures that are written, and what the classifier sees in them."""

from __future__ import annotations

import math
import runpy
import shutil
from pathlib import Path

import pytest
import torch

from kempnerforge.eval.generate import Sampling, generate
from kempnerforge.model.vq import VQVAE, ClassifierConfig, PictureClassifier, VQConfig
from tests.dist import ROOT
from tests.training.tiny import COLOURS, CONFIG, call, make_job, metrics, two_ranks
from tests.vlm.tiny import picture, tiny


def test_only_what_is_allowed_is_written() -> None:
    it = tiny("mot", noise=0.3)
    it.model.eval()
    codes = it.encoder.layout.codes
    allowed = (range(5, 6), *[codes] * 6, range(9, 11))
    prompts = it.prompts([("what?", [0]), ("red", [1])], [picture(0), picture(1)])
    sampling = Sampling(temperature=1.0, seed=3, allowed=allowed)
    made = generate(it.model, prompts, max_new_tokens=9, eos_id=-1, sampling=sampling)
    for row in made:
        assert [id_ in ids for id_, ids in zip(row, allowed, strict=False)] == [True] * 8
    assert made[0] != made[1] and made == generate(it.model, prompts, max_new_tokens=9, eos_id=-1, sampling=sampling)
    greedy = generate(it.model, prompts, max_new_tokens=2, eos_id=-1, sampling=Sampling(allowed=allowed))
    with torch.no_grad():
        assert [row[0] for row in greedy] == [5, 5]


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A job that writes pictures of 8x8 in five codes."""
    VQVAE(VQConfig(image_size=8, codes=5, code_dim=4, width=8)).save(tmp_path / "codec")
    PictureClassifier(ClassifierConfig(list(COLOURS), image_size=8, width=4)).save(tmp_path / "judge")
    rows = '{ source = "jsonl", path = "{folder}/train.jsonl", eval_path = "{folder}/test.jsonl" }'
    begin, _, after = CONFIG.partition("[data]")
    data = f'[data]\nsource = "picture_codes"\ncodec = "{{folder}}/codec"\npictures = {rows}\n\n[train]{after.partition("[train]")[2]}'
    task = '\n[eval]\ntasks = ["picture_class"]\n\n[eval.options.picture_class]\nclassifier = "{folder}/judge"\n'
    return make_job(tmp_path, config=begin + data + task)


@pytest.mark.parametrize("arch", ["mot", "joint_decoder"])
def test_a_run_writes_pictures_and_shows_them(arch: str, job: Path) -> None:
    ended = call("train", job, f"--vlm.arch={arch}", "--train.max_steps=2", "--eval.loss=true")
    assert ended.code == 0, ended.err
    found = metrics(job.parent / "run")[-1]
    assert found["eval/picture_class_whole"] == 1 and found["eval/picture_class_questions"] == 8
    assert {"eval/picture_class", "eval/picture_class_real", "eval/picture_class_reconstructed"} <= found.keys()
    assert found["eval/picture_class_loss"] == pytest.approx(found["eval/loss"], rel=1e-5), "all that is held out are pictures"
    assert "eval/exact_match" not in found and "eval/picture_class_blind" not in found
    page = (job.parent / "run" / "report.html").read_text(encoding="utf-8")
    assert page.count('alt="drawn by the model"') == 8 and "drawn; seen in it" in page
    shutil.rmtree(job.parent / "codec")
    ended = call("generate", job.parent / "run", "--prompt", "red", "--max-new-tokens=4")
    assert ended.code == 0, "a trained model is read without its picture tokenizer"


def test_another_picture_tokenizer_than_in_training_is_refused(job: Path) -> None:
    """By training and evaluation alike; its codes are other pictures."""
    again = ("train", job, "--train.max_steps=1")
    assert call(*again, "--checkpoint.interval=1").code == 0
    run, codec = job.parent / "run", job.parent / "codec"
    assert call("eval", run, "--limit=2").code == 0
    kept = shutil.copytree(codec, job.parent / "kept")
    torch.manual_seed(5)
    VQVAE(VQConfig(image_size=8, codes=5, code_dim=4, width=8)).save(codec)
    for command in (
        ("train", job, "--train.max_steps=2", "--scheduler.name=constant", "--allow-change=scheduler"),
        ("eval", run, "--limit=2"),
    ):
        ended = call(*command)
        assert ended.code == 2 and "picture tokenizer of train" in ended.err, ended.err
    ended = call("eval", run, f"--data.codec={kept}", "--limit=2")
    assert ended.code == 0, "the same one elsewhere"
    more = job.parent / "more"
    VQVAE(VQConfig(image_size=8, codes=9, code_dim=4, width=8)).save(more)
    says = f"data.codec = '{more}': its config.json has codes = 9, and the model's vocabulary 5 of them (model.new_tokens); set data.codec"
    ended = call("eval", run, f"--data.codec={more}", "--limit=2")
    assert ended.code == 2 and says in ended.err, ended.err
    ended = call("train", job, f"--data.codec={more}", f"--run.dir={job.parent}/other", '--model.new_tokens=["<code_0>", "<x>"]')
    assert ended.code == 2 and "has codes = 9, and the model's vocabulary 1 of them (model.new_tokens), and '<x>' after them" in ended.err


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_score_as_one(job: Path) -> None:
    runs = {"one": call, "two": two_ranks}
    for name, command in runs.items():
        ended = command("train", job, "--vlm.arch=mot", "--train.max_steps=2", f"--run.dir={job.parent}/{name}")
        assert ended.code == 0, ended.err
    one, two = (metrics(job.parent / name)[-1] for name in runs)
    drawn = "eval/picture_class"  # draws depend on the number of processes
    assert {k: v for k, v in one.items() if k.startswith("eval/") and k != drawn} == pytest.approx(
        {k: v for k, v in two.items() if k.startswith("eval/") and k != drawn}, rel=1e-4
    )


@pytest.mark.slow
def test_the_recipe_from_the_tokenizer_to_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With few steps: its tokenizer and classifier are made, and its two rows are trained with them."""
    folder = ROOT / "recipes/image-generation"
    monkeypatch.setattr("sys.argv", ["codec.py", f"--out={tmp_path}", "--steps=300"])
    runpy.run_path(str(folder / "codec.py"), run_name="__main__")
    assert len(PictureClassifier.load(tmp_path / "classifier", "").cfg.classes) == 24
    text = (folder / "cpu-joint.toml").read_text(encoding="utf-8").replace("runs/recipes/image-generation/", f"{tmp_path}/")
    (tmp_path / "job.toml").write_text(text, encoding="utf-8")
    for arch in ("joint_decoder", "mot"):
        ended = call("train", tmp_path / "job.toml", f"--vlm.arch={arch}", "--train.max_steps=60", f"--run.dir={tmp_path}/{arch}")
        assert ended.code == 0, ended.err
        found = metrics(tmp_path / arch)[-1]
        assert found["eval/picture_class_whole"] == 1 and found["eval/picture_class_loss"] < math.log(256)
        assert found["eval/picture_class_real"] > 0.1


def test_a_missing_classifier_ends_the_job_before_its_first_step(job: Path) -> None:
    ended = call("train", job, "--eval.options.picture_class.classifier=nowhere")
    assert ended.code == 2 and "eval.options.picture_class.classifier = 'nowhere': no folder with config.json" in ended.err
    PictureClassifier(ClassifierConfig(list(COLOURS), image_size=12, width=4)).save(job.parent / "judge")
    ended = call("train", job)
    assert ended.code == 2 and "judges 12 pixels a side, data.codec writes 8" in ended.err
    PictureClassifier(ClassifierConfig(["a cat", "a dog"], image_size=8, width=4)).save(job.parent / "other")
    ended = call("train", job, f"--eval.options.picture_class.classifier={job.parent}/other")
    assert ended.code == 2 and "'picture_class' asks none of the 8 held-out questions" in ended.err
