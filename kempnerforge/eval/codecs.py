"""Boxes and points that models write as text, both ways.

PaliGemma (Beyer et al. 2024, section 3.2) writes a box as four location tokens, **y first**, in 1024ths of
the side, then sixteen codes of a mask where it segments, then a label; several are separated by " ; "::

    <loc0256><loc0128><loc0768><loc0512> cat ; <loc0000><loc0512><loc1023><loc0600><seg000>...<seg127> dog

Molmo (Deitke et al. 2024, section 4) writes points as percent of the side with one decimal, x first::

    <point x="63.5" y="44.5" alt="mug">mug</point>
    <points x1="10.0" y1="5.5" x2="63.5" y2="44.5" alt="mugs">mugs</points>

Here every coordinate is a share of the side, from 0 at the left or top to 1. What a model writes is never
trusted: decoding skips what is malformed and raises nothing. Only encoding, which is given to us by a person,
refuses.
"""

from __future__ import annotations

import html
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kempnerforge.util.errors import InputError

LOC_BINS = 1024
SEG_BINS = 128
SEG_CODES = 16
NO_POINTS = "There are none."
"""What Molmo answers where nothing is to be pointed at."""


@dataclass(frozen=True)
class Box:
    """A rectangle on an image.

    Attributes:
        x0, y0, x1, y1: shares of width and height, 0 <= x0 <= x1 <= 1 and so for y.
        label: of what is in it.
        codes: sixteen numbers below 128, the code of its mask; or none.
    """

    x0: float
    y0: float
    x1: float
    y1: float
    label: str = ""
    codes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not (0 <= self.x0 <= self.x1 <= 1 and 0 <= self.y0 <= self.y1 <= 1):
            raise InputError(f"box ({self.x0}, {self.y0}, {self.x1}, {self.y1}): needs 0 <= x0 <= x1 <= 1 and 0 <= y0 <= y1 <= 1")
        if self.codes and (len(self.codes) != SEG_CODES or not all(0 <= code < SEG_BINS for code in self.codes)):
            raise InputError(f"box: {len(self.codes)} mask codes {self.codes}: needs {SEG_CODES} from 0 to {SEG_BINS - 1}, or none")

    def pixels(self, width: float, height: float) -> tuple[float, float, float, float]:
        """(x0, y0, x1, y1) on an image of that size."""
        return self.x0 * width, self.y0 * height, self.x1 * width, self.y1 * height


@dataclass(frozen=True)
class Point:
    """A place on an image.

    Attributes:
        x, y: shares of width and height, 0 to 1.
        label: of what is there.
    """

    x: float
    y: float
    label: str = ""

    def __post_init__(self) -> None:
        if not (0 <= self.x <= 1 and 0 <= self.y <= 1):
            raise InputError(f"point ({self.x}, {self.y}): needs 0 <= x <= 1 and 0 <= y <= 1")

    def pixels(self, width: float, height: float) -> tuple[float, float]:
        """(x, y) on an image of that size."""
        return self.x * width, self.y * height


# ---- boxes ---------------------------------------------------------------------------------------

_BOX = re.compile(
    r"(?P<locs>(?:<loc[0-9]{4}>)+)"  # a run of another length than four is no box
    r"(?:\s*(?P<segs>(?:<seg[0-9]{3}>)+))?"
    r"[^\S\n]*(?P<label>[^;<>\n]*)"  # of the same line
)
_NUMBER = re.compile(r"[0-9]+")


def decode_boxes(text: str) -> list[Box]:
    """The boxes in ``text``, in order. A box whose mask codes are not sixteen valid ones comes without them;
    what is no box is skipped.
    """
    boxes = []
    for match in _BOX.finditer(text):
        locs = [int(n) for n in _NUMBER.findall(match["locs"])]
        codes = tuple(int(n) for n in _NUMBER.findall(match["segs"] or ""))
        if len(locs) != 4 or max(locs) >= LOC_BINS or locs[0] > locs[2] or locs[1] > locs[3]:
            continue
        if len(codes) != SEG_CODES or max(codes) >= SEG_BINS:
            codes = ()
        y0, x0, y1, x1 = (n / LOC_BINS for n in locs)
        boxes.append(Box(x0, y0, x1, y1, match["label"].strip(), codes))
    return boxes


def encode_boxes(boxes: Sequence[Box]) -> str:
    """``boxes`` as PaliGemma writes them. Decoding gives them back with sides rounded to 1024ths (at most
    1023 of them).

    Raises:
        ValueError: a label holds one of "; < >" or a line break, which would end it.
    """
    return " ; ".join(_encode_box(box) for box in boxes)


