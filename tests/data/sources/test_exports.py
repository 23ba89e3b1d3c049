"""Rows as the usual exports write them: several answers as objects, keys that are null in most messages, numbered images; and keys that
``data.ignore_columns`` names and no row has.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kempnerforge.config.data import DataConfig, HFDatasetConfig, JsonlConfig
from kempnerforge.data import SampleError
from kempnerforge.data.sources.llava import SPARE, LlavaConfig
from kempnerforge.data.sources.mixture import MixtureConfig
from kempnerforge.util.errors import InputError
from tests.data.samples import built, png
from tests.data.sources.test_data_keys import ROWS, WRITERS, lines, parquet
from tests.params import quick
from tests.training.tiny import call, make_job, rows_of, write_rows

pa = pytest.importorskip("pyarrow")
datasets = pytest.importorskip("datasets")
COLOURS = ((200, 0, 0), (0, 200, 0), (0, 0, 200))
TEN = [{"answer": word, "answer_confidence": "yes", "answer_id": k + 1} for k, word in enumerate(["yes", "yes", "no", "yes", "maybe"] * 2)]
PATHS = ["0.png", "1.png", "2.png"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    for k, colour in enumerate(COLOURS):
        (tmp_path / f"{k}.png").write_bytes(png(colour))


def one(make: type[DataConfig], path: Path, row: dict[str, Any], **keys: Any) -> Any:
    """The sample of a file with ``row`` in it."""
    WRITERS[path.suffix[1:]](path, [row])
    return built(make(path=str(path), **keys))[0]  # type: ignore[call-arg]


# ---- answers as objects ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("answers", [TEN, {key: [entry[key] for entry in TEN] for key in TEN[0]}], ids=["objects", "columns"])
@pytest.mark.parametrize("in_texts", [False, True], ids=["flat", "texts"])
def test_ten_answers_of_vqa(kind: str, answers: Any, in_texts: bool, tmp_path: Path) -> None:
    row = {"question": "is it red?", "answers": answers}
    row = {"image": "0.png"} | ({"texts": [row]} if in_texts else row)
    make = JsonlConfig if kind == "jsonl" else HFDatasetConfig
    (text,) = one(make, tmp_path / f"rows.{kind}", row).texts
    assert (text.prompt, text.answer, text.listed) == ("is it red?", "yes", True)
    assert text.references == tuple(entry["answer"] for entry in TEN[1:])


def test_answer_objects_are_as_strict_as_rows(tmp_path: Path) -> None:
    for answers, says in (
        ([{"answer": "yes", "weight": 3}], r"key \"answers.weight\" is read by nothing"),
        ([{"answer_id": 1}], "column 'answers': must be a string, not dict"),
        ([{"answer": None}], "column 'answers' is null"),
    ):
        with pytest.raises(InputError, match=says):
            one(JsonlConfig, tmp_path / "rows.jsonl", {"image": "0.png", "question": "q", "answers": answers})


# ---- null means absent ----------------------------------------------------------------------------------------------

SAID = [
    {"role": "user", "content": [{"type": "image", "text": None, "index": 0}, {"type": "text", "text": "what?", "index": None}]},
    {"role": "assistant", "content": [{"type": "text", "text": "red", "index": None}]},
]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_keys_that_are_null_in_a_message(kind: str, tmp_path: Path) -> None:
    spare: dict[str, Any] = dict.fromkeys(SPARE)
    turns = [message | spare for message in SAID]
    sample = one(LlavaConfig, tmp_path / f"rows.{kind}", {"images": ["0.png"], "messages": turns})
    assert (sample.texts[0].prompt, sample.texts[0].answer, len(sample.images)) == ("<image>what?", "red", 1)


@pytest.mark.parametrize("key", SPARE)
def test_keys_that_are_not_null_are_refused(key: str, tmp_path: Path) -> None:
    turns = [SAID[0], SAID[1] | {key: [{"id": "x"}]}]
    for kind in ("jsonl", "parquet"):
        with pytest.raises(InputError, match=rf"key \"messages.{key}\" is read by nothing \(it may be there as null\)"):
            one(LlavaConfig, tmp_path / f"rows.{kind}", {"images": ["0.png"], "messages": turns})
        one(LlavaConfig, tmp_path / f"rows.{kind}", {"images": ["0.png"], "messages": turns}, ignore_columns=[f"messages.{key}"])


# ---- numbered images ------------------------------------------------------------------------------------------------


def numbered(*numbers: Any) -> list[dict[str, Any]]:
    parts = [{"type": "image", "index": number} for number in numbers]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}, {"role": "assistant", "content": "a"}]


def test_an_index_chooses_the_image(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for numbers, images in (((0, 1, 2), (0, 1, 2)), ((2, 0, 1), (2, 0, 1)), ((1, 0, 1, 2), (1, 0, 1, 2))):
        sample = one(LlavaConfig, path, {"images": PATHS, "messages": numbered(*numbers)})
        assert [image.name for image in sample.images] == [f"{k}.png" for k in images]
        assert sample.texts[0].prompt.count("<image>") == len(images)
    turns = [*numbered(1), *numbered(0)]
    sample = one(LlavaConfig, path, {"images": PATHS[:2], "messages": turns})
    assert [image.name for image in sample.images] == ["1.png", "0.png"]
    flat = {"images": PATHS[:2], "prompt": numbered(1, 0)[0]["content"], "answer": "a"}
    assert [image.name for image in one(JsonlConfig, path, flat).images] == ["1.png", "0.png"]


@pytest.mark.parametrize(
    ("images", "numbers", "says"),
    [
        (2, (0, 2), "index 2, and 'image' or 'images' 2 images, from 0"),
        (2, (0, -1), "index -1"),
        (3, (0, 2), "no part of type image has index 1, and 'image' or 'images' 3 images"),
        (1, ("0",), 'index = "0": must be the number of an image'),
        (1, (True,), "index = true: must be the number of an image"),
        (0, (0,), "index 0, and 'image' or 'images' 0 images"),
    ],
)
def test_an_index_of_no_image(images: int, numbers: tuple[Any, ...], says: str, tmp_path: Path) -> None:
    with pytest.raises(SampleError, match=says):
        one(LlavaConfig, tmp_path / "rows.jsonl", {"images": PATHS[:images], "messages": numbered(*numbers)})


def test_an_index_beside_an_image_or_of_a_text(tmp_path: Path) -> None:
    for part, says in (
        ({"type": "image", "index": 0, "path": "1.png"}, "and name no other"),
        ({"type": "text", "text": "?", "index": 0}, "a part of type text with an index"),
    ):
        turns = [{"role": "user", "content": [part]}, SAID[1]]
        with pytest.raises(SampleError, match=says):
            one(LlavaConfig, tmp_path / "rows.jsonl", {"images": ["0.png"], "messages": turns})


# ---- conversations in datasets --------------------------------------------------------------------------------------


def test_conversations_in_parquet_and_in_datasets(tmp_path: Path) -> None:
    row = {"image": "0.png", "conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}]}
    parquet(tmp_path / "rows.parquet", [row])
    embedded = row | {"image": {"bytes": (tmp_path / "0.png").read_bytes(), "path": None}}
    datasets.Dataset.from_list([embedded]).cast_column("image", datasets.Image()).save_to_disk(tmp_path / "saved")
    for path in ("rows.parquet", "saved"):
        source = built(LlavaConfig(path=str(tmp_path / path), root=str(tmp_path)))
        sample = source[0]
        assert (sample.texts[0].turns, len(sample.images)) == ((("<image>\nwhat?", "red"),), 1)
        assert source.length(0) == len("human<image>\nwhat?gptred") and source.num_images(0) == 1
    with pytest.raises(InputError, match="data.source = 'llava' reads conversations"):
        built(HFDatasetConfig(path=str(tmp_path / "rows.parquet")))


# ---- data.ignore_columns --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["check", "train"])
def test_a_pattern_that_no_key_has(command: str, tmp_path: Path) -> None:
    job = make_job(tmp_path)
    rows = rows_of(tmp_path)
    write_rows(tmp_path / "train.jsonl", [row | {"note": 1, "made_score": 2} for row in rows])
    write_rows(tmp_path / "test.jsonl", [row | {"only_here": 1} for row in rows])
    ended = call(command, job, '--data.ignore_columns=["note", "*_score", "only_here", "no one", "x*"]')
    assert ended.code == 2 and not (tmp_path / "run").exists()
    assert 'data.ignore_columns: no key of the data is called "no one", "x*"; take it out, or mend it' in ended.err
    ended = call("check", job, '--data.ignore_columns=["note", "*_score", "only_here"]')
    assert ended.code == 0, ended.err


def test_a_known_column_that_is_taken_out_and_not_there(tmp_path: Path) -> None:
    for row, unused in (({"caption": "c"}, set()), ({}, {"caption"})):
        lines(tmp_path / "rows.jsonl", [{"image": "0.png", "question": "q", "answer": "a", **row}])
        source = built(JsonlConfig(path=str(tmp_path / "rows.jsonl"), ignore_columns=["caption"]))
        assert {pattern for one in source.ignoring() for pattern in one.patterns if pattern not in one.used} == unused


SEEN_WHOLE = {name: entry for name, entry in ROWS.items() if not name.startswith(("webdataset", "hf_stream, jsonl"))}


@pytest.mark.parametrize("name", ROWS)
def test_patterns_of_every_source(name: str, tmp_path: Path) -> None:
    make, keys, kind, row, _ = ROWS[name]
    path = tmp_path / f"rows.{kind}"
    row = row if kind != "tar" else row | {"json": row["json"] | {"meta": 1}}
    WRITERS[kind](path, [row if kind == "tar" else row | {"meta": "x"}] * 3)
    meta = "json.meta" if kind == "tar" else "meta"
    source = built(make(path=str(path), root="" if kind == "tar" else str(tmp_path), ignore_columns=[meta, "other"], **keys))  # type: ignore[call-arg]
    (used,) = source.ignoring()
    assert used.used == ({meta} if name in SEEN_WHOLE else {meta, "other"})


def test_patterns_of_a_mixture(tmp_path: Path) -> None:
    for k, key in enumerate(("note", "remark")):
        lines(tmp_path / f"{k}.jsonl", [{"image": "0.png", "question": "q", "answer": "a", key: 1}])
    parts = [JsonlConfig(path=str(tmp_path / f"{k}.jsonl"), ignore_columns=["note", "remark"]) for k in range(2)]
    source = built(MixtureConfig(parts=parts))
    assert [one.used for one in source.ignoring()] == [{"note"}, {"remark"}]


# ---- messages are short ---------------------------------------------------------------------------------------------

LONG = 'many words, it\'s "quoted" ' * 400
RUN = "x" * 5000


def spoiled(row: Any) -> Iterator[Any]:
    """``row`` with each of its values, or the name of each key, made long."""
    if isinstance(row, list):
        for k, entry in enumerate(row):
            for changed in spoiled(entry):
                yield [*row[:k], changed, *row[k + 1 :]]
    elif isinstance(row, dict):
        for key, value in row.items():
            rest = {other: kept for other, kept in row.items() if other != key}
            for long in (LONG, RUN):
                yield rest | {long: value}
            for changed in spoiled(value):
                yield rest | {key: changed}
    yield from (LONG, RUN, [LONG], {"bytes": None, "path": LONG}, {RUN: RUN}, [{"type": LONG}], [{"type": "image", "index": LONG}])


def longest_common(message: str, text: str) -> int:
    """Characters in a row of ``text`` that ``message`` shows."""
    found = 0
    for start in range(len(message)):
        while message[start : start + found + 1] in text and start + found < len(message):
            found += 1
    return found


@pytest.mark.parametrize("name", quick([name for name in ROWS if not name.startswith("webdataset")], *list(ROWS)[:4]))
def test_errors_show_no_long_values(name: str, tmp_path: Path) -> None:
    make, keys, kind, row, _ = ROWS[name]
    path, refused = tmp_path / f"rows.{kind}", 0
    for changed in list(spoiled(row)):
        if not isinstance(changed, dict) or (kind in ("csv", "tsv") and any(not isinstance(v, str) for v in changed.values())):
            continue
        try:
            WRITERS[kind](path, [changed] * 3)
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            continue
        try:
            source = built(make(path=str(path), root=str(tmp_path), **keys))  # type: ignore[call-arg]
            source[0]
        except InputError as error:
            refused += 1
            said = str(error)
            assert max(longest_common(said, LONG), longest_common(said, RUN)) <= 300 and len(said) < 3000, said
            assert type(error)(said) is not None and str(type(error)(said)) == said, "shortening twice is shortening once"
    assert refused > 3


def test_quoted_values_are_cut_in_any_error() -> None:
    for said in (f"x = {LONG!r}: no", f"x = {json.dumps(LONG)}: no", f"x = {RUN}: no", f"it's one; x = '{'a b ' * 200}': no, it isn't"):
        found = str(InputError(said))
        assert len(found) < 400 and found.startswith(said[:9]) and found.endswith(": no" if "isn't" not in said else ": no, it isn't"), (
            found
        )
    prose = f"the run's data aren't there; {'and so on, ' * 50} it's all that isn't"
    assert str(InputError(prose)) == prose
