"""Images and texts in one space of embeddings (CLIP: Radford et al. 2021; SigLIP: Zhai et al. 2023), and
captions from the same model if wanted (CoCa: Yu et al. 2022).

Shapes: B rows, S positions, D ``model.dim``, N images, F tokens of one image, Dm their width, P pairs of a
text and its image on this rank, A pairs on all ranks, E ``embed_dim``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kempnerforge.config import ModelConfig, registry
from kempnerforge.config.vlm_dual_encoder import DualEncoderConfig
from kempnerforge.data.batching.batch import Batch
from kempnerforge.distributed.rows import gather_rows
from kempnerforge.model.transformer import Block, Cache, Context, init_weights, separate_draws
from kempnerforge.util.errors import InputError, NotBuiltError
from kempnerforge.vlm.base import Output
from kempnerforge.vlm.cross_attention import CrossAttention
from kempnerforge.vlm.placements import with_answers

LARGEST_SCALE = 100.0
"""Of CLIP's logits (Radford et al. 2021, section 2.5). A scale that is larger gets no gradient."""


@registry.register_arch("dual_encoder")
class DualEncoder(CrossAttention):
    """A text with exactly one image is a pair; the two get embeddings of length 1 that are alike. Other texts
    are in no pair, and an image of several views (``data.images.fit = "tiles"``) is not one image.

    The text tower is the text backbone, the same as in all archs, and no layer of it knows images: they are
    not in the stream. Of an image's tokens after the adapter the mean is projected (so ``adapter.type =
    "perceiver"`` is attention pooling; ``vision_encoder.pooled`` is CLIP's and SigLIP's way), of a text the
    last token or the mean, after the final norm.

    With ``caption_weight`` the lower half of the layers is that tower, as in CoCa; in the upper half every
    layer has a gated cross-attention block of ``CrossAttention`` in front of it, and the next token is
    predicted. One pass through the backbone serves both losses, and what a text's embedding is made of has
    not met its image by construction, not by a mask.

    Negatives are the other pairs of a micro-batch on all ranks: gradient accumulation adds none. Other texts
    of the same image are neither positive nor negative. In evaluation, negatives are of this rank alone.
    """

    shares_rows = False

    def build(self) -> None:
        super().build()
        cfg = self.dual
        with separate_draws("contrastive"):
            width = self.adapter.out_dim
            self.image_projection = nn.Linear(width, cfg.embed_dim, bias=False) if cfg.image_projection else nn.Identity()
            self.text_projection = nn.Linear(self.job.model.dim, cfg.embed_dim, bias=cfg.text_projection_bias)
            init_weights(self.image_projection, self.job.model)
            init_weights(self.text_projection, self.job.model)
        if not cfg.image_projection and width != cfg.embed_dim:
            raise InputError(f"vlm.embed_dim = {cfg.embed_dim}: image_projection = false, and the adapter gives tokens {width} wide")
        siglip = cfg.loss == "siglip"
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(10.0 if siglip else 1 / 0.07)))
        self.logit_bias = nn.Parameter(torch.full((1,), -10.0)) if siglip else None

    @property
    def dual(self) -> DualEncoderConfig:
        """The ``[vlm]`` section."""
        assert isinstance(self.job.vlm, DualEncoderConfig), "the loader makes the section of the arch's own class"
        return self.job.vlm

    @property
    def config(self) -> Any:
        """Of the layers that read images."""
        return self.dual.captioning

    @property
    def gives(self) -> frozenset[str]:
        return frozenset({"embeddings", "words"} if self.dual.caption_weight else {"embeddings"})

    @property
    def text_layers(self) -> int:
        """How many layers are the text tower."""
        layers = self.job.model.n_layers
        return layers // 2 if self.dual.caption_weight else layers

    def block(self, cfg: ModelConfig, layer: int) -> Block:
        return Block(cfg, layer) if layer < self.text_layers else super().block(cfg, layer)

    def place(self, words: Tensor, features: Tensor | None, batch: Batch, cache: Cache | None) -> tuple[Tensor, Context]:
        if self.dual.caption_weight:
            return super().place(words, features, batch, cache)
        return words, self.context(batch, cache, words.dtype)

    def forward(self, batch: Batch, cache: Cache | None = None) -> Output:
        """As ``VLM.forward``, with ``pair_loss`` and ``embeddings``. Without ``caption_weight`` there are no
        logits, and the loss of words is 0.

        Raises:
            NotImplementedError: it is asked to write and has no ``caption_weight``.
            InputError: it learns embeddings alone, and the micro-batch has fewer than two pairs on all ranks.
        """
        weight = self.dual.caption_weight
        if cache is not None or batch.images is None:  # there are words alone
            if not weight:
                raise NotBuiltError("vlm.caption_weight = 0: this model gives embeddings and writes no text")
            return super().forward(batch, cache)
        features = self.features(batch)
        assert features is not None
        x, ctx = self.place(self.transformer.embed(batch.input_ids), features, batch, None)
        ctx = with_answers(ctx, batch, self.job.model, self.stored)
        x = self.transformer.run(x, ctx, slice(self.text_layers))
        embeddings = self.embed(features, x, batch)  # (P, 2, E)
        pair_loss = self.contrast(embeddings, batch.pair_images)
        if weight:
            x = self.transformer.run(x, ctx, slice(self.text_layers, None))
            output = self.score_stream(self.read(x, ctx, batch), batch)
            weighted = None if output.weighted_loss is None else weight * output.weighted_loss
            output = output._replace(loss=weight * output.loss, weighted_loss=weighted) if self.training else output
        else:
            output = Output(pair_loss.new_zeros(()), pair_loss.new_zeros(0, self.job.model.vocab_size), self.extra_loss(batch))
        return output._replace(pair_loss=pair_loss, embeddings=embeddings.detach())

    def embed(self, features: Tensor, x: Tensor, batch: Batch) -> Tensor:
        """The embeddings of image and text of each pair, of length 1, in fp32.

        Args:
            features: (N, F, Dm) adapted images.
            x: (B, S, D) the stream after the text tower.

        Returns:
            (P, 2, E).
        """
        pairs, ids = batch.num_pairs, batch.pair_ids.flatten()  # (B * S,), -1 on words of no pair
        ids, x = torch.where(ids < 0, pairs, ids), x.flatten(0, 1)
        if self.dual.pooling == "last":
            places = torch.arange(len(ids), device=ids.device)
            texts = x[places.new_zeros(pairs + 1).scatter_reduce(0, ids, places, "amax")[:pairs]]
        else:
            ones = F.pad(x.float(), (0, 1), value=1.0)  # (B * S, D + 1), a one to count with
            sums = ones.new_zeros(pairs + 1, ones.shape[-1]).index_add(0, ids, ones)[:pairs]
            texts = (sums[:, :-1] / sums[:, -1:]).to(x.dtype)
        texts = self.text_projection(self.transformer.norm(texts))
        images = self.image_projection(features.mean(1))[batch.pair_images]
        return F.normalize(torch.stack([images, texts], dim=1).float(), dim=-1)

    def contrast(self, embeddings: Tensor, images: Tensor) -> Tensor:
        """The loss, summed over the pairs of this rank; it is divided by the pairs of all ranks.

        Args:
            embeddings: (P, 2, E).
            images: (P,) which image of the batch is in each pair.

        Raises:
            InputError: see ``forward``.
        """
        every, before = gather_rows(embeddings.flatten(1), self.pair_ranks) if self.training else (embeddings.flatten(1), 0)  # (A, 2 * E)
        if self.training and not self.dual.caption_weight and len(every) < 2 and not every.is_meta:
            raise InputError(
                f"vlm.arch = {self.dual.arch!r}: texts with exactly one image in a micro-batch of all ranks together: {len(every)}; two are"
                " needed. Raise train.batch_size, or see what the data hold: kempnerforge inspect"
            )
        own = before + torch.arange(len(embeddings), device=embeddings.device)  # (P,) which of the A are these
        other = F.pad(images[:, None] == images, (before, len(every) - before - len(images)))  # (P, A)
        other[torch.arange(len(own), device=own.device), own] = False  # another text of the same image
        logits = [embeddings[:, at] @ every.unflatten(1, (2, -1))[:, 1 - at].T for at in (0, 1)]  # (P, A): of images, of texts
        scale = self.logit_scale.float().exp()
        if self.logit_bias is not None:  # Zhai et al. 2023, algorithm 1; each image of this rank with each text of all
            signs = (torch.arange(len(every), device=own.device) == own[:, None]) * 2.0 - 1.0  # (P, A)
            return -F.logsigmoid(signs * (logits[0] * scale + self.logit_bias.float())).masked_fill(other, 0.0).sum()
        scale = scale.clamp(max=LARGEST_SCALE)
        scaled = [(one * scale).masked_fill(other, -math.inf) for one in logits]
        return torch.stack([F.cross_entropy(one, own, reduction="sum") for one in scaled]).mean()
