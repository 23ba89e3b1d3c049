"""Time and memory of the output head and its loss, forward and backward, in this process alone.

Usage: python benchmarks/logits.py WAY VOCABULARY TARGETS DTYPE

WAY is how many logits are in memory at once: "all", a number of targets (``train.logits_at_once``), or "torch:N", which is
``torch.nn.functional.linear_cross_entropy`` (torch 2.13) in pieces of N targets with the policy that is fastest on a CPU. The head has 512
inputs. Prints one JSON object; time is that of the processor, which neighbours change less; memory is what the process holds at most beyond
weights and inputs, so that the gradient of the weights is in it.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kempnerforge.vlm.word_loss import loss_in_pieces, word_loss

DIM = 512


def loss_of(way: str, x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    def head(rows: Tensor) -> Tensor:
        return F.linear(rows, weight).float()

    if way == "all":
        return word_loss(head(x), labels, None).loss
    if way.startswith("torch:"):
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=int(way[6:]), chunking_method=None, acc_policy="accurate")
        return F.linear_cross_entropy(x, weight, labels, reduction="sum", options=options)
    return loss_in_pieces(head, x, labels, None, int(way)).loss


def run(way: str, vocabulary: int, targets: int, dtype: torch.dtype) -> dict[str, float]:
    torch.manual_seed(0)
    weight = (0.02 * torch.randn(vocabulary, DIM)).to(dtype).requires_grad_()
    x, labels = torch.randn(targets, DIM).to(dtype).requires_grad_(), torch.randint(vocabulary, (targets,))
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    before, begin = status("VmRSS"), time.process_time()
    (loss_of(way, x, weight, labels) / targets).backward()
    return {"step_s": time.process_time() - begin, "memory_gib": (status("VmHWM") - before) / 2**20}


def status(key: str) -> int:
    """KiB."""
    return int(re.findall(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[0])


def main() -> None:
    way, vocabulary, targets, dtype = sys.argv[1:]
    run(re.sub(r"\d+", "2", way), 64, 8, getattr(torch, dtype))  # libraries are loaded
    print(json.dumps(run(way, int(vocabulary), int(targets), getattr(torch, dtype))))


if __name__ == "__main__":
    main()
