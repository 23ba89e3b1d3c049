"""Exponential moving average of the weights, and averages in place of the weights for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from kempnerforge.distributed.fsdp import fsdp_modules
from kempnerforge.training.optimizers.foreach import FOREACH, local


class Averaging(Protocol):
    """Something that averages the trained weights."""

    def average(self) -> dict[Tensor, Tensor]:
        """Parameter -> its average, sharded like it. A parameter without one is used as it is."""
        ...


class Ema:
    """Exponential moving average of the weights: ``a = d a + (1 - d) w`` (Polyak and Juditsky 1992).

    A parameter gets an average when it trains for the first time. What never trains costs no memory.

    Args:
        decay: ``d``, at most ``(1 + t) / (10 + t)`` in step t of the run.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._averages: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def begin(self, parameters: Iterable[Tensor]) -> None:
        """Before a step: makes the averages of ``parameters`` that train for the first time."""
        for p in parameters:
            if p.grad is not None and p not in self._averages:
                self._averages[p] = p.detach().clone()

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After step ``step``, from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        if self._averages:
            FOREACH["lerp_"]([local(a) for a in self._averages.values()], [local(p) for p in self._averages], 1 - decay)

    def average(self) -> dict[Tensor, Tensor]:
        return dict(self._averages)

    def load(self, averages: Mapping[Tensor, Tensor]) -> None:
        """Replaces all averages by the saved averages of an earlier part of the run."""
        self._averages = dict(averages)


@torch.no_grad()
def write(model: nn.Module, values: Mapping[Tensor, Tensor]) -> None:
    """Copies ``values`` into the (sharded) parameters that they belong to.

    NOTE: after a forward without backward some FSDP units still show gathered parameters, which the next
    forward would use again. After resharding they are gathered again.
    """
    for module in fsdp_modules(model):
        module.reshard()
    if values:
        FOREACH["copy_"]([local(p) for p in values], [local(value) for value in values.values()])


@contextmanager
def swapped(model: nn.Module, values: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Puts ``values`` in place of their parameters; afterwards the parameters are bitwise as before."""
    if not values:
        yield
        return
    before = {p: p.detach().clone() for p in values}
    write(model, values)
    try:
        yield
    finally:
        write(model, before)
