"""Processors of exports and of imported directories: the ids and pixels of transformers' own, and so the same answers."""

from __future__ import annotations

import io
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

import kempnerforge
from kempnerforge.checkpoint import save_training
from kempnerforge.config import DataConfig, JobConfig, ModelConfig, to_toml
from kempnerforge.config.adapter import LinearAdapterConfig, PixelShuffleConfig
from kempnerforge.config.data import JsonlConfig
from kempnerforge.config.images import ImagesConfig
from kempnerforge.config.template import TurnsConfig
from kempnerforge.config.vision import ClipConfig, SiglipConfig
from kempnerforge.config.vlm import VLMConfig
from kempnerforge.convert.commands import export_model, import_model
from kempnerforge.data.batching.batch import Kind
from kempnerforge.data.sample import Text
from kempnerforge.data.sources.llava import LlavaConfig
from kempnerforge.data.text.tokenizer import Tokenizer
from kempnerforge.interop.chat_template import chat_template
from kempnerforge.interop.settings import complete, model_config
from kempnerforge.interop.vlm_family import FRAME
from kempnerforge.model.image_processor import pil_processor
from kempnerforge.training.setup import assemble
from tests.interop.tiny_vlms import FRAMES, TEXT, TOWER, VOCAB, save, write_tokenizer
from tests.params import quick

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IM_TURNS = TurnsConfig(user="<|im_start|>user\n{prompt}<|im_end|>\n", assistant="<|im_start|>assistant\n", end="<|im_end|>", separator="\n")
FRAMED_TURNS = TurnsConfig(
    user=f"User:{FRAME}{{prompt}}<end_of_utterance>\n", assistant="Assistant:", answer=" {answer}", end="<end_of_utterance>"
)


def rows(**keys: Any) -> JsonlConfig:
    return JsonlConfig(path="rows.jsonl", prompt_column="prompt", **keys)


def tokenizer_of(name: str, path: Path) -> Tokenizer:
    """ "trained": of ours; "first": of Llama's kind, it adds BOS and a space; "plain": adds nothing; "chat": besides with a chat template."""
    if name == "trained":
        return Tokenizer.train(["what shape is it? circle", "what colour? red, or a caption en\n"], 320)
    write_tokenizer(path, prefix=name == "first", more=FRAMES)
    found = Tokenizer.from_pretrained(path)
    found.chat_template = CHATML if name == "chat" else None
    return found


def run_of(path: Path, kind: str, words: str, data: DataConfig, **sections: Any) -> Path:
    """A checkpoint of a model that can be a ``kind``, as a run leaves it."""
    train = replace(JobConfig().train, max_steps=7, seq_len=160)
    sections = {"model": ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=192, tie_embeddings=False), **sections}
    siglip = SiglipConfig(settings={"model_type": "siglip_vision_model", **TOWER})
    if kind == "llava":
        sections["vision_encoder"] = ClipConfig(feature_layer=-2, settings={"model_type": "clip_vision_model", **TOWER})
    elif kind == "idefics3":
        sections |= {"vision_encoder": siglip, "adapter": PixelShuffleConfig(factor=2, bias=False)}
    elif kind == "paligemma":
        gemma = model_config(complete(hf.GemmaConfig(**TEXT | {"num_key_value_heads": 1}).to_dict()), VOCAB)
        sections |= {"vision_encoder": siglip, "adapter": LinearAdapterConfig(), "model": gemma}
    vlm = VLMConfig(attention_mask="prefix" if kind == "paligemma" else "causal", max_text_len=96) if kind else None
    job = replace(JobConfig(), train=train, data=data, vlm=vlm, **sections)
    tokenizer = tokenizer_of(words, path / "words")
    assembly = assemble(job, tokenizer, data=False)
    with torch.no_grad():
        for name, p in assembly.model.named_parameters():
            p.normal_(mean=float("norm" in name), std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    tokenizer.save(path / "tokenizer")
    files = {f"tokenizer/{file.name}": file.read_bytes() for file in (path / "tokenizer").iterdir()}
    files["config.toml"] = to_toml(assembly.job).encode()
    save_training(path / "checkpoints", 7, assembly.model, [], {"step": 7, "samples_seen": 21}, files, 1)
    return path


def pictures() -> list[Image.Image]:
    """Wide, narrow, square and tiny; colour, gray, palette, transparent."""
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for shape in ((37, 61, 3), (90, 23), (28, 28, 4), (5, 7, 3))]
    return [*noise, noise[0].convert("P"), Image.merge("LA", [noise[1], noise[1]])]


