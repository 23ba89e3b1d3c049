"""The projector of Prismatic's fused encoders (Karamcheti et al. 2024, arXiv 2402.07865; FusedMLPProjector in
their code).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from kempnerforge.config import AdapterConfig, registry
from kempnerforge.model.adapters import ProjectingAdapter, TwoLayerMLP


@registry.register_adapter_config
@dataclass
class FusedMLPConfig(AdapterConfig):
    """Linear, GELU, linear, GELU, linear (Prismatic, for ``fused`` encoders). ``hidden_dim``, the width after
    the first layer, 0 means 4 times the width of the features; after the others it is the language model's.
    """

    type: str = "fused_mlp"


@registry.register_adapter("fused_mlp")
class FusedMLPAdapter(ProjectingAdapter):
    """Three linear layers with a GELU between each two."""

    def __init__(self, cfg: FusedMLPConfig, in_dim: int, out_dim: int, num_features: int) -> None:
        super().__init__(cfg, in_dim, out_dim, num_features)
        wide = TwoLayerMLP(in_dim, cfg.hidden_dim or 4 * in_dim, out_dim, cfg.bias)
        self.proj = nn.Sequential(wide, nn.GELU(), nn.Linear(out_dim, out_dim, bias=cfg.bias))
