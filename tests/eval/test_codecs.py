"""Boxes and points as text: there and back, and whatever a model may write."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kempnerforge.eval.codecs import (
    NO_POINTS,
    Box,
    Point,
    decode,
    decode_boxes,
    decode_points,
    encode_boxes,
    encode_points,
)

SHARE = st.floats(0, 1)
WORDS = st.text(st.characters(blacklist_characters=";<>\n", blacklist_categories=("Cs",)), max_size=12).map(str.strip)
LABELS = st.text(st.characters(blacklist_categories=("Cs",)), max_size=12).map(str.strip)
CODES = st.one_of(st.just(()), st.tuples(*[st.integers(0, 127)] * 16))


@st.composite
def boxes(draw: st.DrawFn, side: st.SearchStrategy[float] = SHARE) -> Box:
    x0, x1 = sorted((draw(side), draw(side)))
    y0, y1 = sorted((draw(side), draw(side)))
    return Box(x0, y0, x1, y1, draw(WORDS), draw(CODES))


# ---- boxes --------------------------------------------------------------------------------------------------------------


def test_the_order_is_y_first() -> None:
    width, height = 640, 480
    text = "<loc0256><loc0128><loc0768><loc0512> cat ; <loc0000><loc0512><loc1023><loc1000> dog"
    cat, dog = decode_boxes(text)
    assert (cat.label, dog.label) == ("cat", "dog")
    assert cat.pixels(width, height) == (128 / 1024 * width, 256 / 1024 * height, 512 / 1024 * width, 768 / 1024 * height)
    assert dog.pixels(width, height) == (512 / 1024 * width, 0, 1000 / 1024 * width, 1023 / 1024 * height)
    assert encode_boxes([cat, dog]) == text


def test_mask_codes() -> None:
    codes = tuple(range(16))
    written = "".join(f"<seg{code:03d}>" for code in codes)
    (box,) = decode_boxes(f"<loc0001><loc0002><loc0003><loc0004>{written} a mug")
    assert box.codes == codes and box.label == "a mug"
    assert decode_boxes(f"<loc0001><loc0002><loc0003><loc0004> {written} a mug") == [box], "the released models write a blank between"


@settings(deadline=None)
@given(st.lists(boxes(st.integers(0, 1023).map(lambda n: n / 1024)), max_size=4))
def test_boxes_on_the_grid_come_back(given: list[Box]) -> None:
    assert decode_boxes(encode_boxes(given)) == given


@settings(deadline=None)
@given(boxes())
def test_any_box_comes_back_rounded(box: Box) -> None:
    (found,) = decode_boxes(encode_boxes([box]))
    assert (found.label, found.codes) == (box.label, box.codes)
    for side in ("x0", "y0", "x1", "y1"):
        want = getattr(box, side)
        assert abs(getattr(found, side) - want) <= (1 / 2048 if want < 1023.5 / 1024 else 1 / 1024)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<loc0001><loc0002><loc0003> three",
        "<loc0001><loc0002><loc0003><loc0004><loc0005> five",
        "<loc0001><loc0002><loc1024><loc0004> beyond the grid",
        "<loc0009><loc0002><loc0003><loc0004> upside down",
        "<loc0001><loc0009><loc0003><loc0004> inside out",
        "<loc001><loc0002><loc0003><loc0004> three digits",
        "<loc-001><loc0002><loc0003><loc0004>",
        "<loc٠٠٠١><loc0002><loc0003><loc0004> digits of another script",
        "<seg001>" * 16,
    ],
)
def test_what_is_no_box_is_skipped(text: str) -> None:
    good = Box(1 / 1024, 0, 0.5, 0.5, "good")
    assert decode_boxes(text) == []
    assert decode_boxes(f"{text} ; {encode_boxes([good])}") == [good], "what follows is read"


@pytest.mark.parametrize("segs", ["<seg001>" * 15, "<seg001>" * 17, "<seg001>" * 15 + "<seg128>"])
def test_a_broken_mask_leaves_its_box(segs: str) -> None:
    (box,) = decode_boxes(f"<loc0001><loc0002><loc0003><loc0004>{segs} mug")
    assert box.codes == () and box.label == "mug"


def test_a_label_stands_on_the_line_of_its_box() -> None:
    place = "<loc0001><loc0002><loc0003><loc0004>"
    assert [box.label for box in decode_boxes(f"{place}\nThe cat sits. {place} \n<seg001> mug")] == ["", "mug"]


@pytest.mark.parametrize("label", ["a;b", "<b>", "a\nb"])
def test_labels_that_would_end_early(label: str) -> None:
    with pytest.raises(ValueError, match="label"):
        encode_boxes([Box(0, 0, 1, 1, label)])


@pytest.mark.parametrize("sides", [(0.5, 0, 0.4, 1), (0, 0, 1, 1.1), (-0.1, 0, 1, 1), (0, 0, math.nan, 1)])
def test_boxes_that_cannot_be(sides: tuple[float, float, float, float]) -> None:
    with pytest.raises(ValueError, match="box"):
        Box(*sides)


@pytest.mark.parametrize("codes", [(1,) * 15, (128,) * 16])
def test_codes_that_cannot_be(codes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="codes"):
        Box(0, 0, 1, 1, codes=codes)


# ---- points -------------------------------------------------------------------------------------------------------------


def test_points_as_molmo_writes_them() -> None:
    assert encode_points([Point(0.635, 0.445, "mug")]) == '<point x="63.5" y="44.5" alt="mug">mug</point>'
    several = [Point(0.635, 0.445, "mugs"), Point(0.1, 0.9, "mugs"), Point(0.1, 0.05, "mugs")]
    text = '<points x1="10.0" y1="5.0" x2="10.0" y2="90.0" x3="63.5" y3="44.5" alt="mugs">mugs</points>'
    assert encode_points(several) == text
    assert encode_points([]) == NO_POINTS and decode_points(NO_POINTS) == []


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 1000)), max_size=6), LABELS)
def test_points_on_the_grid_come_back(places: list[tuple[int, int]], label: str) -> None:
    given = [Point(x / 10 / 100, y / 10 / 100, label) for x, y in sorted(places)]
    assert decode_points(encode_points(given)) == given
    assert decode_points(f"Counting the {encode_points(given)} shows a total of {len(given)}.") == given


@settings(deadline=None)
@given(SHARE, SHARE)
def test_any_point_comes_back_rounded(x: float, y: float) -> None:
    (found,) = decode_points(encode_points([Point(x, y)]))
    assert abs(found.x - x) <= 0.000501 and abs(found.y - y) <= 0.000501


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ('<point x=" 63.5" y=" 44.5" alt="m">m</point>', [(63.5, 44.5)]),
        ('<point x="63" y="44" alt="m">m</point>', [(63, 44)]),
        ("Click(63.5, 44.5)", [(63.5, 44.5)]),
        ("Click(63.5,44.5) then (1.0, 2.0)", [(63.5, 44.5), (1, 2)]),
        ("it is at (63.5, 44.5)", [(63.5, 44.5)]),
        ("(50.0 70.1) and (63.5  44.5 )", [(50, 70.1), (63.5, 44.5)]),
        ("(50.070.1) (50.0 , 70.1 9.9)", []),
        ("p=635,445", [(63.5, 44.5)]),
        ("1 = 635, 445 2 = 010,020", [(63.5, 44.5), (1, 2)]),
        ('<points x1="1.0" y1="2.0" x2="3.0" y2="4', [(1, 2)]),  # still being written
        ('x="1.0" y="2.0"', [(1, 2)]),
        ("(3, 4) and (2019, 12)", []),
        ('<point x="100.1" y="2.0">m</point><point x="3.0" y="100.0">m</point>', [(3, 100)]),
        ("p=6355,445 p=635,4455", []),
        ("(1e3.0, 2.0) (nan, 1.0) <point> <points x1=1 y1=2>", []),
    ],
)
def test_forms_of_points(text: str, places: list[tuple[float, float]]) -> None:
    assert [(p.x, p.y) for p in decode_points(text)] == [(x / 100, y / 100) for x, y in places]


def test_labels_of_points() -> None:
    text = (
        '(9.0, 9.0) <point x="1.0" y="2.0">a mug</point> <points x1="3.0" y1="4.0" x2="5.0" y2="6.0" alt="&quot;b&quot; &amp; c">x</points>'
    )
    assert [p.label for p in decode_points(text)] == ["", "a mug", '"b" & c', '"b" & c']


def test_one_answer_has_one_label() -> None:
    with pytest.raises(ValueError, match="one label"):
        encode_points([Point(0, 0, "a"), Point(0, 0, "b")])


@pytest.mark.parametrize("place", [(1.1, 0), (0, -0.1), (math.nan, 0), (0, math.inf)])
def test_points_that_cannot_be(place: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="point"):
        Point(*place)


# ---- anything at all ----------------------------------------------------------------------------------------------------

PIECES = ["<loc", "<loc0256>", "<seg001>", "<seg", "1024>", "9" * 400, "<point ", "<points ", 'x="', 'x1="5.0"', ' y1="5.0"', '"', ">", "</point>",
          'alt="', "(", "1.0", ", ", ")", "Click(", "p=", "123,", "456", ";", "\n", "\0", "é", "١", " "]  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=30).map("".join)))
def test_nothing_raises(text: str) -> None:
    marks = decode(text)
    assert bool(marks) == bool(list(marks))
    assert set(marks.to_json()) == {"boxes", "points"}


def test_long_texts_take_no_time() -> None:
    for piece in ("<loc0001>", "<seg001>", "<point ", "((((", 'x="1', "p=", "1 = ", "<points x1=", ' y1="1.0" ', "9", " ", "(1.0 "):
        decode(piece * (200_000 // len(piece)))
    decode("<loc0001><loc0002><loc0003><loc0004>" + " " * 200_000 + "<")
    decode("(1.0" + " " * 200_000 + "<")
    assert len(decode("<points " + 'x="1" y="2" ' * 10_000 + 'alt="mugs">').points) == 10_000
