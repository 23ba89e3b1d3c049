"""Held-out questions for lm-eval: what is written, what another reader makes of it, and the score of lm-eval itself where it is installed."""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from kempnerforge.config import DataConfig, EvalConfig
from kempnerforge.data.images.decode import opened
from kempnerforge.data.sample import Sample, Text
from kempnerforge.data.text.encode import Encoder
from kempnerforge.eval.answers import Answer
from kempnerforge.eval.lm_eval_task import FILES, TABLE, TASK, write_task
from kempnerforge.eval.questions import Question, Truth, examine, questions
from kempnerforge.inference.model import TrainedModel
from kempnerforge.model.image_processor import pil_processor
from tests.eval.scripted import BROKEN, ENCODER, TEXT_ENCODER, ListSource, evaluate, grey
from tests.eval.test_questions import lower_case
from tests.training.tiny import call, rows_of, write_config, write_rows

CFG = EvalConfig()


def functions(folder: Path = FILES) -> Any:
    spec = importlib.util.spec_from_file_location("vqa", folder / "vqa.py")
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def read(folder: Path) -> list[dict[str, Any]]:
    """The rows as lm-eval gets them."""
    return list(functions(folder).load(pretrained="what lm-eval is told besides")["test"])


def noise(mode: str, size: tuple[int, int] = (13, 7)) -> Image.Image:
    channels = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}.get(mode, 1)
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    return Image.fromarray(values.squeeze(-1) if channels == 1 else values, mode if mode != "I;16" else "L").convert(mode)


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    image.save(buffer := io.BytesIO(), form, **options)
    return buffer.getvalue()


# ---- what is written ------------------------------------------------------------------------------------------------


