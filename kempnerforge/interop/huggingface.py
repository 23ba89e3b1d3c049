"""Text weights from a directory that transformers wrote: safetensors only, nothing is unpickled and no code beside them is run.

Names are ours, ``transformer.*``. Reading is strict: every tensor of the files is one of the text model's, or of a kind that is known
and reported; every tensor of the text model is there, in the shape that ``[model]`` asks for.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kempnerforge.config.model import ModelConfig
from kempnerforge.interop.names import EMBEDDING, HEAD, HF_EMBEDDING, HF_HEAD, IGNORED, OTHER_PARTS, SETTINGS, hf_name
from kempnerforge.interop.settings import check_facts, complete, hf_facts, text_part
from kempnerforge.model.their_config import check_config, names_keys
from kempnerforge.model.transformer import Transformer
from kempnerforge.util.errors import InputError, show
from kempnerforge.util.reading import check_files, read_object, regular

log = logging.getLogger("kempnerforge")

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
"""Of the package peft, with which transformers puts an adapter on what it loads."""


def read_text_weights(path: Path | str, cfg: ModelConfig) -> dict[str, Tensor]:
    """The text model in the directory ``path``, of one of the ``FAMILIES``.

    Args:
        path: a directory with ``config.json`` and safetensors, sharded or not. Of a vision-language model, the text part is read.
        cfg: ``[model]``, with ``vocab_size`` set.

    Returns:
        ``transformer.*`` -> tensor on the CPU, in the dtype of the file; new tokens are not among them. An embedding that is the head, too,
        is there twice when ``cfg`` does not tie them.

    Raises:
        ValueError: the directory cannot be read, holds another model than ``cfg`` describes, lacks tensors or has unknown ones.
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
    files = tensor_files(path)
    tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings", True))
    with torch.device("meta"):
        wanted = Transformer(replace(cfg, new_tokens=[])).state_dict()
    names = _match(path, wanted, files, tied, text["model_type"])
    tensors = _read(files, set(names.values()))
    if tied and not cfg.tie_embeddings and (head := _head(files)) and not torch.equal(tensors[head], tensors[names[EMBEDDING]]):
        raise InputError(f"{path}: {head} is not {names[EMBEDDING]}, but its {CONFIG} says that they are tied")
    if cfg.tie_embeddings and (head := _head(files)) and not torch.equal(_read(files, {head})[head], tensors[names[EMBEDDING]]):
        raise InputError(f"{path}: {head} is not the embedding; set model.tie_embeddings = false")
    for ours, theirs in names.items():
        check_tensor(path, f"{theirs} (transformer.{ours})", tensors[theirs], wanted[ours])
    return {f"transformer.{ours}": tensors[theirs] for ours, theirs in names.items()}


def read_config(path: Path, name: str = CONFIG) -> dict[str, Any]:
    """``config.json``, or a file like it.

    Raises:
        ValueError: there is none, it is no JSON object, or says what no class can be.
    """
    check_files(path)
    config = read_object(path / name)
    if name == CONFIG:
        check_config(str(path / name), config)
    return config


def tensor_files(path: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it. Weights in other formats beside safetensors are not looked at, as in transformers.

    Raises:
        ValueError: there are no safetensors, two sets of them, or they are not what their index says.
    """
    if (path / ADAPTER).is_file():
        raise InputError(f"{path}: has {ADAPTER}, so there is an adapter beside the weights: merge it first, or take that file away")
    if not _is_sharded(path):
        return dict.fromkeys(_names(path / WEIGHTS), path / WEIGHTS)
    files = _index(path)
    for file in sorted(set(files.values())):
        there = _names(file)
        if absent := [name for name, place in files.items() if place == file and name not in there]:
            raise InputError(f"{file}: lacks {some(absent)}, which {INDEX} says it has")
        files = dict.fromkeys(there, file) | files  # those that the index does not name are there, too
    return files


def _is_sharded(path: Path) -> bool:
    """Whether the weights are those of an index.

    Raises:
        ValueError: there is none and no single file either, or there are both, and the single one is not a shard.
    """
    if not (path / WEIGHTS).is_file():
        if not (path / INDEX).is_file():
            raise InputError(f"{path}: has neither {WEIGHTS} nor {INDEX}; only safetensors are read")
        return True
    if not (path / INDEX).is_file():
        return False
    shards = set(_index(path).values())
    if shards == {path / WEIGHTS}:
        return True
    if there := [shard.name for shard in shards if shard.is_file()]:
        raise InputError(f"{path}: has two sets of weights, {WEIGHTS} and the {len(there)} shards of {INDEX}; take one of them away")
    log.warning("%s: none of the shards that %s names is there; %s is read", path, INDEX, WEIGHTS)
    return False


def _index(path: Path) -> dict[str, Path]:
    try:
        shards = read_object(path / INDEX)["weight_map"]
        files = {name: path / shard for name, shard in shards.items() if Path(shard).name == shard}
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path / INDEX}: is no index of safetensors; {type(error).__name__}: {error}") from None
    if files.keys() != shards.keys():
        raise InputError(f"{path / INDEX}: names files outside its directory")
    return files


def _names(file: Path) -> set[str]:
    try:
        with safe_open(regular(file), framework="pt") as opened:
            return set(opened.keys())
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: cannot be read; {error}") from None


def _read(files: dict[str, Path], names: Iterable[str]) -> dict[str, Tensor]:
    tensors = {}
    for file in {files[name] for name in names}:
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in names if files[name] == file}
    return tensors


def _match(path: Path, wanted: Iterable[str], files: dict[str, Path], tied: bool, family: str) -> dict[str, str]:
    """Our name -> the name in the files, for all that is wanted."""
    found = [name.removesuffix(HF_EMBEDDING) for name in files if name == HF_EMBEDDING or name.endswith("." + HF_EMBEDDING)]
    if len(found) != 1:
        raise InputError(f"{path}: needs one text model, but {len(found)} tensors are called {HF_EMBEDDING}")
    prefix, head = found[0], _head(files)
    names = {ours: prefix + hf_name(ours, family) for ours in wanted if ours != HEAD}
    if HEAD in wanted:
        names[HEAD] = head or (names[EMBEDDING] if tied else HF_HEAD)
    if missing := [name for name in names.values() if name not in files]:
        raise InputError(f"{path}: lacks {some(missing)}")
    rest = [name for name in files if name not in names.values() and name != head and not IGNORED.search(name)]
    if unknown := [name for name in rest if not OTHER_PARTS.match(name)]:
        raise InputError(f"{path}: has {len(unknown)} tensors that [model] has no place for: {some(unknown)}")
    if rest:
        log.info("%s: %d tensors that are not of the text model are left aside: %s", path, len(rest), some(rest))
    return names


def _head(files: dict[str, Path]) -> str | None:
    return next((name for name in files if name == HF_HEAD or name.endswith("." + HF_HEAD)), None)


def check_tensor(path: Path, name: str, tensor: Tensor, wanted: Tensor) -> None:
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise InputError(f"{path}: {name} is {tensor.dtype}; quantised weights are not read")
    if tensor.shape != wanted.shape:
        rows = "; model.vocab_size must be the number of rows" if HF_EMBEDDING in name or HF_HEAD in name else ""
        raise InputError(f"{path}: {name} has shape {tuple(tensor.shape)}, the model's has {tuple(wanted.shape)}{rows}")


def some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
