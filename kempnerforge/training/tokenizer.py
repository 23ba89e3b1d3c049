"""The tokenizer of a job: saved with a run, inherited with weights, loaded, or trained on the job's texts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from pathlib import Path

from kempnerforge.config import DataConfig, ModelConfig
from kempnerforge.data.source import Source
from kempnerforge.data.text.tokenizer import Tokenizer
from kempnerforge.util.errors import InputError

TOKENIZER = "tokenizer"
"""The folder of the tokenizer in a run directory and in a checkpoint."""


def saved_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer in a run directory or a checkpoint; None if there is none."""
    path = directory / TOKENIZER
    return Tokenizer.from_pretrained(str(path)) if path.is_dir() else None


def tokenizer_of_weights(path: Path) -> Tokenizer | None:
    """The tokenizer of the weights at ``path``, a checkpoint of a run or a directory of transformers."""
    for folder in (path / TOKENIZER, path.parent.parent / TOKENIZER, path):
        if (folder / "tokenizer.json").is_file():
            return Tokenizer.from_pretrained(folder.absolute())
    return None


def inherited_tokenizer(init_from: str, model_files: str) -> Tokenizer | None:
    """The tokenizer of the run that the weights are taken from, or the model's own; None if neither is named.

    Args:
        init_from: ``run.init_from``.
        model_files: a directory or hub id of the model's own processor, see ``VLMConfig.files``.
    """
    path = Path(init_from)
    found = saved_tokenizer(path) or saved_tokenizer(path.parent.parent) if init_from else None  # a run, or a checkpoint
    return found or (Tokenizer.from_pretrained(model_files) if model_files else None)


def new_tokenizer(cfg: DataConfig, sources: Iterable[Source]) -> Tokenizer:
    """``data.tokenizer``: trained on the texts of ``sources``, or loaded."""
    if cfg.tokenizer == "train":
        return Tokenizer.train(chain.from_iterable(source.corpus() for source in sources), cfg.tokenizer_vocab_size)
    return Tokenizer.from_pretrained(cfg.tokenizer)


def fit_vocabulary(cfg: ModelConfig, tokenizer: Tokenizer, image_tokens: Iterable[str]) -> ModelConfig:
    """``cfg`` with ``new_tokens`` and ``vocab_size`` resolved. New tokens are added to ``tokenizer``.

    New tokens have a separate embedding, whose ids follow the tokenizer's without a gap. So the embedding of
    a model with new tokens is not padded.

    Args:
        image_tokens: names that the images of the data need. Missing ones become new tokens.

    Raises:
        InputError: ``vocab_size`` is smaller than the tokenizer, or new tokens are missing that would follow
            unwritten ones.
    """
    added = set(tokenizer.appended)
    missing = [name for name in image_tokens if name in added or tokenizer.token_id(name) is None]
    new = list(dict.fromkeys([*cfg.new_tokens, *missing]))
    if cfg.unwritten_new_tokens and new != cfg.new_tokens:
        raise InputError(
            f"model.new_tokens = {cfg.new_tokens}: the data needs {new[len(cfg.new_tokens) :]} as well, and with "
            f"model.unwritten_new_tokens = {cfg.unwritten_new_tokens} all must be listed, those that are not written last"
        )
    if new:
        tokenizer.add_tokens(new)
    size = tokenizer.base_vocab_size
    if cfg.vocab_size and cfg.vocab_size < size:
        name = tokenizer.backend.id_to_token(cfg.vocab_size)
        raise InputError(
            f"model.vocab_size = {cfg.vocab_size}: the tokenizer has {size} tokens, and {name!r} (id {cfg.vocab_size}) would have no row."
            f" Weights of that size belong to another tokenizer; a model without earlier weights takes 0, or {size} and more"
        )
    return replace(cfg, new_tokens=new, vocab_size=size if new else cfg.vocab_size or size)
