"""Attention on this machine: the fused kernel against the written-out form that ``attend`` takes for short rows on a CPU.

Usage: python benchmarks/attention.py [--repeats 15]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

from kempnerforge.cli.main import tune_process

tune_process()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from kempnerforge.model.attention import written_out  # noqa: E402

SHAPES = [(32, 3, 64, 32), (16, 4, 136, 32), (16, 12, 196, 64), (4, 9, 512, 64), (2, 9, 1024, 64)]


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return written_out(q, k, v, None, q.shape[-1] ** -0.5, 0.0, causal=True)


def measure(attention: Callable[[Tensor, Tensor, Tensor], Tensor], shape: tuple[int, ...], dtype: torch.dtype, repeats: int) -> float:
    """Median milliseconds of forward and backward."""
    q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))
    times = []
    for _ in range(repeats + 3):
        begin = time.perf_counter()
        attention(q, k, v).sum().backward()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[3:]) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    print(f"{'B, heads, S, head_dim':24s} {'dtype':8s} {'fused ms':>9s} {'written out ms':>15s} {'ratio':>6s}")
    for shape in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            a, b = measure(fused, shape, dtype, repeats), measure(ours, shape, dtype, repeats)
            print(f"{shape!s:24s} {str(dtype)[6:]:8s} {a:9.2f} {b:15.2f} {b / a:6.2f}", flush=True)


if __name__ == "__main__":
    main()
