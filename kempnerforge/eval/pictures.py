"""The images of questions that are asked together."""

from __future__ import annotations

import numpy as np
import torch

from kempnerforge.data.batching.batch import Part
from kempnerforge.data.batching.collate import stack_views
from kempnerforge.data.sample import ImageSource
from kempnerforge.data.text.encode import Encoder
from kempnerforge.data.text.interleave import ImageBlock
from kempnerforge.eval.exam import BLANK


class Pictures:
    """The distinct views of a chunk, made once for each image; None is a blank one."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder, self.size = encoder, encoder.layout.image_size
        self._places: dict[tuple[ImageSource, int], list[int]] = {}
        self._blanks: dict[Part | None, int] = {}
        self._pixels: list[np.ndarray] = []

    def places(self, image: ImageSource | None, block: ImageBlock, part: int) -> list[int]:
        """Indices of an image's views in ``stack``; of the blank one for each view if there is no image."""
        if image is None:
            return [self.blank(shown) for shown in block.parts] or [self.blank()] * len(block.starts)
        if (image, part) not in self._places:
            self._places[image, part] = self._add(self.encoder.images[part].load(image, block.views))
        return self._places[image, part]

    def blank(self, shown: Part | None = None) -> int:
        """Index of the blank view, one for each part of it that is shown."""
        if shown not in self._blanks:
            (self._blanks[shown],) = self._add([np.full((self.size, self.size, 3), BLANK, np.uint8)])
        return self._blanks[shown]

    def _add(self, views: list[np.ndarray]) -> list[int]:
        self._pixels += views
        return list(range(len(self._pixels) - len(views), len(self._pixels)))

    def stack(self) -> torch.Tensor | None:
        """(N, 3, H, W) uint8; None where the job has no images."""
        return stack_views(self._pixels, self.size) if self.size else None
