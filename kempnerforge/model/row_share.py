"""Rows that several ranks share: each has some of the positions, and the keys and values of all are gathered
in every layer (Grattafiori et al. 2024, section 3.3.2).

Shapes: B rows, S positions of the stream, R ranks that share it, n positions of one rank, G key/value heads, E
head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from kempnerforge.distributed.rows import gather_alike


@dataclass(frozen=True)
class RowShare:
    """The positions of a stream that this rank has, the same ones of every row.

    Attributes:
        index: (R * n,) int64, the places in the stream of the positions of all ranks, rank after rank; -1 is
            padding, which nothing reads.
        rank: of this process among those that share the stream.
        sizes: positions that a rank has of each part of the stream.
        group: the ranks.
        scored: (T,) int64, where the targets of this rank are among its positions, ``b * n + place``. None:
            not known yet.
    """

    index: Tensor
    rank: int
    sizes: tuple[int, ...]
    group: dist.ProcessGroup
    scored: Tensor | None = None

    @property
    def ranks(self) -> int:
        """R."""
        return self.group.size()

    @property
    def length(self) -> int:
        """n."""
        return sum(self.sizes)

    @property
    def first(self) -> int:
        """The first position of this rank among those of all ranks."""
        return self.rank * self.length

    @property
    def own(self) -> Tensor:
        """(n,) int64, the places of this rank's positions; -1 is padding."""
        return self.index[self.first : self.first + self.length]

    def take(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's positions of ``x``, which has all S along ``dim``; padding repeats the first one."""
        return x.index_select(dim, self.own.clamp(min=0))

    def gather(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, G, n, E) of this rank -> those of all ranks, (B, G, R * n, E), in the order of
        ``index``. A gradient is the sum over the ranks, each of which has differentiated its own queries.
        """
        both = gather_alike(torch.stack([k, v]), self.group)  # (R, 2, B, G, n, E)
        k, v = both.movedim(0, 3).flatten(3, 4)
        return k, v


def share_row(parts: Sequence[int], ranks: DeviceMesh, device: torch.device) -> RowShare:
    """Cuts a stream for ``ranks``; ``parts`` as of ``cut``."""
    places = cut(parts, ranks.size(), device)
    sizes = tuple(part.shape[1] for part in places)
    return RowShare(torch.cat(places, dim=1).flatten(), ranks.get_local_rank(), sizes, ranks.get_group())


def cut(parts: Sequence[int], ranks: int, device: torch.device | None = None) -> list[Tensor]:
    """The places of each part of a stream that each rank has, (R, n of the part) int64; -1 is padding.

    Args:
        parts: positions of each part. Of each part every rank gets equally many, two stretches: the i-th from
            the front and the i-th from the end of 2 R, so that under a causal mask all ranks have about as many
            keys to look at.
    """
    places, before = [], 0
    for size in parts:
        length = -(-size // (2 * ranks))  # of a stretch
        steps = torch.arange(2 * ranks * length, device=device).view(2 * ranks, length)
        steps = torch.where(steps < size, before + steps, -1)
        places.append(torch.cat([steps[:ranks], steps[ranks:].flip(0)], dim=1))
        before += size
    return places
