"""The reader of Hugging Face folders: ``config.json``, ``generation_config.json``, and safetensors, in one
file or in shards with an index.

Nothing is unpickled and no code beside the files is run. ``model/image_processor.py`` reads the image
processor's files.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kempnerforge.model.hf_checks import check_config
from kempnerforge.model.quiet import quiet
from kempnerforge.util.errors import InputError, library_call
from kempnerforge.util.paths import is_no_hub_id, start_of
from kempnerforge.util.reading import check_files, read_object, regular

log = logging.getLogger("kempnerforge")

CONFIG, GENERATION = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
"""Of the package peft: transformers adds the adapter to the weights that it loads."""


# ---- configs -------------------------------------------------------------------------------------


def read_config(path: Path) -> dict[str, Any]:
    """``config.json`` of a directory.

    Raises:
        InputError: the file cannot be read, or a value is one that no class can have.
    """
    check_files(path)
    config = read_object(path / CONFIG)
    check_config(str(path / CONFIG), config)
    return config


def read_named_config(path: str) -> dict[str, Any]:
    """``config.json`` of a directory or of a model on the hub, whichever a key ``path`` names.

    Raises:
        InputError: as of ``read_config``; or there is no such directory, or no such model that can be read.
    """
    if is_no_hub_id(path) and not Path(path).is_dir():
        raise InputError(f"path = {path!r}: no such directory{start_of(path)}")
    if Path(path).is_dir():
        if not (file := Path(path) / CONFIG).is_file():
            raise InputError(f"path = {path!r}: this directory has no {CONFIG}")
        check_files(path)
        config = read_object(file)
    else:
        from transformers import PretrainedConfig

        with library_call(f"path = {path!r}", f"neither a directory{start_of(path)} nor a hub model that can be read"):
            config = PretrainedConfig.get_config_dict(path)[0]
    check_config(f"path = {path!r}: {CONFIG}", config)
    return config


def stop_ids(path: Path) -> tuple[int, ...]:
    """The tokens at which the model in the directory ``path`` stops, as transformers finds them; none if
    there is no model.

    Raises:
        InputError: a file cannot be read, or ``eos_token_id`` is no id of a token.
    """
    for file in (path / GENERATION, path / CONFIG):
        if not file.is_file():
            continue
        content = read_object(file)
        parts = [part for part in (content, content.get("text_config")) if isinstance(part, dict)]
        value = next((part["eos_token_id"] for part in parts if part.get("eos_token_id") is not None), None)
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if wrong := [id_ for id_ in ids if isinstance(id_, bool) or not isinstance(id_, int) or id_ < 0]:
            raise InputError(f"{file}: eos_token_id has {wrong[0]!r}, which is no id of a token")
        return tuple(ids)
    return ()


# ---- weights -------------------------------------------------------------------------------------


def tensor_files(path: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it. Weights in other formats beside safetensors are not read, as in
    transformers.

    Raises:
        InputError: there are no safetensors, two sets of them, an adapter, or shards that differ from their
            index.
    """
    if (path / ADAPTER).is_file():
        raise InputError(f"{path}: has {ADAPTER}, so there is an adapter beside the weights: merge it first, or take that file away")
    if not _is_sharded(path):
        return dict.fromkeys(_tensor_names(path / WEIGHTS), path / WEIGHTS)
    files = _read_index(path)
    for file in sorted(set(files.values())):
        stored = _tensor_names(file)
        if absent := [name for name, shard in files.items() if shard == file and name not in stored]:
            raise InputError(f"{file}: lacks {some(absent)}, which {INDEX} says it has")
        files = dict.fromkeys(stored, file) | files  # tensors that the index does not name count as well
    return files


