"""The text backbone that every architecture is built around. It knows nothing about images.

Shapes: B rows, S positions, D ``dim``, H query heads, G key/value heads, E head width, V vocabulary.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from kempnerforge.config.model import GATED, ModelConfig
from kempnerforge.model.attention import ByWindow, Mask, Segments, attend
from kempnerforge.model.rope import Rope, rope_of_layer, rotate
from kempnerforge.model.row_share import RowShare
from kempnerforge.model.tensor_plan import Share, mine


class Cache:
    """Keys and values of the positions so far, one entry per layer, and the structure they belong to.

    Attributes:
        segments: that structure.
        kept: what an arch computes once, with the prompt, under names that the arch chooses: tensors with a
            row for each prompt, tuples of them, or a cache of transformers.
    """

    def __init__(self) -> None:
        self.segments: Segments | None = None
        self.kept: dict[str, Any] = {}
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends ``k`` and ``v`` (B, G, S, E) of ``layer``; returns all of them, (B, G, K, E)."""
        if layer in self._layers:
            past_k, past_v = self._layers[layer]
            k, v = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
        self._layers[layer] = k, v
        return k, v

    def take(self, rows: Tensor) -> None:
        """Goes on with ``rows`` (B',) int64 of the batch, in this order; one may be there several times."""
        self._layers = _rows_of(self._layers, rows)
        self.kept = _rows_of(self.kept, rows)
        self.segments = self.segments.rows(rows) if self.segments is not None else None


def _rows_of(kept: Any, rows: Tensor) -> Any:
    if isinstance(kept, Tensor):
        return kept.index_select(0, rows)
    if isinstance(kept, dict):
        return {name: _rows_of(value, rows) for name, value in kept.items()}
    if isinstance(kept, tuple):
        return tuple.__new__(type(kept), (_rows_of(value, rows) for value in kept))  # a named one as well
    if kept is not None:
        kept.reorder_cache(rows)
    return kept


@dataclass(frozen=True)
class Context:
    """Inputs of a block in addition to the residual stream. An arch subclasses it to add fields.

    Attributes:
        rope: tables of the stream's positions, for all layers; a block takes its own.
        mask: which position sees which, for all layers; None is plain causal. A block takes the mask of its
            window.
        cache: keys and values of earlier positions, when generating.
        answers: (B, S) bool, where ``ModelConfig.answer_dropout`` acts; None: the model has none.
        share: the positions of the stream that this rank has, if others have the other ones. All that has
            positions is of these alone, but for the keys of the mask, which are of all ranks.
    """

    rope: Rope
    mask: Mask | ByWindow | None = None
    cache: Cache | None = None
    answers: Tensor | None = field(default=None, kw_only=True)
    share: RowShare | None = field(default=None, kw_only=True)


@contextmanager
def separate_draws(name: str = "") -> Iterator[None]:
    """Random draws inside take no numbers from the usual stream: modules that an arch adds to a layer do not
    change the text weights after it.

    Args:
        name: the seed depends on it and on the state of the usual stream; two of these blocks between the
            same two draws need two names.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), device="cpu")) + zlib.crc32(name.encode()))
        yield


def init_weights(module: nn.Module, cfg: ModelConfig) -> None:
    """Gives all linear layers of ``module`` the standard deviation ``init_std``; 0 leaves them as they are."""
    if cfg.init_std:
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=cfg.init_std)


class RMSNorm(nn.Module):
    """Root mean square norm in fp32 (Zhang and Sennrich 2019, eq. 4); ``plus_one`` scales by ``1 + weight``
    with weights that start at 0 (Gemma).

    NOTE: written out, as ``torch.nn.RMSNorm`` takes 1.4 to 2.7 times as long in bf16 on a CPU.
    """

    def __init__(self, dim: int, eps: float, plus_one: bool = False) -> None:
        super().__init__()
        self.eps, self.plus_one = eps, plus_one
        self.weight = nn.Parameter(torch.zeros(dim) if plus_one else torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        mean_square = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square() / x32.shape[-1]
        x32 = x32 * torch.rsqrt(mean_square + self.eps)
        weight = mine(self.weight)
        if self.plus_one:  # Gemma multiplies before it casts back
            return (x32 * (1.0 + weight.float())).to(x.dtype)
        return x32.to(x.dtype) * weight

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}, plus_one={self.plus_one}"


def stream_norm(cfg: ModelConfig) -> nn.Module:
    """The norm that ``cfg.norm`` names, of vectors of width D."""
    if cfg.norm == "layer_norm":
        return nn.LayerNorm(cfg.dim, eps=cfg.norm_eps)
    return RMSNorm(cfg.dim, cfg.norm_eps, cfg.norm_plus_one)


class StreamDropout(nn.Module):
    """Dropout of what is added to the stream: ``answer_dropout`` at answers, if there is one, and ``dropout``
    elsewhere, each with what is kept divided by the share of it.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.p, self.at_answers = cfg.dropout, cfg.answer_dropout

    def forward(self, x: Tensor, answers: Tensor | None = None) -> Tensor:
        """(B, S, D), (B, S) -> (B, S, D)."""
        if not self.at_answers or not self.training:
            return F.dropout(x, self.p, self.training) if self.p else x
        assert answers is not None, "model.answer_dropout: a layer must be told Context.answers in training"
        kept = torch.where(answers, 1 - self.at_answers, 1 - self.p)[..., None]  # (B, S, 1) fp32
        return (x * (torch.rand_like(x, dtype=kept.dtype) < kept) / kept).to(x.dtype)

    def extra_repr(self) -> str:
        return f"p={self.p}, at_answers={self.at_answers}"


