"""What is drawn: where it must be, inside the picture, and to be seen on any ground."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kempnerforge.eval.codecs import Box, Marks, Point
from kempnerforge.eval.draw import COLOURS, MAX_SIDE, MIN_SIDE, SUFFIXES, draw_marks, save_drawn

SIDE = 500


def changed(marks: Marks, ground: tuple[int, int, int] = (128, 128, 128), size: tuple[int, int] = (SIDE, SIDE)) -> np.ndarray:
    """(H, W) bool, the pixels that ``marks`` change."""
    image = Image.new("RGB", size, ground)
    drawn = draw_marks(image, marks)
    assert drawn.size == size and drawn.mode == "RGB"
    assert set(np.asarray(image).reshape(-1, 3).max(0)) == set(ground), "the given image is left alone"
    return (np.asarray(drawn) != np.asarray(image)).any(-1)


def test_a_box_is_outlined_where_it_is() -> None:
    found = changed(Marks((Box(0.2, 0.4, 0.6, 0.8),)))
    rows, columns = np.flatnonzero(found.any(1)), np.flatnonzero(found.any(0))
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (200, 399, 100, 299)
    for edge in (found[200:203, 100:300], found[397:400, 100:300], found[200:400, 100:103], found[200:400, 297:300]):
        assert edge.all()
    assert not found[210:390, 110:290].any(), "what is in it can be seen"


def test_a_point_is_in_the_middle_of_its_dot() -> None:
    found = changed(Marks((), (Point(0.5, 0.25),)))
    rows, columns = np.flatnonzero(found.any(1)), np.flatnonzero(found.any(0))
    assert abs(rows.mean() - 0.25 * SIDE) <= 1 and abs(columns.mean() - 0.5 * SIDE) <= 1
    assert found[round(0.25 * SIDE), round(0.5 * SIDE)] and len(rows) < 25


@pytest.mark.parametrize("mark", [Box(0.2, 0.2, 0.8, 0.8), Point(0.5, 0.5)])
@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), *(tuple(int(c[k : k + 2], 16) for k in (1, 3, 5)) for c in COLOURS)])
def test_seen_on_any_ground(mark: Box | Point, colour: tuple[int, int, int]) -> None:
    marks = Marks((mark,)) if isinstance(mark, Box) else Marks((), (mark,))
    drawn = np.asarray(draw_marks(Image.new("RGB", (SIDE, SIDE), colour), marks)).reshape(-1, 3).astype(int)
    weights = np.array([0.299, 0.587, 0.114])
    light = drawn @ weights
    assert (abs(light - weights @ np.array(colour)) > 60).sum() > 50, "an edge of another brightness"


@pytest.mark.parametrize(("x", "y"), [*itertools.product((0.0, 0.5, 0.97), repeat=2)])
@pytest.mark.parametrize("label", ["mug", "m" * 400, "a\x1b[31m\nb", "多くの", "\u202e"])
def test_labels_are_inside(x: float, y: float, label: str) -> None:
    """The label's ground has a whole dark frame, so none of it is cut off."""
    plain = changed(Marks((Box(x, y, x + 0.03, y + 0.03),)))
    named = changed(Marks((Box(x, y, x + 0.03, y + 0.03, label),)))
    more = named & ~plain
    assert more.sum() > 100
    drawn = np.asarray(draw_marks(Image.new("RGB", (SIDE, SIDE), (128, 128, 128)), Marks((Box(x, y, x + 0.03, y + 0.03, label),))))
    fill = (drawn == np.array([int(COLOURS[0][k : k + 2], 16) for k in (1, 3, 5)])).all(-1)
    rows, columns = np.flatnonzero((fill & more).any(1)), np.flatnonzero((fill & more).any(0))
    frame = [drawn[rows[0] - 1, columns[0] : columns[-1]], drawn[rows[-1] + 1, columns[0] : columns[-1]]]
    frame += [drawn[rows[0] : rows[-1], columns[0] - 1], drawn[rows[0] : rows[-1], columns[-1] + 1]]
    assert all((side == 0).all() for side in frame)


def test_labels_keep_apart() -> None:
    one = changed(Marks((Box(0.2, 0.5, 0.8, 0.9, "first"),)))
    both = changed(Marks((Box(0.2, 0.5, 0.8, 0.9, "first"), Box(0.2, 0.5, 0.8, 0.9, "other"))))
    assert (both & ~one).sum() > 400, "the second is beside the first"


def test_a_label_has_one_colour_and_points_of_one_name_are_named_once() -> None:
    image = Image.new("RGB", (SIDE, SIDE), (10, 10, 10))
    two = Marks((), (Point(0.2, 0.2, "mug"), Point(0.8, 0.8, "mug")))
    drawn = np.asarray(draw_marks(image, two))
    colours = {tuple(drawn[100, 100].tolist()), tuple(drawn[399, 399].tolist())}
    assert len(colours) == 1
    far = changed(two)[300:, 300:]
    assert np.flatnonzero(far.any(1)).size < 25, "a dot, no label"


def test_small_images_are_enlarged() -> None:
    drawn = draw_marks(Image.new("L", (64, 16), 200), Marks((Box(0, 0, 1, 1, "a"),)))
    assert drawn.size == (64 * 28, 16 * 28) and min(drawn.size) >= MIN_SIDE
    assert max(draw_marks(Image.new("RGB", (2000, 10)), Marks()).size) <= MAX_SIDE


SHARE = st.floats(0, 1)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(SHARE, SHARE, SHARE, SHARE, st.text(max_size=30)), max_size=4),
    st.lists(st.builds(Point, SHARE, SHARE, st.text(max_size=30)), max_size=4),
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.sampled_from(["RGB", "L", "RGBA", "P", "CMYK"]),
)
def test_nothing_raises(boxes: list[tuple[float, float, float, float, str]], points: list[Point], size: tuple[int, int], mode: str) -> None:
    marks = Marks(tuple(Box(min(a, c), min(b, d), max(a, c), max(b, d), label) for a, b, c, d, label in boxes), tuple(points))
    draw_marks(Image.new(mode, size), marks)


@pytest.mark.parametrize("name", ["out", "out.xyz", "out.psd", "no/such/folder/out.png"])
def test_where_nothing_can_be_written(tmp_path: Path, name: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="out"):
        save_drawn(tmp_path / "a.png", "", tmp_path / name)


def test_the_image_itself_is_never_written_over(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").symlink_to("a.png")
    for name in ("a.png", "b.png"):
        with pytest.raises(ValueError, match="would be lost"):
            save_drawn(tmp_path / "a.png", "", tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == before


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_formats_that_are_written(tmp_path: Path, suffix: str) -> None:
    Image.new("RGB", (448, 448)).save(tmp_path / "a.png")
    for _ in range(2):
        save_drawn(tmp_path / "a.png", "", tmp_path / f"out{suffix}")
    assert Image.open(tmp_path / f"out{suffix}").size == (448, 448)


def test_a_drawing_that_fails_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    Image.new("RGB", (200, 17_000)).save(tmp_path / "long.png")
    (tmp_path / "out.webp").write_bytes(b"kept")
    with pytest.raises(ValueError, match="out.webp: cannot be written"):
        save_drawn(tmp_path / "long.png", "", tmp_path / "out.webp")
    assert (tmp_path / "out.webp").read_bytes() == b"kept"
