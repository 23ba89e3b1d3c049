"""Where rows are in a file, and whether an edited file is noticed."""

from __future__ import annotations

import csv
import io
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kempnerforge.config.data import DataConfig, EasyVQAConfig, HFDatasetConfig, JsonlConfig, TextConfig
from kempnerforge.data import Sample, Text
from kempnerforge.data.fingerprint import BLOCK, WHOLE, file_fingerprint
from kempnerforge.data.sources.captions import CaptionsConfig
from kempnerforge.data.sources.interleaved import InterleavedConfig
from kempnerforge.data.sources.llava import LlavaConfig
from kempnerforge.data.sources.rows import CsvRows, JsonLines, JsonList, json_rows
from tests.data.samples import ListSource, built
from tests.data.sources.test_file_sources import said

NOTHING = lambda row: (0, 0)


# ---- where rows stand ------------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=4) | st.sampled_from(['"', "\\", "]", "{[", '\\"', "\u2028"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.lists(st.dictionaries(st.text(max_size=3), VALUES, max_size=3), min_size=1, max_size=6), st.sampled_from([None, 0, 2]), st.booleans()
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_rows_of_a_json_list(tmp_path: Path, rows: list[dict[str, Any]], indent: int | None, ascii_only: bool) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii_only) + " \n", encoding="utf-8", errors="surrogatepass")
    found = json_rows(str(path), "path", NOTHING)
    assert isinstance(found, JsonList)
    assert [found[k] for k in range(len(found))] == rows and found.columns == set().union(*rows)
    path.write_text("\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows), encoding="utf-8", errors="surrogatepass")
    found = json_rows(str(path), "path", NOTHING)
    assert isinstance(found, JsonLines) and [found[k] for k in range(len(found))] == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"a": 1}, 5]', "entry 2 is not an object"),
        ('[5, {"a": 1}]', "entry 1 is not an object"),
        ('["a", {"a": 1}]', "entry 1 is not an object"),
        ('[{"a": 1}, nonsense {"a": 1}]', "entry 2 is not an object"),
        ('[{"a": 1}, {"a": ', "it is broken off after entry 1"),
        ('[{"a": 1}', "it is broken off after entry 1"),
        ('[{"a": 1}] {}', "it goes on after entry 1"),
        ("[", "it is broken off after entry 0"),
        ("[]", "no rows"),
        ('[[1], {"a": 1}]', "1 bad entries: entry 1: a JSON object is needed, not list"),
        ('[{"a": nan}, {"a": 1}]', "1 bad entries: entry 1: not JSON"),
    ],
)
def test_json_lists_that_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(ValueError, match=r"rows\.json: ") as error:
        json_rows(str(tmp_path / "rows.json"), "path", NOTHING)
    assert message in str(error.value)


FIELDS = st.text(st.characters(exclude_categories=("Cs",)), max_size=5) | st.sampled_from(
    ['"', "a,b", "a\tb", "x\ny", "\r\n", "\u2028", ""]
)


@given(st.lists(st.tuples(FIELDS, FIELDS), min_size=1, max_size=6), st.sampled_from(["csv", "tsv"]), st.sampled_from(["\n", "\r\n"]))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_of_a_csv_file(tmp_path: Path, rows: list[tuple[str, str]], suffix: str, newline: str) -> None:
    buffer = io.StringIO(newline="")
    style: dict[str, Any] = {"delimiter": "\t" if suffix == "tsv" else ",", "lineterminator": newline, "quoting": csv.QUOTE_ALL}
    csv.writer(buffer, **style).writerows([("a", "b"), *rows])
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(buffer.getvalue().encode())
    found = CsvRows(str(path), "path", NOTHING)
    assert [found[k] for k in range(len(found))] == [{"a": a, "b": b} for a, b in rows]


def test_a_file_is_not_kept_in_memory(tmp_path: Path) -> None:
    row = json.dumps({"conversations": said("a?" * 400, "b" * 400), "image": "0.png"})
    (tmp_path / "rows.json").write_text("[" + ",\n".join([row] * 1500) + "]")
    tracemalloc.start()
    source = built(LlavaConfig(path=str(tmp_path / "rows.json")))
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source) == 1500 and held < 0.2e6 and peak < 0.6e6 < len(row) * 1500


# ---- edited data -----------------------------------------------------------------------------------------------------------


def test_fingerprints_of_files(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x" * 1000)
    first = file_fingerprint(path)
    path.touch()
    assert file_fingerprint(path) == first, "times do not count"
    for content in (b"x" * 999 + b"y", b"x" * 1001):
        path.write_bytes(content)
        assert file_fingerprint(path) != first
    big = bytearray(WHOLE + 10 * BLOCK)
    path.write_bytes(big)
    first = file_fingerprint(path)
    for at in (0, len(big) - 1):
        big[at] = 1
        path.write_bytes(big)
        assert file_fingerprint(path) != first
    (tmp_path / "d" / "e").mkdir(parents=True)
    (tmp_path / "d" / "e" / "f").write_text("a")
    first = file_fingerprint(tmp_path / "d")
    (tmp_path / "d" / "e" / "f").write_text("b")
    assert file_fingerprint(tmp_path / "d") != first


def test_an_edited_file_is_noticed(tmp_path: Path, hf: Any) -> None:
    cases: list[tuple[Callable[..., DataConfig], Path, str]] = [
        (JsonlConfig, tmp_path / "a.jsonl", json.dumps({"image": None, "answer": "WORD"})),
        (LlavaConfig, tmp_path / "b.json", json.dumps([{"conversations": said("a", "WORD")}])),
        (CaptionsConfig, tmp_path / "c.csv", "image,caption\n0.png,WORD"),
        (InterleavedConfig, tmp_path / "d.jsonl", json.dumps({"text": "WORD", "images": []})),
        (TextConfig, tmp_path / "e.txt", "WORD"),
    ]
    for make, path, content in cases:
        path.write_text(content.replace("WORD", "one"))
        first = built(make(path=str(path))).fingerprint()
        assert built(make(path=str(path))).fingerprint() == first
        path.write_text(content.replace("WORD", "two"))
        assert built(make(path=str(path))).fingerprint() != first, path
    for k in range(2):
        hf.Dataset.from_dict({"image": [None], "answer": [f"{k}"]}).save_to_disk(str(tmp_path / f"set{k}"))
    first, second = (built(HFDatasetConfig(path=str(tmp_path / f"set{k}"))).fingerprint() for k in range(2))
    assert first != second


def test_sources_without_files_have_a_fingerprint(list_source: type[ListSource]) -> None:
    samples = [Sample(f"s{k}", (), (Text("a", str(k)),)) for k in range(20)]
    first = list_source(samples).fingerprint()
    assert list_source(samples).fingerprint() == first != list_source(samples[:-1]).fingerprint()
    assert list_source([None, *samples[1:]]).fingerprint() != first
    changed = [*samples[:-1], Sample("s19", (), (Text("a", "b", (("c", "d"),)),))]
    assert list_source(changed).fingerprint() != first
    pytest.importorskip("easy_vqa")
    assert built(EasyVQAConfig()).fingerprint() != built(EasyVQAConfig(form="captions")).fingerprint()
