"""Feed-forward layers of experts one by one and in batched products (``vlm.batched_experts``), and one product for the weights of two
modalities, as ``mot`` would need it: kernels of a forward and backward pass, and how long one takes against the other.

Usage: python benchmarks/batched_experts.py [--repeats 15] [--device cpu]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kempnerforge.config import ModelConfig
from kempnerforge.model.batched import BatchedMLP
from kempnerforge.model.transformer import MLP

EXPERTS = [(128, 344, 2, 1024), (128, 344, 4, 512), (128, 344, 8, 256), (576, 1536, 4, 256), (576, 1536, 8, 128)]  # D, F, E, N
MODALITIES = [(128, 344, 16, (64, 64)), (576, 1536, 4, (196, 60))]  # D, F, rows, positions
NO_KERNEL = (
    "view",
    "expand",
    "t.",
    "transpose",
    "unsqueeze",
    "select",
    "split",
    "unbind",
    "slice",
    "detach",
    "_unsafe_view",
    "alias",
    "empty",
)
"""What the names of operators that launch none begin with."""


class Kernels(TorchDispatchMode):
    """Counts operators that compute something."""

    count = 0

    def __torch_dispatch__(
        self, func: Callable[..., object], types: object, args: tuple[object, ...] = (), kwargs: object = None
    ) -> object:
        self.count += not str(func).removeprefix("aten.").startswith(NO_KERNEL)
        return func(*args, **(kwargs or {}))  # type: ignore[arg-type]


def one_by_one(x: Tensor, mlps: Sequence[MLP]) -> Tensor:
    return torch.stack([mlp(part) for mlp, part in zip(mlps, x.unbind(), strict=True)])


def two_products(x: Tensor, sizes: Sequence[int], weights: Sequence[Tensor]) -> Tensor:
    return torch.cat([F.linear(part, weight) for part, weight in zip(x.split(sizes, dim=1), weights, strict=True)], dim=1)


def one_product(x: Tensor, sizes: Sequence[int], weights: Sequence[Tensor]) -> Tensor:
    """``F.grouped_mm`` over what all rows have of a modality."""
    counts = [len(x) * size for size in sizes]
    parts = torch.cat([part.reshape(-1, x.shape[-1]) for part in x.split(sizes, dim=1)])
    offsets = torch.tensor(counts, device=x.device).cumsum(0, dtype=torch.int32)
    y = F.grouped_mm(parts, torch.stack([*weights]).mT, offs=offsets)
    return torch.cat([part.view(len(x), -1, y.shape[-1]) for part in y.split(counts)], dim=1)


def compare(x: Tensor, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor], repeats: int) -> str:
    """One row: kernels of both, and the median of the ratios of times, taken in turns."""

    def run(which: Callable[[Tensor], Tensor]) -> float:
        start = time.perf_counter()
        y = which(x.detach().requires_grad_())
        y.backward(torch.ones_like(y))
        if x.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    counts = []
    for which in (before, after):
        run(which)
        with Kernels() as kernels:
            run(which)
        counts.append(kernels.count)
    ratios = [run(after) / run(before) for _ in range(repeats)]
    return f"{counts[0]} | {counts[1]} | {statistics.median(ratios):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    print("| what | dtype | kernels before | after | time, after / before |\n|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        made = {"device": args.device, "dtype": dtype}
        for dim, width, count, rows in EXPERTS:
            mlps = [MLP(ModelConfig(dim=dim, n_heads=4, ffn_dim=width, vocab_size=10)).to(**made) for _ in range(count)]
            batched = BatchedMLP(mlps)
            row = compare(torch.randn(count, rows, dim, **made), lambda x, mlps=mlps: one_by_one(x, mlps), batched, args.repeats)
            print(f"| {count} experts {dim} x {width}, {rows} tokens each | {dtype} | {row} |", flush=True)
        for dim, width, rows, sizes in MODALITIES:
            weights = [torch.randn(width, dim, requires_grad=True, **made) for _ in sizes]
            both = [lambda x, f=f, sizes=sizes, weights=weights: f(x, sizes, weights) for f in (two_products, one_product)]
            row = compare(torch.randn(rows, sum(sizes), dim, **made), *both, args.repeats)
            print(f"| 2 modalities {dim} x {width}, {rows} rows of {sizes} | {dtype} | {row} |", flush=True)


if __name__ == "__main__":
    main()
