"""Attention on this machine, forward and backward: kernels, and forms of the mask.

First the fused kernel against the written-out form that ``attend`` takes for short rows on a CPU, both causal. Then an image whose tokens
see each other in front of words: one product with an additive mask against ``Prefix``, two products on slices. Last rows that hold several
samples: one product with an additive mask against ``Documents``, which takes the rows apart. Times are CPU time of the process, so that
others disturb them less: run it with one thread. The candidates take turns; the median is shown.

Usage: OMP_NUM_THREADS=1 python benchmarks/attention.py [--repeats 15]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

from kempnerforge.util.process import tune_memory

tune_memory()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from kempnerforge.model.attention import Prefix, Segments, additive, attend, written_out  # noqa: E402

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

SHAPES = [(32, 3, 64, 32), (16, 4, 136, 32), (16, 12, 196, 64), (4, 9, 512, 64), (2, 9, 1024, 64)]
ROWS = [(48, 20, 16, 1), (48, 24, 16, 1), (24, 77, 16, 8), (16, 72, 64, 1), (8, 192, 128, 8), (8, 260, 196, 1)]
"""B, S, image tokens, texts after them; the first three are the quickstart's batches. Four heads of 32."""
PACKED = [(16, 128, 16), (8, 256, 16), (4, 512, 16), (2, 2048, 0), (2, 2048, 16), (2, 2048, 64), (2, 2048, 196)]
"""B, S, image tokens of each sample of a row; with them texts of 13 tokens in the mean. Four heads of 32."""


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return written_out(q, k, v, None, q.shape[-1] ** -0.5, 0.0, causal=True)


def measure(candidates: list[Attention], shape: tuple[int, ...], dtype: torch.dtype, repeats: int) -> list[float]:
    """Median CPU milliseconds of forward and backward of each."""
    q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))
    times: list[list[float]] = [[] for _ in candidates]
    for _ in range(repeats + 3):
        for attention, taken in zip(candidates, times, strict=True):
            begin = time.process_time()
            attention(q, k, v).sum().backward()
            taken.append(time.process_time() - begin)
    return [statistics.median(taken[3:]) * 1e3 for taken in times]


def structure(batch: int, length: int, image: int, texts: int) -> Segments:
    """Rows of one image and ``texts`` texts that do not see each other."""
    sample_ids = torch.zeros(batch, length, dtype=torch.int64)
    text_ids, groups = sample_ids.clone(), sample_ids.clone()
    text_ids[:, image:] = 1 + torch.arange(length - image) * texts // (length - image)
    groups[:, :image] = 1
    return Segments(sample_ids, text_ids, groups, has_documents=texts > 1)


def packed(batch: int, length: int, image: int) -> Segments:
    """Rows full of samples of one text, of log-normal length."""
    random = torch.Generator().manual_seed(0)
    rows, sample_ids = [], torch.full((batch, length), -1)
    for row in range(batch):
        lengths: list[int] = []
        while True:
            size = image + max(3, round(float(torch.empty(1).log_normal_(2.4, 0.6, generator=random))))
            if sum(lengths) + size > length:
                break
            sample_ids[row, sum(lengths) : sum(lengths) + size] = len(lengths)
            lengths.append(size)
        rows.append(tuple((size, 1) for size in lengths))
    return Segments(sample_ids, (sample_ids >= 0).long(), documents=tuple(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    print(f"{'B, heads, S, head_dim':24s} {'dtype':8s} {'fused ms':>12s} {'written out ms':>15s} {'ratio':>6s}")
    for shape in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            a, b = measure([fused, ours], shape, dtype, repeats)
            print(f"{shape!s:24s} {str(dtype)[6:]:8s} {a:12.2f} {b:15.2f} {b / a:6.2f}", flush=True)
    print(f"\n{'B, S, image, texts':24s} {'dtype':8s} {'additive ms':>12s} {'prefix ms':>15s} {'ratio':>6s}")
    for batch, length, image, texts in ROWS:
        for dtype in (torch.bfloat16, torch.float32):
            found = structure(batch, length, image, texts)
            dense = additive(found.visible(), dtype)
            prefix = Prefix(image, additive(found.visible(length - image), dtype) if found.has_documents else None)
            forms: list[Attention] = [lambda q, k, v, mask=mask: attend(q, k, v, mask) for mask in (dense, prefix)]
            a, b = measure(forms, (batch, 4, length, 32), dtype, repeats)
            print(f"{(batch, length, image, texts)!s:24s} {str(dtype)[6:]:8s} {a:12.2f} {b:15.2f} {b / a:6.2f}", flush=True)
    print(f"\n{'B, S, image, samples':24s} {'dtype':8s} {'additive ms':>12s} {'documents ms':>15s} {'ratio':>6s}")
    for batch, length, image in PACKED:
        for dtype in (torch.bfloat16, torch.float32):
            found = packed(batch, length, image)
            assert found.documents is not None
            masks = (additive(found.visible(), dtype), found.apart(found.documents, dtype))
            forms = [lambda q, k, v, mask=mask: attend(q, k, v, mask) for mask in masks]
            a, b = measure(forms, (batch, 4, length, 32), dtype, repeats)
            shape = (batch, length, image, sum(map(len, found.documents)))
            print(f"{shape!s:24s} {str(dtype)[6:]:8s} {a:12.2f} {b:15.2f} {b / a:6.2f}", flush=True)


if __name__ == "__main__":
    main()
