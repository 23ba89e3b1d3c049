"""Optimizers over *all* parameters, also frozen ones: stages and freeze specs decide what trains.

A frozen parameter has no gradient and is skipped; its moments stay. Parameters are in one group if they have
the same rule, the same settings in each stage, and all decay or all do not. Hyper-parameters are a function
of the step and are written into the groups at each step, so they are not saved.
"""

from __future__ import annotations

import math
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

from kempnerforge.config import JobConfig, OptimizerConfig, Stage, registry
from kempnerforge.training.ema import Averaging, Ema, swapped, write
from kempnerforge.training.optimizers.foreach import local
from kempnerforge.training.optimizers.rule import Settings, UpdateRule
from kempnerforge.util.errors import InputError
from kempnerforge.util.name_rules import Aliases, match_names

PATTERNED = ("groups", "lr_scale")
"""Keys of ``[optimizer]`` that name parameters."""


def rules_of(model: nn.Module, cfg: OptimizerConfig) -> dict[str, UpdateRule[Any]]:
    """Name -> the rule that moves the parameter: the one called ``cfg.name``, or its ``rest``.

    Raises:
        ValueError: no rule takes a parameter.
    """
    left, found = {name for name, _ in model.named_parameters()}, dict[str, UpdateRule[Any]]()
    cls: type[UpdateRule[Any]] | None = registry.optimizers.get(cfg.name)
    while cls is not None:
        rule = cls()
        found |= dict.fromkeys(left & rule.takes(model), rule)
        left, cls = left - found.keys(), rule.rest
    if left:
        raise InputError(f"optimizer.name = {cfg.name!r}: does not take {min(left)!r}, and its rule has no `rest` that does")
    return found


def state_copies(model: nn.Module, cfg: OptimizerConfig, ema: bool) -> dict[str, int]:
    """Name -> fp32 tensors of its size that are kept in addition to weight and gradient once it trains."""
    return {name: rule.state_copies + ema for name, rule in rules_of(model, cfg).items()}


def check_groups(job: JobConfig, stages: Sequence[Stage], names: Sequence[str], patterns: Aliases) -> None:
    """Resolves the patterns of all stages.

    Raises:
        ValueError: one of them matches nothing; with the file and the stage.
    """
    for stage in stages:
        changed = job.stages[stage.index].optimizer if job.stages else {}
        places = {key: job.place(("stages", stage.index, "optimizer", key) if key in changed else ("optimizer", key)) for key in PATTERNED}
        settings(names, stage.optimizer, patterns, places)


def settings(names: Sequence[str], cfg: OptimizerConfig, patterns: Aliases, places: Mapping[str, str] | None = None) -> dict[str, Settings]:
    """Name -> its settings: the section, then key by key each group that matches the name, then ``lr_scale``.

    Of the patterns of ``lr_scale`` that match a name the last one counts.

    Args:
        places: of the keys ``PATTERNED``, for messages.

    Raises:
        ValueError: a pattern matches nothing.
    """
    places = places or {key: f"optimizer.{key}" for key in PATTERNED}
    section = {key: value for key, value in vars(cfg).items() if key in Settings.__dataclass_fields__}
    found = dict.fromkeys(names, Settings(**section))
    for index, group in enumerate(cfg.groups):
        for name in match_names(names, group.module, patterns, f"{places['groups']}[{index}].module"):
            found[name] = replace(found[name], **group.given())
    scales = dict.fromkeys(names, 1.0)
    for module, scale in cfg.lr_scale.items():
        scales.update(dict.fromkeys(match_names(names, module, patterns, places["lr_scale"]), scale))
    return {name: replace(s, lr=s.lr * scales[name], muon_lr=s.muon_lr * scales[name]) for name, s in found.items()}