def test_images_are_the_same_to_every_reader(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    deep = Image.fromarray((np.arange(91, dtype=np.uint16) * 700).reshape(7, 13))
    (tmp_path / "file.png").write_bytes(saved(noise("RGB"), "PNG"))
    plain = [tmp_path / "file.png", saved(noise("RGB"), "JPEG"), saved(noise("L"), "PNG"), saved(noise("RGB"), "WEBP", lossless=True)]
    others = [saved(noise("RGB"), "JPEG", exif=turned), saved(noise("RGBA"), "PNG"), saved(noise("LA"), "PNG"), saved(deep, "PNG")]
    images = [*plain, *others]
    write_task(ListSource([Sample("a", tuple(images), (Text("what?", "noise"),))]), ENCODER, tmp_path / "out", CFG)
    (row,) = read(tmp_path / "out")
    for source, found in zip(images, row["images"], strict=True):
        with opened(source) as picture:
            want = picture.pixels(picture.size)
        assert np.array_equal(np.asarray(found.convert("RGB")), np.asarray(want))
    table = datasets.Dataset.from_parquet(str(tmp_path / "out" / TABLE)).with_format("arrow")
    kept = [image["bytes"] for image in table[0]["images"][0].as_py()]  # type: ignore[index]
    assert kept[: len(plain)] == [image.read_bytes() if isinstance(image, Path) else image for image in plain]
    assert all(new != old for new, old in zip(kept[len(plain) :], others, strict=True))


class Placed(ListSource):
    """With a placeholder of its own, and answers that the template writes otherwise."""

    def __init__(self, samples: Sequence[Sample | None]) -> None:
        super().__init__(samples)
        self.cfg = DataConfig(source="list", image_placeholder="<pic>", answer_template="{answer}.")


def test_questions_are_those_of_evaluate_without_the_template(tmp_path: Path) -> None:
    one, two = (grey(10),), (grey(10), grey(200))
    samples = [
        Sample("front", one, (Text("what?", "red"), Text("and  now?", "blue"))),
        Sample("inside", two, (Text("is <pic> like <pic>?", "no"),)),
        Sample("no image", (), (Text("hello", "hi"),)),
        Sample("caption", one, (Text("", "red"),)),
        Sample("led", two, (Text("which?", "first", leading=2),)),
        Sample("conversation", one, (Text("what?", "red", more=(("sure?", "yes"),)),)),
        Sample("system", one, (Text("what?", "red", system="be brief"),)),
        Sample("text of a mark", one, (Text("what is <image>?", "red"),)),
        Sample("text of ours", one, (Text("what is <pic>?", "red", leading=1),)),
        Sample("broken", (BROKEN,), (Text("what?", "red"),)),
        None,
    ]
    written = write_task(Placed(samples), ENCODER, tmp_path, CFG)
    rows = read(tmp_path)
    assert [(row["id"], row["question"], row["answer"], len(row["images"])) for row in rows] == [
        ("front", "<image>what?", "red.", 1),
        ("front", "<image>and  now?", "blue.", 1),
        ("inside", "is <image> like <image>?", "no.", 2),
        ("no image", "hello", "hi.", 0),
        ("caption", "<image>", "red.", 1),
        ("led", "<image><image>which?", "first.", 2),
        ("conversation", "<image>what?", "red.", 1),
    ]
    assert written.questions == len(rows)
    reasons = dict(written.left_out)
    assert reasons.keys() == {"10", "conversation", "system", "text of a mark", "text of ours", "broken"}
    assert "conversation before it" in reasons["conversation"] and "where there is no image" in reasons["text of ours"]


def test_limit_spreads_as_it_does_in_evaluation(tmp_path: Path) -> None:
    source = ListSource([Sample(f"s{k}", (grey(k),), (Text("what?", "red"),)) for k in range(10)])
    assert write_task(source, ENCODER, tmp_path, CFG, limit=4).questions == 4
    want = [question.sample_id for question in examine(source, ENCODER, CFG).draw(4, ENCODER.seed).values()]
    assert [row["id"] for row in read(tmp_path)] == want
    with pytest.raises(ValueError, match="none of 1 held-out questions can be written; the first: image 8 bytes: not an image"):
        write_task(ListSource([Sample("s", (BROKEN,), (Text("what?", "red"),))]), ENCODER, tmp_path / "none", CFG)
    assert list((tmp_path / "none").iterdir()) == []


def test_the_task_is_whole(tmp_path: Path) -> None:
    write_task(ListSource([Sample("s", (grey(1),), (Text("what?", "red"),))]), ENCODER, tmp_path, EvalConfig(max_new_tokens=40))
    named: list[str] = []
    loader = type("Loader", (yaml.SafeLoader,), {})
    loader.add_constructor("!function", lambda loader, node: named.append(node.value))  # type: ignore[attr-defined]
    task = yaml.load((tmp_path / f"{TASK}.yaml").read_text(), loader)
    assert task["task"] == TASK and task["generation_kwargs"]["max_gen_toks"] == 40
    assert [callable(getattr(functions(tmp_path), name.removeprefix("vqa."))) for name in named] == [True, True]
    columns = datasets.Dataset.from_parquet(str(tmp_path / TABLE)).features.keys()
    assert {task["doc_to_image"], task["doc_to_text"], task["doc_to_target"]} <= columns


def test_answers_are_compared_as_the_tokenizer_writes_them_and_long_ones_are_counted(tmp_path: Path) -> None:
    """An export can say no more than its tokenizer writes; another model may say the answer as it is."""
    encoder = Encoder(lower_case(), DataConfig(), TEXT_ENCODER.layout, seed=0)
    samples = [Sample(truth, (), (Text("what?", truth),)) for truth in ("Red", "BLUE  sea", "dark red . a b")]
    written = write_task(ListSource(samples), encoder, tmp_path, EvalConfig(max_new_tokens=4))
    rows = read(tmp_path)
    assert [row["right"] for row in rows] == [["Red", "red"], ["BLUE  sea", "blue sea"], ["dark red . a b", "dark red . a b"]]
    score = functions(tmp_path).score
    for row in rows:
        for said in row["right"]:
            assert score(row, [f" {said}\n"]) == {"exact_match": 1}
        assert score(row, ["RED"]) == {"exact_match": 0}
    assert (written.questions, written.too_long) == (3, 1)
    task = (tmp_path / f"{TASK}.yaml").read_text()
    assert "  questions: 3\n  left_out: 0\n  too_long: 1\n" in task and "max_gen_toks: 4\n" in task


def test_all_right_answers_count(tmp_path: Path) -> None:
    """As in ``kempnerforge eval``: of a list of answers any, also as the tokenizer writes it."""
    encoder = Encoder(lower_case(), DataConfig(), TEXT_ENCODER.layout, seed=0)
    text = Text("what?", "Red", references=("Dark red", "blue"), listed=True)
    write_task(ListSource([Sample("s", (), (text,))]), encoder, tmp_path, EvalConfig())
    (row,) = read(tmp_path)
    assert row["answer"] == "Red"
    score = functions(tmp_path).score
    for said in ("Red", "red", "Dark red", "dark red", " blue\n"):
        assert score(row, [said]) == {"exact_match": 1}
    assert score(row, ["green"]) == {"exact_match": 0}


WORDS = st.text("ab .\t\n\u00a0\u2003", max_size=6)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(WORDS, WORDS)
def test_an_answer_is_right_to_both_or_to_none(truth: str, said: str) -> None:
    right = Answer(Question("s", (), "what?", truth), 0, said, Truth(" ".join(truth.split()), 1, False), False).right
    assert functions().score({"right": [truth, "other"]}, [said]) == {"exact_match": float(right)}


# ---- what others make of it -----------------------------------------------------------------------------------------

LLAVA = """\
[run]
dir = "{folder}/run"

[model]
dim = 32
n_layers = 2
n_heads = 2
max_seq_len = 128

[vision_encoder]
type = "clip"
[vision_encoder.settings]
model_type = "clip_vision_model"
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 2
image_size = 16
patch_size = 8

[adapter]
type = "mlp_2layer"

[vlm]
arch = "joint_decoder"
freeze = []
max_text_len = 96

[data]
source = "jsonl"
path = "{folder}/train.jsonl"
eval_path = "{folder}/test.jsonl"
prompt_column = "prompt"
tokenizer_vocab_size = 300
PROMPT

[train]
max_steps = 40
batch_size = 16
seq_len = 128
mixed_precision = "fp32"

[optimizer]
lr = 5e-3

[eval]
at_end = false

[metrics]
tensorboard = false
"""
IMAGE_INSIDE = 'prompt_template = "USER: <image>\\n{prompt} ASSISTANT:"\nanswer_template = " {answer}"'
IMAGE_IN_FRONT = 'prompt_template = "Q: {prompt}\\n"\n[data.images]\nfit = "crop"'


def exported(folder: Path, prompt: str, steps: int = 1) -> Path:
    """A run, its export and its task below ``folder``. The pictures are not of the encoder's size, nor square."""
    rows = rows_of(folder)
    for k, row in enumerate(rows):
        Image.open(folder / row["image"]).resize((17 + k, 40 - k), Image.Resampling.BICUBIC).save(folder / row["image"])
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "test.jsonl", rows)
    job = write_config(folder, config=LLAVA.replace("PROMPT", prompt))
    for command in (("train", job, f"--train.max_steps={steps}"), ("export", folder / "run", folder / "hf")):
        ended = call(*command)
        assert ended.code == 0, ended
    ended = call("data", "lm-eval", folder / "run", folder / "task")
    assert ended.code == 0 and "16 questions, 0 left out" in ended.err, ended
    return folder


