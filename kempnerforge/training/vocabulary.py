"""Rows of embedding and head by token: a model that begins with the weights of another, and has more tokens or less padding."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from kempnerforge.data.text.tokenizer import Tokenizer
from kempnerforge.interop.families import EMBEDDING, HEAD
from kempnerforge.interop.write import NEW_EMBEDDING, NEW_HEAD
from kempnerforge.util.errors import InputError
from kempnerforge.vlm.base import VLM

log = logging.getLogger("kempnerforge")


def vocab_size(asked: int, has_new_tokens: bool, tokenizer: Tokenizer) -> int:
    """Entries of the embedding, without the new tokens: these have one of their own, whose ids follow the tokenizer's without a gap. So rows
    that pad the embedding are left out where there are any.

    Args:
        asked: ``model.vocab_size``.

    Raises:
        ValueError: there are more tokens.
    """
    there = tokenizer.base_vocab_size
    if asked and asked < there:
        name = tokenizer.backend.id_to_token(asked)
        raise InputError(
            f"model.vocab_size = {asked}: the tokenizer has {there} tokens, and {name!r} (id {asked}) would have no row. Weights that are"
            f" there go with another tokenizer; a model that begins without any takes 0, or {there} and more"
        )
    return there if has_new_tokens else asked or there


@torch.no_grad()
def rows_by_token(weights: Mapping[str, Tensor], model: VLM, ours: Tokenizer, theirs: Tokenizer | None) -> dict[str, Tensor]:
    """``weights`` with tables of as many rows as ``model`` has, where these are of the same tokens: all rows that there are stay as they are,
    those of further tokens are the fresh ones of ``model``.

    Args:
        theirs: the tokenizer that belongs to ``weights``, if there is one. Where it gives other ids nothing is changed.
    """
    found = dict(weights)
    own = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for whole, new in ((f"transformer.{EMBEDDING}", f"transformer.{NEW_EMBEDDING}"), (f"transformer.{HEAD}", f"transformer.{NEW_HEAD}")):
        names = [name for name in (whole, new) if name in own or name in weights]
        if whole not in own or whole not in weights or own[whole].shape[1:] != weights[whole].shape[1:]:
            continue
        if all(name in own and name in weights and own[name].shape == weights[name].shape for name in names):
            continue
        if theirs is None or not _same_ids(ours, theirs):
            continue
        there = weights[whole]
        if new in weights:
            there = torch.cat([there[: theirs.vocab_size - len(weights[new])], weights[new]])  # by id
        found.pop(new, None)
        found[whole] = _over(own[whole], there)
        if new in own:
            found[new] = _over(own[new], there[ours.base_vocab_size : theirs.vocab_size])
        log.info("%s: %d rows are kept, of %d tokens", whole, min(len(there), ours.vocab_size), ours.vocab_size)
    return found


def _over(fresh: Tensor, there: Tensor) -> Tensor:
    """``fresh`` (rows, D) with the first rows from ``there``."""
    made, count = fresh.clone().to(there.dtype), min(len(fresh), len(there))
    made[:count] = there[:count]
    return made


def _same_ids(ours: Tokenizer, theirs: Tokenizer) -> bool:
    """Whether each id that both have is the same token."""
    shared = min(ours.vocab_size, theirs.vocab_size)
    return all(ours.backend.id_to_token(k) == theirs.backend.id_to_token(k) for k in range(shared))


def tokenizer_beside(path: Path) -> Tokenizer | None:
    """The tokenizer that belongs to the weights at ``path``: a run directory, one of its checkpoints, or a directory of transformers."""
    for folder in (path / "tokenizer", path.parent.parent / "tokenizer", path):
        if (folder / "tokenizer.json").is_file():
            return Tokenizer.from_pretrained(folder.absolute())
    return None
