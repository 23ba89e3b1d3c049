"""Lion (Chen et al. 2023, "Symbolic discovery of optimization algorithms", algorithm 2)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from kempnerforge.config import registry
from kempnerforge.config.optimizer import AdamWConfig
from kempnerforge.training.optimizers.adamw import AdamWRule
from kempnerforge.training.optimizers.foreach import FOREACH, ForeachOptimizer, local


class Lion(ForeachOptimizer):
    """Every entry changes by ``lr``, independent of the size of its gradient.

    Args:
        lr: a third to a tenth of AdamW's, with a weight decay larger by the same factor.
        betas: of the interpolation whose sign is the update, and of the momentum that is kept.

    State: ``exp_avg``, sharded like its parameter.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def first_state(self, parameter: Tensor) -> dict[str, Tensor]:
        return {"exp_avg": torch.zeros_like(parameter)}

    def move(self, group: dict[str, Any], params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[dict[str, Tensor]]) -> None:
        beta1, beta2 = group["betas"]
        momenta = [local(state["exp_avg"]) for state in states]
        directions = FOREACH["lerp"](momenta, grads, 1 - beta1)
        FOREACH["sign_"](directions)
        FOREACH["mul_"](params, 1 - group["lr"] * group["weight_decay"])
        FOREACH["add_"](params, directions, alpha=-group["lr"])
        FOREACH["lerp_"](momenta, grads, 1 - beta2)


@registry.register_optimizer("lion")
class LionRule(AdamWRule):
    state_copies = 1

    def make(self, groups: list[dict[str, Any]], cfg: AdamWConfig) -> torch.optim.Optimizer:
        return Lion(groups, lr=cfg.lr, betas=cfg.betas)
