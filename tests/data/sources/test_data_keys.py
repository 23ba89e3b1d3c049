"""Any key of any row is read or reported, for every source; texts stay as they are written; nulls, types and pictures by their meaning."""

from __future__ import annotations

import base64
import copy
import csv
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kempnerforge.config import registry
from kempnerforge.config.data import DataConfig, HFDatasetConfig, JsonlConfig
from kempnerforge.data import SampleError, Source, Text
from kempnerforge.data.sources.captions import CaptionsConfig
from kempnerforge.data.sources.finevision import FineVisionConfig
from kempnerforge.data.sources.hf_stream import HFStreamConfig
from kempnerforge.data.sources.interleaved import InterleavedConfig
from kempnerforge.data.sources.llava import LlavaConfig
from kempnerforge.data.sources.mixture import MixtureConfig
from kempnerforge.data.sources.pictures import resolve_image
from kempnerforge.data.sources.webdataset import WebDatasetConfig
from kempnerforge.inspection.remarks import Remarks
from tests.data.samples import built, png

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
datasets = pytest.importorskip("datasets")
RED = png((200, 0, 0))
SLOW = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    (tmp_path / "0.png").write_bytes(RED)


# ---- how rows are written ------------------------------------------------------------------------------------------------


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def table(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


def tar(path: Path, rows: list[dict[str, Any]]) -> None:
    with tarfile.open(path, "w") as file:
        for number, row in enumerate(rows):
            for name, value in row.items():
                content = value if isinstance(value, bytes) else (value if name == "txt" else json.dumps(value)).encode()
                member = tarfile.TarInfo(f"{number:03}.{name}")
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], None]] = {
    "jsonl": lines,
    "json": lambda path, rows: path.write_text(json.dumps(rows), encoding="utf-8") and None,
    "csv": table,
    "tsv": table,
    "parquet": parquet,
    "tar": tar,
}
FLAT = {"image": "0.png", "question": "q?", "response": "a"}
TEXTS = {"images": ["0.png"], "texts": [{"instruction": "q?", "output": "a"}]}
TALK = {"id": "x", "image": "0.png", "conversations": [{"from": "human", "value": "q?"}, {"from": "gpt", "value": "a"}]}
MESSAGES = {
    "image": "0.png",
    "messages": [{"role": "user", "content": [{"type": "text", "text": "q?"}]}, {"role": "assistant", "content": "a"}],
}
FINE = {"images": ["0.png"], "texts": [{"user": "q?", "assistant": "a"}], "source": "x", "relevance_ratings": [5]}
MMC4 = {"text_list": ["a"], "image_info": [{"image_name": "0.png", "matched_text_index": 0, "raw_url": "u"}], "url": "u"}
ROWS: dict[str, tuple[type[DataConfig], dict[str, Any], str, dict[str, Any], list[tuple[Any, ...]]]] = {
    "jsonl, flat": (JsonlConfig, {}, "jsonl", FLAT, [()]),
    "jsonl, texts": (JsonlConfig, {}, "jsonl", TEXTS, [(), ("texts", 0)]),
    "jsonl, content": (
        JsonlConfig, {}, "jsonl", {"image": None, "prompt": [{"type": "text", "text": "q?"}], "answer": "a"}, [(), ("prompt", 0)]
    ),
    "hf_dataset, csv": (HFDatasetConfig, {}, "csv", FLAT, [()]),
    "hf_dataset, tsv": (HFDatasetConfig, {}, "tsv", FLAT, [()]),
    "hf_dataset, json": (HFDatasetConfig, {}, "json", TEXTS, [(), ("texts", 0)]),
    "hf_dataset, parquet": (HFDatasetConfig, {}, "parquet", TEXTS, [(), ("texts", 0)]),
    "hf_stream, parquet": (HFStreamConfig, {}, "parquet", TEXTS, [(), ("texts", 0)]),
    "hf_stream, jsonl": (HFStreamConfig, {"num_samples": 3}, "jsonl", TEXTS, [(), ("texts", 0)]),
    "captions, csv": (CaptionsConfig, {}, "csv", {"image": "0.png", "caption": "a", "image_id": "1"}, [()]),
    "captions, json": (CaptionsConfig, {}, "json", {"image": "0.png", "text": "a"}, [()]),
    "captions, parquet": (CaptionsConfig, {}, "parquet", {"image": "0.png", "captions": ["a"]}, [()]),
    "llava": (LlavaConfig, {}, "json", TALK, [(), ("conversations", 1)]),
    "llava, messages": (LlavaConfig, {}, "jsonl", MESSAGES, [(), ("messages", 0), ("messages", 0, "content", 0)]),
    "finevision": (FineVisionConfig, {}, "parquet", FINE, [(), ("texts", 0)]),
    "finevision, jsonl": (FineVisionConfig, {}, "jsonl", FINE, [(), ("texts", 0)]),
    "interleaved": (InterleavedConfig, {}, "jsonl", {"text": "a <image>", "images": ["0.png"]}, [()]),
    "interleaved, lists": (InterleavedConfig, {"form": "lists"}, "parquet", {"texts": ["a", None], "images": [None, "0.png"]}, [()]),
    "interleaved, mmc4": (InterleavedConfig, {"form": "mmc4"}, "json", MMC4, [(), ("image_info", 0)]),
    "webdataset": (WebDatasetConfig, {}, "tar", {"txt": "a", "png": RED, "json": {"url": "u"}}, [(), ("json",)]),
    "webdataset, texts": (
        WebDatasetConfig, {"texts_column": "json.texts", "answer_column": ""}, "tar", {"png": RED, "json": {"texts": TEXTS["texts"]}},
        [(), ("json",), ("json", "texts", 0)],
    ),
}  # fmt: skip
MADE = {"easy_vqa", "digits", "openmoji", "stamps", "probe", "text"}
"""Sources without rows of the user's."""


