"""The golden audit: for every source and template, what is trained is exactly what the assistant says, and the token that ends it.

Files of each format are written here and read back as batches. What is trained is read from ``labels`` and nothing else; what ought to be is
told by the rows themselves, without the code under test.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from kempnerforge.config.data import DataConfig, HFDatasetConfig, JsonlConfig, TextConfig
from kempnerforge.data import IGNORE, Batch, Encoder, Layout, SampleError, Source, Tokenizer, build_source, collate
from kempnerforge.data.sources.captions import CaptionsConfig
from kempnerforge.data.sources.finevision import FineVisionConfig
from kempnerforge.data.sources.interleaved import InterleavedConfig
from kempnerforge.data.sources.llava import LlavaConfig
from kempnerforge.inspection.audit import audit
from tests.data.samples import png
from tests.data.text.chat_templates import FAMILIES, VICUNA_SYSTEM
from tests.data.text.test_template import CHATML_TURNS, VICUNA_TURNS

SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
PICTURES = {f"{k}.png": png((60 * k, 0, 0)) for k in range(4)}
CONVERSATIONS: list[tuple[int, list[tuple[str, str]]]] = [
    (1, [("what is this?", "a cat")]),
    (1, [("what is\nit?", "a dog."), ("and\n\nits colour?", "brown, mostly"), ("why?", "no one knows: it\nis")]),
    (3, [("which is red?", "the second one"), ("sure?", "yes")]),
    (0, [("2 + 2?", "4")]),
    (0, [("hi", "hello"), ("hi again", "<|im_end|></s> is no end")]),
]
"""Number of images, and (question, answer) of each turn."""
CAPTIONS = [("0.png", ["a red square", "nothing but red"]), ("1.png", ["darker red </s>"]), ("2.png", ["<image> is a name"])]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["what is this? a cat"], trainer)
    return Tokenizer(backend, eos="</s>", bos="<s>", chat_template=FAMILIES["smollm2"].template)


TEMPLATES: dict[str, dict[str, Any]] = {
    "prompt": {"prompt_template": "Q: {prompt}\nA:", "answer_template": " {answer}."},
    "chat": {"template": "chat"},
    "plain": {"template": "plain"},
    "paligemma": {"template": "paligemma"},
    "vicuna": {"template": "turns", "turns": VICUNA_TURNS, "system": VICUNA_SYSTEM},
    "chatml": {"template": "turns", "turns": CHATML_TURNS},
}
WRITTEN = {"prompt": " {}.", "plain": "{}\n", "vicuna": " {}"}
ENDS = {"chat": "<|im_end|>", "chatml": "<|im_end|>"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of each format, with pictures beside it."""
    folder = tmp_path_factory.mktemp("golden")
    for name, content in PICTURES.items():
        (folder / name).write_bytes(content)
    names = [list(PICTURES)[:count] for count, _ in CONVERSATIONS]
    llava: list[dict[str, Any]] = []
    for number, (count, turns) in enumerate(CONVERSATIONS):
        said = [{"from": who, "value": value} for turn in turns for who, value in zip(("human", "gpt"), turn, strict=True)]
        said[0]["value"] = "<image>\n" * count + said[0]["value"]
        row = {"id": f"c{number}", "conversations": said}
        llava.append(row | ({"image": names[number][0] if count == 1 else names[number]} if count else {}))
    (folder / "llava.json").write_text(json.dumps(llava, indent=1))
    (folder / "llava.jsonl").write_text("\n".join(map(json.dumps, llava)))
    texts = [
        {"image": name, "texts": [{"prompt": q, "answer": a} for q, a in turns]}
        for name, (_, turns) in zip(names, CONVERSATIONS, strict=True)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, texts)))
    (folder / "captions.jsonl").write_text("\n".join(json.dumps({"image": image, "caption": said}) for image, said in CAPTIONS))
    for suffix, delimiter in (("csv", ","), ("tsv", "\t")):
        with open(folder / f"captions.{suffix}", "w", newline="") as file:
            rows = [{"image": image, "first": said[0], "second": "".join(said[1:])} for image, said in CAPTIONS]
            writer = csv.DictWriter(file, ["image", "first", "second"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    documents = [
        {"text": "a <image> b <image> c", "images": ["0.png", "1.png"]},
        {"text": "<image>red", "images": ["2.png"]},
        {"text": "no picture", "images": []},
    ]
    (folder / "documents.jsonl").write_text("\n".join(map(json.dumps, documents)))
    (folder / "text.txt").write_text("some running text, all of it trained\n" * 3)
    return folder


@pytest.fixture(scope="module")
def datasets_folder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    hf = pytest.importorskip("datasets")
    hf.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    hf.disable_progress_bars()
    images = [[{"bytes": PICTURES[f"{k}.png"], "path": None} for k in range(count)] for count, _ in CONVERSATIONS]
    rated: dict[str, Any] = {f"{name}_ratings": [[5] * len(turns) for _, turns in CONVERSATIONS] for name in ("relevance", "formatting")}
    rated["relevance_ratings"][1][1] = 2
    rated["formatting_ratings"][2] = [None, 1]
    texts = [[{"user": q, "assistant": a} for q, a in turns] for _, turns in CONVERSATIONS]
    features = {"images": hf.List(hf.Image()), "texts": hf.List({"user": hf.Value("string"), "assistant": hf.Value("string")})}
    features |= {column: hf.List(hf.Value("int64")) for column in rated}
    hf.Dataset.from_dict({"images": images, "texts": texts} | rated, features=hf.Features(features)).save_to_disk(
        str(folder / "finevision")
    )
    pairs = [[{"prompt": q, "answer": a} for q, a in turns] for _, turns in CONVERSATIONS]
    features = {"image": hf.List(hf.Image()), "texts": hf.List({"prompt": hf.Value("string"), "answer": hf.Value("string")})}
    hf.Dataset.from_dict({"image": images, "texts": pairs}, features=hf.Features(features)).save_to_disk(str(folder / "rows"))
    table = {"image": [image for image, _ in CAPTIONS], "caption": [said for _, said in CAPTIONS]}
    hf.Dataset.from_dict(table).to_parquet(str(folder / "captions.parquet"))
    return folder


Expected = list[list[list[str]]]
"""What is trained: of each sample, of each of its texts, of each turn."""
SAID = [[answer for _, answer in turns] for _, turns in CONVERSATIONS]
AS_CONVERSATIONS: Expected = [[answers] for answers in SAID]
AS_TEXTS: Expected = [[[answer] for answer in answers] for answers in SAID]
AS_CAPTIONS: Expected = [[[caption] for caption in captions] for _, captions in CAPTIONS]
KEPT: Expected = [[SAID[0]], [[SAID[1][0], SAID[1][2]]], [SAID[2][:1]], [SAID[3]], [SAID[4]]]
FINEVISION = {"relevance_min_rating": 3, "formatting_min_rating": 2}

SOURCES: dict[str, tuple[Callable[..., DataConfig], str, dict[str, Any], Expected]] = {
    "llava list": (LlavaConfig, "llava.json", {}, AS_CONVERSATIONS),
    "llava lines": (LlavaConfig, "llava.jsonl", {"image_first": True}, AS_CONVERSATIONS),
    "jsonl": (JsonlConfig, "rows.jsonl", {"texts_column": "texts"}, AS_TEXTS),
    "hf_dataset": (HFDatasetConfig, "rows", {"texts_column": "texts"}, AS_TEXTS),
    "finevision": (FineVisionConfig, "finevision", FINEVISION, KEPT),
    "finevision inside": (FineVisionConfig, "finevision", FINEVISION | {"images_in_prompt": True}, KEPT),
    "captions jsonl": (CaptionsConfig, "captions.jsonl", {"prompt": "caption en"}, AS_CAPTIONS),
    "captions csv": (CaptionsConfig, "captions.csv", {"caption_columns": ["first", "second"]}, AS_CAPTIONS),
    "captions tsv": (CaptionsConfig, "captions.tsv", {"caption_columns": ["first", "second"]}, AS_CAPTIONS),
    "captions parquet": (CaptionsConfig, "captions.parquet", {}, AS_CAPTIONS),
}


def trained(batch: Batch) -> list[list[list[int]]]:
    """Of each row, the trained tokens of each text, in the order of the row: by ``labels`` and ``text_ids`` alone. Turns are one list."""
    rows = []
    for labels, owners in zip(batch.labels.tolist(), batch.text_ids.tolist(), strict=True):
        texts: dict[int, list[int]] = {}
        for position, label in enumerate(labels):
            if label != IGNORE:
                behind = owners[position + 1 : position + 2]
                texts.setdefault((behind and behind[0]) or owners[position], []).append(label)
        rows.append([texts[number] for number in sorted(texts)])
    return rows


def batch_of(source: Source, encoder: Encoder) -> Batch:
    return collate([encoder.encode(source[index], 0) for index in range(len(source))], encoder.tokenizer.pad_id, None)


def spell(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Text of ``ids`` with special tokens by name."""
    return tokenizer.backend.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("image_tokens", [3, 0])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", SOURCES)
def test_what_is_trained(name: str, template: str, image_tokens: int, datasets_folder: Path, tokenizer: Tokenizer) -> None:
    make, path, keys, expected = SOURCES[name]
    asked = {key: value for key, value in keys.items() if (template, key) != ("plain", "prompt")}  # which nothing would read
    cfg = make(path=str(datasets_folder / path), **asked, **TEMPLATES[template])
    source = build_source(cfg, "train")
    assert source is not None and len(source) == len(expected)
    encoder = Encoder(tokenizer, cfg, Layout(image_tokens, 8, 1000, 2000, 0), seed=0)
    if not encoder.texts[0].has_turns:
        for index, sample in enumerate(expected):
            if any(len(turns) > 1 for turns in sample):
                with pytest.raises(SampleError, match="turns, it writes one"):
                    encoder.encode(source[index], 0)
        whole = [index for index, sample in enumerate(expected) if all(len(turns) == 1 for turns in sample)]
        batch = collate([encoder.encode(source[index], 0) for index in whole], tokenizer.pad_id, None)
        expected = [expected[index] for index in whole]
    else:
        batch = batch_of(source, encoder)
    end, written = ENDS.get(template, "</s>"), WRITTEN.get(template, "{}")
    wanted = [["".join(written.format(answer) + end for answer in turns) for turns in sample] for sample in expected]
    found = trained(batch)
    assert [[spell(tokenizer, ids) for ids in texts] for texts in found] == wanted
    end_id = tokenizer.token_id(end)
    assert [[ids.count(end_id) for ids in texts] for texts in found] == [[len(turns) for turns in sample] for sample in expected]
    assert audit(batch, tokenizer.eos_id, ends=encoder.texts[0].ends) == []


def test_documents_are_trained_whole(folder: Path, tokenizer: Tokenizer) -> None:
    cfg = InterleavedConfig(path=str(folder / "documents.jsonl"))
    source = build_source(cfg, "train")
    assert source is not None
    encoder = Encoder(tokenizer, cfg, Layout(3, 8, 1000, 2000, 0), seed=0)
    batch = batch_of(source, encoder)
    assert [spell(tokenizer, texts[0]) for texts in trained(batch)] == ["a  b  c</s>", "red</s>", "no picture</s>"]
    assert audit(batch, tokenizer.eos_id) == []


def test_running_text_is_trained_whole(folder: Path, tokenizer: Tokenizer) -> None:
    cfg = TextConfig(path=str(folder / "text.txt"))
    source = build_source(cfg, "train", tokenizer, 16)
    assert source is not None
    encoder = Encoder(tokenizer, cfg, Layout(0, 0, 16, 16, 0), seed=0)
    found = [id_ for texts in trained(batch_of(source, encoder)) for ids in texts for id_ in ids]
    content = (folder / "text.txt").read_text()
    assert found == [*tokenizer.encode(content), tokenizer.eos_id][1:]


def test_every_source_is_in_the_audit() -> None:
    named = {make().source if make is DataConfig else make(path="x").source for make, *_ in SOURCES.values()} | {"interleaved", "text"}
    assert {"llava", "jsonl", "hf_dataset", "finevision", "captions", "interleaved", "text"} == named
