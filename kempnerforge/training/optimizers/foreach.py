"""Base of the optimizers here: they update lists of local tensors instead of one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

NAMES = ("add_", "addcmul_", "copy_", "div", "div_", "lerp", "lerp_", "mul_", "sign_", "sqrt_")

FOREACH: dict[str, Callable[..., Any]] = {name: getattr(torch, f"_foreach_{name}") for name in NAMES}
"""One call for a list of tensors, not empty: single calls cost more than their arithmetic."""


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of ``tensor``."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class ForeachOptimizer(torch.optim.Optimizer):
    """Elementwise updates, the same for shards as for the whole. A subclass defines state and update.

    Unlike in the libraries' optimizers, groups without a gradient (a frozen module) are skipped, and
    everything that changes over time is in the state of the parameter, as tensors: parameters begin to train
    at different steps, and a checkpoint holds nothing else.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Moves every parameter that has a gradient."""
        assert closure is None, f"{type(self).__name__} takes no closure"
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p] = self.first_state(p)
            if params:
                states = [self.state[p] for p in params]
                self.move(group, [local(p) for p in params], [local(p.grad) for p in params], states)

    def first_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state of ``parameter`` before its first step."""
        raise NotImplementedError

    def move(self, group: dict[str, Any], params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[dict[str, Tensor]]) -> None:
        """One step of ``params``, in place; ``grads`` stay as they are.

        Args:
            params, grads: local parts; never empty lists.
            states: of the whole parameters.
        """
        raise NotImplementedError
