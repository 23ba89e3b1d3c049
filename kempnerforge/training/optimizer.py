"""Optimizers over *all* parameters, frozen ones too: what trains when is the schedule's business, not the optimizer's.

A parameter that is frozen has no gradient and is skipped; its moments wait. Parameters fall into groups by what may differ between them:
which optimizer takes them, whether they decay, and the settings of each stage. Hyper-parameters are written into the groups at every step
as a function of that step, so nothing of them needs to be saved.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from kempnerforge.config import OptimizerConfig, Stage, registry
from kempnerforge.training.ema import Averaging, Ema, swapped, write
from kempnerforge.training.freeze import match_names
from kempnerforge.training.optimizers.rule import Settings, UpdateRule
from kempnerforge.util.errors import InputError


def rules_of(model: nn.Module, cfg: OptimizerConfig) -> dict[UpdateRule[Any], frozenset[str]]:
    """The rule of ``cfg`` and those for what it does not take, each with the names of its parameters.

    Raises:
        ValueError: no rule takes a parameter.
    """
    left, found = frozenset(name for name, _ in model.named_parameters()), dict[UpdateRule[Any], frozenset[str]]()
    cls: type[UpdateRule[Any]] | None = registry.optimizers.get(cfg.name)
    while cls is not None:
        rule = cls()
        found[rule] = left & rule.takes(model)
        left, cls = left - found[rule], rule.rest
    if left:
        raise InputError(f"optimizer.name = {cfg.name!r}: takes no parameter like {min(left)!r}; its rule needs a `rest`")
    return found


def rule_by_name(model: nn.Module, cfg: OptimizerConfig) -> dict[str, UpdateRule[Any]]:
    """Name -> the rule that moves the parameter."""
    return {name: rule for rule, names in rules_of(model, cfg).items() for name in names}


def state_copies(model: nn.Module, cfg: OptimizerConfig, ema: bool) -> dict[str, int]:
    """Name -> fp32 tensors of its size that are kept besides weight and gradient once it trains."""
    return {name: rule.state_copies + ema for name, rule in rule_by_name(model, cfg).items()}


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
    section = {key: value for key, value in vars(cfg).items() if key in Settings.__dataclass_fields__}
    found = dict.fromkeys(names, Settings(**section))
    for index, group in enumerate(cfg.groups):
        for name in match_names(names, group.module, patterns, f"optimizer.groups[{index}].module"):
            found[name] = replace(found[name], **group.given())
    scales = lr_scales(names, cfg, patterns)
    return {name: replace(s, lr=s.lr * scales[name], muon_lr=s.muon_lr * scales[name]) for name, s in found.items()}


class Optimizers:
    """The optimizers of all rules, stepped as one; and the average of the weights, if one is kept.

    Attributes:
        all: those that have parameters.

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
        rules = rules_of(model, cfg)
        assert sum(map(len, rules.values())) == len(self.parameters), "rules must cover every parameter once"
        self.ema = Ema(ema_decay) if ema_decay else None
        self._averaging: Averaging | None = self.ema
        self._lr_keys = dict.fromkeys(["lr", *(rule.lr_key for rule in rules)])
        self._rules: list[UpdateRule[Any]] = []
        self.all: list[torch.optim.Optimizer] = []
        self._step = 0
        for rule, names in rules.items():
            members: dict[tuple[bool, tuple[Settings, ...]], list[nn.Parameter]] = defaultdict(list)
            for name, parameter in self.parameters.items():
                if name in names:
                    members[parameter.ndim > 1, tuple(s[name] for s in found)].append(parameter)
            groups = [
                {"params": params, "decays": decays, "settings": each, **rule.values(cfg, each[0])}
                for (decays, each), params in members.items()
            ]
            if groups:
                self._rules.append(rule)
                self.all.append(optimizer := rule.make(groups, cfg))
                self._averaging = rule.averaging(optimizer) or self._averaging
        assert self.ema in (None, self._averaging), "train.ema_decay with an optimizer that averages is refused when a job is loaded"

    def set_step(self, stage: Stage, step: int) -> dict[str, float]:
        """Writes the hyper-parameters of ``step`` into all groups; returns the learning rates of the section by their keys."""
        cfg, self._step = stage.optimizer, step
        into = step - stage.start
        for rule, optimizer in zip(self._rules, self.all, strict=True):
            for group in optimizer.param_groups:
                own: Settings = group["settings"][stage.index]
                factor = stage.scheduler.factor(into, stage.planned_steps, own.warmup_steps)
                group["lr"] = getattr(own, rule.lr_key) * factor
                group["weight_decay"] = own.weight_decay if group["decays"] else 0.0
                group.update(rule.values(cfg, own))
        factor = stage.scheduler.factor(into, stage.planned_steps)
        return {key: getattr(cfg, key) * factor for key in self._lr_keys}

    def step(self) -> None:
        if self.ema is not None:
            self.ema.begin(self.parameters.values())
        for optimizer in self.all:
            optimizer.step()
        if self.ema is not None:
            self.ema.update(self._step)

    def reset(self) -> None:
        """Forgets all moments and step counts, as if nothing had been trained yet. An optimizer that averages goes on from its average."""
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
        """Goes on from the ``averages`` of a checkpoint. (An optimizer that averages makes them from its state.)"""
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
