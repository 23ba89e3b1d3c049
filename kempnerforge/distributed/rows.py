"""Rows of all ranks together, with their gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

_group: dist.ProcessGroup | None = None


def gather_among(group: dist.ProcessGroup | None) -> None:
    """``gather_rows`` is of the ranks of ``group`` from now on; None: of all."""
    global _group
    _group = group


def gather_rows(x: Tensor) -> tuple[Tensor, int]:
    """The rows of ``x`` (n, E) of all ranks that have rows of their own (``gather_among``), in the order of
    ranks, and how many of them are before those of this rank. A rank may have none; without a process group
    they are ``x``.

    NOTE: a collective, forward and backward. A row's gradient is the sum over these ranks, so each must
    differentiate a part of the loss that no other has, as FSDP sums gradients here.
    """
    if not dist.is_initialized() or dist.get_world_size(_group) == 1 or x.is_meta:
        return x, 0
    counts, rank = torch.zeros(dist.get_world_size(_group), dtype=torch.int64, device=x.device), dist.get_rank(_group)
    counts[rank] = len(x)
    dist.all_reduce(counts, group=_group)
    numbers: list[int] = counts.tolist()
    padded: Tensor = _Gather.apply(F.pad(x, (0, 0, 0, max(numbers) - len(x))))  # (W, most, E)
    return torch.cat([rows[:n] for rows, n in zip(padded, numbers, strict=True)]), sum(numbers[:rank])


class _Gather(torch.autograd.Function):
    """(n, E) of each rank -> (W, n, E); n is the same on all W ranks of the group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        found = x.new_empty(dist.get_world_size(_group), *x.shape)
        dist.all_gather([*found], x.contiguous(), group=_group)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        gradient = gradient.contiguous().clone()  # others may hold it, too
        dist.all_reduce(gradient, group=_group)
        return gradient[dist.get_rank(_group)]