def _encode_box(box: Box) -> str:
    if re.search(r"[;<>\n]", box.label):
        raise InputError(f"box label {box.label!r}: must not hold ';', '<', '>' or a line break")
    sides = (min(round(side * LOC_BINS), LOC_BINS - 1) for side in (box.y0, box.x0, box.y1, box.x1))
    locs = "".join(f"<loc{side:04d}>" for side in sides)
    codes = "".join(f"<seg{code:03d}>" for code in box.codes)
    return f"{locs}{codes} {box.label.strip()}".rstrip()


# ---- points --------------------------------------------------------------------------------------

_N = r"([0-9]+(?:\.[0-9]+)?)"
_TAG = re.compile(r"<points?\s(?P<attributes>[^<>]*)(?:>(?P<inner>[^<]*))?")
_ALT = re.compile(r'\balt\s*=\s*"([^"]*)"')
_PLACE = re.compile(
    rf'x[0-9]*="\s*{_N}\s*"\s+y[0-9]*="\s*{_N}\s*"'
    r"|\(\s*([0-9]+\.[0-9]+)(?:\s*,\s*|\s+)([0-9]+\.[0-9]+)\s*\)"  # also Click(a, b); whole numbers in brackets are more often something else
    r"|\b(?:p|[0-9]+)\s*=\s*([0-9]{3})\s*,\s*([0-9]{3})(?![0-9])"  # tenths of a percent
)


def decode_points(text: str) -> list[Point]:
    """The points in ``text``, in order, in any of Molmo's forms: tags, "(63.5, 44.5)" with or without a
    comma, "Click(63.5, 44.5)", "p=635,445". Coordinates above 100 are no point and skipped. A label is what a
    tag says; the other forms have none.
    """
    tags = [(tag.start(), tag.end("attributes"), _label(tag)) for tag in _TAG.finditer(text)]
    points = []
    for match in _PLACE.finditer(text):
        tenths = match[5] is not None
        x, y = (float(n) / (10 if tenths else 1) for n in match.groups() if n is not None)
        if x <= 100 and y <= 100:
            before = bisect_right(tags, match.start(), key=lambda tag: tag[0]) - 1
            inside = before >= 0 and match.start() < tags[before][1]
            points.append(Point(x / 100, y / 100, tags[before][2] if inside else ""))
    return points


def _label(tag: re.Match[str]) -> str:
    alt = _ALT.search(tag["attributes"])
    return html.unescape(alt[1] if alt else tag["inner"] or "").strip()


def encode_points(points: Sequence[Point]) -> str:
    """``points`` as Molmo writes them, from left to right, and in one column from top to bottom. None of
    them: ``NO_POINTS``.

    Raises:
        ValueError: they have different labels; one answer points at one thing.
    """
    if not points:
        return NO_POINTS
    labels = {point.label.strip() for point in points}
    if len(labels) > 1:
        raise InputError(f"points with labels {sorted(labels)}: one answer has one label; encode them apart")
    label = html.escape(labels.pop(), quote=False).replace('"', "&quot;")
    places = sorted((round(100 * point.x, 1), round(100 * point.y, 1)) for point in points)
    if len(places) == 1:
        return f'<point x="{places[0][0]:.1f}" y="{places[0][1]:.1f}" alt="{label}">{label}</point>'
    attributes = " ".join(f'x{k}="{x:.1f}" y{k}="{y:.1f}"' for k, (x, y) in enumerate(places, 1))
    return f'<points {attributes} alt="{label}">{label}</points>'


# ---- both ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Marks:
    """What an answer marks on its image."""

    boxes: tuple[Box, ...] = ()
    points: tuple[Point, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.boxes or self.points)

    def __iter__(self) -> Iterator[Box | Point]:
        yield from self.boxes
        yield from self.points

    def to_json(self) -> dict[str, list[dict[str, object]]]:
        """Plain lists, coordinates as shares of the side."""
        return {
            "boxes": [
                {"label": b.label, "x0": b.x0, "y0": b.y0, "x1": b.x1, "y1": b.y1, **({"codes": list(b.codes)} if b.codes else {})}
                for b in self.boxes
            ],
            "points": [{"label": p.label, "x": p.x, "y": p.y} for p in self.points],
        }


def decode(text: str) -> Marks:
    """All boxes and points in ``text``."""
    return Marks(tuple(decode_boxes(text)), tuple(decode_points(text)))