def at(row: Any, place: tuple[Any, ...]) -> Any:
    for step in place:
        row = row[step]
    return row


def dotted(place: tuple[Any, ...], key: str) -> str:
    return ".".join([step for step in place if isinstance(step, str)] + [key])


def test_every_source_is_in_the_table() -> None:
    registry.sources.import_all()
    there = {cfg.source for cfg, *_ in ROWS.values()} | MADE | {"mixture", "picture_codes"}
    own = {name for name in registry.sources if registry.sources.get(name).__module__.startswith("kempnerforge.")}
    assert own == there


@pytest.mark.parametrize("name", ROWS)
def test_any_key_is_read_or_reported(name: str, tmp_path: Path) -> None:
    make, keys, kind, row, places = ROWS[name]
    path = tmp_path / f"rows.{kind}"
    cfg = lambda **more: make(path=str(path), root="" if kind == "tar" else str(tmp_path), **keys, **more)  # type: ignore[call-arg]
    WRITERS[kind](path, [row] * 3)
    source = built(cfg())
    first = source[0]
    assert len(source) == 3 and len(first.images) == (1 if row.get("image", row) is not None else 0)
    assert "a" in str(first.texts[0].turns[0][1]) and ("q?" in first.texts[0].prompt or "q?" not in json.dumps(row, default=repr))
    for place in places:
        changed = [copy.deepcopy(row) for _ in range(3)]
        at(changed[1], place)["anwser"] = "x"
        if kind in ("csv", "tsv", "parquet"):  # whose rows all have the same columns
            changed = [changed[1]] * 3
        WRITERS[kind](path, changed)
        with pytest.raises(ValueError) as error:
            built(cfg())
        assert f'"{dotted(place, "anwser")}" is read by nothing' in str(error.value) and path.name in str(error.value)
        assert "data.ignore_columns" in str(error.value) and len(str(error.value)) < 700
        for pattern in (dotted(place, "anwser"), "*anw*"):
            assert built(cfg(ignore_columns=[pattern]))[0].texts == first.texts
        part = MixtureConfig(parts=[cfg(), cfg()])
        with pytest.raises(ValueError, match=r"data.parts\[0\]: .*anwser"):
            built(part)


