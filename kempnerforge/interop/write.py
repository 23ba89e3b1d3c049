"""Writes directories that transformers loads: ``config.json`` and safetensors, with the names of files on the
hub.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kempnerforge.config.model import ModelConfig
from kempnerforge.interop.families import EMBEDDING, HEAD, text_names
from kempnerforge.interop.settings import hf_config
from kempnerforge.model.hf_files import CONFIG, INDEX, WEIGHTS
from kempnerforge.util.errors import InputError
from kempnerforge.util.files import scratch, sync_files
from kempnerforge.util.reading import read_object

SHARD_BYTES = 5_000_000_000

NEW_EMBEDDING, NEW_HEAD = "new_tokens.embedding.weight", "new_tokens.output_head.weight"

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Progress = Callable[[str, int, int], None]
"""Called with the name of the work, the number of units done, and the number of all units."""


def nothing(what: str, done: int, total: int) -> None:
    """A ``Progress`` that reports nothing."""


@contextmanager
def fresh(path: Path) -> Iterator[Path]:
    """A directory to write into, which becomes ``path`` when all is done. After an error, Ctrl-C or a kill
    there is no ``path``.

    Raises:
        ValueError: something is there already.
        OSError: it cannot be made.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path}: already there; give a directory that is new or empty")
    with scratch(path) as folder:
        part = folder / path.resolve().name
        part.mkdir()
        yield part
        sync_files(part)
        part.rename(path.resolve())


def plain_embedding(cfg: ModelConfig, tensors: Mapping[str, Tensor], rows: int = 0) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The same model with its new tokens as ordinary rows of embedding and head.

    Args:
        cfg: ``[model]``.
        tensors: ours, by parameter name.
        rows: further rows to append, each the mean of the others.
    """
    tensors = dict(tensors)
    for whole, new in ((EMBEDDING, NEW_EMBEDDING), (HEAD, NEW_HEAD)):
        added = [tensors.pop(f"transformer.{new}")] if f"transformer.{new}" in tensors else []
        if (table := tensors.get(f"transformer.{whole}")) is None:
            continue
        if rows:
            added.append(table.float().mean(0, keepdim=True).to(table.dtype).expand(rows, -1))
        tensors[f"transformer.{whole}"] = torch.cat([table, *added]) if added else table  # (V + n, D)
    return replace(cfg, vocab_size=cfg.vocab_size + len(cfg.new_tokens) + rows, new_tokens=[]), tensors


def without_last_name(cfg: ModelConfig) -> ModelConfig:
    """``cfg`` without the last of its new tokens."""
    return replace(cfg, new_tokens=cfg.new_tokens[:-1], unwritten_new_tokens=max(0, cfg.unwritten_new_tokens - 1))


def without_last_token(cfg: ModelConfig, tensors: Mapping[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor], Tensor]:
    """The same model without the last of its new tokens, and the embedding of that token, (D,). Arguments:
    as of ``plain_embedding``.
    """
    tensors, kept = dict(tensors), len(cfg.new_tokens) - 1
    vector = tensors[f"transformer.{NEW_EMBEDDING}"][-1]
    for name in (f"transformer.{NEW_EMBEDDING}", f"transformer.{NEW_HEAD}"):
        if name in tensors and len(rows := tensors.pop(name)[:kept]):
            tensors[name] = rows
    return without_last_name(cfg), tensors, vector


def write_language_model(
    path: Path, cfg: ModelConfig, tensors: Mapping[str, Tensor], ids: Mapping[str, int | None], family: str | None = None,
    shard_bytes: int = SHARD_BYTES, progress: Progress = nothing,
) -> dict[str, Any]:  # fmt: skip
    """A language model that transformers loads.

    Args:
        path: a directory, made if it is not there.
        cfg, tensors: as ``plain_embedding`` gives them.
        ids: "bos_token_id", "eos_token_id" and "pad_token_id".
        family: of transformers; None takes the first that can be this model.

    Returns:
        The content of ``config.json``.

    Raises:
        ValueError: no family of transformers can be this model.
    """
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    config: dict[str, Any] = hf_config(cfg, family) | dict(ids) | {"torch_dtype": dtype}
    write_config(path, config)
    names = text_names(tensors, config["model_type"])
    save_tensors(path, {name: tensors[key] for key, name in names.items()}, shard_bytes, progress)
    return config


def write_config(path: Path, config: Mapping[str, Any], name: str = CONFIG) -> None:
    """``config.json`` or a file like it."""
    path.mkdir(parents=True, exist_ok=True)
    (path / name).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], shard_bytes: int = SHARD_BYTES, progress: Progress = nothing) -> None:
    """``model.safetensors``, or as many shards as are needed, with their index. Older weights there are
    replaced.

    Args:
        shard_bytes: the size of a file at most; a larger tensor gets a separate file.
    """
    path.mkdir(parents=True, exist_ok=True)
    for old in [path / INDEX, *path.glob("model*.safetensors")]:
        old.unlink(missing_ok=True)
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    total, done = sum(tensor.nbytes for tensor in tensors.values()), 0
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # NOTE: safetensors stores no two names for the same memory
        save_file({name: tensors[name].detach().cpu().contiguous().clone() for name in names}, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        done += sum(tensors[name].nbytes for name in names)
        progress(f"writing {file}", done, total)
    if len(shards) > 1:
        write_config(path, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, INDEX)


def cast_files(path: Path, dtype: torch.dtype) -> None:
    """Casts the weights at ``path`` to ``dtype``, and says so in its ``config.json``, if there is one.
    Tensors of integers are not cast.
    """
    if (path / CONFIG).is_file():
        config = read_object(path / CONFIG)
        for section in (config, *(part for part in config.values() if isinstance(part, dict))):
            section.pop("dtype", None)
        write_config(path, config | {"torch_dtype": str(dtype).removeprefix("torch.")})
    if dtype == torch.float32:
        return
    size = 0
    for file in sorted(path.glob("model*.safetensors")):
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
        size += sum(t.nbytes for t in tensors.values())
    if (path / INDEX).is_file():
        index = read_object(path / INDEX)
        write_config(path, index | {"metadata": index["metadata"] | {"total_size": size}}, INDEX)
