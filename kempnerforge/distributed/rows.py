"""What several ranks have, together, with its gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
"""The second names are those of torch 2.11, which warn in later versions."""


def gather_alike(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """``x`` (...) of each rank of ``group`` (None: all of the job), of one shape on all R -> (R, ...).

    NOTE: a collective, forward and backward. The gradient is the sum over these ranks, so each must
    differentiate a part of the loss that no other has, as FSDP sums gradients here.
    """
    return _Gather.apply(x, group)  # pyright: ignore[reportReturnType]


def gather_rows(x: Tensor, ranks: DeviceMesh | None) -> tuple[Tensor, int]:
    """The rows of ``x`` (n, E) of all ``ranks`` (None: all of the job), in their order, and how many of them
    are before those of this rank. A rank may have none; without a process group they are ``x``.

    NOTE: as of ``gather_alike``.
    """
    group = None if ranks is None else ranks.get_group()
    if not dist.is_initialized() or (size := dist.get_world_size(group)) == 1 or x.is_meta:
        return x, 0
    counts, rank = torch.zeros(size, dtype=torch.int64, device=x.device), dist.get_rank(group)
    counts[rank] = len(x)
    dist.all_reduce(counts, group=group)
    numbers: list[int] = counts.tolist()
    padded = gather_alike(F.pad(x, (0, 0, 0, max(numbers) - len(x))), group)  # (R, most, E)
    return torch.cat([rows[:n] for rows, n in zip(padded, numbers, strict=True)]), sum(numbers[:rank])


class _Gather(torch.autograd.Function):
    """``gather_alike``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        found = x.new_empty(dist.get_world_size(group), *x.shape)
        all_gather(found.flatten(0, 1), x.contiguous(), group)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        own = gradient.new_empty(gradient.shape[1:])
        reduce_scatter(own, gradient.contiguous().flatten(0, 1), group=ctx.group)
        return own, None
