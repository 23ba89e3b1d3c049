"""A contact sheet: many images in one picture, each with its text below."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GAP = 12  # pixels between tiles and around the sheet
LETTER = 7  # pixels of one, about
MAX_LINES = 12  # of a caption; a longer one ends in "..."
BACKGROUND, INK, FRAME = (255, 255, 255), (30, 33, 40), (205, 209, 217)


def contact_sheet(images: np.ndarray, captions: Sequence[str], columns: int = 4, tile: int = 192) -> Image.Image:
    """Lays images out in rows of ``columns``, each scaled to fit a square of ``tile`` pixels, with its
    caption below; RGB.

    Args:
        images: (N, 3, H, W) uint8, RGB.
        captions: one per image; characters without a glyph are replaced.

    Raises:
        ValueError: the images have another shape or type, or there are not as many captions.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images are {images.dtype} {images.shape}: must be uint8 (N, 3, H, W)")
    if len(captions) != len(images):
        raise ValueError(f"{len(captions)} captions for {len(images)} images: must be as many")
    cards = [_card(pixels, caption, tile) for pixels, caption in zip(images, captions, strict=True)]
    rows = [cards[start : start + columns] for start in range(0, len(cards), columns)]
    heights = [GAP + max(card.height for card in row) for row in rows]
    sheet = Image.new("RGB", (GAP + max(1, min(columns, len(cards))) * (tile + GAP), GAP + sum(heights)), BACKGROUND)
    frames = ImageDraw.Draw(sheet)
    for number, row in enumerate(rows):
        top = GAP + sum(heights[:number])
        for column, card in enumerate(row):
            left = GAP + column * (tile + GAP)
            sheet.paste(card, (left, top))
            frames.rectangle((left - 1, top - 1, left + tile, top + tile), outline=FRAME)
    return sheet


def _card(pixels: np.ndarray, caption: str, tile: int) -> Image.Image:
    """One image, (3, H, W), in the middle of its tile, and its caption; small ones grow by a whole factor so
    that their pixels stay visible.
    """
    picture = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))  # (H, W, 3)
    factor = tile / max(picture.size)
    width, height = (max(1, round(side * (int(factor) if factor >= 1 else factor))) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.BICUBIC)
    font = _font()
    encoding = "utf-8" if isinstance(font, ImageFont.FreeTypeFont) else "latin-1"
    known = "".join(c if c.isprintable() or c.isspace() else "?" for c in caption).encode(encoding, "replace").decode(encoding)
    text = "\n".join(textwrap.wrap(known, tile // LETTER, max_lines=MAX_LINES, placeholder=" ..."))
    bottom = ImageDraw.Draw(picture).multiline_textbbox((0, tile + 6), text, font=font)[3]
    card = Image.new("RGB", (tile, max(tile, int(np.ceil(bottom)))), BACKGROUND)
    card.paste(picture, ((tile - width) // 2, (tile - height) // 2))
    ImageDraw.Draw(card).multiline_text((0, tile + 6), text, fill=INK, font=font)
    return card


def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Pillow's own font; where it was built without FreeType, that is a small bitmap font for Latin-1."""
    try:
        return ImageFont.load_default(size=13)
    except ImportError:
        return ImageFont.load_default()
