"""Molmo's way from vision features to words: attention over each window of patches, then a gated MLP (Deitke
et al. 2024, arXiv 2409.17146, section 2; ``attention-meanq`` and the image projector in their code).

Shapes: N images, F features of one image, s ``factor``, T windows, Di ``in_dim``, Do ``out_dim``, H heads, E
head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kempnerforge.config import registry
from kempnerforge.config.adapter import GridAdapterConfig
from kempnerforge.config.checks import at_least
from kempnerforge.model.adapters import GridAdapter
from kempnerforge.model.transfer import told
from kempnerforge.util.errors import InputError


@registry.register_adapter_config
@dataclass
class AttentionPoolConfig(GridAdapterConfig):
    """Each window of features becomes one token, by multi-head attention whose query is their mean; a gated
    MLP follows, and a learned embedding of image tokens is added (Molmo). A grid whose side is no multiple of
    ``factor`` is filled up with zeros at the right and at the bottom.

    Attributes:
        hidden_dim: of the gated MLP; 0 means 4 times the language model's width. Molmo has the hidden width
            of the language model's own MLP.
        bias: whether the layers of the attention have biases; the MLP has none.
        heads, head_dim: of the attention; their product is its width, in Molmo the width of one layer of the
            encoder.
        pad_embed: two learned vectors are added to features before they are pooled, one where a patch shows
            nothing of its image and one where it shows it in part (Molmo's ``pad_and_partial_pad``); with
            ``data.images.fit = "letterbox"`` and "tiles", which fill up views.
    """

    type: str = "attention_pool"
    heads: int = 16
    head_dim: int = 64
    pad_embed: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "heads", "head_dim")

    @property
    def reads_padding(self) -> bool:
        return self.pad_embed

    def num_tokens(self, num_features: int) -> int:
        side = math.isqrt(num_features)
        if self.factor > side:
            raise InputError(f"factor = {self.factor}: is larger than the grid of {side} x {side} vision features")
        full = side + -side % self.factor
        return super().num_tokens(full**2 if side**2 == num_features else num_features)


class GatedMLP(nn.Module):
    """SwiGLU without biases (Shazeer 2020)."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(in_dim, hidden_dim, bias=False)
        self.up = nn.Linear(in_dim, hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, out_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_dim) -> (..., out_dim)."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


def padding_of(contents: Tensor, side: int) -> Tensor:
    """What patches show: 0, the image; 1, nothing of it; 2, a part.

    Args:
        contents: (N, 5) int64, as of ``AttentionPoolAdapter.forward``.
        side: patches along a side.

    Returns:
        (N, side * side) int64.
    """
    top, left, bottom, right = (contents[:, :4] * side).T[..., None]  # (N, 1) each, a pixel is ``side`` long
    size = contents[:, 4:]
    begins = torch.arange(side, device=contents.device) * size  # (N, side)
    rows, columns = ((end.minimum(begins + size) - first.maximum(begins)).clamp(min=0) for first, end in ((top, bottom), (left, right)))
    shown = (rows[:, :, None] * columns[:, None]).flatten(1)
    return torch.where(shown == 0, 1, torch.where(shown < size**2, 2, 0))


@registry.register_adapter("attention_pool")
class AttentionPoolAdapter(GridAdapter):
    """Attention over windows with their mean as query, then ``proj``, a gated MLP; the result is added to
    ``image_token``, the embedding of the token at the positions of images, which is learned.

    NOTE: a window has one query and s^2 keys, so the products are written out: fused kernels on GPUs
    take at most 65,535 sequences, and a batch of tiles has more windows.
    """

    def __init__(self, cfg: AttentionPoolConfig, in_dim: int, out_dim: int, num_features: int) -> None:
        super().__init__(cfg, in_dim, out_dim, num_features)
        self.heads, width = cfg.heads, cfg.heads * cfg.head_dim
        self.q_proj = nn.Linear(in_dim, width, bias=cfg.bias)
        self.k_proj = nn.Linear(in_dim, width, bias=cfg.bias)
        self.v_proj = nn.Linear(in_dim, width, bias=cfg.bias)
        self.o_proj = nn.Linear(width, width, bias=cfg.bias)
        self.proj = GatedMLP(width, cfg.hidden_dim or 4 * out_dim, out_dim)
        self.image_token = nn.Parameter(0.02 * torch.randn(out_dim))
        self.pad_embed = nn.Parameter(torch.zeros(2, in_dim)) if cfg.pad_embed else None

    def prepare(self, features: Tensor) -> Tensor:
        """(N, F, Di) -> (N, T, H * E)."""
        side = math.isqrt(features.shape[1])
        more = self.side * self.factor - side
        grid = F.pad(features.unflatten(1, (side, side)), (0, 0, 0, more, 0, more)).flatten(1, 2)
        x = self.windows(grid).transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (N, T, s^2, Di)
        q = self.q_proj(x.mean(dim=2)).unflatten(-1, (self.heads, -1))  # (N, T, H, E)
        k, v = (proj(x).unflatten(-1, (self.heads, -1)) for proj in (self.k_proj, self.v_proj))  # (N, T, s^2, H, E)
        scores = torch.einsum("nthe,ntshe->nths", q, k).float() / math.sqrt(q.shape[-1])
        return self.o_proj(torch.einsum("nths,ntshe->nthe", scores.softmax(dim=-1).to(v.dtype), v).flatten(2))

    def forward(self, features: Tensor, contents: Sequence[Sequence[int]] = ()) -> Tensor:
        """(N, F, Di) -> (N, T, Do).

        Args:
            contents: of each view the first row and column of its pixels that show the image, those after the
                last, and how many are along its side, if there are embeddings of padding; empty: all show it.
        """
        if self.pad_embed is not None:
            kinds = torch.zeros(features.shape[:2], dtype=torch.int64, device=features.device)
            if contents:
                kinds = padding_of(told(contents, features.device), math.isqrt(features.shape[1]))
            features = features + F.embedding(kinds, F.pad(self.pad_embed, (0, 0, 1, 0)))
        return self.image_token + super().forward(features)
