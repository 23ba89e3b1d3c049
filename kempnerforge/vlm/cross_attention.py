"""Images stay out of the stream: gated cross-attention blocks read them (Flamingo: Alayrac et al. 2022,
section 2.2).

Shapes: B rows, S positions, D ``model.dim``, K placements of a row with the most, F tokens of one image, Dm
their width, H query heads, G key/value heads, E head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from kempnerforge.config import ModelConfig, registry
from kempnerforge.config.vlm import CrossAttentionConfig
from kempnerforge.data.batching.batch import Batch
from kempnerforge.interop.openflamingo import read_openflamingo
from kempnerforge.interop.weights import take_weights
from kempnerforge.model.adapters import TwoLayerMLP
from kempnerforge.model.attention import additive, attend
from kempnerforge.model.hf_files import some
from kempnerforge.model.row_share import RowShare
from kempnerforge.model.tensor_plan import Share
from kempnerforge.model.transformer import MLP, Block, Cache, Context, RMSNorm, StreamDropout, init_weights, separate_draws
from kempnerforge.util.errors import InputError
from kempnerforge.vlm.base import VLM
from kempnerforge.vlm.placements import images_of_text, visible_images


class Sight(NamedTuple):
    """What the words of a stream see of its media.

    Attributes:
        mask: (B, 1, S, K * F) additive; None: a word that sees any token of its media sees all of them.
        seeing: (B, S, 1), 1 where a word reads of at least one image, else 0.
        acting: (B, S, 1), 1 where the feed-forward acts, else 0; None: on every word.

    NOTE: a word that sees none is not masked, or its softmax would be over nothing (NaN): what it reads is
    multiplied by 0.
    """

    mask: Tensor | None
    seeing: Tensor
    acting: Tensor | None = None


@dataclass(frozen=True)
class MediaContext(Context):
    """A context with the images beside the stream.

    Attributes:
        media: (B, K * F, Dm), image after image, zeros where a row has fewer; None: keys and values are in
            the cache.
        sight: who sees which.
    """

    media: Tensor | None = None
    sight: Sight | None = None


class GatedCrossAttention(nn.Module):
    """``x + tanh(a) * attention(x, media)``, then ``x + tanh(b) * mlp(x)`` (Alayrac et al. 2022, figure 4).
    Both gates start at 0, so a fresh block changes nothing. Media have no positions.

    Args:
        cfg: of the text backbone.
        n_heads, n_kv_heads: H and G.
        head_dim: E; 0: as in the text backbone.
        qk_norm, media_norm: whether there are norms on each head's q and k, and on the media.
        openflamingo: LayerNorm with bias, and two layers with a GELU, in place of RMSNorm and the backbone's.
        media_dim: Dm; 0: D.
    """

    def __init__(
        self, cfg: ModelConfig, n_heads: int, n_kv_heads: int, head_dim: int = 0, *, qk_norm: bool = False, media_norm: bool = True,
        openflamingo: bool = False, media_dim: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.head_dim, media_dim, self.openflamingo = head_dim or cfg.head_width, media_dim or cfg.dim, openflamingo
        self.enter = nn.Identity()
        kind = nn.LayerNorm if openflamingo else lambda dim: RMSNorm(dim, cfg.norm_eps, cfg.norm_plus_one)
        norm = lambda dim, used=True: kind(dim) if used else nn.Identity()
        self.norm, self.media_norm, self.mlp_norm = norm(cfg.dim), norm(media_dim, media_norm), norm(cfg.dim)
        self.q_norm, self.k_norm = norm(self.head_dim, qk_norm), norm(self.head_dim, qk_norm)
        self.q_proj = nn.Linear(cfg.dim, n_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(media_dim, n_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(media_dim, n_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(n_heads * self.head_dim, cfg.dim, bias=False)
        self.dropout = StreamDropout(cfg)
        self.mlp = TwoLayerMLP(cfg.dim, 4 * cfg.dim, cfg.dim, bias=False) if openflamingo else MLP(cfg)
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.mlp_gate = nn.Parameter(torch.zeros(1))
        init_weights(self, cfg)

    @property
    def tensor_plan(self) -> Mapping[str, Share]:
        plan = dict.fromkeys(("norm", "media_norm", "mlp_norm", "attention_gate", "mlp_gate"), Share.WHOLE)
        plan |= dict.fromkeys(("q_proj", "k_proj", "v_proj"), Share.COLUMNS) | {"o_proj": Share.ROWS}
        plan |= dict.fromkeys(("q_norm", "k_norm"), Share.INSIDE)
        return plan | ({"mlp.fc1": Share.COLUMNS, "mlp.fc2": Share.ROWS} if self.openflamingo else {"mlp": Share.WHOLE})

    def heads(self, x: Tensor) -> Tensor:
        """(B, L, heads * E) -> (B, heads, L, E)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def keys_values(self, media: Tensor) -> tuple[Tensor, Tensor]:
        """(B, K * F, Dm) -> k and v (B, G, K * F, E).

        NOTE: with the view, the gradients of this layer are summed before they are added to the gradients of
        other layers. Otherwise the order of the sum, and so its last bit, would depend on the sharding.
        """
        media = self.enter(self.media_norm(media.view_as(media)))
        return self.k_norm(self.heads(self.k_proj(media))), self.heads(self.v_proj(media))

    def forward(self, x: Tensor, k: Tensor, v: Tensor, sight: Sight, answers: Tensor | None = None) -> Tensor:
        """(B, S, D) -> (B, S, D); ``answers`` as of ``Context``."""
        q = self.q_norm(self.heads(self.q_proj(self.norm(x))))  # (B, H, S, E)
        read = self.dropout(self.o_proj(attend(q, k, v, sight.mask, causal=False)), answers)  # (B, S, D)
        x = x + self.attention_gate.tanh() * sight.seeing * read
        hidden = self.mlp_norm(x)
        hidden = self.mlp(hidden) if self.openflamingo else self.mlp(hidden, answers)
        return x + self.mlp_gate.tanh() * (hidden if sight.acting is None else sight.acting * hidden)


