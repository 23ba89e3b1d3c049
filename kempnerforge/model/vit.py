"""Our own vision transformer, in the shape of SigLIP's image tower.

Shapes: N images, F features (tokens) of one image, D ``dim``, H heads, E head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kempnerforge.config import registry
from kempnerforge.config.vision import ViTConfig
from kempnerforge.model.attention import additive, attend
from kempnerforge.model.vision import VisionEncoder, inside


class ViTAttention(nn.Module):
    """Multi-head self-attention in which every token sees every other (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, dim: int, n_heads: int, bias: bool) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.q_proj = nn.Linear(dim, dim, bias=bias)
        self.k_proj = nn.Linear(dim, dim, bias=bias)
        self.v_proj = nn.Linear(dim, dim, bias=bias)
        self.out_proj = nn.Linear(dim, dim, bias=bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N, F, D) -> (N, F, D); ``mask`` as of ``attend``."""
        n, f, d = x.shape
        q, k, v = (proj(x).view(n, f, self.n_heads, d // self.n_heads).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attend(q, k, v, mask, causal=False))  # (N, H, F, E) -> (N, F, D)


class ViTMLP(nn.Module):
    """Two layers with a tanh GELU (Hendrycks and Gimpel 2016) between them."""

    def __init__(self, dim: int, hidden_dim: int, bias: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, bias=bias)
        self.fc2 = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, F, D) -> (N, F, D)."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class ViTBlock(nn.Module):
    """One pre-norm layer (Dosovitskiy et al. 2021, eq. 2 and 3)."""

    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.dim, eps=cfg.norm_eps)
        self.attention = ViTAttention(cfg.dim, cfg.n_heads, cfg.bias)
        self.norm2 = nn.LayerNorm(cfg.dim, eps=cfg.norm_eps)
        self.mlp = ViTMLP(cfg.dim, cfg.mlp_dim or 4 * cfg.dim, cfg.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N, F, D) -> (N, F, D); ``mask`` as of ``attend``."""
        x = x + self.attention(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


@registry.register_vision_encoder("vit")
class ViT(VisionEncoder):
    """Vision transformer (Dosovitskiy et al. 2021) as SigLIP has it (Zhai et al. 2023): learned positions, no
    CLS token unless asked for.

    Only what ``feature_layer`` needs is built: the layers up to it, and the final norm for -1 alone. So every
    parameter gets a gradient. Of several layers the features are joined channel by channel (Molmo, Deitke et
    al. 2024, arXiv 2409.17146, section 2).

    Linear and convolution layers keep PyTorch's default init, which learns faster at small widths than a std
    of 0.02 everywhere does; the positions and the CLS token start with a std of 0.02.
    """

    def __init__(self, cfg: ViTConfig) -> None:
        width = cfg.dim * len(cfg.feature_layers)
        side = cfg.grid if not cfg.cls_token and cfg.stride in (0, cfg.patch_size) else 0
        super().__init__(
            num_tokens=cfg.num_tokens(), dim=width, image_size=cfg.image_size, mean=cfg.mean, std=cfg.std, layer_dim=cfg.dim, side=side
        )
        self.layers_used = cfg.layers_used
        stride = cfg.stride or cfg.patch_size
        self.patch_embedding = nn.Conv2d(3, cfg.dim, cfg.patch_size, stride, padding=(cfg.patch_size - stride) // 2)
        self.position_embedding = nn.Parameter(torch.empty(self.num_tokens, cfg.dim))
        self.cls_token = nn.Parameter(torch.empty(cfg.dim)) if cfg.cls_token else None
        self.layers = nn.ModuleList(ViTBlock(cfg) for _ in range(cfg.n_layers - cfg.unused_layers))
        self.norm = nn.Identity() if cfg.unused_layers else nn.LayerNorm(cfg.dim, eps=cfg.norm_eps)
        nn.init.normal_(self.position_embedding, std=0.02)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02)

    @property
    def units(self) -> list[nn.Module]:
        return list(self.layers)

    def forward(self, images: Tensor, grids: Sequence[tuple[int, int]] = ()) -> Tensor:
        """(N, 3, H, H) uint8 -> (N, F, D times the layers used); a CLS token is the first of the F."""
        mask = None
        if grids:
            seen = inside(grids, self.side, images.device).flatten(1)[:, None, None]  # (N, 1, 1, F)
            mask = additive(seen, self.position_embedding.dtype)
        x = self.patch_embedding(self.normalise(images))  # (N, D, grid, grid)
        x = x.flatten(2).transpose(1, 2)  # (N, grid * grid, D), row by row
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), 1, -1), x], dim=1)  # (N, 1 + grid * grid, D)
        x = x + self.position_embedding
        states: dict[int, Tensor] = {}
        for number, layer in enumerate(self.layers, -len(self.layers)):
            x = layer(x) if mask is None else layer(x, mask)
            if number in self.layers_used:
                states[number] = x
        states[-1] = self.norm(x)
        return torch.cat([states[number] for number in self.layers_used], dim=-1)
