"""A source from its config."""

from __future__ import annotations

from kempnerforge.config import registry
from kempnerforge.config.data import DataConfig
from kempnerforge.data.source import Source
from kempnerforge.data.text.tokenizer import Tokenizer
from kempnerforge.data.validation import Cut
from kempnerforge.util.errors import InputError


def build_source(cfg: DataConfig, split: str, tokenizer: Tokenizer | None = None, seq_len: int = 0) -> Source | None:
    """The samples of ``split``; None when ``cfg`` names none.

    Args:
        tokenizer: cuts running text into windows; without it only ``Source.corpus`` may be read.

    Raises:
        ValueError: unknown source; data that are missing or not what ``cfg`` says.
    """
    kind: type[Source] = registry.sources.get(cfg.source)
    if not kind.has(cfg, "train" if cfg.validation else split):
        return None
    source = Cut(kind(cfg, "train"), split) if cfg.validation else kind(cfg, split)
    if len(source) < 1:
        raise InputError(f"data.source = {cfg.source!r}: no samples in split {split!r}")
    return source if tokenizer is None else source.tokenised(tokenizer, seq_len)