def _is_sharded(path: Path) -> bool:
    """Whether the weights are in the shards of an index.

    Raises:
        InputError: there is neither an index nor a single file, or both, and the single file is not one of
            the shards.
    """
    if not (path / WEIGHTS).is_file():
        if not (path / INDEX).is_file():
            raise InputError(f"{path}: has neither {WEIGHTS} nor {INDEX}; only safetensors are read")
        return True
    if not (path / INDEX).is_file():
        return False
    shards = set(_read_index(path).values())
    if shards == {path / WEIGHTS}:
        return True
    if present := [shard.name for shard in shards if shard.is_file()]:
        raise InputError(f"{path}: has two sets of weights, {WEIGHTS} and the {len(present)} shards of {INDEX}; take one of them away")
    log.warning("%s: none of the shards that %s names is there; %s is read", path, INDEX, WEIGHTS)
    return False


def _read_index(path: Path) -> dict[str, Path]:
    try:
        shards = read_object(path / INDEX)["weight_map"]
        files = {name: path / shard for name, shard in shards.items() if Path(shard).name == shard}
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path / INDEX}: is no index of safetensors; {type(error).__name__}: {error}") from None
    if files.keys() != shards.keys():
        raise InputError(f"{path / INDEX}: names files outside its directory")
    return files


def _tensor_names(file: Path) -> set[str]:
    try:
        with safe_open(regular(file), framework="pt") as opened:
            return set(opened.keys())
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: cannot be read; {error}") from None


def read_tensors(files: Mapping[str, Path], names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of each of ``names``, file by file, on the CPU and in the dtype of the file; where the
    default device is "meta", shapes and dtypes alone.
    """
    shapes = torch.get_default_device().type == "meta"
    by_file: dict[Path, list[str]] = {}
    for name in dict.fromkeys(names):
        by_file.setdefault(files[name], []).append(name)
    for file, inside in by_file.items():
        with safe_open(file, framework="pt") as opened:
            for name in inside:
                tensor = opened.get_tensor(name)  # a view of the file: values are read when they are used
                yield name, tensor.to("meta") if shapes else tensor


def num_rows(files: Mapping[str, Path], name: str) -> int:
    """The first dimension of a tensor, which is not read."""
    with safe_open(files[name], framework="pt") as opened:
        return opened.get_slice(name).get_shape()[0]


def find_weights(path: str, where: str) -> None:
    """Looks for weights that ``load_whole`` may load, and reads the headers of safetensors; what is on the hub is
    not looked for.

    Raises:
        InputError: the directory ``path`` has none, or a file is damaged; the message begins with ``where``.
    """
    folder = Path(path)
    if folder.is_dir() and not any(name.endswith((".safetensors", ".bin")) for name in os.listdir(folder)):
        raise InputError(f"{where}; this directory has neither {WEIGHTS} nor {INDEX}")
    for file in sorted(folder.glob("*.safetensors")):
        _tensor_names(file)


def load_whole(model_class: Any, path: Path | str, where: str, what: str, *, more: bool = False, **named: Any) -> Any:
    """A model of transformers in fp32, each of whose parameters is in the files.

    Args:
        where, what: for messages, as of ``library_call``.
        more: the files may have further weights.
        named: arguments of ``from_pretrained``.

    Raises:
        InputError: it cannot be loaded, or weights are missing, of another shape or left over.
    """
    with library_call(where, what), quiet():
        model, info = model_class.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **named
        )
    kinds = {
        "missing": info["missing_keys"],
        "of another shape": info["mismatched_keys"],
        "left over": () if more else info["unexpected_keys"],
    }
    if wrong := [f"{len(keys)} {kind}: {_listed(keys)}" for kind, keys in kinds.items() if keys]:
        raise InputError(f"{where}: of the weights of {model_class.__name__} are {'; '.join(wrong)}")
    return model.float()


def _listed(keys: Iterable[Any]) -> str:
    """Names, or (name, shape in the file, shape here)."""
    listed = sorted(key if isinstance(key, str) else f"{key[0]} {tuple(key[1])}, not {tuple(key[2])}" for key in keys)
    return ", ".join(listed[:3])


def some(names: Iterable[str]) -> str:
    """The first four names, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