def asked(processor: Any, images: list[Image.Image], question: str) -> Any:
    """As people ask a chat model of transformers."""
    parts = [{"type": "image", "image": image} for image in images]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")


LLAVA_PROMPT = {"prompt_template": "USER: <image>\n{prompt} ASSISTANT:", "answer_template": " {answer}"}
CASES: dict[str, tuple[str, str, DataConfig, str]] = {
    "images lead": ("llava", "trained", rows(), "LlavaProcessor"),
    "images lead, Llama's tokenizer": ("llava", "first", rows(), "LlavaProcessor"),
    "LLaVA's prompt": ("llava", "first", rows(**LLAVA_PROMPT), "LlavaProcessor"),
    "turns": ("llava", "plain", rows(template="turns", turns=IM_TURNS, system="be brief"), "LlavaProcessor"),
    "chat": ("llava", "chat", rows(template="chat", system="be brief"), "LlavaProcessor"),
    "chat, LLaVA's rows": ("llava", "chat", LlavaConfig(path="rows.json", template="chat"), "LlavaProcessor"),
    "plain": ("llava", "trained", rows(template="plain", images=ImagesConfig(fit="crop")), "LlavaProcessor"),
    "paligemma": ("paligemma", "plain", rows(template="paligemma"), "PaliGemmaProcessor"),
    "paligemma, crop": ("paligemma", "trained", rows(images=ImagesConfig(fit="crop")), "PaliGemmaProcessor"),
    "paligemma, another prompt": ("paligemma", "trained", rows(prompt_template="Q: {prompt} A:"), "LlavaProcessor"),
    "idefics": ("idefics3", "plain", rows(template="turns", turns=FRAMED_TURNS), "Idefics3Processor"),
    "idefics, bare images": ("idefics3", "trained", rows(prompt_template="USER: {prompt} ASSISTANT:"), "LlavaProcessor"),
}


@pytest.mark.parametrize("name", quick(CASES, *list(CASES)[::3]))
def test_an_export_answers_in_transformers_as_the_run_does(name: str, tmp_path: Path) -> None:
    kind, words, data, processor = CASES[name]
    run = run_of(tmp_path / "run", kind, words, data)
    done = export_model(run, tmp_path / "out", verify=False)
    assert any(f"processor: {processor}" in line for line in done.lines), done.lines
    theirs = pil_processor(tmp_path / "out")
    assert type(theirs).__name__ == processor
    model, ours = kempnerforge.load_pretrained(run, device="cpu", dtype=torch.float32)
    gap = "<image>\n" if data.source == "llava" else ""
    for picture in pictures():
        got, want = asked(theirs, [picture], "what is it?"), ours(images=picture, text=f"{gap}what is it?")
        ids = want["input_ids"].masked_fill(want.batch.kinds == Kind.IMAGE, theirs.image_token_id)  # the run may have no token there
        assert got["input_ids"].tolist() == ids.tolist()
        assert (got["pixel_values"].flatten(0, -4) - want["pixel_values"]).abs().max() <= 1e-5, picture
    copy = hf.AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    made = copy.generate(**got, max_new_tokens=8, do_sample=False)[0, got["input_ids"].shape[1] :].tolist()  # pyright: ignore[reportPossiblyUnboundVariable]
    assert made[:8] == (model.generate(want, max_new_tokens=8)[0] + [want.end_id])[: len(made)]  # pyright: ignore[reportPossiblyUnboundVariable]


