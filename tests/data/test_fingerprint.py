"""Images that were replaced behind an unchanged list are noticed, whatever the source; a copy of the data is the same data."""

from __future__ import annotations

import json
import os
import shutil
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