TALKED = {"conversations": [{"from": "human", "value": "q?"}, {"from": "gpt", "value": "a"}]}
CARRIED: dict[str, tuple[type[DataConfig], str, dict[str, Any], str]] = {
    "llava": (LlavaConfig, "json", {"image": "0.png", **TALKED}, "model source data_source split url width height question_id image_id"),
    "internvl": (LlavaConfig, "jsonl", {"image": ["0.png"], **TALKED}, "width_list height_list"),
    "karpathy": (CaptionsConfig, "json", {"image": "0.png", "caption": ["a", "b"]}, "split filename filepath imgid cocoid sentids"),
    "coco": (CaptionsConfig, "json", {"image": "0.png", "caption": "a"}, "image_id file_name license coco_url height width"),
    "laion": (CaptionsConfig, "parquet", {"image": RED, "caption": "a"}, "url key status similarity NSFW LICENSE punsafe sha256 exif"),
    "cauldron": (FineVisionConfig, "parquet", {"images": [RED], "texts": [{"user": "q?", "assistant": "a", "source": "TQA"}]}, "source"),
}


@pytest.mark.parametrize("name", CARRIED)
def test_metadata_of_a_format_are_known_to_its_source(name: str, tmp_path: Path) -> None:
    make, extension, row, carried = CARRIED[name]
    path = tmp_path / f"rows.{extension}"
    WRITERS[extension](path, [row | dict.fromkeys(("id", *carried.split()), "7")])
    (sample,) = built(make(path=str(path)))
    assert sample.texts[0].answer == "a" and len(sample.images) == 1


def test_metadata_in_json_members_are_known(tmp_path: Path) -> None:
    tar(tmp_path / "rows.tar", [{"png": RED, "txt": "a", "json": dict.fromkeys(("url", "similarity", "punsafe", "hash", "caption"), "7")}])
    assert built(WebDatasetConfig(path=str(tmp_path / "rows.tar")))[0].texts[0].answer == "a"


def test_the_system_prompt_of_a_row_is_read(tmp_path: Path) -> None:
    turns = [{"from": "system", "value": "2"}, *TALKED["conversations"]]
    lines(tmp_path / "rows.jsonl", [{"system": said, "conversations": turns} for said in ("1", "", None)])
    assert [sample.texts[0].system for sample in built(LlavaConfig(path=str(tmp_path / "rows.jsonl")))] == ["1\n2", "2", "2"]


def test_advice_is_given_once(tmp_path: Path) -> None:
    lines(tmp_path / "rows.jsonl", [{"image": None, "question": "q?", "answer": "a", "caption": "c"}])
    with pytest.raises(ValueError, match="'answer' and 'caption' could each be") as refused:
        built(JsonlConfig(path=str(tmp_path / "rows.jsonl")))
    assert str(refused.value).count("data.ignore_columns") == 1


def test_the_nearest_key_is_named_and_sources_that_read_it(tmp_path: Path) -> None:
    lines(tmp_path / "rows.jsonl", [{"image": None, "questoin": "q", "answer": "a"}])
    with pytest.raises(ValueError, match="line 1: key \"questoin\" is read by nothing .nearest is 'question'."):
        built(JsonlConfig(path=str(tmp_path / "rows.jsonl")))
    lines(tmp_path / "rows.jsonl", [TALK | {"answer": "a"}] * 4)
    with pytest.raises(ValueError, match=r"data.source = 'llava' reads conversations\) \(4 times\)"):
        built(JsonlConfig(path=str(tmp_path / "rows.jsonl")))


def test_a_later_row_of_a_stream_with_an_unknown_key_is_an_unusable_sample(tmp_path: Path) -> None:
    lines(tmp_path / "rows.jsonl", [{"image": None, "answer": "a"}] * 100 + [{"image": None, "answer": "a", "weight": 1}])
    source = built(HFStreamConfig(path=str(tmp_path / "rows.jsonl"), num_samples=101))
    assert source[99].texts[0].answer == "a"
    with pytest.raises(SampleError, match='key "weight" is read by nothing'):
        source[100]


