"""No images at all: a plain language model. A job without ``[vlm]`` is this."""

from __future__ import annotations

from torch import Tensor

from kempnerforge.data.batching.batch import Batch
from kempnerforge.model.transformer import Cache, Context
from kempnerforge.vlm.base import VLM


class TextOnly(VLM):
    """The text backbone with the interface of every arch."""

    has_images = False
    shares_rows = True

    def place(self, words: Tensor, features: Tensor | None, batch: Batch, cache: Cache | None) -> tuple[Tensor, Context]:
        return words, self.context(batch, cache, words.dtype)
