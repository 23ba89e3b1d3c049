"""Rows of all ranks together, with their gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def gather_rows(x: Tensor) -> tuple[Tensor, int]:
    """The rows of ``x`` (n, E) of all ranks, in the order of ranks, and how many of them are before those of
    this rank. A rank may have none; without a process group they are ``x``.

    NOTE: a collective, forward and backward. A row's gradient is the sum over all ranks, so each rank must
    differentiate a part of the loss that no other has, as FSDP sums gradients here.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1 or x.is_meta:
        return x, 0
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=x.device)
    counts[dist.get_rank()] = len(x)
    dist.all_reduce(counts)
    numbers: list[int] = counts.tolist()
    padded: Tensor = _Gather.apply(F.pad(x, (0, 0, 0, max(numbers) - len(x))))  # (W, most, E)
    return torch.cat([rows[:n] for rows, n in zip(padded, numbers, strict=True)]), sum(numbers[: dist.get_rank()])


class _Gather(torch.autograd.Function):
    """(n, E) of each rank -> (W, n, E); n is the same on all W ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        found = x.new_empty(dist.get_world_size(), *x.shape)
        dist.all_gather([*found], x.contiguous())
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        gradient = gradient.contiguous().clone()  # others may hold it, too
        dist.all_reduce(gradient)
        return gradient[dist.get_rank()]