# ---- usual names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"question": "q", "answer": "a"}, "q", "a"),
        ({"instruction": "do", "input": "it", "output": "a"}, "do\nit", "a"),
        ({"instruction": "do", "input": "", "output": "a"}, "do", "a"),
        ({"input": "q", "response": "a"}, "q", "a"),
        ({"caption": "a"}, "", "a"),
        ({"prompt": "q", "question": None, "text": "a"}, "q", "a"),
    ],
)
def test_usual_names(row: dict[str, Any], prompt: str, answer: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for found in (row, {"texts": [row]}):
        lines(path, [{"image": None} | found])
        assert [(t.prompt, t.answer) for t in built(JsonlConfig(path=str(path)))[0].texts] == [(prompt, answer)]


@pytest.mark.parametrize("row", [{"answer": "a", "caption": "b"}, {"prompt": "a", "question": "b", "answer": "c"}])
def test_several_candidates_are_named(row: dict[str, Any], tmp_path: Path) -> None:
    path, names = tmp_path / "rows.jsonl", list(row)[:2]
    for found, above in ((row, ""), ({"texts": [row]}, "texts.")):
        lines(path, [{"image": None} | found])
        with pytest.raises(ValueError, match=f"'{above}{names[0]}' and '{above}{names[1]}' could each be the"):
            built(JsonlConfig(path=str(path)))
        assert built(JsonlConfig(path=str(path), ignore_columns=[above + names[0]]))[0].texts[0].turns[0][names[0] == "answer"] == "b"


def test_a_prompt_that_one_row_lacks(tmp_path: Path) -> None:
    lines(tmp_path / "rows.jsonl", [{"image": None, "prompt": "q", "answer": "a"}, {"image": None, "answer": "a"}])
    with pytest.raises(ValueError, match="1 of 2 rows have no column 'prompt'; write \"\" for a row without a prompt"):
        built(JsonlConfig(path=str(tmp_path / "rows.jsonl")))


# ---- null -------------------------------------------------------------------------------------------------------------------


def llava_row(**keys: Any) -> dict[str, Any]:
    return {"conversations": TALK["conversations"], **keys}


def test_null_beside_images(tmp_path: Path) -> None:
    rows = [llava_row(image=None, images=["0.png"]), llava_row(image="0.png", images=None), llava_row(images=["0.png", None])]
    lines(tmp_path / "a.jsonl", rows)
    source = built(LlavaConfig(path=str(tmp_path / "a.jsonl")))
    assert [len(source[k].images) for k in range(2)] == [1, 1] == [source.num_images(k) for k in range(2)]
    with pytest.raises(SampleError, match="'images': image 2 of 2 is null"):
        source[2]
    lines(tmp_path / "a.jsonl", [llava_row(image="0.png", images=["0.png"])])
    with pytest.raises(ValueError, match="'image' and 'images' are both there"):
        built(LlavaConfig(path=str(tmp_path / "a.jsonl")))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "answer": None}, "'answer' is null"),
        ({"prompt": None, "answer": "a"}, "'prompt' is null"),
        ({"prompt": "q", "answer": ["a", None]}, "'answer' is null"),
        ({"prompt": "q", "answer": []}, "empty list"),
    ],
)
def test_nulls_are_named(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    lines(tmp_path / "a.jsonl", [{"image": None} | row])
    with pytest.raises(SampleError, match=message):
        built(JsonlConfig(path=str(tmp_path / "a.jsonl")))[0]


# ---- text stays text --------------------------------------------------------------------------------------------------------

SPECIAL = ["None", "NA", "NaN", "null", "007", "1.0", "1e5", "2020-01-01", "TRUE", "true", "12", " x ", "a,b", 'say "x"', "a\tb", "-0", "é"]
WORDS = st.sampled_from(SPECIAL) | st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n"), min_size=1).filter(str.strip)
FORMATS: dict[str, tuple[type[DataConfig], dict[str, Any], str, Callable[[str], dict[str, Any]]]] = {
    **{
        f"hf_dataset.{kind}": (HFDatasetConfig, {}, kind, lambda text: {"image": "", "prompt": text, "answer": text})
        for kind in ("csv", "tsv", "json", "jsonl", "parquet")
    },
    **{
        f"captions.{kind}": (CaptionsConfig, {}, kind, lambda text: {"image": "0.png", "caption": text})
        for kind in ("csv", "tsv", "json", "parquet")
    },
    **{
        f"hf_stream.{kind}": (HFStreamConfig, {"num_samples": 3}, kind, lambda text: {"image": None, "answer": text})
        for kind in ("jsonl", "parquet")
    },
    "jsonl": (JsonlConfig, {}, "jsonl", lambda text: {"image": None, "answer": text}),
    "llava": (LlavaConfig, {}, "json", lambda text: {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": text}]}),
    "finevision": (FineVisionConfig, {}, "json", lambda text: {"images": [], "texts": [{"user": "q", "assistant": text}]}),
    "interleaved": (InterleavedConfig, {"image_token": "<<>>"}, "jsonl", lambda text: {"text": text, "images": []}),
    "webdataset.txt": (WebDatasetConfig, {}, "tar", lambda text: {"txt": text, "png": RED}),
    "webdataset.json": (WebDatasetConfig, {"answer_column": "json.a"}, "tar", lambda text: {"json": {"a": text}, "png": RED}),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
@given(words=st.lists(WORDS, min_size=3, max_size=3))
@SLOW
def test_text_stays_text(name: str, words: list[str], tmp_path: Path) -> None:
    make, keys, kind, row = FORMATS[name]
    path = tmp_path / f"rows.{kind}"
    WRITERS[kind](path, [row(word) for word in words])
    text_only = {"image_column": "", "ignore_columns": ["image"]} if name.startswith("hf_dataset") else {}
    source = built(make(path=str(path), **keys, **text_only))  # type: ignore[call-arg]
    found = [source[k].texts[0].turns[-1] for k in range(3)]
    assert [answer for _, answer in found] == words and all(type(answer) is str for _, answer in found)
    if name.startswith("hf_dataset"):
        assert [prompt for prompt, _ in found] == words


def test_numbers_are_taken_as_written_and_said(tmp_path: Path) -> None:
    written = ["3", "1e5", "0.10", "-7", "true", "12345678901234567890123"]
    content = "".join(f'{{"image": null, "prompt": "q", "answer": {value}}}\n' for value in written)
    (tmp_path / "a.jsonl").write_text(content + '{"image": null, "prompt": "q", "answer": NaN}\n')
    source, remarks = built(JsonlConfig(path=str(tmp_path / "a.jsonl"))), Remarks()
    assert [source[k].texts[0].answer for k in range(6)] == written
    for k in range(6):
        remarks.add(source[k], True)
    said = "\n".join(remarks.lines())
    assert (
        '5 values are a number: taken as text, the first as "3"' in said and "1 values are a boolean" in said and 'the prompt "q"' in said
    )
    with pytest.raises(SampleError, match="NaN"):
        source[6]


def test_turns_without_a_partner_are_remarked(tmp_path: Path) -> None:
    """LLaVA's files have answers before the first question and questions after the last answer; neither can be trained."""
    turns = [("gpt", "hello"), ("human", "q?"), ("gpt", "a"), ("human", "and?")]
    lines(tmp_path / "rows.jsonl", [{"conversations": [{"from": role, "value": value} for role, value in turns]}, TALKED])
    source, remarks = built(LlavaConfig(path=str(tmp_path / "rows.jsonl"))), Remarks()
    for k in range(2):
        remarks.add(source[k], True)
    assert source[0].texts[0].turns == (("q?", "a"),)
    (said,) = [line for line in remarks.lines() if "turns" in line]
    assert said.startswith("2 turns of conversations are left out") and said.endswith('the first is "hello"')


def test_several_answers(tmp_path: Path) -> None:
    lines(tmp_path / "a.jsonl", [{"image": None, "question": "q", "answers": ["four", 4, "four", "IV"]}])
    (text,) = built(JsonlConfig(path=str(tmp_path / "a.jsonl")))[0].texts
    assert text == Text("q", "four") and text.references == ("4", "four", "IV") and text.listed
    lines(tmp_path / "a.jsonl", [{"image": "0.png", "caption": ["a", "b"]}])
    assert [t.answer for t in built(CaptionsConfig(path=str(tmp_path / "a.jsonl")))[0].texts] == ["a", "b"], "captions are all trained"


# ---- twice, and shards ------------------------------------------------------------------------------------------------------


def test_a_key_that_is_there_twice(tmp_path: Path) -> None:
    twice = '{"image": null, "answer": "a", "answer": "b"}\n'
    (tmp_path / "a.jsonl").write_text(twice)
    (tmp_path / "b.json").write_text('[{"image": null, "texts": [{"answer": "a", "answer": "b"}]}]')
    (tmp_path / "c.csv").write_text("image,answer,answer\n0.png,a,b\n")
    pq.write_table(pa.table([["0.png"], ["a"], ["b"]], names=["image", "answer", "answer"]), tmp_path / "d.parquet")
    for cfg in (
        JsonlConfig(path=str(tmp_path / "a.jsonl")),
        HFDatasetConfig(path=str(tmp_path / "b.json")),
        HFDatasetConfig(path=str(tmp_path / "c.csv")),
        HFDatasetConfig(path=str(tmp_path / "d.parquet")),
        HFStreamConfig(path=str(tmp_path / "d.parquet")),
    ):
        with pytest.raises(ValueError, match='"answer".* twice'):
            built(cfg)


def shards(folder: Path, *answers: Any, images: tuple[Any, ...] = ()) -> HFStreamConfig:
    for number, column in enumerate(answers):
        image = images[number] if images else pa.array([{"bytes": RED, "path": None}] * len(column))
        pq.write_table(pa.table({"image": image, "answer": column}), folder / f"train-{number}.parquet")
    return HFStreamConfig(path=f"{folder}/train-*.parquet")


def test_shards_of_other_types_serve_every_row(tmp_path: Path) -> None:
    words = [f"red {k}" for k in range(70)]
    kinds = [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.string_view()]
    order = [
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        pa.struct([("path", pa.large_string()), ("bytes", pa.large_binary())]),
    ]
    images = tuple(pa.array([{"bytes": RED, "path": None}] * 70, type=order[k % 2]) for k in range(3))
    source = built(shards(tmp_path, *(pa.array(words, type=pa.string()).cast(kind) for kind in kinds[:3]), images=images))
    assert [source[k].texts[0].answer for k in range(len(source))] == words * 3 and source[100].images == (RED,)
    source = built(shards(tmp_path, *(pa.array(range(70), type=kind) for kind in (pa.int32(), pa.int64(), pa.uint8()))))
    assert [source[k].texts[0].answer for k in range(len(source))] == [str(k) for k in range(70)] * 3


@pytest.mark.parametrize("other", [pa.array([1]), pa.array([["a"]]), pa.array([True])])
def test_shards_that_do_not_go_together_are_named(tmp_path: Path, other: Any) -> None:
    with pytest.raises(
        ValueError, match=f'column "answer" is string in .*train-0.parquet and {str(other.type)[:4]}.* in .*train-1.parquet'
    ):
        built(shards(tmp_path, pa.array(["a"]), other))


def test_a_column_that_one_shard_lacks(tmp_path: Path) -> None:
    cfg = shards(tmp_path, pa.array(["a"]), pa.array(["b"]))
    pq.write_table(pa.table({"image": pa.array([None], pa.string())}), tmp_path / "train-1.parquet")
    with pytest.raises(ValueError, match='train-1.parquet has no column "answer", which .*train-0.parquet has'):
        built(cfg)


@pytest.mark.parametrize("make", [HFDatasetConfig, HFStreamConfig])
def test_class_labels_are_names(make: type, tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Value("string"), "answer": datasets.ClassLabel(names=["cat", "dog"])})
    table = datasets.Dataset.from_dict({"image": [None] * 3, "answer": [1, 0, -1]}, features=features)
    table.to_parquet(str(tmp_path / "a.parquet"))
    source = built(make(path=str(tmp_path / "a.parquet")))
    assert [source[k].texts[0].answer for k in range(2)] == ["dog", "cat"]
    with pytest.raises(SampleError, match="'answer' is null"):
        source[2]


# ---- pictures --------------------------------------------------------------------------------------------------------------


def test_content_lists_have_images_at_their_places(tmp_path: Path) -> None:
    url = "data:image/png;base64," + base64.b64encode(RED).decode()
    content = [
        {"type": "text", "text": "is "},
        {"type": "image_url", "image_url": {"url": url, "detail": "low"}},
        {"type": "text", "text": " like "},
        {"type": "image", "image": "0.png"},
        {"type": "text", "text": "?"},
    ]
    (tmp_path / "talk").mkdir()
    lines(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]}])
    sample = built(LlavaConfig(path=str(tmp_path / "a.jsonl"), image_token="<pic>"))[0]
    assert sample.texts == (Text("is <image> like <image>?", "yes"),) and sample.images == (RED, tmp_path / "0.png")
    lines(tmp_path / "a.jsonl", [{"prompt": content, "answer": "yes"}])
    assert built(JsonlConfig(path=str(tmp_path / "a.jsonl"), image_column=""))[0].images == sample.images
    marks = [{"type": "image"}, {"type": "text", "text": "what?"}]
    lines(
        tmp_path / "a.jsonl",
        [{"images": ["0.png"], "messages": [{"role": "user", "content": marks}, {"role": "assistant", "content": "a"}]}],
    )
    assert built(LlavaConfig(path=str(tmp_path / "a.jsonl")))[0].texts[0].prompt == "<image>what?"
    lines(
        tmp_path / "a.jsonl",
        [{"images": ["0.png"], "prompt": content, "answer": "a"}, {"images": None, "prompt": [{"type": "audio"}], "answer": "a"}],
    )
    source = built(JsonlConfig(path=str(tmp_path / "a.jsonl")))
    for index, message in enumerate(("images both in", 'a part of type "audio"')):
        with pytest.raises(SampleError, match=message):
            source[index]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP"])
