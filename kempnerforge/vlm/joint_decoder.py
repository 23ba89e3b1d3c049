"""Image tokens stand in one stream with the words (LLaVA: Liu et al. 2023; PaliGemma: Beyer et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from kempnerforge.config import registry
from kempnerforge.data.batch import Batch
from kempnerforge.model.transformer import Cache, Context
from kempnerforge.vlm.base import VLM


@registry.register_arch("joint_decoder")
class JointDecoder(VLM):
    """Every image takes ``num_image_tokens`` positions of the stream, wherever its placeholder stands."""

    def place(self, words: Tensor, features: Tensor | None, batch: Batch, cache: Cache | None) -> tuple[Tensor, Context]:
        if features is not None:
            steps = torch.arange(features.shape[1], device=words.device)
            columns = batch.image_starts[:, None] + steps  # (M, F)
            rows = batch.image_rows[:, None].expand_as(columns)
            words = words.index_put((rows, columns), features[batch.image_index].to(words.dtype))
        return words, self.context(batch, cache, words.dtype)
