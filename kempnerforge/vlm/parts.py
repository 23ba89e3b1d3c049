"""The parts of a model, by the names of its parameters."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

from kempnerforge.config.model import ModelConfig
from kempnerforge.model.transformer import Block

LAYERS = "transformer.layers"


@cache
def _own_children() -> frozenset[str]:
    """Children of a layer of the plain text backbone."""
    with torch.device("meta"):
        return frozenset(name for name, _ in Block(ModelConfig(), 0).named_children())


def part_of(name: str) -> str:
    """The part that a parameter belongs to: a child of the model, of the backbone (``model`` in transformers)
    one level deeper. What an arch adds to the layers of the text backbone is a part as well, the same child
    of all layers together.
    """
    words = name.split(".")
    if len(words) > 4 and name.startswith(f"{LAYERS}.") and words[3] not in _own_children():
        return f"{LAYERS}.*.{words[3]}"
    return ".".join(words[: 2 if words[0] in ("transformer", "model") else 1])


def parts(names: Sequence[str]) -> dict[str, list[str]]:
    """Parameter names by part."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(part_of(name), []).append(name)
    return found
