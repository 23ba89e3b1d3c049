"""A contact sheet: many images in one picture, each with its text below."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GAP = 12  # pixels between tiles and around the sheet
MAX_LINES = 12  # of a caption; a longer one ends in "..."
BACKGROUND, INK, FRAME = (255, 255, 255), (30, 33, 40), (205, 209, 217)

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


def contact_sheet(images: Tensor | np.ndarray, captions: Sequence[str], columns: int = 4, tile: int = 192) -> Image.Image:
    """Lays images out in rows of ``columns``, each scaled to fit a square of ``tile`` pixels, with its caption wrapped below.

    Args:
        images: (N, 3, H, W) uint8, RGB; N may be 0.
        captions: one per image; line breaks are kept, characters without a glyph are replaced.
        columns: tiles side by side.
        tile: side of a tile in pixels.

    Returns:
        An RGB picture as tall as the captions need.

    Raises:
        ValueError: the images have another shape or type, or there are not as many captions.
    """
    pixels = images.detach().cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"images are {pixels.dtype} {pixels.shape}: must be uint8 (N, 3, H, W)")
    if len(captions) != len(pixels):
        raise ValueError(f"{len(captions)} captions for {len(pixels)} images: must be as many")
    if columns < 1 or tile < 16:
        raise ValueError(f"columns = {columns}, tile = {tile}: must be at least 1 and 16")
    font = _font()
    line_height = sum(_extent("Ag|ÅÇ", font)[1:])
    texts = [_wrap(caption, tile, font) for caption in captions]
    rows = [range(start, min(start + columns, len(pixels))) for start in range(0, len(pixels), columns)]
    heights = [tile + 6 + line_height * max(len(texts[index]) for index in row) for row in rows]
    width = GAP + max(1, min(columns, len(pixels))) * (tile + GAP)
    sheet = Image.new("RGB", (width, GAP + sum(height + GAP for height in heights) if rows else tile), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    if not rows:
        draw.text((GAP, GAP), "no images", fill=INK, font=font)
    top = GAP
    for row, height in zip(rows, heights, strict=True):
        for column, index in enumerate(row):
            left = GAP + column * (tile + GAP)
            _paste(sheet, draw, pixels[index], left, top, tile)
            for number, line in enumerate(texts[index]):
                draw.text((left, top + tile + 6 + number * line_height), line, fill=INK, font=font)
        top += height + GAP
    return sheet


def _paste(sheet: Image.Image, draw: ImageDraw.ImageDraw, pixels: np.ndarray, left: int, top: int, tile: int) -> None:
    """One image, (3, H, W), in the middle of its tile; small ones grow by a whole factor so that their pixels stay visible."""
    picture = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))  # (H, W, 3)
    factor = tile / max(picture.size)
    grown = factor >= 1
    factor = int(factor) if grown else factor
    size = tuple(max(1, round(side * factor)) for side in picture.size)
    picture = picture.resize((size[0], size[1]), Image.Resampling.NEAREST if grown else Image.Resampling.BICUBIC)
    draw.rectangle((left - 1, top - 1, left + tile, top + tile), outline=FRAME)
    sheet.paste(picture, (left + (tile - size[0]) // 2, top + (tile - size[1]) // 2))


def _font() -> Font:
    """Pillow's own font; where it was built without FreeType, that is a small bitmap font for Latin-1."""
    try:
        return ImageFont.load_default(size=13)
    except ImportError:
        return ImageFont.load_default()


def _extent(text: str, font: Font) -> tuple[int, int, int]:
    """Width of a line, and its height with the space to the next as two terms, in pixels."""
    _, _, right, bottom = font.getbbox(text)
    return int(np.ceil(right)), int(np.ceil(bottom)), 3


def _printable(text: str, font: Font) -> str:
    """``text`` without what the font cannot take: half surrogates and controls, and all beyond Latin-1 for a bitmap font."""
    encoding = "utf-8" if isinstance(font, ImageFont.FreeTypeFont) else "latin-1"
    known = text.expandtabs(4).encode(encoding, "replace").decode(encoding)
    return "".join(c if c.isprintable() else "?" for c in known)


def _wrap(text: str, width: int, font: Font) -> list[str]:
    """Lines no wider than ``width`` pixels: broken at spaces, and inside words that are too long."""
    lines: list[str] = []
    for paragraph in text.splitlines():
        line = ""
        for word in _printable(paragraph, font).split(" "):
            longer = f"{line} {word}" if line else word
            if _extent(longer, font)[0] <= width:
                line = longer
                continue
            if line:
                lines.append(line)
            while len(word) > 1 and _extent(word, font)[0] > width and len(lines) <= MAX_LINES:
                fits = max(1, sum(_extent(word[:end], font)[0] <= width for end in range(1, min(len(word), width) + 1)))
                lines.append(word[:fits])
                word = word[fits:]
            line = word
            if len(lines) > MAX_LINES:
                break
        lines.append(line)
        if len(lines) > MAX_LINES:
            return [*lines[: MAX_LINES - 1], "..."]
    return lines
