"""The interface of an optimizer: one file per rule, found by ``optimizer.name``."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import nn

from kempnerforge.config import OptimizerConfig
from kempnerforge.training.ema import Averaging
from kempnerforge.util.plugin_returns import check_returns, gives, instance

Config = TypeVar("Config", bound=OptimizerConfig)


@dataclass(frozen=True)
class Settings:
    """The settings of one parameter in one stage.

    Attributes:
        lr, muon_lr: peak learning rates; the rule's ``lr_key`` says which one it uses.
        weight_decay: for parameters that decay, see ``Optimizers``.
        muon_lr, betas: 0 if the optimizer has no such key.
        warmup_steps: None: the scheduler's.
    """

    lr: float
    muon_lr: float = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.0, 0.0)
    warmup_steps: int | None = None


class UpdateRule(ABC, Generic[Config]):
    """Makes the optimizer that ``optimizer.name`` selects. Subclasses register with
    ``@registry.register_optimizer("name")``.

    Attributes:
        lr_key: the key of the section that is its peak learning rate.
        state_copies: fp32 tensors of a parameter's size, in addition to weight and gradient.
        rest: the rule for parameters that this one does not take.
    """

    lr_key: ClassVar[str] = "lr"
    state_copies: ClassVar[int] = 2
    rest: ClassVar[type[UpdateRule[Any]] | None] = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        check_returns(
            cls,
            takes=instance(set | frozenset, "a set of names"),
            make=_not_an_optimizer,
            values=_no_values,
            averaging=instance(Averaging | None, "Averaging, or None"),
        )

    def takes(self, model: nn.Module) -> frozenset[str]:
        """Names of the parameters that it updates."""
        return frozenset(name for name, _ in model.named_parameters())

    @abstractmethod
    def make(self, groups: list[dict[str, Any]], cfg: Config) -> torch.optim.Optimizer:
        """The optimizer of ``groups``, each with "params", "settings" (``Settings`` of each stage) and what
        ``values`` returns. A parameter without a gradient must stay as it is, and all state must be tensors
        in ``optimizer.state``.
        """

    def values(self, cfg: Config, settings: Settings) -> dict[str, Any]:
        """The values to write into a group before each step, in addition to "lr" and "weight_decay".

        Args:
            cfg: the section of the stage.
            settings: of the group's parameters.
        """
        return {}

    def averaging(self, optimizer: torch.optim.Optimizer) -> Averaging | None:
        """The averages for evaluation, if ``optimizer`` makes them (``keeps_average`` of the config)."""
        return None


def _not_an_optimizer(value: Any, rule: UpdateRule[Any], groups: list[dict[str, Any]], *_: Any, **__: Any) -> str:
    if not isinstance(value, torch.optim.Optimizer):
        return gives(value, "a torch.optim.Optimizer")
    made = [{id(parameter) for parameter in group["params"]} for group in value.param_groups if "settings" in group]
    if made != [{id(parameter) for parameter in group["params"]} for group in groups]:
        return gives(type(value), f"an optimizer of all {len(groups)} groups that it is given, with their keys")
    return ""


def _no_values(value: Any, *_: Any, **__: Any) -> str:
    if not isinstance(value, dict):
        return gives(value, "a dict, empty if there are none")
    wrong = next(((name, each) for name, each in value.items() if isinstance(each, float) and not math.isfinite(each)), None)
    return "" if wrong is None else gives(wrong[1], "finite", f"[{wrong[0]!r}]")
