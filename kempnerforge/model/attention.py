"""Who may see whom, and the one function that computes attention.

Shapes: B rows, H query heads, G key/value heads, Q queries, K keys, S positions, E head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """The structure that attention follows, one number per key in storage order.

    A query sees a key of its own sample (padding, sample -1, sees padding) that belongs to the sample's shared part (text 0) or to its own
    text, if the key does not come later in the stream or both are of one bidirectional group.

    Attributes:
        sample_ids: (B, K) int64; -1 is padding.
        text_ids: (B, K) int64; 0 is the shared part of a sample.
        groups: (B, K) int64; tokens with the same number above 0 see each other in both directions. None: there are no such groups.
    """

    sample_ids: Tensor
    text_ids: Tensor
    groups: Tensor | None = None

    def extend(self, later: Segments) -> Segments:
        """These keys followed by ``later`` ones."""
        groups = None
        if self.groups is not None or later.groups is not None:
            parts = [s.groups if s.groups is not None else torch.zeros_like(s.text_ids) for s in (self, later)]
            groups = torch.cat(parts, dim=1)
        return Segments(torch.cat([self.sample_ids, later.sample_ids], dim=1), torch.cat([self.text_ids, later.text_ids], dim=1), groups)

    def visible(self, num_queries: int | None = None) -> Tensor:
        """(B, 1, Q, K) bool, True where the last ``num_queries`` positions (default: all) may look."""
        keys = self.sample_ids.shape[1]
        first = keys - (keys if num_queries is None else num_queries)
        pair = lambda ids: (ids[:, first:, None], ids[:, None, :])  # (B, Q, 1), (B, 1, K)
        sample_q, sample_k = pair(self.sample_ids)
        text_q, text_k = pair(self.text_ids)
        order = torch.arange(keys, device=self.sample_ids.device)
        earlier = order[first:, None] >= order[None, :]  # (Q, K)
        if self.groups is not None:
            group_q, group_k = pair(self.groups)
            earlier = earlier | ((group_q == group_k) & (group_q > 0))
        return ((sample_q == sample_k) & ((text_k == 0) | (text_k == text_q)) & earlier)[:, None]


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as scores to add: 0 where a query may look, -inf elsewhere. Adding costs nothing in the backward pass."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, scale: float | None = None, softcap: float = 0.0, causal: bool = True
) -> Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1), grouped-query when k and v have fewer heads.

    Args:
        q: (B, H, Q, E).
        k, v: (B, G, K, E); G divides H.
        mask: (B, 1, Q, K) additive; it says everything, ``causal`` is not read then.
        scale: of the scores; None means ``E ** -0.5``.
        softcap: ``cap * tanh(scores / cap)`` before the mask (Gemma 2); 0 is off.
        causal: without a mask: query i sees keys up to K - Q + i; False sees all.

    Returns:
        (B, Q, H * E).

    NOTE: on a CPU the fused kernel's backward is slow for short sequences, in bf16 by far: 5.7 ms against 0.5 ms written out for 64
    tokens, 42 against 14 for 196; they meet near 512. Elsewhere the fused kernel wins. ``benchmarks/`` measures both.
    """
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    short = q.device.type == "cpu" and k.shape[2] <= (512 if q.dtype == torch.bfloat16 else 64)
    if softcap or short:
        return written_out(q, k, v, mask, scale, softcap, causal)
    aligned = causal and mask is None and q.shape[2] != k.shape[2]
    if aligned:  # SDPA's causal mask starts at the upper left, a cache needs the lower right
        mask = _causal_bias(q, k)
    o = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal and mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return o.transpose(1, 2).flatten(2)


def _causal_bias(q: Tensor, k: Tensor) -> Tensor:
    visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
    return additive(visible, q.dtype)


def written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float, causal: bool) -> Tensor:
    batch, heads, queries, _ = q.shape
    groups = k.shape[1]
    if groups != heads:  # each key/value head serves heads / groups query heads: fold them into the query axis
        q = q.reshape(batch, groups, heads // groups * queries, -1)  # (B, G, H/G * Q, E)
    scores = (q * scale) @ k.transpose(-1, -2)
    if groups != heads:
        scores = scores.unflatten(2, (heads // groups, queries)).flatten(1, 2)  # (B, H, Q, K)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None and causal and queries > 1:
        mask = _causal_bias(q[:, :, :queries], k)
    weights = (scores if mask is None else scores + mask).softmax(-1)
    if groups != heads:
        weights = weights.unflatten(1, (groups, heads // groups)).flatten(2, 3)  # (B, G, H/G * Q, K)
    o = weights @ v
    if groups != heads:
        o = o.unflatten(2, (heads // groups, queries)).flatten(1, 2)  # (B, H, Q, E)
    return o.transpose(1, 2).flatten(2)