class CrossAttentionBlock(Block):
    """A text block with one more child, which acts in front of it.

    Args:
        cfg: of the text backbone.
        layer: i.
        vlm: what the cross-attention is made of.
    """

    def __init__(self, cfg: ModelConfig, layer: int, vlm: CrossAttentionConfig) -> None:
        super().__init__(cfg, layer)
        self.vlm = vlm
        self.make_gated(cfg.dim)

    def make_gated(self, media_dim: int) -> None:
        """Makes the child, for media of this width."""
        vlm, theirs = self.vlm, self.vlm.cross_attention_block == "openflamingo"
        how = {"qk_norm": vlm.cross_attention_qk_norm, "media_norm": vlm.cross_attention_media_norm and not theirs, "openflamingo": theirs}
        heads, kv_heads = vlm.resolved_heads(self.cfg.n_heads)
        with separate_draws():
            self.cross_attention = GatedCrossAttention(self.cfg, heads, kv_heads, vlm.cross_attention_head_dim, media_dim=media_dim, **how)

    def media_heads(self, ctx: MediaContext) -> tuple[Tensor, Tensor]:
        """Keys and values of the media, (B, G, K * F, E) each; with a cache they are computed once, with the
        prompt.
        """
        if ctx.cache is None:
            assert ctx.media is not None, "without a cache every pass has its media"
            return self.cross_attention.keys_values(ctx.media)
        name = f"media.{self.layer}"
        if ctx.media is not None:
            ctx.cache.kept[name] = self.cross_attention.keys_values(ctx.media)
        return ctx.cache.kept[name]

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        assert isinstance(ctx, MediaContext) and ctx.sight is not None
        return super().forward(self.cross_attention(x, *self.media_heads(ctx), ctx.sight, ctx.answers), ctx)


