"""Optimizers over *all* parameters, frozen ones too: what trains when is the schedule's business, not the optimizer's.

A parameter that is frozen has no gradient and is skipped; its moments wait. Parameters fall into groups by what may differ between them:
which optimizer takes them, whether they decay, and the settings of each stage. Hyper-parameters are written into the groups at every step
as a function of that step, so nothing of them needs to be saved.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from kempnerforge.config import OptimizerConfig, Stage
from kempnerforge.training.ema import Averaging, Ema, swapped, write
from kempnerforge.training.freeze import match_names
from kempnerforge.training.muon import Muon
from kempnerforge.training.optimizers.lion import Lion
from kempnerforge.training.optimizers.schedule_free import ScheduleFreeAdamW
from kempnerforge.util.errors import InputError


def _adamw(groups: list[dict[str, Any]], cfg: OptimizerConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True)


MAKERS: dict[str, Callable[[list[dict[str, Any]], OptimizerConfig], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "muon": _adamw,
    "lion": lambda groups, cfg: Lion(groups, lr=cfg.lr, betas=cfg.betas),
    "schedule_free_adamw": lambda groups, cfg: ScheduleFreeAdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps),
}
"""``optimizer.name`` -> what takes all that Muon does not."""

MOMENTS = {"adamw": 2, "muon": 2, "lion": 1, "schedule_free_adamw": 2}


@dataclass(frozen=True)
class Settings:
    """What holds for one parameter in one stage.

    Attributes:
        lr, muon_lr: peaks; the one of the optimizer that takes the parameter counts.
        weight_decay: if it decays, see ``Optimizers``.
        warmup_steps: None: the scheduler's.
    """

    lr: float
    muon_lr: float
    weight_decay: float
    betas: tuple[float, float]
    warmup_steps: int | None = None


def muon_names(model: nn.Module) -> frozenset[str]:
    """The hidden matrices: weights of linear layers, less the output head, which like the embedding faces the vocabulary (Jordan et al. 2024)."""
    linears = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return frozenset(linears) - {"transformer.output_head.weight", "lm_head.weight"}  # ours, and that of models of transformers


def state_copies(model: nn.Module, cfg: OptimizerConfig, ema: bool) -> dict[str, int]:
    """Name -> fp32 tensors of its size that are kept beside weight and gradient once it trains."""
    to_muon = muon_names(model) if cfg.name == "muon" else frozenset()
    return {name: (1 if name in to_muon else MOMENTS[cfg.name]) + ema for name, _ in model.named_parameters()}


def lr_scales(names: Sequence[str], cfg: OptimizerConfig, patterns: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Name -> factor on the learning rate. Of the patterns that match a name the last one counts. Raises ValueError: a pattern matches nothing."""
    scales = dict.fromkeys(names, 1.0)
    for module, scale in cfg.lr_scale.items():
        scales.update(dict.fromkeys(match_names(names, module, patterns, "optimizer.lr_scale"), scale))
    return scales


def settings(names: Sequence[str], cfg: OptimizerConfig, patterns: Mapping[str, Sequence[str]]) -> dict[str, Settings]:
    """Name -> what holds for it: the section, then key by key each group that matches it, then ``lr_scale``.

    Raises:
        ValueError: a pattern matches nothing.
    """
    found = dict.fromkeys(names, Settings(cfg.lr, cfg.muon_lr, cfg.weight_decay, cfg.betas))
    for index, group in enumerate(cfg.groups):
        given = {key: value for key, value in vars(group).items() if key != "module" and value is not None}
        for name in match_names(names, group.module, patterns, f"optimizer.groups[{index}].module"):
            found[name] = replace(found[name], **given)
    scales = lr_scales(names, cfg, patterns)
    return {name: replace(s, lr=s.lr * scales[name], muon_lr=s.muon_lr * scales[name]) for name, s in found.items()}


