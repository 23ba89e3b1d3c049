"""Sources of files: what rows of each format mean, and the example configs."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kempnerforge.config import load_config
from kempnerforge.config.data import DataConfig, JsonlConfig, TextConfig
from kempnerforge.config.images import ImagesConfig
from kempnerforge.data import Encoder, Layout, Sample, SampleError, Source, Text, Tokenizer, collate
from kempnerforge.data.collections.openmoji import OpenMojiConfig
from kempnerforge.data.collections.probe import ProbeConfig
from kempnerforge.data.sources.captions import CaptionsConfig
from kempnerforge.data.sources.finevision import FineVisionConfig
from kempnerforge.data.sources.hf_stream import HFStreamConfig
from kempnerforge.data.sources.interleaved import InterleavedConfig
from kempnerforge.data.sources.llava import LlavaConfig
from kempnerforge.inspection.audit import audit
from tests.data.samples import built, png
from tests.dist import ROOT

CONFIGS = ROOT / "configs" / "data"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for k in range(4):
        (tmp_path / f"{k}.png").write_bytes(png((50 * k, 0, 0)))
    return tmp_path


def dump(path: Path, rows: list[Any]) -> str:
    path.write_text(json.dumps(rows, indent=1) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)))
    return str(path)


def reason(source: Source, index: int) -> str:
    with pytest.raises(SampleError) as error:
        source[index]
    return str(error.value)


# ---- LLaVA -----------------------------------------------------------------------------------------------------------------


def said(*values: str, roles: tuple[str, str] = ("human", "gpt"), keys: tuple[str, str] = ("from", "value")) -> list[dict[str, str]]:
    return [{keys[0]: roles[k % 2], keys[1]: value} for k, value in enumerate(values)]


def test_llava_rows(root: Path) -> None:
    system = {"from": "system", "value": "be brief"}
    rows = [
        {"id": "x", "image": "0.png", "conversations": said("<image>\na?", "b", "c?", "d")},
        {"image": ["0.png", "1.png"], "conversations": [system, *said("<image> or <image>?", "b")]},
        {"id": 7, "conversations": said("a?", "b")},
        {"messages": said("a?", "b", roles=("user", "assistant"), keys=("role", "content"))},
        {"conversations": said("left out", "a?", "b", "c?", roles=("gpt", "human"))},
        {"image": None, "conversations": said("a?", "b", "no one answers")},
    ]
    for name in ("rows.json", "rows.jsonl"):
        source = built(LlavaConfig(path=dump(root / name, rows)))
        assert [source[k].texts for k in range(6)] == [
            (Text("<image>\na?", "b", (("c?", "d"),)),),
            (Text("<image> or <image>?", "b", system="be brief"),),
            *[(Text("a?", "b"),)] * 4,
        ]
        assert [len(source[k].images) for k in range(6)] == [1, 2, 0, 0, 0, 0] == [source.num_images(k) for k in range(6)]
        assert [source[k].id for k in range(3)] == [f"{name}:1 (x)", f"{name}:2", f"{name}:3 (7)"]
        assert source[1].images == (root / "0.png", root / "1.png")
        assert source.length(0) > source.length(2) > 0


def test_llava_placeholders(root: Path) -> None:
    rows = [{"image": "0.png", "conversations": said("a\n<image>", "b", "c", "d")}, {"conversations": said(" a ", "b")}]
    path = dump(root / "rows.json", rows)
    assert built(LlavaConfig(path=path, image_placeholder="<|pic|>"))[0].texts[0].prompt == "a\n<|pic|>"
    first = built(LlavaConfig(path=path, image_first=True))
    assert [first[k].texts[0].prompt for k in range(2)] == ["<image>\na", " a "]


@pytest.mark.parametrize(
    ("conversations", "message"),
    [
        (None, "'conversations': is null"),
        (["a"], "must be a list"),
        ([], "no question with an answer"),
        (said("a?"), "no question with an answer"),
        ([{"from": "tool", "value": "a"}], '"tool" says something; known are human, user'),
        ([{"from": "human"}], "what 'human' says is null"),
        ([*said("a?"), *said("b?")], "do not alternate"),
    ],
)
def test_llava_conversations_that_are_skipped(root: Path, conversations: Any, message: str) -> None:
    good = {"conversations": said("a?", "b")}
    source = built(LlavaConfig(path=dump(root / "rows.json", [good, {"conversations": conversations}])))
    assert reason(source, 1).startswith("rows.json:2: ") and message in reason(source, 1)


def test_llava_files_that_are_refused(root: Path) -> None:
    with pytest.raises(ValueError, match="no column 'conversations' for data.source = 'llava'; columns: id"):
        built(LlavaConfig(path=dump(root / "rows.json", [{"id": 1}])))
    with pytest.raises(ValueError, match=r"data\.path = '.*nowhere.json': No such file"):
        built(LlavaConfig(path=str(root / "nowhere.json")))


# ---- FineVision ------------------------------------------------------------------------------------------------------------


def test_finevision_turns_by_their_ratings(hf: Any, tmp_path: Path) -> None:
    turns = [[("a", "b"), ("c", "d"), ("e", "f")], [("g", "h")], [("i", "j")]]
    rows = {
        "images": [[{"bytes": png((1, 0, 0)), "path": None}] * 2, [], [{"bytes": png((2, 0, 0)), "path": None}]],
        "texts": [[{"user": q, "assistant": a} for q, a in row] for row in turns],
        "relevance_ratings": [[5, 1, 3], [2], None],
        "formatting_ratings": [[5, 5, None], [None], [1]],
    }
    features = {"images": hf.List(hf.Image()), "texts": hf.List({"user": hf.Value("string"), "assistant": hf.Value("string")})}
    features |= {f"{name}_ratings": hf.List(hf.Value("int64")) for name in ("relevance", "formatting")}
    hf.Dataset.from_dict(rows, features=hf.Features(features)).save_to_disk(str(tmp_path / "set"))
    cfg = FineVisionConfig(path=str(tmp_path / "set"))
    everything = built(cfg)
    assert [everything[k].texts[0].turns for k in range(3)] == [tuple(row) for row in turns]
    assert [everything.num_images(k) for k in range(3)] == [2, 0, 1] and everything.length(0) == 6
    chosen = built(replace(cfg, relevance_min_rating=3, images_in_prompt=True))
    assert chosen[0].texts == (Text("a", "b", (("e", "f"),), leading=2),)
    assert "none of 1 turns is rated high enough" in reason(chosen, 1)
    assert chosen[2].texts == (Text("i", "j", leading=1),), "without ratings all stay"
    assert "rated high enough" in reason(built(replace(cfg, formatting_min_rating=2)), 2)
    with pytest.raises(ValueError, match="no column 'texts' for data.source = 'finevision', 'images' for .*; columns: answer"):
        hf.Dataset.from_dict({"answer": ["a"]}).save_to_disk(str(tmp_path / "other"))
        built(replace(cfg, path=str(tmp_path / "other")))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"texts": "a"}, "must be a list of {user, assistant} objects"),
        ({"texts": []}, "no turns"),
        ({"texts": [{"user": "a", "assistant": None}]}, "column 'assistant' is null"),
        ({"texts": [{"user": "a", "assistant": " "}]}, "empty answer"),
        ({"texts": [{"user": "a", "assistant": "b"}], "relevance_ratings": [1, 2]}, "must hold a rating for each of 1 turns"),
    ],
)
def test_finevision_rows_that_are_skipped(hf: Any, tmp_path: Path, row: dict[str, Any], message: str) -> None:
    texts = [[{"user": "a", "assistant": "b"}]]
    hf.Dataset.from_dict({"texts": texts, "images": [None]}).save_to_disk(str(tmp_path / "set"))
    source = built(FineVisionConfig(path=str(tmp_path / "set")))
    assert source[0].texts[0].answer == "b"
    source.row = lambda index: {"images": None} | row  # type: ignore[method-assign]
    assert message in reason(source, 0)


def test_finevision_of_older_versions(hf: Any, tmp_path: Path) -> None:
    hf.Dataset.from_dict({"texts": [{"user": ["a", "c"], "assistant": ["b", "d"]}], "images": [None]}).save_to_disk(str(tmp_path / "set"))
    assert built(FineVisionConfig(path=str(tmp_path / "set")))[0].texts[0].turns == (("a", "b"), ("c", "d"))


# ---- captions --------------------------------------------------------------------------------------------------------------


def test_captions_of_lists_and_columns(root: Path) -> None:
    rows = [
        {"image": "0.png", "caption": ["a", "", "b <image>"], "other": None},
        {"image": "1.png", "caption": "c", "other": "d"},
        {"image": "2.png", "caption": None, "other": " "},
        {"image": None, "caption": "a", "other": "b"},
        {"image": "3.png", "caption": ["a", {}], "other": "b"},
        {"image": "3.png"},
    ]
    for name in ("rows.json", "rows.jsonl"):
        source = built(CaptionsConfig(path=dump(root / name, rows), caption_columns=["caption", "other"], prompt="say"))
        assert source[0].texts == (Text("say", "a", leading=0), Text("say", "b <image>", leading=0))
        assert [text.answer for text in source[1].texts] == ["c", "d"] and source[1].images == (root / "1.png",)
        messages = [
            "no caption in 'caption', 'other'",
            "column 'image': no image",
            "column 'caption': must be a string, not dict",
            "no caption",
        ]
        for index, message in enumerate(messages, 2):
            assert message in reason(source, index)
    with pytest.raises(ValueError, match="no column 'text' for data.caption_columns; columns: caption, image, other"):
        built(CaptionsConfig(path=str(root / "rows.jsonl"), caption_columns=["caption", "text"]))


def test_captions_of_csv_and_tsv(root: Path) -> None:
    (root / "a.csv").write_bytes(b'\xef\xbb\xbfimage,caption\r\n0.png,"a ""cat"",\nasleep"\r\n\r\n1.png,\xc3\xa9t\xc3\xa9\r\n')
    source = built(CaptionsConfig(path=str(root / "a.csv")))
    assert [source[k].texts[0].answer for k in range(len(source))] == ['a "cat",\nasleep', "été"]
    assert [source[k].id for k in range(2)] == ["a.csv:1", "a.csv:3"] and source.num_images(0) == 1
    (root / "a.tsv").write_text('image\tcaption\n0.png\ta 5" plate\n1.png\t"quoted\n')
    source = built(CaptionsConfig(path=str(root / "a.tsv"), quotes=False))
    assert [source[k].texts[0].answer for k in range(2)] == ['a 5" plate', '"quoted']
    with pytest.raises(ValueError, match="a.tsv: row 2: a quote that is never closed"):
        built(CaptionsConfig(path=str(root / "a.tsv")))
    (root / "b.csv").write_bytes(b"image,caption\n0.png,a\n1.png\n2.png,\xff\n3.png,d,e\n0.png,b\n")
    with pytest.raises(ValueError, match="b.csv: 3 bad rows: row 2: 1 fields, 2 column names; row 3: not UTF-8: .*; row 4: 3 fields"):
        built(CaptionsConfig(path=str(root / "b.csv")))
    source = built(CaptionsConfig(path=str(root / "b.csv"), max_bad_fraction=0.9))
    assert [source[k].texts[0].answer for k in (0, 4)] == ["a", "b"] and "b.csv:3: cannot be read: not UTF-8" in reason(source, 2)


# ---- interleaved documents -----------------------------------------------------------------------------------------------


def document(root: Path, row: dict[str, Any], **keys: Any) -> Sample:
    return built(InterleavedConfig(path=dump(root / "rows.jsonl", [row]), **keys))[0]


def test_documents_with_a_token_for_images(root: Path) -> None:
    row = {"text": "a <img> b <img> c", "images": ["0.png", "1.png"]}
    sample = document(root, row, image_token="<img>")
    assert sample.texts == (Text("", "a <image> b <image> c"),) and sample.images == (root / "0.png", root / "1.png")
    assert document(root, row, image_token="<img>", max_images=1).texts[0].answer == "a <image> b  c"
    assert document(root, row, image_token="<img>", before_image="|").texts[0].answer == "a <image> b |<image> c"
    with pytest.raises(SampleError, match="2 of '<img>' and 1 images"):
        document(root, row | {"images": ["0.png"]}, image_token="<img>")
    with pytest.raises(SampleError, match="no text"):
        document(root, {"text": "<image>\n", "images": ["0.png"]})


def test_documents_of_obelics(root: Path) -> None:
    row = {"texts": ["a", None, "b", "c", None], "images": [None, "0.png", None, None, "1.png"]}
    assert document(root, row, form="lists", joiner="\n").texts[0].answer == "a<image>b\nc<image>"
    for change in ({"texts": ["a"]}, {"texts": ["a", "b", "b", "c", None]}, {"images": [None] * 5}, {"images": None}):
        with pytest.raises(SampleError, match="'texts' and 'images'"):
            document(root, row | change, form="lists")


def test_documents_of_mmc4(root: Path) -> None:
    info = [
        {"image_name": "0.png", "matched_text_index": 1, "matched_sim": 0.3},
        {"image_name": "1.png", "matched_text_index": 0, "matched_sim": 0.4},
        {"image_name": "2.png", "matched_text_index": 1, "matched_sim": 0.1},
    ]
    row = {"text_list": ["a.", "b.", "c."], "image_info": info}
    assert document(root, row, form="mmc4").texts[0].answer == "<image>a. <image><image>b. c."
    sample = document(root, row, form="mmc4", min_similarity=0.24, before_image="<e>", answer_template="{answer}<e>")
    assert sample.texts[0].answer == "<image>a. <e><image>b. c." and sample.images == (root / "1.png", root / "0.png")
    assert document(root, row, form="mmc4", max_images=1).images == (root / "1.png",)
    for change in ({"text_list": "a"}, {"image_info": [{"matched_text_index": 3}]}, {"image_info": [{"matched_text_index": 0}]}):
        with pytest.raises(SampleError, match=r"'text_list'|matched_text_index = 3|an image is missing"):
            document(root, row | change, form="mmc4")


def test_documents_have_no_turns(root: Path) -> None:
    with pytest.raises(ValueError, match="template = 'chat': a document has no turns"):
        InterleavedConfig(path="x", template="chat")
    with pytest.raises(ValueError, match="min_similarity = 0.5: only form = 'mmc4' reads it"):
        InterleavedConfig(path="x", min_similarity=0.5)
    with pytest.raises(ValueError, match="no column 'images' for data.form = 'lists'; columns: texts"):
        document(root, {"texts": ["a"]}, form="lists")


# ---- the example configs ---------------------------------------------------------------------------------------------------

ROWS: dict[str, tuple[str, Any]] = {
    "llava": ("rows.json", [{"id": "0", "image": "0.png", "conversations": said("<image>\nWhat is it?", "A cat.", "Why?", "So.")}]),
    "captions": ("rows.jsonl", [{"image": "0.png", "caption": "A cat, asleep.", "alternative": "A sleeping cat"}]),
    "interleaved": ("rows.jsonl", [{"text": "A cat. <image> It sleeps: <image>", "images": ["0.png", "1.png"]}]),
    "jsonl": ("rows.jsonl", [{"image": "0.png", "texts": [{"prompt": "What is it?", "answer": "A cat."}, {"answer": "a sleeping cat"}]}]),
    "text": ("rows.txt", ["It was a dark night."]),
    "finevision": (
        "",
        {"images": [[{"bytes": png((1, 0, 0)), "path": None}]], "texts": [[{"user": "What is it?", "assistant": "A cat."}]]},
    ),
    "hf_dataset": ("", {"image": [{"bytes": png((1, 0, 0)), "path": None}], "question": ["What is it?"], "answer": ["A cat."]}),
}


@pytest.mark.parametrize("name", ROWS)
def test_example_configs(name: str, root: Path, hf: Any) -> None:
    job = load_config(CONFIGS / f"{name}.toml")
    assert job.data.source == name
    file, rows = ROWS[name]
    path = root / (file or "set")
    if file:
        dump(path, rows)
    else:
        features = hf.Dataset.from_dict(rows).features
        if name == "hf_dataset":
            features["image"] = hf.Image()
        table = hf.Dataset.from_dict(rows, features=features)
        hf.DatasetDict({"train": table, "validation": table}).save_to_disk(str(path))
    cfg = replace(job.data, path=str(path), **({} if name == "text" else {"root": str(root)}))  # type: ignore[arg-type]
    source = built(cfg)
    tokenizer = Tokenizer.train(source.corpus(), 400)
    tokenizer.add_tokens(job.model.new_tokens)
    source = source.tokenised(tokenizer, 32)
    encoder = Encoder(tokenizer, cfg, Layout(2, 8 if job.vlm else 0, 400, 512, 0), seed=0)
    batch = collate([encoder.encode(source[0], 0)], 0, None)
    assert batch.num_targets > 0 and audit(batch, tokenizer.eos_id, ends=encoder.texts[0].ends) == []


# ---- options that nothing would read ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "keys", "key", "reader"),
    [
        (CaptionsConfig, {"path": "a.json", "quotes": False}, "quotes = False", "a CSV or TSV file"),
        (CaptionsConfig, {"path": "a.parquet", "quotes": False}, "quotes = False", "a CSV or TSV file"),
        (CaptionsConfig, {"path": "a.csv", "split": "val"}, "split = 'val'", "a dataset"),
        (CaptionsConfig, {"path": "a", "eval_path": "b.tsv", "eval_split": "val"}, "eval_split = 'val'", "a dataset"),
        (CaptionsConfig, {"path": "a.csv", "prompt": "say", "template": "plain"}, "prompt = 'say'", "a template other than 'plain'"),
        (InterleavedConfig, {"path": "a.jsonl", "split": "val"}, "split = 'val'", "a dataset"),
        (InterleavedConfig, {"path": "a", "form": "lists", "image_token": "<i>"}, "image_token = '<i>'", "form = 'text'"),
        (InterleavedConfig, {"path": "a", "joiner": "|"}, "joiner = '|'", "form = 'lists' or 'mmc4'"),
        (InterleavedConfig, {"path": "a", "before_image": "|", "max_images": 1}, "before_image = '|'", "max_images = 0 or 2"),
        (JsonlConfig, {"path": "a", "texts_column": "t", "prompt_column": "q"}, "prompt_column = 'q'", "texts_column = ''"),
        (JsonlConfig, {"path": "a", "texts_column": "t", "answer_column": "b"}, "answer_column = 'b'", "texts_column = ''"),
        (
            TextConfig,
            {"path": "a", "answer_template": "{answer}!"},
            "answer_template = '{answer}!'",
            "a source of prompts, answers and images",
        ),
        (TextConfig, {"path": "a", "truncate": True}, "truncate = True", "a source of prompts, answers and images"),
        (TextConfig, {"path": "a", "images": ImagesConfig(fit="crop")}, "images", "a source of prompts, answers and images"),
        (HFStreamConfig, {"path": "a", "eval_num_samples": 3}, "eval_num_samples = 3", "a job with eval_path or eval_split"),
        (OpenMojiConfig, {"held_out_every": 5}, "held_out_every = 5", "eval_on = 'names'"),
        (ProbeConfig, {"reading": "words", "reading_length": 5}, "reading_length = 5", "reading = 'digits' or 'letters'"),
    ],
)
def test_an_option_that_nothing_reads_is_refused(cls: type[DataConfig], keys: dict[str, Any], key: str, reader: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(f'{key}: only {reader}')}.* reads it$"):
        cls(**keys)


def test_options_that_something_reads_are_not_refused(tmp_path: Path) -> None:
    (tmp_path / "set.json").mkdir()
    CaptionsConfig(path="a.jsonl", eval_path="b.CSV", quotes=False)
    CaptionsConfig(path="a.jsonl", eval_path="b", split="val")  # of b
    CaptionsConfig(path="a.jsonl", eval_path="b", eval_split="val")
    CaptionsConfig(path=str(tmp_path / "set.json"), split="val")
    InterleavedConfig(path="a", form="mmc4", joiner="|", before_image="|", max_images=2)
    JsonlConfig(path="a", texts_column="t", answer_column="")


def test_the_message_names_the_file_and_a_stage_of_text_drops_what_it_does_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('[data]\nsource = "captions"\npath = "a.json"\nquotes = false\n[train]\nmax_steps = 1\n')
    with pytest.raises(ValueError, match=r"a\.toml: \[data\] quotes = False: only a CSV or TSV file"):
        load_config(tmp_path / "a.toml")
    job = load_config(
        None, ["--data.source=jsonl", "--data.path=a", "--data.truncate=true", '--stages=[{name="t",steps=1,data={source="text"}}]']
    )
    assert [stage.data.truncate for stage in job.resolved_stages()] == [False]