@pytest.mark.parametrize("prompt", [IMAGE_INSIDE, IMAGE_IN_FRONT], ids=["inside", "in front"])
def test_transformers_gives_the_model_what_it_was_trained_on(prompt: str, tmp_path: Path) -> None:
    """As lm-eval asks: the export's chat template writes the prompt, its processor makes ids and pixels."""
    folder = exported(tmp_path, prompt)
    processor = pil_processor(folder / "hf")
    assembly = TrainedModel.restore(folder / "run").assembly
    assembly.data.read_held_out()
    held_out = assembly.data.held_out
    assert held_out is not None
    encoder = assembly.data.encoder(assembly.stages[-1])
    image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    mean, std = (np.array(values) for values in assembly.model.normalisation)
    for row, question in zip(read(folder / "task"), questions(held_out)[0], strict=True):
        content = [{"type": "image"}, {"type": "text", "text": row["question"].removeprefix("<image>")}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        made = processor(images=row["images"], text=[text], return_tensors="pt")
        want = encoder.encode_question(question.asked, question.images)
        (at,) = want.image_at
        assert made["input_ids"][0].tolist() == [*want.ids[:at], *[image_id] * 4, *want.ids[at:]]
        (view,) = encoder.images[0].load(question.images[0])
        pixels = (view / 255 - mean) / std  # (H, W, 3)
        assert np.abs(made["pixel_values"][0].permute(1, 2, 0).numpy() - pixels).max() <= 1e-5


@pytest.mark.slow
def test_lm_eval_gives_every_answer_that_ours_gives(tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    folder = exported(tmp_path, IMAGE_INSIDE, steps=40)
    assembly = TrainedModel.restore(folder / "run").assembly
    assembly.data.read_held_out()
    held_out = assembly.data.held_out
    assert held_out is not None
    asked = questions(held_out)[0]
    ours = evaluate(assembly.model, asked, assembly.data.encoder(assembly.stages[-1]), assembly.job.eval)
    theirs = lm_eval.simple_evaluate(
        model="hf-multimodal",
        model_args={"pretrained": str(folder / "hf"), "dtype": "float32"},
        tasks=[TASK],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(folder / "task")),
        apply_chat_template=True,
        batch_size=5,
        device="cpu",
        bootstrap_iters=0,
    )
    said = {sample["doc_id"]: sample["resps"][0][0].strip() for sample in theirs["samples"][TASK]}
    assert [said[k] for k in range(len(asked))] == [answer.text.strip() for answer in ours.answers]
    assert theirs["results"][TASK]["exact_match,none"] == ours.mean > 0
    assert len(set(said.values())) > 1, json.dumps(said)