class Optimizers:
    """The optimizers of all rules, stepped as one; and the average of the weights, if there is one.

    Attributes:
        all: the optimizers that have parameters.

    Args:
        model: its parameters are partitioned; each is in exactly one group. Matrices decay, vectors do not.
        patterns: aliases for ``groups`` and ``lr_scale``.

    Raises:
        ValueError: a pattern matches nothing, or the settings do not go together.
    """

    def __init__(self, model: nn.Module, stages: Sequence[Stage], patterns: Aliases, ema_decay: float = 0.0) -> None:
        cfg = stages[0].optimizer
        self.model, self.stages = model, list(stages)
        self.parameters = dict(model.named_parameters())
        by_stage = [settings(list(self.parameters), stage.optimizer, patterns) for stage in stages]
        self.ema = Ema(ema_decay) if ema_decay else None
        self._step = 0
        rules = rules_of(model, cfg)
        members: dict[tuple[UpdateRule[Any], bool, tuple[Settings, ...]], list[nn.Parameter]] = defaultdict(list)
        for name, parameter in self.parameters.items():
            members[rules[name], parameter.ndim > 1, tuple(stage[name] for stage in by_stage)].append(parameter)
        groups: dict[UpdateRule[Any], list[dict[str, Any]]] = defaultdict(list)
        for (rule, decays, each), params in members.items():
            groups[rule].append({"params": params, "decays": decays, "settings": each, **rule.values(cfg, each[0])})
        self._by_rule = {rule: rule.make(rows, cfg) for rule, rows in groups.items()}
        self.all = list(self._by_rule.values())
        averaging = [average for rule, optimizer in self._by_rule.items() if (average := rule.averaging(optimizer)) is not None]
        assert not (averaging and self.ema), "train.ema_decay with an optimizer that averages is refused when a job is loaded"
        self._averaging: Averaging | None = averaging[0] if averaging else self.ema

    def set_step(self, stage: Stage, step: int) -> dict[str, float]:
        """Writes the hyper-parameters of ``step`` into all groups; returns the learning rates by key."""
        cfg, self._step = stage.optimizer, step
        into = step - stage.start
        for rule, optimizer in self._by_rule.items():
            for group in optimizer.param_groups:
                current: Settings = group["settings"][stage.index]
                factor = stage.scheduler.factor(into, stage.planned_steps, current.warmup_steps)
                group["lr"] = getattr(current, rule.lr_key) * factor
                group["weight_decay"] = current.weight_decay if group["decays"] else 0.0
                group.update(rule.values(cfg, current))
        factor = stage.scheduler.factor(into, stage.planned_steps)
        return {key: getattr(cfg, key) * factor for key in ("lr", *(rule.lr_key for rule in self._by_rule))}

    def step(self) -> None:
        if self.ema is not None:
            self.ema.begin(self.parameters.values())
        for optimizer in self.all:
            optimizer.step()
        if self.ema is not None:
            self.ema.update(self._step)

    def reset(self) -> None:
        """Clears all moments and step counts. An optimizer that averages continues from its average."""
        if self._averaging is not self.ema:
            write(self.model, self._averages())
        for optimizer in self.all:
            optimizer.state.clear()

    def _averages(self) -> dict[Tensor, Tensor]:
        return self._averaging.average() if self._averaging is not None else {}

    def averages(self) -> dict[str, Tensor]:
        """Name -> average, sharded like the parameter; only parameters that have one. Read only."""
        found = self._averages()
        return {name: found[p] for name, p in self.parameters.items() if p in found}

    def averaged(self) -> AbstractContextManager[None]:
        """Puts the averages into the model; afterwards the model is as before. All ranks call it."""
        return swapped(self.model, self._averages())

    def load_averages(self, averages: Mapping[str, Tensor]) -> None:
        """Continues from the ``averages`` of a checkpoint; other averages are made from optimizer state."""
        if self.ema is not None:
            self.ema.load({self.parameters[name]: value for name, value in averages.items()})

    def zero_grad(self) -> None:
        """Drops all gradients. NOTE: with zeros AdamW would move frozen parameters by momentum and decay."""
        for optimizer in self.all:
            optimizer.zero_grad(set_to_none=True)


def local_gradients(model: nn.Module) -> list[torch.Tensor]:
    """This rank's shards of all gradients."""
    return [local(p.grad) for p in model.parameters() if p.grad is not None]


def holders(model: nn.Module, ranks: int) -> list[int]:
    """How many of ``ranks`` have the same shard as this one, for each of ``local_gradients``."""
    return [held_by(p, ranks) for p in model.parameters() if p.grad is not None]


def held_by(parameter: Tensor, ranks: int) -> int:
    """How many of ``ranks`` have the same shard of ``parameter`` as this one."""
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        ranks //= math.prod(mesh.size(axis) for axis, placement in enumerate(placements) if not placement.is_replicate())
    return ranks


def squared_norm(shards: Sequence[torch.Tensor], held: Sequence[int]) -> torch.Tensor:
    """What this rank adds to the squared norm of the whole tensors, the sum over all ranks: a scalar in fp64,
    where the shards are.

    Args:
        held: how many ranks have the same shard, for each of ``shards``.
    """
    groups: dict[int, list[torch.Tensor]] = defaultdict(list)
    for shard, count in zip(shards, held, strict=True):
        groups[count].append(shard)
    squares = [get_total_norm(group).square().double() / count for count, group in groups.items()]
    return torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)


def clip(grads: Sequence[torch.Tensor], norm: float, max_norm: float) -> None:
    """Scales ``grads`` in place to a norm of at most ``max_norm`` (Pascanu et al. 2013); 0: no clipping."""
    if max_norm and norm > max_norm:
        for grad in grads:
            grad.mul_(max_norm / norm)
