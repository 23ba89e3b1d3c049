"""Random changes to an image in training."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance

from kempnerforge.config.images import AugmentConfig


class Change(NamedTuple):
    """Random changes to one image.

    Attributes:
        box: the part that is taken: left, upper, right and lower edge as shares of width and height.
    """

    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    flip: bool = False
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0

    def part(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """``box`` in pixels of an image of ``size`` (width, height)."""
        return self.box[0] * size[0], self.box[1] * size[1], self.box[2] * size[0], self.box[3] * size[1]

    def recolour(self, image: Image.Image) -> Image.Image:
        """``image`` mirrored and with its colours changed."""
        if self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for factor, enhance in (
            (self.brightness, ImageEnhance.Brightness),
            (self.contrast, ImageEnhance.Contrast),
            (self.saturation, ImageEnhance.Color),
        ):
            if factor != 1.0:
                image = enhance(image).enhance(factor)
        return image


def draw_changes(cfg: AugmentConfig, rng: np.random.Generator) -> Change:
    """A change as ``cfg`` allows. Every kind has its own number among those drawn, so that one can be
    switched without changing the others.
    """
    area, aspect, left, upper, flip, *colours = rng.random(8)
    share = cfg.crop_scale + (1 - cfg.crop_scale) * area
    factor = cfg.crop_ratio ** (2 * aspect - 1) if cfg.crop_scale < 1 else 1.0
    width, height = min(1.0, (share * factor) ** 0.5), min(1.0, (share / factor) ** 0.5)
    left, upper = left * (1 - width), upper * (1 - height)
    brightness, contrast, saturation = (
        float(1 + strength * (2 * value - 1))
        for strength, value in zip((cfg.brightness, cfg.contrast, cfg.saturation), colours, strict=True)
    )
    box = float(left), float(upper), float(left + width), float(upper + height)
    return Change(box, bool(flip < cfg.flip), brightness, contrast, saturation)
