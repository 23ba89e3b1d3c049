"""Boxes and points drawn on their image, with labels, to be read on any background."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from kempnerforge.data.images.decode import opened
from kempnerforge.data.sample import ImageSource
from kempnerforge.eval.codecs import Box, Marks, Point, decode
from kempnerforge.util.errors import InputError
from kempnerforge.util.reading import irregular

COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#FFFFFF")
"""Told apart by colour-blind readers, too (Okabe and Ito 2008), white in place of their black. Each label has one."""
HALO = "#000000"
MIN_SIDE = 448
"""Pixels: a smaller image is enlarged by a whole factor first, so that labels can be read."""
MAX_SIDE = 4096
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
"""Of files with images, those that are read and those that are written."""

Rect = tuple[float, float, float, float]


@dataclass
class _Style:
    """Sizes in pixels that suit one image."""

    line: int
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont

    @classmethod
    def of(cls, image: Image.Image) -> _Style:
        side = min(image.size)
        return cls(max(2, round(side / 200)), ImageFont.load_default(max(13, round(side / 32))))


def draw_marks(image: Image.Image, marks: Marks) -> Image.Image:
    """A copy of ``image`` with ``marks`` on it.

    Every line has a dark edge and every label is on its own ground; labels avoid each other where there is room and are always wholly
    inside the picture.

    Args:
        image: any mode; a small one is enlarged.

    Returns:
        RGB.
    """
    picture = _enlarged(image.convert("RGB"))
    pen, style = ImageDraw.Draw(picture), _Style.of(picture)
    colours = _colours(mark.label for mark in marks)
    anchors: list[tuple[Rect, str]] = []
    for box in marks.boxes:
        anchors.append((_draw_box(pen, box, colours[box.label], style, picture.size), box.label))
    dots: dict[Rect, str] = {}
    for point in marks.points:
        dots[_draw_dot(pen, point, colours[point.label], style, picture.size)] = point.label
    named: set[str] = set()
    for rect, label in dots.items():  # of several points that are called the same, one says how; the colour says the rest
        anchors += [(rect, label)] if label not in named else []
        named.add(label)
    taken = list(dots)
    for rect, label in anchors:
        if label:
            taken.append(_draw_label(pen, rect, label, colours[label], style, picture.size, taken))
    return picture


def check_place(path: Path, images: Iterable[ImageSource]) -> None:
    """Whether a drawing may be written to ``path``.

    Raises:
        ValueError: its suffix is not one of ``SUFFIXES``, its folder is not there, or it is one of ``images``, which would be lost.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}: {path.suffix or 'no suffix'} is no format of images; take one of {', '.join(SUFFIXES)}")
    if kind := irregular(path):
        raise InputError(f"{path}: cannot be written: is {kind}")
    if not path.parent.is_dir():
        raise InputError(f"{path}: cannot be written: {path.parent} is no folder")
    if path.exists() and any(isinstance(image, Path) and image.exists() and path.samefile(image) for image in images):
        raise InputError(f"{path}: is an image that is asked about, and would be lost; write to another file")


def save_drawn(image: ImageSource, answer: str, path: Path) -> None:
    """Writes ``image`` with the boxes and points of ``answer`` on it. A file that is there already is replaced.

    Args:
        path: its suffix says in which format.

    Raises:
        ValueError: the image cannot be used, or the file not be written; see ``check_place``.
    """
    check_place(path, [image])
    with opened(image) as picture:
        drawn = draw_marks(picture.pixels(picture.size), decode(answer))
    try:
        drawn.save(encoded := io.BytesIO(), Image.registered_extensions()[path.suffix.lower()])
        path.write_bytes(encoded.getvalue())
    except (OSError, ValueError) as error:  # the latter: too large for the format
        raise InputError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from None


