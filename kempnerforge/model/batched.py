"""Feed-forward layers of one shape, each for vectors of its own, in batched matrix products.

Shapes: E layers, N vectors of each, I input, O output features, D ``model.dim``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kempnerforge.model.transformer import MLP


class Products(torch.autograd.Function):
    """``x[e] @ weights[e].T`` for each e: (E, N, I), E times (O, I) -> (E, N, O).

    NOTE: the weights are copied side by side again in the backward pass. A copy that waits for it would hold
    the weights of all layers, which FSDP2 frees as soon as a layer is done.
    NOTE: not ``F.grouped_mm``: all e have as many vectors, FLOPs of ``bmm`` are counted and those of
    ``_grouped_mm`` are not, and it has a kernel for bf16 on Hopper only.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        return torch.bmm(x, torch.stack(weights).mT)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, *weights = ctx.saved_tensors
        wanted_x, *wanted = ctx.needs_input_grad
        of_x = torch.bmm(grad, torch.stack(weights)) if wanted_x else None
        of_weights = torch.bmm(grad.mT, x).unbind() if any(wanted) else [None] * len(weights)
        return of_x, *(found if trains else None for found, trains in zip(of_weights, wanted, strict=True))


class Each(nn.Module):
    """The layer ``name`` of each owner e for the vectors e: (E, ..., I) -> (E, ..., O). Plain linear layers of
    one shape are one batched product; others (norms, with LoRA, in float8, shared by ranks) are computed one by
    one.
    """

    def __init__(self, owners: Sequence[nn.Module], name: str) -> None:
        super().__init__()
        self.owners, self.name = tuple(owners), name  # a tuple hides the modules from registration

    def forward(self, x: Tensor) -> Tensor:
        layers = [owner.get_submodule(self.name) for owner in self.owners]  # they may have been replaced since
        linear = [layer for layer in layers if type(layer) is nn.Linear]
        if len(linear) < len(layers):
            return torch.stack([layer(part) for layer, part in zip(layers, x, strict=True)])
        y: Tensor = Products.apply(x.flatten(1, -2), *(layer.weight for layer in linear))  # (E, N, O)
        biases: list[Tensor] = [layer.bias for layer in linear if layer.bias is not None]
        y = y + torch.stack(biases)[:, None] if biases else y
        return y.unflatten(1, x.shape[1:-1])


class BatchedMLP(MLP):
    """Several ``mlps`` of one shape as one: (E, ..., D) -> (E, ..., D). It has no parameters, those of ``mlps`` are read
    where they are. Dropout draws other numbers than one by one.
    """

    def __init__(self, mlps: Sequence[MLP]) -> None:
        nn.Module.__init__(self)
        first = mlps[0]
        self.activation, self.enter, self.dropout = first.activation, nn.Identity(), first.dropout
        self.gate_proj = None if first.gate_proj is None else Each(mlps, "gate_proj")
        self.up_proj, self.down_proj = Each(mlps, "up_proj"), Each(mlps, "down_proj")
        self.post_norm = nn.Identity() if isinstance(first.post_norm, nn.Identity) else Each(mlps, "post_norm")
