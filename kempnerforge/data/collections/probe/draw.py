"""From placed things to a PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from kempnerforge.data.collections.probe.scene import COLOURS, Placed
from kempnerforge.data.images.decode import encode_png
from kempnerforge.util.errors import InputError

FINE = 4
"""Pixels are drawn this many times finer and averaged: smooth edges."""
WHITE = (255, 255, 255)


def _star() -> tuple[tuple[float, float], ...]:
    turns = [math.pi * k / 5 for k in range(10)]
    return tuple((math.sin(t) * r, -math.cos(t) * r) for k, t in enumerate(turns) for r in [0.42 if k % 2 else 1.0])


POLYGONS: dict[str, tuple[tuple[float, float], ...]] = {
    "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    "triangle": ((0, -1), (1, 0.85), (-1, 0.85)),
    "diamond": ((0, -1), (0.75, 0), (0, 1), (-0.75, 0)),
    "cross": (
        (-0.33, -1), (0.33, -1), (0.33, -0.33), (1, -0.33), (1, 0.33), (0.33, 0.33),
        (0.33, 1), (-0.33, 1), (-0.33, 0.33), (-1, 0.33), (-1, -0.33), (-0.33, -0.33),
    ),
    "star": _star(),
}  # fmt: skip
"""Corners, for a box from -1 to 1. A circle has none."""


def draw_scene(placed: Sequence[Placed], side: int, rng: Random, background: str = "white", noise: float = 0.0) -> bytes:
    """The picture as a PNG.

    Args:
        rng: of background and noise.
        background: "white", or "varied": some pale colour.
        noise: standard deviation of Gaussian noise on every value; 1 is the range of values.
    """
    ground = tuple(rng.randint(215, 255) for _ in range(3)) if background == "varied" else WHITE
    image = Image.new("RGB", (side * FINE, side * FINE), ground)
    pen = ImageDraw.Draw(image)
    for one in placed:
        _draw(pen, one, side * FINE)
    image = image.reduce(FINE)
    if noise:
        pixels = np.asarray(image, dtype=np.float32)
        pixels = pixels + np.random.default_rng(rng.getrandbits(64)).normal(0, 255 * noise, pixels.shape)
        image = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    return encode_png(image, compress_level=1)


def _draw(pen: ImageDraw.ImageDraw, one: Placed, side: int) -> None:
    x, y, radius = one.x * side, one.y * side, one.size * side / 2
    colour = COLOURS[one.thing.colour]
    if one.thing.writing:
        room = 2 * one.half[0] * side
        font = _font(max(1, round(2 * radius)))
        if (width := font.getlength(one.thing.writing)) > room:
            font = _font(max(1, int(2 * radius * room / width)))
        pen.text((x, y), one.thing.writing, fill=colour, font=font, anchor="mm")
    elif one.thing.shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    else:
        pen.polygon([(x + radius * dx, y + radius * dy) for dx, dy in POLYGONS[one.thing.shape]], fill=colour)


@lru_cache(maxsize=64)
def _font(pixels: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font; raises ValueError where it was built without FreeType."""
    font = ImageFont.load_default(pixels)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise InputError("data.source = 'probe': this Pillow has no FreeType and cannot write; install a wheel of it: pip install pillow")
    return font
