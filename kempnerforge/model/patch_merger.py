"""The patch merger of Qwen2.5-VL and Qwen3-VL (Wang et al. 2024, arXiv 2409.12191, section 2.1): neighbours
become one token, by a norm and an MLP.

Shapes: N images, F features of one image, s ``factor``, Di ``in_dim``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from kempnerforge.config import registry
from kempnerforge.config.adapter import PixelShuffleConfig
from kempnerforge.config.checks import one_of
from kempnerforge.model.adapters import PixelShuffleAdapter

NORMS: dict[str, type[nn.LayerNorm] | type[nn.RMSNorm]] = {"layer_norm": nn.LayerNorm, "rms_norm": nn.RMSNorm}


@registry.register_adapter_config
@dataclass
class PatchMergerConfig(PixelShuffleConfig):
    """A norm, space to depth, linear, GELU, linear (Qwen2-VL and later).

    Attributes:
        hidden_dim: 0 means the width of ``factor`` x ``factor`` features, as there.
        norm: "layer_norm" (Qwen3-VL) or "rms_norm" (Qwen2.5-VL).
        norm_after: the norm is over all features of a token; false: over each of them. Always true for the
            adapters of ``vision_encoder.deepstack_layers``, as in Qwen3-VL.
    """

    type: str = "patch_merger"
    norm: str = "layer_norm"
    norm_after: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "norm", NORMS)

    @property
    def of_layers(self) -> PatchMergerConfig:
        return replace(self, norm_after=True)


@registry.register_adapter("patch_merger")
class PatchMerger(PixelShuffleAdapter):
    """The children are ``norm`` and ``proj``."""

    def __init__(self, cfg: PatchMergerConfig, in_dim: int, out_dim: int, num_features: int) -> None:
        joined = in_dim * cfg.factor**2
        super().__init__(replace(cfg, hidden_dim=cfg.hidden_dim or joined), in_dim, out_dim, num_features)
        self.norm_after = cfg.norm_after
        self.norm = NORMS[cfg.norm](joined if cfg.norm_after else in_dim, eps=1e-6)

    def prepare(self, features: Tensor) -> Tensor:
        """(N, F, Di) -> (N, F / s^2, s^2 * Di)."""
        return self.norm(super().prepare(features)) if self.norm_after else super().prepare(self.norm(features))