class Optimizers:
    """The optimizer, or Muon beside AdamW, stepped as one; and the average of the weights, if one is kept.

    Args:
        model: its parameters are partitioned; each is in exactly one group. Matrices decay, vectors do not.
        patterns: aliases for ``groups`` and ``lr_scale``.

    Raises:
        ValueError: a pattern matches nothing, or the settings do not go together.
    """

    def __init__(self, model: nn.Module, stages: Sequence[Stage], patterns: Mapping[str, Sequence[str]], ema_decay: float = 0.0) -> None:
        cfg = stages[0].optimizer
        self.model, self.stages = model, list(stages)
        self.parameters = dict(model.named_parameters())
        found = [settings(list(self.parameters), stage.optimizer, patterns) for stage in stages]
        to_muon = muon_names(model) if cfg.name == "muon" else frozenset()
        groups: dict[tuple[bool, bool, tuple[Settings, ...]], list[nn.Parameter]] = defaultdict(list)
        for name, parameter in self.parameters.items():
            groups[name in to_muon, parameter.ndim > 1, tuple(s[name] for s in found)].append(parameter)
        rows: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
        for (muon, decays, each), members in groups.items():
            rows[muon].append({"params": members, "decays": decays, "settings": each, "betas": each[0].betas})
        count = sum(len(g["params"]) for part in rows.values() for g in part)
        assert count == len(self.parameters), "groups must cover every parameter once"
        self.all: list[torch.optim.Optimizer] = []
        self.ema = Ema(ema_decay) if ema_decay else None
        self._averaging: Averaging | None = self.ema
        self._step = 0
        self.muon_lr: float | None = None
        if rows[True]:
            self.all.append(Muon(rows[True], lr=cfg.muon_lr, momentum=cfg.muon_momentum))
        if rows[False]:
            self.all.append(rest := MAKERS[cfg.name](rows[False], cfg))
            if isinstance(rest, ScheduleFreeAdamW):
                self._averaging = self._schedule_free(rest)

    def _schedule_free(self, optimizer: ScheduleFreeAdamW) -> ScheduleFreeAdamW:
        if self.ema is not None:
            raise InputError(
                "train.ema_decay: 'schedule_free_adamw' keeps an average of its own; set ema_decay = 0, or take another optimizer"
            )
        for group in optimizer.param_groups:
            if len(firsts := {s.betas[0] for s in group["settings"]}) > 1:
                raise InputError(
                    f"optimizer.betas: the first one is {sorted(firsts)} in different stages, but with 'schedule_free_adamw' the average is"
                    " made with it; use one for the whole run"
                )
        return optimizer

    def set_step(self, stage: Stage, step: int) -> float:
        """Writes the hyper-parameters of ``step`` into all groups; returns the learning rate of the section. Muon's is in ``muon_lr`` then."""
        cfg, self._step = stage.optimizer, step
        into = step - stage.start
        for optimizer in self.all:
            muon = isinstance(optimizer, Muon)
            for group in optimizer.param_groups:
                own: Settings = group["settings"][stage.index]
                factor = stage.scheduler.factor(into, stage.planned_steps, own.warmup_steps)
                group["lr"] = (own.muon_lr if muon else own.lr) * factor
                group["weight_decay"] = own.weight_decay if group["decays"] else 0.0
                group.update({"momentum": cfg.muon_momentum} if muon else {"betas": own.betas, "eps": cfg.eps})
        factor = stage.scheduler.factor(into, stage.planned_steps)
        self.muon_lr = cfg.muon_lr * factor if cfg.name == "muon" else None
        return cfg.lr * factor

    def step(self) -> None:
        if self.ema is not None:
            self.ema.begin(self.parameters.values())
        for optimizer in self.all:
            optimizer.step()
        if self.ema is not None:
            self.ema.update(self._step)

    def reset(self) -> None:
        """Forgets all moments and step counts, as if nothing had been trained yet. A schedule-free optimizer goes on from its average."""
        if self._averaging is not self.ema:
            write(self.model, self._averages())
        for optimizer in self.all:
            optimizer.state.clear()

    def _averages(self) -> dict[Tensor, Tensor]:
        return self._averaging.average() if self._averaging is not None else {}

    def averages(self) -> dict[str, Tensor]:
        """Name -> the weight to use, sharded like the parameter, where it is another one than that which is trained. Only to be read."""
        found = self._averages()
        return {name: found[p] for name, p in self.parameters.items() if p in found}

    def averaged(self) -> AbstractContextManager[None]:
        """The model with the weights to use, for an evaluation between steps; training goes on as if it had not been. All ranks call it."""
        return swapped(self.model, self._averages())

    def load_averages(self, averages: Mapping[str, Tensor]) -> None:
        """Goes on from the ``averages`` of a checkpoint. (A schedule-free optimizer makes them from its state.)"""
        if self.ema is not None:
            self.ema.load({self.parameters[name]: value for name, value in averages.items()})

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
