"""Schedule-free AdamW (Defazio et al. 2024, "The road less scheduled", algorithm 1).

There are three sequences: z takes AdamW's steps, x is the average of z and is the result, and gradients are
taken at y, between the two. The parameters of the model are y; x is computed from y and z on demand, without
a third copy.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from kempnerforge.config import registry
from kempnerforge.config.optimizer import AdamWConfig
from kempnerforge.training.ema import Averaging
from kempnerforge.training.optimizers.adamw import AdamWRule
from kempnerforge.training.optimizers.foreach import FOREACH, ForeachOptimizer, local
from kempnerforge.util.errors import InputError


class ScheduleFreeAdamW(ForeachOptimizer):
    """AdamW with an average instead of momentum. The learning rate should be constant after a warm-up.

    Args:
        lr: often larger than AdamW's.
        betas: y = (1 - beta1) z + beta1 x, so beta1 > 0, and it must not change while there is state; beta2
            of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, taken at y.

    State: ``z`` and ``exp_avg_sq``, sharded like their parameter; ``step``; ``lr_max`` and ``weight_sum``: an
    iterate weighs the square of the largest learning rate so far (as in the authors' code; with the current
    one in its place a later stage with a smaller learning rate would hardly count).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2.5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def first_state(self, parameter: Tensor) -> dict[str, Tensor]:
        zero = torch.zeros((), dtype=torch.float64)
        return {
            "z": parameter.detach().clone(),
            "exp_avg_sq": torch.zeros_like(parameter),
            "step": torch.zeros(()),
            "lr_max": zero,
            "weight_sum": zero,
        }

    def move(self, group: dict[str, Any], params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[dict[str, Tensor]]) -> None:
        histories: dict[tuple[float, ...], list[int]] = defaultdict(list)
        for index, state in enumerate(states):
            histories[tuple(float(state[key]) for key in ("step", "lr_max", "weight_sum"))].append(index)
        for (step, lr_max, weight_sum), members in histories.items():
            step, lr_max = step + 1, max(lr_max, group["lr"])
            weight_sum += lr_max**2
            share = lr_max**2 / weight_sum if weight_sum else 0.0
            history = {"step": torch.tensor(step)}
            history |= {"lr_max": torch.tensor(lr_max, dtype=torch.float64), "weight_sum": torch.tensor(weight_sum, dtype=torch.float64)}
            for index in members:
                states[index].update(history)
            y, grad = [params[i] for i in members], [grads[i] for i in members]
            z, second = ([local(states[i][key]) for i in members] for key in ("z", "exp_avg_sq"))
            _move(group, share, 1 - group["betas"][1] ** step, y, grad, z, second)

    @torch.no_grad()
    def average(self) -> dict[Tensor, Tensor]:
        """Parameter -> x, for those that have moved."""
        return {
            p: p.detach().lerp(self.state[p]["z"], 1 - 1 / group["betas"][0])
            for group in self.param_groups
            for p in group["params"]
            if self.state.get(p)
        }


def _move(
    group: dict[str, Any], share: float, correction: float, y: list[Tensor], grad: list[Tensor], z: list[Tensor], second: list[Tensor]
) -> None:
    """One step of parameters with one history; ``share`` is the weight of the new z in the average,
    ``correction`` undoes the second moment's bias.
    """
    (beta1, beta2), lr = group["betas"], group["lr"]
    FOREACH["mul_"](second, beta2)
    FOREACH["addcmul_"](second, grad, grad, value=1 - beta2)
    scale = FOREACH["div"](second, correction)
    FOREACH["sqrt_"](scale)
    FOREACH["add_"](scale, group["eps"])
    direction = FOREACH["div"](grad, scale)
    FOREACH["add_"](direction, y, alpha=group["weight_decay"])
    FOREACH["lerp_"](y, z, share)
    FOREACH["add_"](y, direction, alpha=lr * (beta1 * (1 - share) - 1))
    FOREACH["add_"](z, direction, alpha=-lr)


@registry.register_optimizer("schedule_free_adamw")
class ScheduleFreeAdamWRule(AdamWRule):
    def make(self, groups: list[dict[str, Any]], cfg: AdamWConfig) -> torch.optim.Optimizer:
        for group in groups:
            if len(firsts := {settings.betas[0] for settings in group["settings"]}) > 1:
                raise InputError(
                    f"optimizer.betas: the first one is {sorted(firsts)} in different stages, but with 'schedule_free_adamw' the average is"
                    " made with it; use one for the whole run"
                )
        return ScheduleFreeAdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps)

    def averaging(self, optimizer: torch.optim.Optimizer) -> Averaging | None:
        assert isinstance(optimizer, ScheduleFreeAdamW)
        return optimizer
