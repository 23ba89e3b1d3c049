"""Boxes and points drawn on their image, with labels, to be read on any background."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from kempnerforge.data.images.decode import opened
from kempnerforge.data.sample import ImageSource
from kempnerforge.eval.codecs import Box, Marks, Point, decode
from kempnerforge.util.errors import InputError
from kempnerforge.util.reading import irregular

if TYPE_CHECKING:
    from kempnerforge.eval.masks import MaskDecoder

COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#FFFFFF")
"""Told apart by colour-blind readers, too (Okabe and Ito 2008), white in place of their black. Each label has
one."""
HALO = "#000000"
MIN_SIDE = 448
"""Pixels: a smaller image is enlarged by a whole factor first, so that labels can be read."""
MAX_SIDE = 4096
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
"""Of files with images, those that are read and those that are written."""


class Rect(NamedTuple):
    """A rectangle in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Rect) -> float:
        """Pixels that both cover."""
        width, height = min(self.right, other.right) - max(self.left, other.left), min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, width) * max(0.0, height)


def draw_marks(image: Image.Image, marks: Marks, decoder: MaskDecoder | None = None) -> Image.Image:
    """A copy of ``image`` with ``marks`` on it.

    Every line has a dark edge and every label is on its own ground; labels avoid each other where there is
    room and are always wholly inside the picture.

    Args:
        image: any mode; a small one is enlarged.
        decoder: of the masks of boxes, which are tinted; None: they are not shown.

    Returns:
        RGB.
    """
    canvas = _Canvas(_enlarged(image.convert("RGB")))
    colours = _colours(mark.label for mark in marks)
    for box in marks.boxes:
        if decoder is not None and box.codes:
            canvas.tint(decoder.on_image(box, *canvas.picture.size), colours[box.label])
    anchors = [(canvas.box(box, colours[box.label]), box.label) for box in marks.boxes]
    dots = {canvas.dot(point, colours[point.label]): point.label for point in marks.points}
    named: set[str] = set()
    for rect, label in dots.items():  # of several points that are called the same, one says how; the colour says the rest
        anchors += [(rect, label)] if label not in named else []
        named.add(label)
    taken = list(dots)
    for rect, label in anchors:
        if label:
            taken.append(canvas.label(rect, label, colours[label], taken))
    return canvas.picture


def check_place(path: Path, images: Iterable[ImageSource]) -> None:
    """Whether a drawing may be written to ``path``.

    Raises:
        ValueError: its suffix is not one of ``SUFFIXES``, its folder is not there, or it is one of
            ``images``, which would be lost.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}: {path.suffix or 'no suffix'} is no format of images; take one of {', '.join(SUFFIXES)}")
    if kind := irregular(path):
        raise InputError(f"{path}: cannot be written: is {kind}")
    if not path.parent.is_dir():
        raise InputError(f"{path}: cannot be written: {path.parent} is no folder")
    if path.exists() and any(isinstance(image, Path) and image.exists() and path.samefile(image) for image in images):
        raise InputError(f"{path}: is an image that is asked about, and would be lost; write to another file")


def save_drawn(image: ImageSource, answer: str, path: Path, decoder: MaskDecoder | None = None) -> None:
    """Writes ``image`` with the boxes and points of ``answer`` on it. A file that is there already is
    replaced.

    Args:
        path: its suffix says in which format.

    Raises:
        ValueError: the image cannot be used, or the file not be written; see ``check_place``.
    """
    check_place(path, [image])
    with opened(image) as picture:
        drawn = draw_marks(picture.pixels(picture.size), decode(answer), decoder)
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


class _Canvas:
    """A picture that is drawn on, in place, with lines and letters that suit its size."""

    def __init__(self, picture: Image.Image) -> None:
        self.picture, self.pen = picture, ImageDraw.Draw(picture)
        side = min(picture.size)
        self.line = max(2, round(side / 200))  # pixels
        self.edge = round(0.75 * self.line)
        self.font = ImageFont.load_default(max(13, round(side / 32)))

    def tint(self, mask: np.ndarray, colour: str) -> None:
        """Half of ``colour`` over the pixels of ``mask``, (H, W) bool."""
        self.picture.paste(colour, mask=Image.fromarray(mask.astype(np.uint8) * 128))

    def box(self, box: Box, colour: str) -> Rect:
        """Outlines ``box``, the line inside the picture; returns where."""
        width, height = self.picture.size
        x0, y0, x1, y1 = (round(side) for side in box.pixels(width, height))
        x0, y0 = min(x0, width - 1), min(y0, height - 1)
        x1, y1 = max(x0, x1 - 1), max(y0, y1 - 1)
        edge = self.edge
        self.pen.rectangle((x0, y0, x1, y1), outline=HALO, width=self.line + 2 * edge)
        if x1 - x0 > 2 * edge and y1 - y0 > 2 * edge:
            self.pen.rectangle((x0 + edge, y0 + edge, x1 - edge, y1 - edge), outline=colour, width=self.line)
        return Rect(x0, y0, x1, y1)

    def dot(self, point: Point, colour: str) -> Rect:
        """A disc, its middle at ``point``; returns where."""
        x, y = point.pixels(self.picture.width - 1, self.picture.height - 1)
        reach = 3 * self.line + 2 * self.edge
        for radius, fill in ((reach, HALO), (reach - self.edge, "#FFFFFF"), (reach - 2 * self.edge, colour)):
            self.pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        return Rect(x - reach, y - reach, x + reach, y + reach)

    def label(self, rect: Rect, label: str, colour: str, taken: Sequence[Rect]) -> Rect:
        """Writes ``label`` at ``rect``, where it covers none of ``taken`` if there is such a place; returns
        the ground it is on.
        """
        pad = 2 * self.line
        text = self._fitting(label, self.picture.width - 2 * pad - 2)
        left, top, right, bottom = self.pen.textbbox((0, 0), text, font=self.font)
        width, height = right - left + 2 * pad, bottom - top + 2 * pad
        places = [
            self._inside(x, y, width, height)
            for x in (rect.left, rect.right - width, rect.right)
            for y in (rect.top - height, rect.top, rect.bottom, rect.bottom - height)
        ]
        ground = min(places, key=lambda place: sum(place.overlap(other) for other in taken))
        self.pen.rectangle(ground, fill=colour, outline=HALO)
        self.pen.text((ground.left + pad - left, ground.top + pad - top), text, fill=_ink(colour), font=self.font)
        return ground

    def _fitting(self, label: str, width: float) -> str:
        """``label`` on one line, cut so that it is no wider than ``width``."""
        text = " ".join("".join(char if char.isprintable() else " " for char in label[:200]).split()) or "?"
        shown = text
        while len(text) > 1 and self.pen.textlength(shown, font=self.font) > width:
            text = text[:-1]
            shown = text.rstrip() + "..."
        return shown

    def _inside(self, x: float, y: float, width: float, height: float) -> Rect:
        """A rectangle of that size near (x, y), wholly in the picture."""
        x = max(0.0, min(x, self.picture.width - 1 - width))
        y = max(0.0, min(y, self.picture.height - 1 - height))
        return Rect(x, y, x + width, y + height)


def _ink(colour: str) -> str:
    """Black or white, whichever is easier to read on ``colour``."""
    red, green, blue = (int(colour[k : k + 2], 16) for k in (1, 3, 5))
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#FFFFFF"
