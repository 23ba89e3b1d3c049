"""Optimizers over *all* parameters, frozen ones too: what trains when is the schedule's business, not the optimizer's.

A parameter that is frozen has no gradient and is skipped; its moments wait. Parameters fall into groups by what may differ between them:
which optimizer takes them, whether they decay, and the learning-rate scale of each stage. Hyper-parameters are written into the groups at
every step as a function of that step, so nothing of them needs to be saved.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from kempnerforge.config import OptimizerConfig, Stage
from kempnerforge.training.freeze import match_names
from kempnerforge.training.muon import Muon
from kempnerforge.training.schedule import lr_factor


def muon_names(model: nn.Module) -> frozenset[str]:
    """The hidden matrices: weights of linear layers, less the output head, which like the embedding faces the vocabulary (Jordan et al. 2024)."""
    linears = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return frozenset(linears) - {"transformer.output_head.weight"}


def lr_scales(names: Sequence[str], cfg: OptimizerConfig, patterns: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Name -> factor on the learning rate. Of the patterns that match a name the last one counts.

    Raises:
        ValueError: a pattern matches nothing.
    """
    scales = dict.fromkeys(names, 1.0)
    for module, scale in cfg.lr_scale.items():
        scales.update(dict.fromkeys(match_names(names, module, patterns, "optimizer.lr_scale"), scale))
    return scales


class Optimizers:
    """AdamW, or Muon beside AdamW, stepped as one.

    Args:
        model: its parameters are partitioned; each is in exactly one group.
        stages: all stages of the run.
        patterns: aliases for ``lr_scale``.
    """

    def __init__(self, model: nn.Module, stages: Sequence[Stage], patterns: Mapping[str, Sequence[str]]) -> None:
        cfg = stages[0].optimizer
        parameters = dict(model.named_parameters())
        scales = [lr_scales(list(parameters), stage.optimizer, patterns) for stage in stages]
        to_muon = muon_names(model) if cfg.name == "muon" else frozenset()
        groups: dict[tuple[bool, bool, tuple[float, ...]], list[nn.Parameter]] = defaultdict(list)
        for name, parameter in parameters.items():
            groups[name in to_muon, parameter.ndim > 1, tuple(s[name] for s in scales)].append(parameter)
        rows: dict[bool, list[dict]] = {True: [], False: []}
        for (muon, decays, scale), members in groups.items():
            rows[muon].append({"params": members, "decays": decays, "scales": scale})
        assert sum(len(g["params"]) for part in rows.values() for g in part) == len(parameters), "groups must cover every parameter once"
        self.stages = list(stages)
        self.all: list[torch.optim.Optimizer] = []
        if rows[True]:
            self.all.append(Muon(rows[True], lr=cfg.muon_lr, momentum=cfg.muon_momentum))
        if rows[False]:
            self.all.append(torch.optim.AdamW(rows[False], lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True))

    def set_step(self, stage: Stage, step: int) -> float:
        """Writes the hyper-parameters of ``step`` into all groups; returns AdamW's learning rate at scale 1."""
        cfg = stage.optimizer
        factor = lr_factor(stage.scheduler, step - stage.start, stage.planned_steps)
        for optimizer in self.all:
            muon = isinstance(optimizer, Muon)
            for group in optimizer.param_groups:
                group["lr"] = (cfg.muon_lr if muon else cfg.lr) * factor * group["scales"][stage.index]
                group["weight_decay"] = cfg.weight_decay if group["decays"] else 0.0
                group.update({"momentum": cfg.muon_momentum} if muon else {"betas": cfg.betas, "eps": cfg.eps})
        return cfg.lr * factor

    def step(self) -> None:
        for optimizer in self.all:
            optimizer.step()

    def zero_grad(self) -> None:
        """Drops all gradients. NOTE: zeros instead of None would let AdamW move frozen parameters by old momentum and decay."""
        for optimizer in self.all:
            optimizer.zero_grad(set_to_none=True)


def local_gradients(model: nn.Module) -> list[torch.Tensor]:
    """This rank's shards of all gradients."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [g.to_local() if isinstance(g, DTensor) else g for g in grads]


def squared_norm(grads: Sequence[torch.Tensor]) -> float:
    """Of this rank's shards; summed over ranks it is the square of the global gradient norm."""
    return get_total_norm(grads).square().item() if grads else 0.0


def clip(grads: Sequence[torch.Tensor], norm: float, max_norm: float) -> None:
    """Scales ``grads`` in place so that the global norm ``norm`` becomes at most ``max_norm`` (Pascanu et al. 2013); 0 is off."""
    if max_norm and norm > max_norm:
        for grad in grads:
            grad.mul_(max_norm / norm)
