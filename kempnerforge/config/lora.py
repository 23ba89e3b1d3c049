"""``[[lora]]``: low-rank adapters on chosen linear layers, and what follows from their names for freezing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kempnerforge.config.checks import at_least, more_than
from kempnerforge.util.errors import InputError

LORA_PARAMETERS = ("lora_a", "lora_b", "magnitude")
"""What an adapter adds to a layer, by name."""

LORA_ALIAS: dict[str, list[str]] = {"lora": [f"*.{name}" for name in LORA_PARAMETERS]}
"""Alias of freeze specs and learning-rate scales in a job that has adapters."""


@dataclass
class LoRAConfig:
    """One ``[[lora]]`` table. Of several that match a layer the last one counts.

    The weight and the bias of a layer with an adapter are frozen from the start, unless a freeze spec thaws
    them. Everything else trains as ``[vlm].freeze`` says: to train adapters alone, freeze the parts and thaw
    ``lora`` after them.

    Attributes:
        module: which linear layers: an alias of ``module_patterns`` (all that lie in it), or a raw fnmatch
            pattern over their names, such as "transformer.layers.*.attention.*_proj". "transformer.layers.*"
            is every one of the backbone but the output head.
        rank: r, of the update.
        alpha: the update counts ``alpha / rank``.
        dropout: on what enters the update, in training.
        dora: learn the length of each row of the weight apart from its direction.

    Raises:
        ValueError: a value is out of range.
    """

    module: str
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    dora: bool = False

    def __post_init__(self) -> None:
        if not self.module:
            raise InputError("module = '': a LoRA table needs an alias or a pattern")
        at_least(self, 1, "rank")
        more_than(self, 0, "alpha")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout = {self.dropout!r}: must be at least 0 and below 1")


def is_adapter(name: str) -> bool:
    """Whether the parameter ``name`` was added by an adapter."""
    return name.rpartition(".")[2] in LORA_PARAMETERS


def lora_frozen(names: Iterable[str]) -> set[str]:
    """Of the parameters ``names`` of a model those that are frozen before any freeze spec counts: weight and
    bias of layers with an adapter.
    """
    present = set(names)
    layers = [name.removesuffix(".lora_a") for name in present if name.endswith(".lora_a")]
    return {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")} & present
