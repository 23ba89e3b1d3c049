"""Weights to start from, wherever they are: a checkpoint or run directory of ours, or a Hugging Face
directory.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kempnerforge.checkpoint import CheckpointError, load, reading, tensor_info
from kempnerforge.checkpoint.state import AVERAGED, MODEL
from kempnerforge.config.files import read_toml
from kempnerforge.config.model import ModelConfig, RopeScaling
from kempnerforge.interop.external import (
    FileTensor,
    TiedHead,
    backbone_parameters,
    check_tensor,
    check_tied,
    differ,
    match_tensors,
    text_prefix,
)
from kempnerforge.interop.families import EMBEDDING, HEAD, HF_HEAD, OTHER_PARTS, SETTINGS, text_names
from kempnerforge.interop.settings import check_facts, complete, facts, hf_facts
from kempnerforge.interop.vlms import text_part
from kempnerforge.model.hf_checks import names_keys
from kempnerforge.model.hf_files import CONFIG, read_config, read_tensors, tensor_files
from kempnerforge.util.errors import InputError, show

log = logging.getLogger("kempnerforge")


def read_weights(path: Path | str, cfg: ModelConfig) -> dict[str, Tensor]:
    """All model tensors at ``path``, by our parameter names. Call it on all ranks; each has all of them, on
    the CPU. Where the default device is "meta", shapes and dtypes alone are read, and what their values would
    tell is not checked.

    Args:
        path: a checkpoint, a folder of them (the newest is taken), a run directory, or a Hugging Face
            directory (see ``read_text_weights``).
        cfg: ``[model]`` of the model that takes the weights.

    Raises:
        InputError: nothing usable is there, or its text backbone computes something else than ``cfg`` says.
    """
    path = Path(path)
    if (path / CONFIG).is_file():
        return read_text_weights(path, cfg)
    try:
        return reading(path, lambda checkpoint: _of_checkpoint(checkpoint, cfg), content=not _shapes_alone())
    except CheckpointError as error:
        raise InputError(f"{error}; weights are read from checkpoints, run directories and directories with a {CONFIG}") from None


# ---- Hugging Face directories --------------------------------------------------------------------


def read_text_weights(path: Path | str, cfg: ModelConfig) -> dict[str, Tensor]:
    """The text model in the directory ``path``, of one of the ``FAMILIES``. Every tensor of the files is one
    of the text model's, or of a known other kind, which is logged; every tensor of the text model is there,
    in the shape that ``[model]`` asks for.

    Args:
        path: a directory with ``config.json`` and safetensors, sharded or not. Of a vision-language model,
            the text part is read.
        cfg: ``[model]``, with ``vocab_size`` set.

    Returns:
        ``transformer.*`` -> tensor on the CPU, in the dtype of the file, without new tokens. An embedding
        that is the head as well is there twice when ``cfg`` does not tie them.

    Raises:
        InputError: the directory cannot be read, holds another model than ``cfg`` describes, lacks tensors or
            has unknown ones.
    """
    path = Path(path)
    config = read_config(path)
    text = text_part(config)
    with names_keys(config, f"{path / CONFIG}: "):
        if not isinstance(text, dict):
            raise InputError(f"text_config = {show(text)}: does not say which language model it is")
        if not config.get("model_type"):
            raise InputError(f"model_type = {show(config.get('model_type'))}: does not say which model it is")
        text = complete(text)
        check_facts(cfg, hf_facts(text), SETTINGS)
    files, wanted = tensor_files(path), backbone_parameters(replace(cfg, new_tokens=[]))
    tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings", True))
    head = next((name for name in files if name == HF_HEAD or name.endswith("." + HF_HEAD)), None)
    names = text_names(wanted, text["model_type"], text_prefix(path, files), head or HF_HEAD)
    embedding = names[f"transformer.{EMBEDDING}"]
    if tied and head is None and not cfg.tie_embeddings:
        names[f"transformer.{HEAD}"] = embedding
    used = {name: FileTensor(source) for name, source in names.items()}
    match_tensors(path, used, files, lambda name: name == head or OTHER_PARTS.match(name) is not None)
    tensors = dict(read_tensors(files, names.values()))
    if head is not None and tied and not cfg.tie_embeddings:
        check_tied(path, files, TiedHead(head, embedding))
    if head is not None and cfg.tie_embeddings and differ(dict(read_tensors(files, [head]))[head], tensors[embedding]):
        raise InputError(f"{path}: {head} is not the embedding; set model.tie_embeddings = false")
    for name, source in names.items():
        check_tensor(path, f"{source} ({name})", tensors[source], wanted[name])
    return {name: tensors[source] for name, source in names.items()}


# ---- our checkpoints -----------------------------------------------------------------------------


def read_part(path: Path | str, part: str) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors of the module ``part`` of a model of ours. Call it on all ranks; each has all of them, on
    the CPU, or where the default device is "meta" their shapes alone.

    Args:
        path: a checkpoint, a folder of them (the newest is taken) or a run directory.
        part: a top-level module, such as ``vision_encoder``.

    Returns:
        Our parameter names -> tensor, and the section of that name in the config there; None without one.

    Raises:
        InputError: nothing usable is there, or the model there has no such part.
    """
    try:
        return reading(Path(path), lambda checkpoint: _part_of_checkpoint(checkpoint, part), content=not _shapes_alone())
    except CheckpointError as error:
        raise InputError(f"{error}; parts are read from checkpoints and run directories") from None


