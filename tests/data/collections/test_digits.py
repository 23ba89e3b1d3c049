"""Handwritten digits: questions that fit their pictures; on an imitation of scikit-learn's table, and on the real one where it is installed."""

from __future__ import annotations

import io
import sys
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kempnerforge.data.collections.digits import DigitsConfig
from kempnerforge.data.sources import build_source


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Ten pictures; number k has its upper left k pixels full of ink."""
    images = np.zeros((10, 8, 8))
    for k in range(10):
        images[k].flat[:k] = 16
    made = SimpleNamespace(images=images, target=np.array([3, 1, 4, 1, 5, 9, 2, 6, 0, 7]))
    monkeypatch.setitem(sys.modules, "sklearn", SimpleNamespace(datasets=None))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", SimpleNamespace(load_digits=lambda: made))
    return made


def test_questions_and_pictures(table: Any) -> None:
    train, test = build_source(DigitsConfig(), "train"), build_source(DigitsConfig(), "test")
    assert train is not None and test is not None
    assert [source[k].id for source in (train, test) for k in range(len(source))] == [f"digits/{k}" for k in range(10)]
    assert len(test) == 2
    assert [(t.prompt, t.answer) for t in train[4].texts] == [
        ("which digit is it?", "5"),
        ("is it even?", "no"),
        ("is it larger than four?", "yes"),
    ]
    assert [t.answer for t in test[0].texts] == ["0", "yes", "no"]
    assert [t.kind for t in test[0].texts] == ["which", "even", "larger"]
    pixels = np.asarray(Image.open(io.BytesIO(train[4].images[0])))
    assert pixels.shape == (8, 8) and (pixels.flat[:4] == 0).all() and (pixels.flat[4:] == 255).all()
    assert train.length(4) == sum(len(t.prompt) + len(t.answer) for t in train[4].texts)


def test_questions_are_chosen(table: Any) -> None:
    source = build_source(DigitsConfig(questions=["even"]), "train")
    assert source is not None and [t.prompt for t in source[0].texts] == ["is it even?"]
    for wrong in (["odd"], [], ["even", "even"]):
        with pytest.raises(ValueError, match="questions = .*allowed are 'which', 'even', 'larger'"):
            DigitsConfig(questions=wrong)


def test_the_package_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match=r'needs the package scikit-learn: pip install "kempnerforge\[digits\]"'):
        build_source(DigitsConfig(), "train")


def test_the_real_ones() -> None:
    pytest.importorskip("sklearn")
    train, test = build_source(DigitsConfig(), "train"), build_source(DigitsConfig(), "test")
    assert train is not None and test is not None
    assert (len(train), len(test)) == (1438, 359)
    digits = Counter(train[k].texts[0].answer for k in range(len(train)))
    assert len(digits) == 10 and min(digits.values()) > 130
    eights = [np.asarray(Image.open(io.BytesIO(test[k].images[0]))) for k in range(len(test)) if test[k].texts[0].answer == "8"]
    ones = [np.asarray(Image.open(io.BytesIO(test[k].images[0]))) for k in range(len(test)) if test[k].texts[0].answer == "1"]
    assert np.mean(eights) < np.mean(ones) < 255  # more ink, and the ink is dark