def test_base64_is_a_picture(kind: str, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (30, 30), "red").save(buffer := io.BytesIO(), kind)
    text = base64.b64encode(buffer.getvalue()).decode()
    for value in (text, f"data:image/{kind.lower()};base64,{text}", "\n".join(text[k : k + 76] for k in range(0, len(text), 76))):
        lines(tmp_path / "a.jsonl", [{"image": [value], "answer": "a"}])
        assert built(JsonlConfig(path=str(tmp_path / "a.jsonl")))[0].images == (buffer.getvalue(),)


@pytest.mark.parametrize(
    "image",
    [
        "data:image/png;base64," + "A" * 200_001 + "!",
        "data:text/html," + "x" * 200_000,
        "x" * 200_000,
        "\x1b[31m" * 9,
        {"path": "y/" * 9_000},
    ],
)
def test_no_message_is_long(image: Any, tmp_path: Path) -> None:
    lines(tmp_path / "a.jsonl", [{"image": image, "answer": "a", "id": "i" * 5000}])
    with pytest.raises(SampleError) as error:
        sample = built(JsonlConfig(path=str(tmp_path / "a.jsonl")))[0]
        open_all(sample)
    assert len(str(error.value)) <= 700 and "\x1b" not in str(error.value)


def open_all(sample: Any) -> None:
    from kempnerforge.data.images.decode import image_size

    for image in sample.images:
        image_size(image)


