"""Which weights differ between two runs: ``python recipes/compare.py runs/recipes/llava-align runs/recipes/llava-finetune``.

A line for each part of the model. Exits with 1 if anything differs, as ``cmp`` does.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from kempnerforge.checkpoint import load, resolve, tensor_info
from kempnerforge.checkpoint.state import MODEL


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs=2, type=Path, help="run directories or checkpoints")
    a, b = (weights(path) for path in parser.parse_args().runs)
    total, same = Counter(map(part, a | b)), Counter(part(name) for name in a.keys() & b.keys() if torch.equal(a[name], b[name]))
    alone = Counter(part(name) for name in a.keys() ^ b.keys())
    for name in sorted(total):
        differ = total[name] - same[name] - alone[name]
        print(f"{name:40} {same[name]:4} equal {differ:4} differ {alone[name]:4} in one of them only")
    return int(sum(same.values()) != sum(total.values()))


def weights(path: Path) -> dict[str, Tensor]:
    """The model's tensors by name, from the newest checkpoint at ``path``."""
    checkpoint = resolve(path)
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in tensor_info(checkpoint).items() if name.startswith(MODEL)}
    load(checkpoint, tensors, prefix=MODEL)
    return tensors


def part(name: str) -> str:
    """The part of the model that a tensor belongs to: two parts of a name below ``transformer``, and what an arch adds to its layers."""
    words = name.removeprefix(MODEL).split(".")
    if words[:2] == ["transformer", "layers"]:
        return ".".join(["transformer.layers", *(word for word in words[3:4] if word in ("cross_attention", "image"))])
    return ".".join(words[:2]) if words[0] == "transformer" else words[0]


if __name__ == "__main__":
    sys.exit(main())
