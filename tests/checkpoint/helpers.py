"""What the checkpoint tests share: a small model with awkward shapes, its training, and re-sealing a tampered checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kempnerforge.checkpoint.manifest import NAME, Manifest, checksum

FROZEN_FROM = 2


class Tiny(nn.Module):
    """Rows that do not divide by two, a row fewer than ranks, a tied weight, a buffer, a matrix that never trains."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 5)
        self.inner = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 5))
        self.never = nn.Linear(5, 5)
        self.gate = nn.Parameter(torch.full((1,), 0.5))
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.never.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(self.never(x) + self.gate * self.inner(x))


def make_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """AdamW for the matrices, SGD with momentum for the rest."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    return [torch.optim.AdamW(matrices, lr=0.05), torch.optim.SGD(rest, lr=0.05, momentum=0.9)]


def train(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], start: int, end: int) -> None:
    """Steps ``start`` to ``end``, a pure function of the step. One matrix is frozen from step 2 on, with moments that must survive."""
    for step in range(start, end):
        frozen = model.inner[0].weight
        frozen.requires_grad_(step < FROZEN_FROM)
        if step >= FROZEN_FROM:
            frozen.grad = None
        ids = torch.randint(0, 7, (16,), generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model(ids), ids.roll(1)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def snapshot(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Full plain copies."""
    return {key: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for key, t in tensors.items()}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names that are in one alone or whose values differ in any bit."""
    return sorted(
        key
        for key in a.keys() | b.keys()
        if key not in a or key not in b or a[key].dtype != b[key].dtype or not torch.equal(a[key], b[key])
    )


def reseal(path: Path) -> None:
    """Writes a manifest that fits the files as they are now, as somebody with bad intent would."""
    manifest = Manifest.decode((path / NAME).read_bytes())
    files = {p.relative_to(path).as_posix(): checksum(p) for p in path.rglob("*") if p.is_file() and p.name != NAME}
    (path / NAME).write_bytes(dataclasses.replace(manifest, files=files).encode())


def some_tensors(value: float = 0.0) -> dict[str, Tensor]:
    """Several dtypes, a transposed one, a scalar, an empty one."""
    g = torch.Generator().manual_seed(1)
    return {
        "model.w": torch.randn(30, 40, generator=g) + value,
        "model.layers.0.b": torch.randn(7, generator=g).to(torch.bfloat16),
        "model.t": torch.randn(4, 6, generator=g).t(),
        "optim.w|step": torch.tensor(5.0),
        "model.ids": torch.arange(5),
        "model.none": torch.empty(0, 3),
    }


def blank(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same, filled with 77."""
    return {key: torch.full_like(t, 77) for key, t in tensors.items()}
