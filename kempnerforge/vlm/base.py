"""The contract between an architecture and everything else: trainer, sharding, evaluation, checkpoints see only this class.

An arch overrides ``block`` (which block makes layer i) and ``place`` (what enters the residual stream, and what a block may read besides
it), seldom more. It *adds* modules and never renames: a text checkpoint fits every arch with only new keys missing.

Shapes: B rows, S positions, D ``model.dim``, N images, M placements of them, F tokens of one image, T trained positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from kempnerforge.config import JobConfig, ModelConfig
from kempnerforge.data.batch import IGNORE, Batch, Kind
from kempnerforge.model.adapters import build_adapter
from kempnerforge.model.attention import Segments, additive
from kempnerforge.model.rope import rope_tables
from kempnerforge.model.transformer import Block, Cache, Context, Transformer
from kempnerforge.model.vision import build_vision_encoder


@dataclass
class Output:
    """What a forward pass gives.

    Attributes:
        loss: cross-entropy SUMMED over the batch's targets, fp32; the trainer divides by the count over all ranks and micro-batches.
        logits: (T, V) fp32 at the targets; with a cache (B, V), of the token after each row.
    """

    loss: Tensor
    logits: Tensor


class VLM(nn.Module):
    """A vision-language model around one text backbone. Children: ``transformer``, ``vision_encoder``, ``adapter``.

    Args:
        job: the resolved config, ``model.vocab_size`` set.
    """

    has_images = True
    """Whether the arch reads images; a text-only one builds no encoder and no adapter."""

    def __init__(self, job: JobConfig) -> None:
        super().__init__()
        self.job = job
        self.transformer = Transformer(job.model, self.block)
        self.num_image_tokens = 0
        if self.has_images:
            self.vision_encoder = build_vision_encoder(job.vision_encoder)
            self.adapter = build_adapter(job.adapter, self.vision_encoder.dim, job.model.dim, self.vision_encoder.num_tokens)
            self.num_image_tokens = self.adapter.num_tokens
            job.check_sequence(self.num_image_tokens)

    # ---- what an arch overrides ------------------------------------------------------------------------------------

    def block(self, cfg: ModelConfig, layer: int) -> Block:
        """Makes layer ``layer``."""
        return Block(cfg, layer)

    def place(self, words: Tensor, features: Tensor | None, batch: Batch, cache: Cache | None) -> tuple[Tensor, Context]:
        """Builds the residual stream.

        Args:
            words: (B, S, D) embedded ``batch.input_ids``.
            features: (N, F, D) adapted images, or None when there are none in this pass.

        Returns:
            The stream, (B, S, D), and what blocks may read besides it.
        """
        raise NotImplementedError

    # ---- what it may use -------------------------------------------------------------------------------------------

    def context(self, batch: Batch, cache: Cache | None, dtype: torch.dtype) -> Context:
        """Positions and mask of a stream that is laid out as ``batch`` says. Without documents, groups and cache the mask is None."""
        kind = self.job.vlm.attention_mask if self.job.vlm is not None else "causal"
        text_ids = batch.text_ids
        if kind == "prefix":  # PaliGemma: the image sees the prompt too, unless there are several that must not see each other
            text_ids = text_ids * (text_ids.amax(dim=1, keepdim=True) > 1)
        groups = _bidirectional_groups(kind, batch, text_ids)
        segments = Segments(batch.sample_ids, text_ids, groups)
        rope = rope_tables(batch.positions, self.job.model)
        if cache is not None:
            cache.segments = segments if cache.segments is None else cache.segments.extend(segments)
            mask = additive(cache.segments.visible(batch.input_ids.shape[1]), dtype)
            return Context(rope, mask, cache)
        if groups is None and not batch.has_documents:
            return Context(rope)
        return Context(rope, additive(segments.visible(), dtype))

    # ---- the same for every arch -----------------------------------------------------------------------------------

    def encode(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) uint8 -> (N, F, D)."""
        return self.adapter(self.vision_encoder(images))

    def forward(self, batch: Batch, cache: Cache | None = None) -> Output:
        """Training and evaluation without ``cache``; one step of generation with it.

        NOTE: a batch whose ``images`` is empty (not None) still runs the encoder, on one blank image times zero: every rank must call the
        same modules, or sharded ones wait for each other forever.
        """
        words = self.transformer.embed(batch.input_ids)  # (B, S, D)
        features = None
        if self.has_images and batch.images is not None:
            if len(batch.images):
                features = self.encode(batch.images)  # (N, F, D)
            else:
                words = words + 0 * self.encode(batch.images.new_zeros(1, *batch.images.shape[1:])).sum()
        x, ctx = self.place(words, features, batch, cache)
        x = self.transformer.run(x, ctx)
        if cache is not None:
            logits = self.transformer.unembed(x[:, -1])  # (B, V)
            return Output(logits.new_zeros(()), logits)
        logits = self.transformer.unembed(x.flatten(0, 1)[batch.targets])  # (T, V): the head runs on trained positions only
        labels = batch.labels.flatten()[batch.targets]
        return Output(F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum"), logits)

    def shard_units(self) -> Iterator[nn.Module]:
        """The modules that are sharded, checkpointed and compiled one by one. They do not overlap; the root takes what is left."""
        if self.has_images:
            yield from self.vision_encoder.units
        yield from self.transformer.layers


def _bidirectional_groups(kind: str, batch: Batch, text_ids: Tensor) -> Tensor | None:
    """(B, S): positions with the same number above 0 see each other in both directions."""
    if kind == "causal":
        return None
    if kind == "prefix":
        return ((batch.kinds == Kind.IMAGE) | (batch.kinds == Kind.PROMPT)) * (1 + text_ids)
    starts = torch.zeros_like(text_ids)
    starts[batch.image_rows, batch.image_starts] = 1
    return starts.cumsum(1) * (batch.kinds == Kind.IMAGE)  # the n-th image of a row is group n
