"""Image tokens are in one stream with the words (LLaVA: Liu et al. 2023; PaliGemma: Beyer et al. 2024)."""

from __future__ import annotations

from torch import Tensor

from kempnerforge.config import registry
from kempnerforge.config.images import NEWLINE
from kempnerforge.data.batching.batch import Batch
from kempnerforge.model.transformer import Cache, Context
from kempnerforge.vlm.base import VLM


@registry.register_arch("joint_decoder")
class JointDecoder(VLM):
    """Every image takes ``num_image_tokens`` positions of the stream, wherever its placeholder is."""

    shares_rows = True

    def place(self, words: Tensor, features: Tensor | None, batch: Batch, cache: Cache | None) -> tuple[Tensor, Context]:
        return self.insert(words, features, batch), self.context(batch, cache, words.dtype)

    def with_image_ids(self, batch: Batch, image_id: int) -> Tensor:
        """The token at the end of a row of an image's tokens is one of its positions, too, as in LLaVA-NeXT."""
        ids, model = super().with_image_ids(batch, image_id), self.job.model
        if NEWLINE not in model.new_tokens:
            return ids
        return ids.masked_fill(ids == model.vocab_size + model.new_tokens.index(NEWLINE), image_id)