class Attention(nn.Module):
    """Projections of self-attention; the product itself is ``attend``."""

    tensor_plan: ClassVar[Mapping[str, Share]] = {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj"), Share.COLUMNS),
        **dict.fromkeys(("q_norm", "k_norm"), Share.INSIDE),
        "o_proj": Share.ROWS,
        "post_norm": Share.WHOLE,
    }

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.head_dim, self.turns = cfg.head_width, cfg.positions == "rope"
        qkv_bias = cfg.qkv_bias or cfg.bias
        self.enter = nn.Identity()
        self.q_proj = nn.Linear(cfg.dim, cfg.n_heads * self.head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(cfg.dim, cfg.kv_heads * self.head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(cfg.dim, cfg.kv_heads * self.head_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(cfg.n_heads * self.head_dim, cfg.dim, bias=cfg.bias)
        self.post_norm = _post_norm(cfg)
        self.dropout = StreamDropout(cfg)
        if cfg.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, cfg.norm_eps, cfg.norm_plus_one)
            self.k_norm = RMSNorm(self.head_dim, cfg.norm_eps, cfg.norm_plus_one)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def qkv(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """``x`` (B, S, D) -> q (B, H, S, E), k and v (B, G, S, E), q and k rotated if positions are."""
        x = self.enter(x)
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))  # (B, S, H or G, E)
        q, k = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2)
        if self.turns:
            q, k = rotate(q, rope), rotate(k, rope)
        return q, k, v.transpose(1, 2)

    def out(self, o: Tensor, answers: Tensor | None = None) -> Tensor:
        """The heads' outputs, projected: (B, S, H * E) -> (B, S, D); ``answers`` as of ``Context``."""
        return self.dropout(self.post_norm(self.o_proj(o)), answers)


def _post_norm(cfg: ModelConfig) -> nn.Module:
    return stream_norm(cfg) if cfg.post_norms else nn.Identity()


class MLP(nn.Module):
    """Feed-forward: SwiGLU or GeGLU (Shazeer 2020, eq. 6), or two layers with a GELU between them."""

    tensor_plan: ClassVar[Mapping[str, Share]] = {
        "gate_proj": Share.COLUMNS,
        "up_proj": Share.COLUMNS,
        "down_proj": Share.ROWS,
        "post_norm": Share.WHOLE,
    }

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.enter = nn.Identity()
        self.activation = _ACTIVATIONS.get(cfg.activation, _gelu)
        self.gate_proj = nn.Linear(cfg.dim, cfg.ffn_width, bias=cfg.bias) if cfg.activation in GATED else None
        self.up_proj = nn.Linear(cfg.dim, cfg.ffn_width, bias=cfg.bias)
        self.down_proj = nn.Linear(cfg.ffn_width, cfg.dim, bias=cfg.bias)
        self.post_norm = _post_norm(cfg)
        self.dropout = StreamDropout(cfg)

    def forward(self, x: Tensor, answers: Tensor | None = None) -> Tensor:
        x = self.enter(x)
        hidden = self.up_proj(x) if self.gate_proj is None else self.gate_proj(x)
        hidden = self.activation(hidden) if self.gate_proj is None else self.activation(hidden) * self.up_proj(x)
        return self.dropout(self.post_norm(self.down_proj(hidden)), answers)


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS = {"swiglu": F.silu, "gelu_exact": F.gelu, "quick_gelu": _quick_gelu}
"""The other ones are a tanh GELU."""


