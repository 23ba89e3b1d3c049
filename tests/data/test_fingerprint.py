"""Images that were replaced behind an unchanged list are noticed, whatever the source; a copy of the data is the same data."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kempnerforge.config.data import DataConfig
from kempnerforge.config.registry import registry
from kempnerforge.data import fingerprint
from kempnerforge.data.fingerprint import pictures_fingerprint
from kempnerforge.data.sources import build_source

COUNT = 6


def rows(folder: Path, make: Callable[[str], dict[str, Any]], name: str = "rows.jsonl") -> str:
    found = [make(f"{k}.bmp") for k in range(COUNT)]
    text = json.dumps(found) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in found)
    (folder / name).write_text(text)
    return str(folder / name)


def flat(image: str) -> dict[str, Any]:
    return {"image": image, "answer": "red"}


def llava(image: str) -> dict[str, Any]:
    return {"id": image, "image": image, "conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}]}


def parts(folder: Path) -> list[DataConfig]:
    return [config("jsonl", path=rows(folder, flat, "a.jsonl")), config("llava", path=rows(folder, llava, "b.json"))]


def config(source: str, **keys: Any) -> DataConfig:
    return registry.data_configs.get(source)(source=source, **keys)


SOURCES: dict[str, Callable[[Path], DataConfig]] = {
    "jsonl": lambda folder: config("jsonl", path=rows(folder, flat)),
    "captions": lambda folder: config("captions", path=rows(folder, lambda image: {"image": image, "caption": "red"})),
    "llava": lambda folder: config("llava", path=rows(folder, llava, "rows.json")),
    "interleaved": lambda folder: config(
        "interleaved", path=rows(folder, lambda i: {"texts": [None, "red"], "images": [i, None]}), form="lists"
    ),
    "hf_stream": lambda folder: config("hf_stream", path=rows(folder, flat), num_samples=COUNT),
    "mixture": lambda folder: config("mixture", parts=parts(folder)),
}
"""Those whose rows name files."""


def picture(path: Path, colour: str) -> None:
    Image.new("RGB", (8, 8), colour).save(path)


def fingerprint_of(name: str, folder: Path) -> str:
    source = build_source(SOURCES[name](folder), "train")
    assert source is not None and all(source[k].images for k in range(len(source)))
    return pictures_fingerprint(source)


@pytest.mark.parametrize("name", SOURCES)
def test_it_is_that_of_the_content(name: str, tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    for k in range(COUNT):
        picture(here / f"{k}.bmp", "red")
    first = fingerprint_of(name, here)
    for k in range(COUNT):
        os.utime(here / f"{k}.bmp", ns=(k, k))
    assert fingerprint_of(name, here) == first, "times are nothing"
    assert fingerprint_of(name, Path(shutil.copytree(here, tmp_path / "there"))) == first, "places are nothing"
    for k in (0, COUNT - 1):
        before = (here / f"{k}.bmp").stat()
        picture(here / f"{k}.bmp", "blue")
        os.utime(here / f"{k}.bmp", ns=(before.st_atime_ns, before.st_mtime_ns))
        assert fingerprint_of(name, here) != first
        picture(here / f"{k}.bmp", "red")
    assert fingerprint_of(name, here) == first
    (here / "2.bmp").unlink()
    assert fingerprint_of(name, here) != first


def test_of_many_images_a_few_are_read_the_same_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    checksum = fingerprint._checksum
    monkeypatch.setattr(fingerprint, "_checksum", lambda path: (read.append(Path(path).name), checksum(path))[1])
    monkeypatch.setattr(fingerprint, "PICTURES", 4)
    for k in range(COUNT):
        picture(tmp_path / f"{k}.bmp", "red")
    first = fingerprint_of("jsonl", tmp_path)
    chosen, read[:] = list(read), []
    chosen.remove("rows.jsonl") if "rows.jsonl" in chosen else None
    assert len(set(chosen)) == 4
    assert fingerprint_of("jsonl", tmp_path) == first and set(read) - {"rows.jsonl"} == set(chosen)


def jsonl_shards(folder: Path, words: list[list[str]]) -> DataConfig:
    for k, shard in enumerate(words):
        (folder / f"{k}.jsonl").write_text("".join(json.dumps({"image": None, "answer": word}) + "\n" for word in shard), encoding="utf-8")
    return config("hf_stream", path=str(folder), num_samples=12)


def tar_shards(folder: Path, words: list[list[str]]) -> DataConfig:
    for k, shard in enumerate(words):
        with tarfile.open(folder / f"{k}.tar", "w") as tar:
            for row, word in enumerate(shard):
                for name, content in ((f"{k}-{row}.png", b"x" * 40_000), (f"{k}-{row}.txt", word.encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return config("webdataset", path=str(folder))


def mixed_shards(folder: Path, words: list[list[str]]) -> DataConfig:
    return config("mixture", parts=[tar_shards(folder, words)])


@pytest.mark.parametrize("make", [jsonl_shards, tar_shards, mixed_shards])
def test_a_word_in_the_middle_of_any_shard_counts(make: Callable[[Path, list[list[str]]], DataConfig], tmp_path: Path) -> None:
    def found(words: list[list[str]]) -> str:
        source = build_source(make(tmp_path, words), "train")
        assert source is not None and len(source.shards()) == 3
        return fingerprint.shards_fingerprint(source.shards())

    words = [["red"] * 4 for _ in range(3)]
    first = found(words)
    assert found(words) == first
    for shard in range(3):
        assert found([[*row[:2], "tan" if k == shard else "red", "red"] for k, row in enumerate(words)]) != first


def test_of_large_shards_blocks_are_read(tmp_path: Path) -> None:
    paths = [tmp_path / str(k) for k in range(600)]
    for path in paths:
        path.write_bytes(b"x" * 3 * 2**17)
    first = fingerprint.shards_fingerprint(paths)
    with open(paths[-1], "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"y")
    assert fingerprint.shards_fingerprint(paths) != first
