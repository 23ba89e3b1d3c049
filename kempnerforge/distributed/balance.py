"""The images of all ranks, encoded by all of them alike: packed rows have few images or many, and a step takes
as long as its slowest rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def balanced(encode: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """``encode(images)``. Ranks with more images than others send some to them, and get the features back.

    Args:
        encode: (n, 3, H, W) -> (n, F, D), n at least 1, each image by itself.
        images: (N, 3, H, W) of this rank, N at least 1; H and W are the same on all ranks.

    Returns:
        (N, F, D).

    NOTE: a collective, forward and, where features have a gradient, backward.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1 or images.is_meta:
        return encode(images)
    rank, size = dist.get_rank(), dist.get_world_size()
    counts = torch.zeros(size, dtype=torch.int64, device=images.device)
    counts[rank] = len(images)
    dist.all_reduce(counts)
    own: list[int] = counts.tolist()
    share = [sum(own) // size + (r < sum(own) % size) for r in range(size)]
    if max(own) <= max(share):
        return encode(images)
    sent, received = common(own, share, rank), common(share, own, rank)
    features = encode(_exchange(images, sent, received))
    return _Exchange.apply(features, received, sent)  # pyright: ignore[reportReturnType]


def common(here: Sequence[int], there: Sequence[int], rank: int) -> list[int]:
    """A row of images is cut in two ways, into as many pieces ``here`` and ``there``: how many images of piece
    ``rank`` of the one are in each piece of the other.
    """
    begin, end = list(pairwise(accumulate(here, initial=0)))[rank]
    return [max(0, min(end, stop) - max(begin, start)) for start, stop in pairwise(accumulate(there, initial=0))]


def _exchange(x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
    """Rows of ``x`` to each rank, in order, and rows from each."""
    rows = x.contiguous().flatten(1).view(torch.uint8)  # backends do not have all dtypes
    found = rows.new_empty(sum(received), rows.shape[1])
    dist.all_to_all_single(found, rows, list(received), list(sent))
    return found.view(x.dtype).unflatten(1, x.shape[1:])


class _Exchange(torch.autograd.Function):
    """``_exchange``, whose gradient goes the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        ctx.back = received, sent
        return _exchange(x, sent, received)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _exchange(gradients[0], *ctx.back), None, None
