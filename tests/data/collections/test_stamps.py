"""Captioned stamps, on a tiny imitation of their folders, and on the real ones where they are installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kempnerforge.data import SampleError, Source, Text
from kempnerforge.data.collections.stamps import StampsConfig, find_stamps, read_captions
from tests.data import samples

CAPTIONS = "A {0}.\nde.utf8=Ein {0}.\npt_BR.utf8=Um {0}. = bom\nxx.utf8=\nnot a line\nsr@latin.utf8=Jedan {0}.\n"


def built(folder: Path, split: str = "train", **cfg: Any) -> Source:
    return samples.built(StampsConfig(path=str(folder), **cfg), split)


@pytest.fixture
def folder(tmp_path: Path, png: Callable[..., bytes]) -> Path:
    root = tmp_path / "stamps"
    for k in range(20):
        place = root / ("animals/birds" if k % 2 else "food")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"thing{k:02}.png").write_bytes(png((k, 0, 0)))
        (place / f"thing{k:02}_mirror.png").write_bytes(png((0, k, 0)))
        (place / f"thing{k:02}.txt").write_text(CAPTIONS.format(f"thing{k:02}"), encoding="utf-8")
    (root / "food" / "drawing.svg").touch()
    (root / "food" / "drawing.txt").write_text("A drawing.")
    (root / "food" / "silent.png").write_bytes(png((1, 1, 1)))
    (root / "food" / "silent.txt").write_text("\nfi.utf8=Hiljaa.\n")
    return root


def names(source: Source) -> list[str]:
    return [source[k].id for k in range(len(source))]


def test_captions(folder: Path) -> None:
    assert len(find_stamps(str(folder))) == 21
    assert read_captions(str(folder / "food" / "thing00.txt")) == {
        "en": "A thing00.",
        "de": "Ein thing00.",
        "pt_BR": "Um thing00. = bom",
        "sr@latin": "Jedan thing00.",
    }


def test_each_stamp_is_trained_or_held_out(folder: Path) -> None:
    train, test = built(folder, held_out_every=3), built(folder, "test", held_out_every=3)
    ids = [names(source) for source in (train, test)]
    assert len(ids[1]) > 2 and not set(ids[0]) & set(ids[1])
    assert sorted(ids[0] + ids[1]) == sorted(f"stamps/{name}" for name in find_stamps(str(folder)) if "silent" not in name)
    assert ids[0] == sorted(ids[0])
    sample = train[0]
    assert sample.images == ((folder / f"{sample.id.removeprefix('stamps/')}.png").resolve(),)
    assert sample.texts == (Text("", f"A {Path(sample.id).name}."),)
    (folder / "animals" / "new.txt").write_text("A new one.")
    (folder / "animals" / "new.png").write_bytes(b"")
    assert set(ids[0]) <= set(names(built(folder, held_out_every=3)))


def test_several_languages_are_several_texts(folder: Path) -> None:
    sources = [built(folder, split, languages=["de", "en", "fi"], held_out_every=3) for split in ("train", "test")]
    texts = {source[k].id: source[k].texts for source in sources for k in range(len(source))}
    assert texts["stamps/food/thing04"] == (Text("de", "Ein thing04.", kind="de"), Text("en", "A thing04.", kind="en"))
    assert texts["stamps/food/silent"] == (Text("fi", "Hiljaa.", kind="fi"),)


def test_questions_about_the_groups(folder: Path) -> None:
    for split, captions in (("train", 1), ("test", 0)):
        source = built(folder, split, form="questions", with_captions=True, held_out_every=3)
        assert names(source) == names(built(folder, split, held_out_every=3))  # held out are the same stamps
        for k in range(len(source)):
            sample = source[k]
            group = sample.id.split("/")[1]
            other = {"animals": "food", "food": "animals"}[group]
            assert sample.texts == (
                Text("which group does the picture belong to?", group, kind="group"),
                Text(f"does the picture belong to {group}?", "yes", kind="yes or no"),
                Text(f"does the picture belong to {other}?", "no", kind="yes or no"),
                *[Text("", f"A {Path(sample.id).name}.")] * captions,
            )


def test_a_question_has_another_group_if_there_is_one(folder: Path) -> None:
    for k in range(4):
        (folder / f"group{k}").mkdir()
        (folder / f"group{k}" / "x.txt").write_text("X.")
        (folder / f"group{k}" / "x.png").write_bytes((folder / "food" / "silent.png").read_bytes())
    source = built(folder, form="questions")
    denied = {text.prompt for k in range(len(source)) for text in source[k].texts if text.answer == "no"}
    assert len(denied) > 3  # not always the same one
    with pytest.raises(ValueError, match="form = 'questions' is about the folders in it that stamps lie in, and needs two"):
        built(folder / "group0", form="questions")


def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no captions in 'tlh'; there are de, en, fi, pt_BR, sr@latin"):
        built(folder, languages=["en", "tlh"])
    (tmp_path / "empty").mkdir()
    for place in ("empty", "nowhere"):
        with pytest.raises(ValueError, match="no stamps there; get them with: kempnerforge data fetch stamps"):
            built(tmp_path / place)
    with pytest.raises(ValueError, match="path = ''.*kempnerforge data fetch stamps"):
        StampsConfig()
    with pytest.raises(ValueError, match="with_captions = True: only form = 'questions' reads it"):
        StampsConfig(path="x", with_captions=True)
    with pytest.raises(ValueError, match="each once"):
        StampsConfig(path="x", languages=["en", "en"])
    (folder / "food" / "thing00.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"thing00.txt: 'utf-8' codec"):
        built(folder)


def test_a_link_out_of_the_folder_is_not_followed(folder: Path, tmp_path: Path, png: Callable[..., bytes]) -> None:
    (tmp_path / "secret.png").write_bytes(png((9, 9, 9)))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "link.txt").write_text("A link.")
    sources = [built(folder, split, held_out_every=3) for split in ("train", "test")]
    found = [(source, k) for source in sources for k in range(len(source)) if source.texts(k) == (Text("", "A link."),)]  # type: ignore[attr-defined]
    (source, index), *rest = found
    assert not rest
    with pytest.raises(SampleError, match="leaves the data root"):
        source[index]


REAL = [path for path in (Path("/usr/share/tuxpaint/stamps"), Path("data/stamps")) if path.is_dir()]


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="the stamps are not installed")
def test_the_real_ones() -> None:
    source, test = (built(REAL[0], split, languages=["en", "de", "ja"]) for split in ("train", "test"))
    assert len(source) + len(test) >= 785 and 50 < len(test) < 120
