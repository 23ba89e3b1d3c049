"""How much of the attention of trained words is on image tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from kempnerforge.data.batching.batch import Batch, Kind
from kempnerforge.model.transformer import Block, Context
from kempnerforge.vlm.base import VLM


class AttentionShare:
    """The share of attention that is on images, for each layer of a stream that holds image tokens.

    Attention is linear in its values. With 1 as the value of an image token and 0 as the value of a word, its
    output is the share that a query spends on images, with every form of mask. A layer that is watched
    attends once more, without gradients. ``remove`` gives the layers their own method back.

    Attributes:
        layers: numbers of the layers; empty for an arch whose stream holds words alone.
    """

    def __init__(self, model: VLM) -> None:
        vlm = model.job.vlm
        in_stream = vlm is not None and model.has_images and vlm.residual_stream_image_tokens(model.num_image_tokens)
        blocks = [module for module in model.modules() if isinstance(module, Block)] if in_stream else []
        self.layers = [block.layer for block in blocks]
        self._model, self._blocks, self._batch = model, blocks, None
        self._found: dict[int, Tensor] = {}
        for block in blocks:
            block.attend = partial(self._attend, block.layer, block.attend)

    def watch(self, batch: Batch | None) -> None:
        """The next pass reads ``batch``; None ends the watch."""
        self._batch = batch

    def take(self) -> list[float]:
        """Of what was watched, for each layer: the sum of the shares over trained words that see an image,
        means over heads, and the number of these words.
        """
        found, self._found = self._found, {}
        return [value for layer in self.layers for value in (found[layer].tolist() if layer in found else (0.0, 0.0))]

    def remove(self) -> None:
        """Ends it, as the handles of torch's hooks do."""
        for block in self._blocks:
            del block.attend  # of the instance

    def _attend(self, layer: int, attend: Any, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Tensor:
        if self._batch is not None and layer not in self._found:
            with torch.no_grad():
                image = self._model.stored((self._batch.kinds == Kind.IMAGE).to(v.dtype), ctx)  # (B, K)
                share = attend(q, k, image[:, None, :, None].expand_as(v), ctx)  # (B, K, H * E), equal within a head
                of_words = self._model.read(share, ctx, self._batch).float().mean(-1)  # (T,)
                self._found[layer] = torch.stack([of_words.sum(), (of_words > 0).sum()])
        return attend(q, k, v, ctx)