@registry.register_arch("cross_attention")
class CrossAttention(VLM):
    """A gated block before every n-th layer. The stream holds words alone, so text and its positions are the
    same as in a text-only model.
    """

    reads_any_width = True
    shares_rows = True

    @property
    def config(self) -> CrossAttentionConfig:
        return cast(CrossAttentionConfig, self.job.vlm)

    def block(self, cfg: ModelConfig, layer: int) -> Block:
        if (layer + 1) % self.config.cross_attention_every_n_layers:
            return Block(cfg, layer)
        return CrossAttentionBlock(cfg, layer, self.config)

    def build(self) -> None:
        super().build()
        for block in self.transformer.layers if self.adapter.out_dim != self.job.model.dim else ():
            if isinstance(block, CrossAttentionBlock):
                block.make_gated(self.adapter.out_dim)
        seen, unwritten = self.config.cross_attention_seen_tokens, self.config.unwritten_tokens
        if seen > self.num_image_tokens:
            raise InputError(f"vlm.cross_attention_seen_tokens = {seen}: an image has {self.num_image_tokens} tokens")
        if unwritten:
            self.config.check(self.job)  # tokens that the data needs are known by now
            head, rows = self.transformer.output_head, self.job.model.vocab_size - unwritten
            if rows < 1 or head is None:
                raise InputError(f"vlm.unwritten_tokens = {unwritten}: model.vocab_size = {self.job.model.vocab_size}")
            head.weight, head.out_features = nn.Parameter(head.weight.detach()[:rows].clone()), rows

    def warm_start(self) -> None:
        """Loads ``openflamingo_path``: all of the resampler and of the blocks, or nothing.

        Raises:
            InputError: it cannot be read, or has other tensors or shapes than the model.
        """
        if not (path := self.config.openflamingo_path):
            return
        weights = read_openflamingo(path)
        here = {name for name, _ in self.named_parameters() if name.startswith("adapter.") or ".cross_attention." in name}
        if missing := here - weights.keys():
            raise InputError(f"vlm.openflamingo_path = {path!r}: lacks {some(missing)}")
        if left := weights.keys() - here:
            raise InputError(
                f"vlm.openflamingo_path = {path!r}: has {some(left)}, for which this model has no place; the adapter must be a perceiver"
                " with project = false, max_num_frames and max_num_media, and vlm.cross_attention_every_n_layers, as there"
            )
        self.loaded |= take_weights(self, weights, path)

    def place(self, words: Tensor, features: Tensor | None, batch: Batch, cache: Cache | None) -> tuple[Tensor, Context]:
        ctx = self.context(batch, cache, words.dtype)
        if cache is not None and "sight" in cache.kept:  # words made after the prompt: no new media
            return words, MediaContext(ctx.rope, ctx.mask, cache, sight=cache.kept["sight"])
        media = gather_images(features, words, batch, self.adapter.out_dim)  # (B, K, F, Dm)
        here = self.sight(batch, media.shape[2], words.dtype, share=ctx.share)
        if cache is not None:
            cache.kept["sight"] = self.sight(following(batch), media.shape[2], words.dtype, last=1)
        return words, MediaContext(ctx.rope, ctx.mask, cache, media.flatten(1, 2), here, share=ctx.share)

    def sight(self, batch: Batch, tokens: int, dtype: torch.dtype, last: int = 0, share: RowShare | None = None) -> Sight:
        """What the last so many words of ``batch`` see (0: all words, or those of ``share``), with images of
        ``tokens`` tokens each.
        """
        cfg = self.config
        seen = visible_images(batch, cfg.cross_attention_media != "all", cfg.cross_attention_media == "latest_group")
        seen = seen[:, -last:] if share is None else share.take(seen)  # (B, S, K)
        if cfg.cross_attention_blind == "feed_forward":
            return sight(seen, tokens, dtype, first=cfg.cross_attention_seen_tokens)
        acting = seen.any(-1, keepdim=True)  # (B, S, 1)
        blind = None
        if cfg.cross_attention_blind == "attention":
            of_text = images_of_text(batch)
            blind = (of_text[:, -last:] if share is None else share.take(of_text)) & ~acting
        return sight(seen, tokens, dtype, blind, cfg.cross_attention_seen_tokens)._replace(acting=acting.to(dtype))


def gather_images(features: Tensor | None, words: Tensor, batch: Batch, width: int) -> Tensor:
    """The images of each row in the order of its stream.

    Args:
        features: (N, F, Dm); None: none was encoded.
        words: (B, S, D), for type and device.
        width: Dm.

    Returns:
        (B, K, F, Dm); where a row has fewer than K, and for a batch without any image, zeros: all parameters
        of the blocks take part in every pass, so that ranks with and without images stay in step.
    """
    slots = len(words), max(1, batch.row_images)
    if features is None:
        return words.new_zeros(*slots, 1, width)
    media = words.new_zeros(*slots, *features.shape[1:])
    return media.index_put((batch.image_rows, batch.image_slots), features[batch.image_index].to(words.dtype))


def following(batch: Batch) -> Batch:
    """``batch`` with one more position, which goes on with the last text of each row: an image at the end of
    a prompt is before it.
    """
    more = {name: torch.cat([(ids := getattr(batch, name)), ids[:, -1:]], dim=1) for name in ("input_ids", "sample_ids", "text_ids")}
    return replace(batch, **more)


def sight(seen: Tensor, tokens: int, dtype: torch.dtype, blind: Tensor | None = None, first: int = 0) -> Sight:
    """The masks of blocks, from ``seen`` (B, S, K), for images of ``tokens`` tokens each.

    Args:
        blind: (B, S, K) bool, images that words read without seeing them.
        first: how many tokens of a seen image are seen, from its first one on; 0: all.
    """
    reads = seen if blind is None else seen | blind
    any_read = reads.any(-1, keepdim=True)  # (B, S, 1)
    if seen.shape[-1] == 1 and first in (0, tokens):
        return Sight(None, any_read.to(dtype))
    keys = reads.repeat_interleave(tokens, -1)  # (B, S, K * F)
    if first:
        in_first = torch.arange(tokens, device=seen.device) < first  # (F,)
        keys = (seen[..., None] & in_first).flatten(2) | (blind.repeat_interleave(tokens, -1) if blind is not None else False)
    mask = additive((keys | ~any_read)[:, None], dtype)  # (B, 1, S, K * F)
    return Sight(mask, any_read.to(dtype))
