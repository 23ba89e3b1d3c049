"""Values as HTML: text that is escaped, images that lie in the page."""

from __future__ import annotations

import base64
import io
from html import escape

import numpy as np
from markupsafe import Markup
from PIL import Image

from kempnerforge.util.errors import visible

SMALL_SIDE, MAX_SIDE = 96, 512
"""Pixels. Up to the first, an image is kept and shown with sharp pixels; over the second, it is shrunk."""


def text(value: object, keep: str = "") -> str:
    """Escaped for HTML and XML; controls (except ``keep``) and half surrogates become visible escapes."""
    return escape(visible(str(value), keep + "\u00a0"), quote=True)


def picture(image: np.ndarray, name: str, side: int = MAX_SIDE) -> Markup:
    """An ``img`` element with the pixels in it.

    Args:
        image: (H, W, 3) uint8, RGB.
        name: alternative text.
        side: pixels of the longer side; a larger image is shrunk to it.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image is {image.dtype} {image.shape}: must be uint8 (H, W, 3)")
    drawn, buffer = Image.fromarray(np.ascontiguousarray(image)), io.BytesIO()
    small = max(drawn.size) <= SMALL_SIDE
    drawn.thumbnail((side, side))
    kind, options = ("png", {"optimize": True}) if small else ("jpeg", {"quality": 88})
    drawn.save(buffer, kind, **options)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Markup(f'<img{" class=small" if small else ""} alt="{text(name)}" src="data:image/{kind};base64,{data}">')
