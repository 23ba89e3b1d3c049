"""Cross-entropy of words, of all logits at once or piece by piece.

Logits are the largest tensor of a step where the vocabulary is large: 4,096 positions of 128k words are 2 GiB
in fp32, and the loss needs three such tensors. Positions do not depend on each other, so a few of them at a
time will do (as in Liger Kernel, Hsu et al. 2024, arXiv 2410.10989, section 3.2).

Shapes: T trained positions, D ``model.dim``, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kempnerforge.data.batching.batch import IGNORE


class WordLoss(NamedTuple):
    """Sums over positions, fp32.

    Attributes:
        loss: each position counts alike.
        weighted: each one times its weight; None: there are no weights. With weights no gradient flows from
            ``loss``.
    """

    loss: Tensor
    weighted: Tensor | None

    @property
    def trained(self) -> Tensor:
        """The sum that is sent backward."""
        return self.loss if self.weighted is None else self.weighted


def word_loss(logits: Tensor, labels: Tensor, weights: Tensor | None) -> WordLoss:
    """The loss of ``logits`` (T, V); ``labels`` (T,) int64, ``weights`` (T,) fp32."""
    if weights is None:
        return WordLoss(F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum"), None)
    losses = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")  # (T,)
    return WordLoss(losses.detach().sum(), (losses * weights).sum())


def loss_in_pieces(head: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor, weights: Tensor | None, at_once: int) -> WordLoss:
    """``word_loss(head(x), labels, weights)``, equal up to rounding, with the logits of ``at_once`` positions
    in memory.

    Each piece is differentiated as soon as its loss is known, so nothing is computed twice, and the backward
    pass multiplies the gradients by the one that arrives. Those of parameters are added up in fp32: a bf16
    sum would be rounded once a piece.

    Args:
        head: (t, D) -> (t, V), a function of its argument and of parameters alone.
        x: (T, D), T at least 1.

    NOTE: torch 2.13 has ``linear_cross_entropy`` in pieces, torch 2.11 does not. It knows no softcap and no head
    in several parts. On a CPU its policy "accurate" is faster than this, the one that it chooses many times
    slower; ``benchmarks/logits.py`` measures it.
    """
    losses, into_x, into_weights = [], [], dict[Tensor, Tensor]()
    for start in range(0, len(x), at_once):
        piece = slice(start, start + at_once)
        rows = x.detach()[piece].requires_grad_(x.requires_grad)
        # a view: hooks of torch's counters of FLOPs refuse a module that reads a leaf
        found = word_loss(head(rows.view_as(rows)), labels[piece], None if weights is None else weights[piece])
        leaves = _leaves(found.trained)
        for leaf, gradient in zip(leaves, torch.autograd.grad(found.trained, leaves) if leaves else (), strict=True):
            if leaf is rows:
                into_x.append(gradient)
            elif leaf in into_weights:
                into_weights[leaf] += gradient
            else:
                into_weights[leaf] = gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)
        losses.append([each.detach() for each in found if each is not None])
    sums = [torch.stack(each).sum() for each in zip(*losses, strict=True)]
    gradients = {**({x: torch.cat(into_x)} if into_x else {}), **into_weights}
    trained = _Differentiated.apply(sums[-1], len(gradients), *gradients.values(), *gradients.keys()) if gradients else sums[-1]
    return WordLoss(trained, None) if weights is None else WordLoss(sums[0], trained)


def _leaves(total: Tensor) -> list[Tensor]:
    """The tensors that a gradient of ``total`` ends at."""
    waiting, seen, found = [total.grad_fn], set(), []
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if not node.next_functions:
            found.append(node.variable)  # pyright: ignore[reportAttributeAccessIssue]
        waiting += [following for following, _ in node.next_functions]
    return found


class _Differentiated(torch.autograd.Function):
    """A total whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, count: int, *tensors: Tensor) -> Tensor:
        """``count`` gradients of ``total``, then what they are gradients of."""
        ctx.save_for_backward(*tensors[:count])
        ctx.dtypes = [each.dtype for each in tensors[count:]]
        return total.clone()

    @staticmethod
    def backward(ctx: Any, arrived: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        known = ctx.saved_tensors
        scaled = [gradient.mul_(arrived).to(dtype) for gradient, dtype in zip(known, ctx.dtypes, strict=True)]
        return None, None, *[None] * len(known), *scaled
