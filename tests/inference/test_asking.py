"""All tools that ask a trained model build the row that it was trained on, wherever its data put their images."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers as hf
from PIL import Image

from kempnerforge.checkpoint import resolve
from kempnerforge.checkpoint.manifest import verify
from kempnerforge.config import JobConfig, ModelConfig, VLMConfig, registry
from kempnerforge.config.data import DataConfig, JsonlConfig
from kempnerforge.config.template import TurnsConfig
from kempnerforge.config.vision import ViTConfig
from kempnerforge.convert.commands import import_model
from kempnerforge.data.batching.batch import IGNORE, Kind
from kempnerforge.data.sample import Sample, Text
from kempnerforge.data.source import Source
from kempnerforge.data.text.asking import Asking, observe
from kempnerforge.data.text.encode import Encoder
from kempnerforge.data.text.interleave import IMAGES, INPUT_IDS, KINDS, LABELS, STARTS, VIEW
from kempnerforge.eval.questions import questions
from kempnerforge.inference import model as inference
from kempnerforge.inference.model import TrainedModel, load_pretrained
from kempnerforge.inference.processor import Processor
from kempnerforge.interop.chat_template import chat_template
from kempnerforge.serve.desk import Desk
from kempnerforge.serve.request import Question
from kempnerforge.training.run_state import RunState
from kempnerforge.training.setup import Assembly, assemble
from tests.data.samples import png
from tests.data.text.chat_templates import FAMILIES, LATER, Family
from tests.data.text.test_template import bytes_level
from tests.params import quick
from tests.training.tiny import call, make_job, write_rows
from tests.vlm.tiny import FOREIGN, a_folder, paligemma

IMAGE = "<image>"
PICTURES = (png((200, 0, 0)), png((0, 0, 200)))
TURNS = TurnsConfig(user="USER: {prompt}\n", assistant="ASSISTANT:", answer=" {answer}", system="{system}\n")
LAYOUTS = {  # how the data write a question about one and about two images
    "front": ("{}", "{}"),
    "head": (IMAGE + "\n{}", f"{IMAGE}\n{IMAGE}\n{{}}"),
    "head without a gap": (IMAGE + "{}", IMAGE * 2 + "{}"),
    "head, apart": (IMAGE + " {}", f"{IMAGE}, {IMAGE} {{}}".replace(", ", " ")),
    "tail": ("{}\n" + IMAGE, "{}\n" + IMAGE * 2),
}
PLAIN = Family("", (IMAGE, "<bos>", "<eos>"), "<eos>", "<bos>", "")
TEMPLATES: dict[str, tuple[Family, dict[str, Any]]] = {
    "prompt": (PLAIN, {}),
    "prompt with words": (PLAIN, {"prompt_template": "Q: {prompt} A:", "answer_template": " {answer}"}),
    "paligemma": (PLAIN, {"template": "paligemma"}),
    "turns": (PLAIN, {"template": "turns", "turns": TURNS}),
} | {f"chat {name}": ((FAMILIES | LATER)[name], {"template": "chat"}) for name in ("smollm2", "qwen3", "gemma", "thinks")}


class Given(Source):
    """Samples of a test."""

    def __init__(self, cfg: DataConfig, samples: list[Sample]) -> None:
        super().__init__(cfg, "train")
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


def assembled(template: str, arch: str = "joint_decoder") -> Assembly:
    family, keys = TEMPLATES[template]
    family = replace(family, specials=(*dict.fromkeys((*family.specials, IMAGE)),))
    tokenizer = bytes_level(family)
    own = {"cross_attention_every_n_layers": 1} if arch == "cross_attention" else external() if arch in FOREIGN else {}
    sizes = {} if arch in FOREIGN else {"dim": 16, "n_layers": 1, "n_heads": 2}
    vision = ViTConfig() if arch in FOREIGN else ViTConfig(image_size=16, patch_size=8, dim=16, n_layers=1, n_heads=2)
    job = JobConfig(
        model=ModelConfig(max_seq_len=256, **sizes),
        vision_encoder=vision,
        vlm=VLMConfig.for_arch(arch, **own),
        data=JsonlConfig(path="rows.jsonl", **keys),
    )
    job.train.max_steps, job.train.seq_len, job.vlm.max_text_len = 1, 256, 128
    return assemble(job, tokenizer, data=False)


def samples_of(layout: str, system: str = "") -> list[Sample]:
    one, two = LAYOUTS[layout]
    return [
        Sample(f"{count}", PICTURES[:count], (Text(form.format("what is it?"), "red", system=system),))
        for count, form in ((1, one), (2, two), (1, one))
    ]


@cache
def external() -> dict[str, Any]:
    """Keys of ``[vlm]`` for a PaliGemma with room for the tokenizers here."""
    config = json.loads((Path(paligemma()["path"]) / "config.json").read_text())
    path = Path(a_folder().name, "roomy")
    path.mkdir()
    text = config["text_config"] | {"vocab_size": 1000, "max_position_embeddings": 256}
    (path / "config.json").write_text(json.dumps(config | {"text_config": text}))
    return {"path": str(path), "pretrained": False}


Row = tuple[list[int], list[int]]
"""Ids of a prompt with its images in it, and where the images begin."""


def trained_row(encoder: Encoder, sample: Sample) -> Row:
    row = encoder.encode(sample, 0)
    prompt = next(t for t, label in enumerate(row.table[LABELS]) if label != IGNORE) + 1
    assert row.placements[IMAGES].tolist() == [*range(len(sample.images))]
    ids = np.where(row.table[KINDS] == Kind.IMAGE, VIEW, row.table[INPUT_IDS])
    return ids[:prompt].tolist(), row.placements[STARTS].tolist()


def exported_row(assembly: Assembly, encoder: Encoder, images: int, system: str) -> Row:
    """What transformers makes of a conversation by the exported chat template."""
    words = assembly.tokenizer
    template = chat_template(encoder.texts[0].cfg, words, encoder.asking)
    oracle = hf.PreTrainedTokenizerFast(tokenizer_object=words.backend, bos_token=words.bos, eos_token=words.eos, chat_template=template)
    content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": "what is it?"}]
    text = oracle.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
    words.backend.encode_special_tokens = False
    made, ids, starts = words.backend.encode(text, add_special_tokens=False).ids, [], []
    words.backend.encode_special_tokens = True
    for token in made:
        if token == words.token_id(IMAGE):
            starts.append(len(ids))
            ids += [VIEW] * assembly.data.layout.image_tokens
        else:
            ids.append(token)
    return ids, starts


WHOLE = "joint_decoder"
"""The arch that goes through all templates and layouts; the others through some, as what differs is how many positions an image takes."""
CASES = [
    (arch, template, layout)
    for arch in registry.archs
    for template in TEMPLATES
    for layout in LAYOUTS
    if arch == WHOLE or (template in ("prompt", "turns", "chat smollm2") and layout in ("front", "head", "tail"))
]


@pytest.mark.parametrize(("arch", "template", "layout"), quick(CASES, *CASES[::4]), ids=map("-".join, CASES))
def test_every_tool_asks_as_it_was_trained(arch: str, template: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training, evaluation, generate and chat, serve, the processor of load_pretrained, and the exported template: ids and places."""
    assembly = assembled(template, arch)
    for system in ("", "Be brief.") if template in ("turns", "chat smollm2") else ("",):
        source = Given(assembly.job.data, samples_of(layout, system))
        assembly.data.asking = observe(source, assembly.job.data).asking
        encoder = assembly.data.encoder(assembly.stages[-1])
        seen: list[Row] = []

        def model(_: object, batch: Any, seen: list[Row] = seen, **__: object) -> list[int]:
            seen.append((batch.input_ids.masked_fill(batch.kinds == Kind.IMAGE, VIEW)[0].tolist(), batch.image_starts.tolist()))
            return []

        monkeypatch.setattr(inference, "tokens_of", model)
        asker = TrainedModel(Path(), assembly)
        desk = Desk(asker)
        for sample, question in zip(source.samples, questions(source)[0], strict=True):
            want = trained_row(encoder, sample)
            asked = encoder.encode_question(question.asked, question.images)
            at = [start + sum(len(b.ids) for b in asked.blocks[:k]) for k, start in enumerate(asked.image_at)]
            assert ([i for i in want[0] if i != VIEW], want[1]) == ([*asked.ids], at)
            for prompt in ("what is it?", sample.texts[0].prompt):  # said or not
                asker.ask(prompt, sample.images).finish()
                ticket = desk.ask(Question(prompt, sample.images))
                while not (event := ticket.next(10.0)) or not event.last:
                    assert event is not None
                inputs = Processor(assembly)(images=[[*map(opened, sample.images)]], text=[prompt])
                model(None, inputs.batch)
                assert len(seen) == 3 and all(row == want for row in seen), (prompt, seen)
                seen.clear()
            if (template, len(sample.images)) != ("paligemma", 0):
                assert exported_row(assembly, encoder, len(sample.images), system) == want
        desk.close()


