"""The weights of a fresh run, read from ``run.init_from`` and ``run.init_parts`` by name, and embedding rows
by token.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from kempnerforge.config import to_dict
from kempnerforge.data.text.tokenizer import Tokenizer
from kempnerforge.interop import read_part, read_weights, take_weights
from kempnerforge.interop.families import EMBEDDING, HEAD
from kempnerforge.interop.write import NEW_EMBEDDING, NEW_HEAD
from kempnerforge.model.lora import fitting_magnitudes
from kempnerforge.training.tokenizer import tokenizer_of_weights
from kempnerforge.util.errors import InputError
from kempnerforge.util.name_rules import matches_any
from kempnerforge.vlm.base import VLM

log = logging.getLogger("kempnerforge")

TABLES = ((f"transformer.{EMBEDDING}", f"transformer.{NEW_EMBEDDING}"), (f"transformer.{HEAD}", f"transformer.{NEW_HEAD}"))
"""Embedding and output head: the table of the tokenizer's tokens, and the table of the new tokens."""


def initialise(model: VLM, tokenizer: Tokenizer | None = None) -> None:
    """Loads ``run.init_from`` and ``run.init_parts`` of the model's job into ``model``, then what the
    architecture derives from them. Call it before the model is sharded, on all ranks. Of a model on the meta
    device names and shapes are compared, and no weights are read.

    Args:
        tokenizer: of the model: rows of embedding and head are taken token by token.

    Raises:
        InputError: the weights cannot be used, names or shapes differ that ``run.init_allow`` does not list,
            or a part of ``run.init_parts`` is another one there.
    """
    run = model.job.run
    with fitting_magnitudes(model), torch.device(next(model.parameters()).device):
        if run.init_from:
            weights = read_weights(run.init_from, model.job.model)
            if tokenizer is not None:
                weights = rows_by_token(weights, model, tokenizer, tokenizer_of_weights(Path(run.init_from)))
            shapes = {name: parameter.shape for name, parameter in model.named_parameters() if not _part_of(name, run.init_parts)}
            weights = {name: tensor for name, tensor in weights.items() if not _part_of(name, run.init_parts)}
            other_shape = {name for name in shapes.keys() & weights.keys() if shapes[name] != weights[name].shape}
            differences = {
                "lacks": shapes.keys() - weights.keys(),
                "has in excess": weights.keys() - shapes.keys(),
                "has in another shape": other_shape,
            }
            problems = [
                f"{kind} {len(found)}: {', '.join(found[:4])}{' ...' if len(found) > 4 else ''}"
                for kind, names in differences.items()
                if (found := sorted(name for name in names if not matches_any(name, run.init_allow)))
            ]
            if problems:
                raise InputError(
                    f"run.init_from = {run.init_from!r}: of the model's parameters it {'; it '.join(problems)}."
                    " List patterns of what may differ in run.init_allow"
                )
            model.loaded |= take_weights(model, {name: weights[name] for name in weights.keys() - other_shape}, run.init_from)
        for part, path in run.init_parts.items():
            model.loaded |= _take_part(model, part, path)
        model.warm_start()


def _part_of(name: str, parts: Iterable[str]) -> bool:
    """Whether the parameter ``name`` lies in one of ``parts``."""
    return any(name.startswith(f"{part}.") for part in parts)


def _take_part(model: VLM, part: str, path: str) -> set[str]:
    """Loads the module ``part`` of the checkpoint at ``path``. Returns the names of its parameters."""
    where = f"run.init_parts: {part} = {path!r}"
    names = {name for name, _ in model.named_parameters()}
    wanted = {name for name in names if _part_of(name, [part])}
    if not wanted:
        raise InputError(f"{where}: the model has no such part; it has {', '.join(sorted({name.partition('.')[0] for name in names}))}")
    weights, section = read_part(path, part)
    here = to_dict(model.job).get(part)
    if section is not None and section != here:
        changed = sorted(key for key in section.keys() | here.keys() if section.get(key) != here.get(key)) if here else [part]
        raise InputError(f"{where}: is another one there: {', '.join(f'{part}.{key}' for key in changed)} differ")
    if differing := sorted(name for name in weights.keys() ^ wanted if not matches_any(name, model.job.run.init_allow)):
        raise InputError(f"{where}: {len(differing)} parameters are only there or only here: {', '.join(differing[:4])}")
    return take_weights(model, weights, path)


@torch.no_grad()
def rows_by_token(weights: Mapping[str, Tensor], model: VLM, tokenizer: Tokenizer, old_tokenizer: Tokenizer | None) -> dict[str, Tensor]:
    """``weights`` with embedding and head of as many rows as ``model`` has: rows of the same token are taken,
    further ones are the model's fresh ones.

    Args:
        old_tokenizer: of ``weights``. If it is None, or gives other ids, nothing is changed.
    """
    found = dict(weights)
    if old_tokenizer is None or not _same_ids(tokenizer, old_tokenizer):
        return found
    fresh = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for table, new_table in TABLES:
        if table not in fresh or table not in weights or fresh[table].shape[1:] != weights[table].shape[1:]:
            continue
        shapes = [[part[name].shape for name in (table, new_table) if name in part] for part in (fresh, weights)]
        if shapes[0] == shapes[1]:
            continue
        rows = weights[table]
        if new_table in weights:
            rows = torch.cat([rows[: old_tokenizer.vocab_size - len(weights[new_table])], weights[new_table]])  # by id
        found.pop(new_table, None)
        found[table] = _first_rows_from(rows, fresh[table])
        if new_table in fresh:
            found[new_table] = _first_rows_from(rows[tokenizer.base_vocab_size : old_tokenizer.vocab_size], fresh[new_table])
        log.info("%s: %d rows are kept, of %d tokens", table, min(len(rows), tokenizer.vocab_size), tokenizer.vocab_size)
    return found


def _first_rows_from(rows: Tensor, fresh: Tensor) -> Tensor:
    """``fresh`` (rows, D) with its first rows replaced, as far as there are ``rows``."""
    made, count = fresh.clone().to(rows.dtype), min(len(fresh), len(rows))
    made[:count] = rows[:count]
    return made


def _same_ids(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether each id that both tokenizers have is the same token."""
    return all(a.backend.id_to_token(k) == b.backend.id_to_token(k) for k in range(min(a.vocab_size, b.vocab_size)))