def _part_of_checkpoint(checkpoint: Path, part: str) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    tensors = _tensors(checkpoint, f"{part}.")
    if not tensors:
        raise InputError(f"{checkpoint}: its model has no {part}")
    file = checkpoint / "config.toml"
    return tensors, read_toml(file).get(part) if file.is_file() else None


def _of_checkpoint(checkpoint: Path, cfg: ModelConfig) -> dict[str, Tensor]:
    _check_config(checkpoint, cfg)
    return _with_head(_tensors(checkpoint, ""), checkpoint, cfg)


def _tensors(checkpoint: Path, begin: str) -> dict[str, Tensor]:
    """The parameters in ``checkpoint`` whose names begin with ``begin``; of a run with an average, its."""
    found: dict[str, Tensor] = {}
    for kind in (MODEL, AVERAGED):
        prefix, info = kind + begin, tensor_info(checkpoint)
        wanted = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in info.items() if name.startswith(prefix)}
        if wanted and not _shapes_alone():
            load(checkpoint, wanted, prefix=prefix)
        found |= {name.removeprefix(kind): tensor for name, tensor in wanted.items()}
    return found


def _shapes_alone() -> bool:
    return torch.get_default_device().type == "meta"


def _with_head(tensors: dict[str, Tensor], checkpoint: Path, cfg: ModelConfig) -> dict[str, Tensor]:
    """``tensors`` with a head if ``cfg`` has an untied one; if it has none, a head there must be the
    embedding.
    """
    embedding, head = (tensors.get(f"transformer.{name}") for name in (EMBEDDING, HEAD))
    if not cfg.tie_embeddings and head is None and embedding is not None:
        return tensors | {f"transformer.{HEAD}": embedding}
    if cfg.tie_embeddings and head is not None and (embedding is None or differ(head, embedding)):
        raise InputError(f"{checkpoint}: transformer.{HEAD} is not the embedding; set model.tie_embeddings = false")
    return tensors


def _check_config(checkpoint: Path, cfg: ModelConfig) -> None:
    """Compares ``[model]`` with the config of the checkpoint, if it has one."""
    file = checkpoint / "config.toml"
    if not file.is_file():
        return
    table: Any = read_toml(file).get("model", {})
    try:
        if scaling := table.get("rope_scaling"):
            table["rope_scaling"] = RopeScaling(**scaling)
        trained = facts(ModelConfig(**table))
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: cannot be read; {error}") from None
    try:
        check_facts(cfg, trained, {})
    except ValueError as error:
        raise InputError(f"{file}: {error}") from None


@torch.no_grad()
def take_weights(model: nn.Module, weights: dict[str, Tensor], source: Path | str, optional: tuple[str, ...] = ()) -> set[str]:
    """Copies ``weights`` into the parameters of ``model`` that have the same names, cast to their dtype.

    Args:
        model: not sharded.
        weights: from ``read_weights(source)``; tensors that are no parameters of the model are counted in the
            log.
        optional: prefixes of names that are passed over where the shape is another.

    Returns:
        The names that were taken.

    Raises:
        ValueError: no name matches, or a shape differs; nothing is copied then.
    """
    parameters = dict(model.named_parameters())
    shared = parameters.keys() & weights.keys()
    other_shape = {name for name in shared if parameters[name].shape != weights[name].shape}
    passed_over = {name for name in other_shape if name.startswith(optional)} if optional else set()
    if wrong := sorted(other_shape - passed_over):
        shapes = [f"{name} has shape {tuple(weights[name].shape)} there, {tuple(parameters[name].shape)} here" for name in wrong[:3]]
        rows = "; model.vocab_size must be the number of rows of the embedding" if any("token_embedding" in name for name in wrong) else ""
        raise InputError(f"{source}: {'; '.join(shapes)}{f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''}{rows}")
    taken = shared - passed_over
    if not taken:
        raise InputError(f"{source}: none of its {len(weights)} tensors has a place in the model; it has {', '.join(sorted(weights)[:3])}")
    for name in taken:
        parameters[name].copy_(weights[name])
    fresh = sorted(parameters.keys() - taken)
    log.info(
        "%s: %d tensors taken, %d have no place here; %d of the model's %d stay as they are%s",
        source,
        len(taken),
        len(weights.keys() - taken),
        len(fresh),
        len(parameters),
        f": {_groups(fresh)}" if fresh else "",
    )
    return taken


def _groups(names: list[str]) -> str:
    """Names by the part of the model that they are in, with counts."""
    parts: dict[str, int] = {}
    for name in names:
        words = name.split(".")
        part = ".".join(word if not word.isdigit() else "*" for word in words[: 4 if words[0] == "transformer" else 1])
        parts[part] = parts.get(part, 0) + 1
    return ", ".join(f"{part} ({count})" for part, count in parts.items())
