"""AdamW (Loshchilov and Hutter 2019, "Decoupled weight decay regularization"), by torch's fused kernel."""

from __future__ import annotations

from typing import Any

import torch

from kempnerforge.config import registry
from kempnerforge.config.optimizer import AdamWConfig
from kempnerforge.training.optimizers.rule import Settings, UpdateRule


@registry.register_optimizer("adamw")
class AdamWRule(UpdateRule[AdamWConfig]):
    def make(self, groups: list[dict[str, Any]], cfg: AdamWConfig) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True)

    def values(self, cfg: AdamWConfig, settings: Settings) -> dict[str, Any]:
        return {"betas": settings.betas, "eps": cfg.eps}
