"""Muon (Jordan et al. 2024, "Muon: an optimizer for hidden layers"): momentum, then the nearest
semi-orthogonal matrix as the update.

Unlike ``torch.optim.Muon`` on sharded parameters, every matrix is gathered whole and orthogonalised by local
products. So the update does not depend on the number of ranks (through DTensor, single entries of the first
update differ by 40 % on two ranks). Matrices of one shape are one batch: a small model has dozens of them,
and one product alone is too short for a CPU or a GPU.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from kempnerforge.config import registry
from kempnerforge.config.optimizer import MuonConfig
from kempnerforge.distributed.world import compute_dtype
from kempnerforge.training.optimizers.adamw import AdamWRule
from kempnerforge.training.optimizers.foreach import FOREACH, local
from kempnerforge.training.optimizers.rule import Settings, UpdateRule

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPS = 1e-7


def orthogonalise(matrices: Tensor) -> Tensor:
    """Newton-Schulz iteration towards ``U V^T`` of each singular value decomposition: (N, R, C) -> (N, R, C).

    In bf16 where the hardware multiplies it, otherwise in fp32: emulated products took half of a step.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.to(compute_dtype("auto", matrices.device))
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=EPS)
    for _ in range(ITERATIONS):
        gram = x @ x.mT  # (N, R, R)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """For matrices alone; everything else belongs to another optimizer.

    Args:
        params: two-dimensional parameters, or groups of them.
        lr: times ``sqrt(max(1, rows / columns))`` for each matrix.

    State: ``momentum_buffer``, sharded like its parameter.
    """

    def __init__(self, params: Iterable[Any], lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim != 2:
                    raise ValueError(f"Muon takes matrices, got a parameter of shape {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Moves every parameter that has a gradient."""
        assert closure is None, "Muon takes no closure"
        shapes: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            grads = [local(p.grad) for p in params]
            buffers = [local(self.state[p]["momentum_buffer"]) for p in params]
            FOREACH["lerp_"](buffers, grads, 1 - group["momentum"])
            for p, update in zip(params, FOREACH["lerp"](grads, buffers, group["momentum"]), strict=True):
                shapes[p.shape].append((p, update))
        updates: dict[Tensor, Tensor] = {}
        for members in shapes.values():
            whole = orthogonalise(torch.stack([_gather(update, p) for p, update in members])).float()  # (N, R, C)
            updates |= {p: _shard(direction, p) for (p, _), direction in zip(members, whole.unbind(), strict=True)}
        for group in self.param_groups:
            for stretch, params in _by_stretch(p for p in group["params"] if p in updates).items():
                weights = [local(p) for p in params]
                FOREACH["mul_"](weights, 1 - group["lr"] * group["weight_decay"])
                FOREACH["add_"](weights, [updates[p] for p in params], alpha=-group["lr"] * stretch)


@registry.register_optimizer("muon")
class MuonRule(UpdateRule[MuonConfig]):
    """Takes the hidden matrices: weights of linear layers, without the output head, which like the embedding
    faces the vocabulary (Jordan et al. 2024).
    """

    lr_key = "muon_lr"
    state_copies = 1
    rest = AdamWRule

    def takes(self, model: nn.Module) -> frozenset[str]:
        linears = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        return frozenset(linears) - {"transformer.output_head.weight", "lm_head.weight"}  # ours, and the one of models of transformers

    def make(self, groups: list[dict[str, Any]], cfg: MuonConfig) -> torch.optim.Optimizer:
        return Muon(groups, lr=cfg.muon_lr, momentum=cfg.muon_momentum)

    def values(self, cfg: MuonConfig, settings: Settings) -> dict[str, Any]:
        return {"momentum": cfg.muon_momentum}


def _by_stretch(params: Iterable[Tensor]) -> dict[float, list[Tensor]]:
    """Parameters by the factor on their learning rate."""
    found: dict[float, list[Tensor]] = defaultdict(list)
    for p in params:
        found[max(1.0, p.shape[0] / p.shape[1]) ** 0.5].append(p)
    return found


def _gather(part: Tensor, like: Tensor) -> Tensor:
    """The whole of a tensor that is sharded as ``like``."""
    if not isinstance(like, DTensor) or like.device_mesh.size() == 1:
        return part
    return DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()).full_tensor()


def _shard(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of ``whole``; nothing is sent, every rank has all of it."""
    if not isinstance(like, DTensor) or like.device_mesh.size() == 1:
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local()
