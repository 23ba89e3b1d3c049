"""Image tokens are in one stream with the words (LLaVA: Liu et al. 2023; PaliGemma: Beyer et al. 2024)."""

from __future__ import annotations

from torch import Tensor

from kempnerforge.config import registry
from kempnerforge.data.batching.batch import Batch
from kempnerforge.model.transformer import Cache, Context
from kempnerforge.vlm.base import VLM


@registry.register_arch("joint_decoder")
class JointDecoder(VLM):
    """Every image takes ``num_image_tokens`` positions of the stream, wherever its placeholder is."""

    def place(self, words: Tensor, features: Tensor | None, batch: Batch, cache: Cache | None) -> tuple[Tensor, Context]:
        return self.insert(words, features, batch), self.context(batch, cache, words.dtype)