def test_links_out_of_the_root(tmp_path: Path) -> None:
    root = tmp_path / "data"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "1.png").write_bytes(RED)
    os.symlink(tmp_path / "far", root / "sub" / "link")
    with pytest.raises(SampleError, match=r"sub/link\" is a link to .*/far; set data.root to .*data.follow_links = true"):
        resolve_image("sub/link/1.png", str(root))
    assert resolve_image("sub/link/1.png", str(root), True) == tmp_path / "far" / "1.png"
    for path in ("../far/1.png", "sub/link/../far/1.png", str(tmp_path / "far" / "1.png")):
        with pytest.raises(SampleError, match="leaves the data root"):
            resolve_image(path, str(root), True)


# ---- what is worth a word ---------------------------------------------------------------------------------------------------


def said_of(source: Source) -> str:
    remarks = Remarks()
    for index in range(len(source)):
        remarks.add(source[index], source.asks(index))
    return "\n".join(remarks.lines())


def test_prompts_that_cannot_tell_answers_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines(path, [{"image": "0.png", "answer": answer} for answer in ("red", "square")])
    assert "1 images have several answers without a prompt" in said_of(built(JsonlConfig(path=str(path))))
    assert said_of(built(CaptionsConfig(path=str(path)))) == "", "captions may"
    lines(path, [{"image": "0.png", "prompt": f"{k}?", "answer": str(k)} for k in range(3)])
    assert said_of(built(JsonlConfig(path=str(path)))) == ""
    lines(path, [{"image": None, "texts": [{"prompt": None, "answer": answer}]} for answer in "ab"])
    assert "2 values are null: taken as no prompt" in (text := said_of(built(JsonlConfig(path=str(path))))) and 'the prompt ""' in text