def opened(image: Any) -> Image.Image:
    return Image.open(io.BytesIO(image))


def test_several_layouts_are_told_and_the_usual_one_is_taken() -> None:
    cfg = JsonlConfig(path="a")
    seen = observe(
        Given(cfg, [*samples_of("head"), *samples_of("tail")[:1], *samples_of("front")[:1], Sample("t", (), (Text("a", "b"),))]), cfg
    )
    assert seen.asking == Asking("head", "\n", "\n")
    assert "in different places: images at the head of the prompt" in seen.line(IMAGE) and "(1 texts)" in seen.line(IMAGE)
    alike = observe(Given(cfg, samples_of("front")), cfg)
    assert alike.asking == Asking() and alike.line(IMAGE) == ""
    inside = Sample("s", PICTURES, (Text(f"is {IMAGE} like {IMAGE}?", "no"),))
    assert observe(Given(cfg, [inside] * 2), cfg).asking == Asking(together=2)
    assert observe(Given(cfg, [Sample("s", PICTURES[:1], (Text(f"{IMAGE} a", "b", leading=1),))]), cfg).asking == Asking("head")


def test_a_gap_that_is_there_is_not_made_twice_and_placeholders_count() -> None:
    asking = Asking("head", " ", "\n", "s")
    assert asking.text("\na", 1, IMAGE) == Text(f"{IMAGE}\na", "", system="s")
    assert asking.text(f"a{IMAGE}", 1, IMAGE) == Text(f"a{IMAGE}", "", system="s")
    assert asking.text("c", 2, IMAGE, [("a", f"b{IMAGE}")]) == Text(f"{IMAGE} {IMAGE}\na", "b", (("c", ""),), "s")
    assert Asking("tail", "", "\n").text("a\n", 1, IMAGE) == Text(f"a\n{IMAGE}", "")