@pytest.mark.parametrize("images", [ImagesConfig(fit="letterbox"), ImagesConfig(fit="tiles", tiling="anyres", markers=False)])
def test_what_no_processor_does_is_not_written(images: ImagesConfig, tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", "llava", "trained", rows(images=images))
    done = export_model(run, tmp_path / "out", verify=False)
    assert any("no files of a processor are written" in line and images.fit in line for line in done.lines)
    assert any("reads `'<image><bos>{prompt}\\n'`" in line for line in done.lines)
    assert not {"preprocessor_config.json", "processor_config.json", "chat_template.jinja"} & {f.name for f in (tmp_path / "out").iterdir()}
    assert "no files of a processor are written" in (tmp_path / "out" / "README.md").read_text()


def test_a_prompt_that_would_be_another_is_refused(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", "llava", "trained", rows(images=ImagesConfig(number_images=True)))
    lines = export_model(run, tmp_path / "out", verify=False).lines
    assert any("it refuses 2 images" in line for line in lines)
    with pytest.raises(Exception, match="numbered in training"):
        asked(pil_processor(tmp_path / "out"), pictures()[:2], "what?")


def test_generation_stops_where_answers_end(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", "", "plain", rows(template="turns", turns=IM_TURNS))
    done = export_model(run, tmp_path / "out", verify=False)
    words = hf.AutoTokenizer.from_pretrained(tmp_path / "out")
    stops = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.eos_token_id
    assert words.convert_ids_to_tokens(stops) == ["<|im_end|>", "<eos>"]
    assert any(line.startswith("chat template; ids of 3 questions are written as in training") for line in done.lines)


# ---- chat templates -------------------------------------------------------------------------------------------------

TALK = [
    {"role": "system", "content": "be kind 🎈"},
    {"role": "user", "content": [{"type": "text", "text": 'a "b"'}, {"type": "image"}, {"type": "text", "text": "\\ c {{ d }}"}]},
    {"role": "assistant", "content": "red"},
    {"role": "user", "content": "why?"},
]


@pytest.mark.parametrize("template", ["turns", "chat"])
def test_conversations_are_written_as_in_training(template: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of("chat", tmp_path).changed(adds_bos=True)
    keys: dict[str, Any] = {"turns": replace(IM_TURNS, system="<|im_start|>system\n{system}<|im_end|>\n")} if template == "turns" else {}
    cfg = rows(template=template, **keys)
    words = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend, bos_token="<bos>", eos_token="<eos>")
    words.chat_template = chat_template(cfg, tokenizer)
    written = words.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert written == "<bos>" * (template == "turns") + (
        "<|im_start|>system\nbe kind 🎈<|im_end|>\n"
        '<|im_start|>user\na "b"<image>\\ c {{ d }}<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n'
        "<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    tokenizer.chat_template = words.chat_template  # what was exported is a chat template for training, too
    again = rows(template="chat")
    assembly = assemble(replace(JobConfig(), vlm=None, data=again, train=replace(JobConfig().train, max_steps=1)), tokenizer, data=False)
    asked_again = assembly.data.encoder(assembly.stages[0]).encode_prompt(Text("why?", ""), 0).ids
    assert asked_again == words.apply_chat_template(TALK[3:], add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize(
    ("data", "messages", "message"),
    [
        (rows(**LLAVA_PROMPT), [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}], "as many images"),
        (rows(template="paligemma"), [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "single questions"),
        (rows(), [{"role": "system", "content": "a"}], "no place for a system prompt"),
    ],
)
def test_what_training_has_not_is_refused(data: DataConfig, messages: list[Any], message: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of("plain", tmp_path)
    words = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend, bos_token="<bos>")
    words.chat_template = chat_template(data, tokenizer)
    with pytest.raises(Exception, match=message):
        words.apply_chat_template(messages, tokenize=False)


# ---- theirs ---------------------------------------------------------------------------------------------------------

SQUARE = {"do_image_splitting": False, "size": {"height": 28, "width": 28}, "max_image_size": {"longest_edge": 28}, "resample": 3}


@pytest.mark.parametrize("kind", ["idefics3", "smolvlm"])
def test_a_single_view_of_idefics_is_the_same(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tmp_path / "source"
    model = save(kind, source)
    (source / "preprocessor_config.json").write_text(json.dumps(SQUARE))
    words = hf.PreTrainedTokenizerFast.from_pretrained(source)
    pil = hf.Idefics3ImageProcessorPil if kind == "idefics3" else hf.SmolVLMImageProcessorPil
    theirs: Any = hf.Idefics3Processor(pil(**SQUARE), words, image_seq_len=4)
    with caplog.at_level(logging.WARNING):
        own, ours = kempnerforge.load_pretrained(source, device="cpu")
    assert "does otherwise" not in caplog.text
    text = "<bos>User:<image>what?<end_of_utterance>\nAssistant:"
    one, two = pictures()[:1], pictures()[2:4]
    for images, prompt in ((None, "User: what?"), (one, text), (two, f"<image>{text}")):
        want = theirs(images=images and [images], text=[prompt], return_tensors="pt")
        got = ours(images=images and [images], text=[prompt])
        assert got["input_ids"].tolist() == want["input_ids"].tolist()
        if images:
            assert got["pixel_values"].shape == want["pixel_values"].shape
            assert (got["pixel_values"] - want["pixel_values"]).abs().max() <= 1e-5
    made = model.generate(**dict(got), max_new_tokens=8, do_sample=False)[0, got["input_ids"].shape[1] :].tolist()  # pyright: ignore[reportPossiblyUnboundVariable]
    assert made == own.generate(got, max_new_tokens=8)[0][:8] or 2 in made  # pyright: ignore[reportPossiblyUnboundVariable]
    import_model(source, tmp_path / "run")
    _, ours = kempnerforge.load_pretrained(tmp_path / "run", device="cpu")
    assert torch.equal(ours(images=[one], text=[text])["input_ids"], theirs(images=[one], text=[text], return_tensors="pt")["input_ids"])


def test_images_that_are_handled_otherwise_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save("idefics3", tmp_path / "source")  # without a word about it, images are split
    done = import_model(tmp_path / "source", tmp_path / "run")
    (line,) = (line for line in done.lines if "does otherwise" in line)
    assert "do_image_splitting = true" in line and "resample = 1" in line and "one square of 28 pixels" in line
    with caplog.at_level(logging.WARNING):
        kempnerforge.load_pretrained(tmp_path / "source", device="cpu")
    assert line in caplog.text


@pytest.mark.parametrize("kind", ["llava", "paligemma", "idefics3"])
def test_an_export_that_is_loaded_here_has_the_same_processor(kind: str, tmp_path: Path) -> None:
    data = {"llava": rows(**LLAVA_PROMPT), "paligemma": rows(template="paligemma"), "idefics3": rows(template="turns", turns=FRAMED_TURNS)}
    export_model(run_of(tmp_path / "run", kind, "plain", data[kind]), tmp_path / "out", verify=False)
    theirs, (_, ours) = pil_processor(tmp_path / "out"), kempnerforge.load_pretrained(tmp_path / "out", device="cpu")
    for images, text in ((pictures()[:1], "<image>what?"), (pictures()[:2], "<image><image>a caption en")):
        want, got = theirs(images=[images], text=[text], return_tensors="pt"), ours(images=[images], text=[text])
        assert got["input_ids"].tolist() == want["input_ids"].tolist()
        assert (got["pixel_values"] - want["pixel_values"]).abs().max() <= 1e-5


def test_an_opened_image_is_what_its_file_is(tmp_path: Path) -> None:
    """A run of ours sees both as in training: upright, transparency on white, 16 bits scaled."""
    _, ours = kempnerforge.load_pretrained(run_of(tmp_path / "run", "llava", "trained", rows()), device="cpu")
    turned = Image.Exif()
    turned[0x0112] = 6
    deep = Image.fromarray(np.random.default_rng(0).integers(0, 65536, (30, 40), dtype=np.uint16))
    for number, (image, exif) in enumerate([*((image, None) for image in pictures()), (pictures()[0], turned), (deep, None)]):
        image.save(file := io.BytesIO(), "PNG", **({"exif": exif} if exif else {}))
        (path := tmp_path / f"{number}.png").write_bytes(file.getvalue())
        read = ours(images=path, text="what?")["pixel_values"]
        assert torch.equal(ours(images=Image.open(path), text="what?")["pixel_values"], read)