class Block(nn.Module):
    """One pre-norm layer in two halves, so that an arch can compute something between them."""

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.cfg, self.layer = cfg, layer
        self.scale, self.softcap = cfg.attention_scale or None, cfg.attention_softcap
        self.window = cfg.window(layer)
        self.attention_norm = stream_norm(cfg)
        self.attention = Attention(cfg)
        self.mlp_norm = stream_norm(cfg)
        self.mlp = MLP(cfg)
        init_weights(self, cfg)

    def rope(self, ctx: Context) -> Rope:
        """The tables of this layer."""
        return rope_of_layer(ctx.rope, self.cfg, self.layer)

    def pre(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Norm and projections: (B, S, D) -> q (B, H, S, E), k and v (B, G, S, E). ``rope`` is this layer's."""
        return self.attention.qkv(self.attention_norm(x), rope)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Tensor:
        """Attention with the cache, the other ranks and the mask of ``ctx`` -> (B, S, H * E)."""
        if ctx.cache is not None:
            k, v = ctx.cache.update(self.layer, k, v)
        if ctx.share is not None:
            k, v = ctx.share.gather(k, v)
        mask = ctx.mask.masks[self.window] if isinstance(ctx.mask, ByWindow) else ctx.mask
        assert mask is not None or not 0 < self.window < k.shape[2], "beyond the window a layer needs the mask of Segments"
        return attend(q, k, v, mask, scale=self.scale, softcap=self.softcap)

    def post(self, x: Tensor, o: Tensor, answers: Tensor | None = None) -> Tensor:
        """Output projection and feed-forward, each added to the stream: (B, S, D), (B, S, H * E) -> (B, S,
        D); ``answers`` as of ``Context``.
        """
        x = x + self.attention.out(o, answers)
        return x + self.mlp(self.mlp_norm(x), answers)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        told = () if ctx.answers is None else (ctx.answers,)  # a subclass may have a ``post`` without
        return self.post(x, self.attend(*self.pre(x, self.rope(ctx)), ctx), *told)


class NewTokens(nn.Module):
    """Embeddings of tokens after the base vocabulary, apart from it: they can train while the rest of the
    embedding is frozen (Flamingo, Alayrac et al. 2022, trains only the embeddings of its special tokens).

    Args:
        count: n, how many.
        dim: D.
        tied: the output head reads the embedding, too.
        std: of fresh embeddings.
        written: w, how many have a logit: the first ones.
    """

    def __init__(self, count: int, dim: int, tied: bool, std: float, written: int) -> None:
        super().__init__()
        self.written = written
        self.embedding = nn.Embedding(count, dim)
        self.output_head = None if tied or not written else nn.Linear(dim, written, bias=False)
        nn.init.normal_(self.embedding.weight, std=std)

    def embed(self, ids: Tensor, base: nn.Embedding) -> Tensor:
        """``ids`` (B, S) of both vocabularies -> (B, S, D)."""
        first = base.num_embeddings
        is_new = (ids >= first)[..., None]  # (B, S, 1)
        return torch.where(is_new, self.embedding((ids - first).clamp(min=0)), base(ids.clamp(max=first - 1)))

    def logits(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., w)."""
        return F.linear(x, self.embedding.weight[: self.written]) if self.output_head is None else self.output_head(x)


class Transformer(nn.Module):
    """Decoder-only language model: ``embed``, ``run`` through the layers, ``unembed``.

    Args:
        cfg: with ``vocab_size`` set; V is that and the new tokens.
        block: makes layer i; an arch passes its own.
    """

    def __init__(self, cfg: ModelConfig, block: Callable[[ModelConfig, int], Block] = Block) -> None:
        super().__init__()
        assert cfg.vocab_size > 0, "the vocabulary size is resolved from the tokenizer before the model is built"
        self.cfg = cfg
        std = cfg.init_std or 0.02
        self.token_embedding = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.layers = nn.ModuleList(block(cfg, layer) for layer in range(cfg.n_layers))
        self.embed_norm = stream_norm(cfg) if cfg.embed_norm else None
        self.norm = stream_norm(cfg)
        self.output_head = None if cfg.tie_embeddings else nn.Linear(cfg.dim, cfg.vocab_size, bias=False)
        nn.init.normal_(self.token_embedding.weight, std=std)
        if self.output_head is not None:
            init_weights(self.output_head, cfg)
        self.position_embedding = None
        if cfg.positions == "learned":
            with separate_draws("positions"):
                self.position_embedding = nn.Embedding(cfg.max_seq_len, cfg.dim)
                nn.init.normal_(self.position_embedding.weight, std=std)
        self.new_tokens = None
        if cfg.new_tokens:
            with separate_draws():
                count = len(cfg.new_tokens)
                self.new_tokens = NewTokens(count, cfg.dim, cfg.tie_embeddings, std, count - cfg.unwritten_new_tokens)

    def embed(self, ids: Tensor) -> Tensor:
        """(B, S) -> (B, S, D)."""
        x = self.token_embedding(ids) if self.new_tokens is None else self.new_tokens.embed(ids, self.token_embedding)
        return x * x.new_full((), self.cfg.dim**0.5) if self.cfg.embed_scale else x

    def run(self, x: Tensor, ctx: Context, layers: slice = slice(None)) -> Tensor:
        """All layers, or ``layers`` of them: (B, S, D) -> (B, S, D). Of ``ctx`` learned positions are read, and
        no more.
        """
        if self.position_embedding is not None and not layers.start:
            x = x + self.position_embedding(ctx.rope[0][:, 0, :, 0]).to(x.dtype)
        if self.embed_norm is not None and not layers.start:
            x = self.embed_norm(x)
        for layer in self.layers[layers]:
            x = layer(x, ctx)
        return x

    def unembed(self, x: Tensor) -> Tensor:
        """Final norm and head: (..., D) -> (..., V) in fp32."""
        x = self.norm(x)
        logits = F.linear(x, self.token_embedding.weight) if self.output_head is None else self.output_head(x)
        if self.new_tokens is not None and self.new_tokens.written:
            logits = torch.cat([logits, self.new_tokens.logits(x)], dim=-1)
        logits = logits.float()
        cap = self.cfg.logit_softcap
        return cap * torch.tanh(logits / cap) if cap else logits