def test_a_run_remembers_how_its_data_were(tmp_path: Path) -> None:
    path = make_job(tmp_path)
    found = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    write_rows(tmp_path / "train.jsonl", [{**row, "prompt": f"{row['prompt']}\n{IMAGE}"} for row in found])
    assert call("train", path, "--train.max_steps=1", "--eval.at_end=false").code == 0
    assert RunState.of(verify(resolve(tmp_path / "run"))).asked == Asking("tail", "", "\n")
    said = [call("generate", tmp_path / "run", tmp_path / "0.png", "--prompt", prompt) for prompt in ("what?", f"what?\n{IMAGE}")]
    assert said[0] == said[1] and said[0].code == 0
    out = call("inspect", path, "-n", "1", f"--data.eval_path={tmp_path}/test.jsonl")
    assert "a question without <image> is asked with images at the tail of the prompt" in out.out


def test_an_imported_language_model_is_asked_alike_and_by_its_chat_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``generate`` and the processor of ``load_pretrained`` read the text as the tokenizer of the source does; another template may be asked for."""
    family = FAMILIES["smollm2"]
    oracle = hf.PreTrainedTokenizerFast(
        tokenizer_object=bytes_level(family).backend, bos_token=family.bos, eos_token=family.eos, chat_template=family.template
    )
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 450}
    hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, max_position_embeddings=128)).save_pretrained(tmp_path / "theirs")
    oracle.save_pretrained(tmp_path / "theirs")
    import_model(tmp_path / "theirs", tmp_path / "run", verify=False)
    seen: list[list[int]] = []

    def tokens_of(_: object, batch: Any, **__: object) -> list[int]:
        seen.append(batch.input_ids[0].tolist())
        return []

    monkeypatch.setattr(inference, "tokens_of", tokens_of)
    TrainedModel.restore(tmp_path / "run").ask("what is it?", ()).finish()
    _, processor = load_pretrained(tmp_path / "run", device="cpu")
    assert seen.pop() == processor(text="what is it?").input_ids[0].tolist() == oracle("what is it?").input_ids
    TrainedModel.restore(tmp_path / "run", ["--data.template=chat"]).ask("what is it?", ()).finish()
    talk = [{"role": "user", "content": "what is it?"}]
    assert seen.pop() == oracle.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