def _enlarged(image: Image.Image) -> Image.Image:
    factor = -(-MIN_SIDE // min(image.size))
    factor = max(1, min(factor, MAX_SIDE // max(image.size)))
    size = image.width * factor, image.height * factor
    return image if factor == 1 else image.resize(size, Image.Resampling.BICUBIC)


def _colours(labels: Iterable[str]) -> dict[str, str]:
    """One colour for each label, in order of appearance."""
    return {label: COLOURS[k % len(COLOURS)] for k, label in enumerate(dict.fromkeys(labels))}


def _draw_box(pen: ImageDraw.ImageDraw, box: Box, colour: str, style: _Style, size: tuple[int, int]) -> Rect:
    """Outlines ``box``, the line inside the picture; returns where."""
    width, height = size
    x0, y0, x1, y1 = (round(side) for side in box.pixels(width, height))
    x0, y0 = min(x0, width - 1), min(y0, height - 1)
    x1, y1 = max(x0, x1 - 1), max(y0, y1 - 1)
    edge = round(0.75 * style.line)
    pen.rectangle((x0, y0, x1, y1), outline=HALO, width=style.line + 2 * edge)
    if x1 - x0 > 2 * edge and y1 - y0 > 2 * edge:
        pen.rectangle((x0 + edge, y0 + edge, x1 - edge, y1 - edge), outline=colour, width=style.line)
    return x0, y0, x1, y1


def _draw_dot(pen: ImageDraw.ImageDraw, point: Point, colour: str, style: _Style, size: tuple[int, int]) -> Rect:
    """A disc, its middle at ``point``; returns where."""
    x, y = point.pixels(size[0] - 1, size[1] - 1)
    edge = round(0.75 * style.line)
    reach = 3 * style.line + 2 * edge
    for radius, fill in ((reach, HALO), (reach - edge, "#FFFFFF"), (reach - 2 * edge, colour)):
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    return x - reach, y - reach, x + reach, y + reach


def _draw_label(
    pen: ImageDraw.ImageDraw, rect: Rect, label: str, colour: str, style: _Style, size: tuple[int, int], taken: list[Rect]
) -> Rect:
    """Writes ``label`` at ``rect``, where it covers no earlier one if there is such a place; returns the ground it is on."""
    pad = 2 * style.line
    text = _fitting(pen, label, style, size[0] - 2 * pad - 2)
    left, top, right, bottom = pen.textbbox((0, 0), text, font=style.font)
    width, height = right - left + 2 * pad, bottom - top + 2 * pad
    places = [
        _inside(x, y, width, height, size)
        for x in (rect[0], rect[2] - width, rect[2])
        for y in (rect[1] - height, rect[1], rect[3], rect[3] - height)
    ]
    ground = min(places, key=lambda place: sum(_overlap(place, other) for other in taken))
    pen.rectangle(ground, fill=colour, outline=HALO)
    pen.text((ground[0] + pad - left, ground[1] + pad - top), text, fill=_ink(colour), font=style.font)
    return ground


def _fitting(pen: ImageDraw.ImageDraw, label: str, style: _Style, width: float) -> str:
    """``label`` on one line, cut so that it is no wider than ``width``."""
    text = " ".join("".join(char if char.isprintable() else " " for char in label[:200]).split()) or "?"
    shown = text
    while len(text) > 1 and pen.textlength(shown, font=style.font) > width:
        text = text[:-1]
        shown = text.rstrip() + "..."
    return shown


def _inside(x: float, y: float, width: float, height: float, size: tuple[int, int]) -> Rect:
    """A rectangle of that size near (x, y), wholly in the picture."""
    x = max(0.0, min(x, size[0] - 1 - width))
    y = max(0.0, min(y, size[1] - 1 - height))
    return x, y, x + width, y + height


def _overlap(a: Rect, b: Rect) -> float:
    """Pixels that both cover."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _ink(colour: str) -> str:
    """Black or white, whichever is easier to read on ``colour``."""
    red, green, blue = (int(colour[k : k + 2], 16) for k in (1, 3, 5))
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#FFFFFF"
