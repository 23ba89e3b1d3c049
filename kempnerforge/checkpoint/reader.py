"""Reads tensors without running code that a checkpoint file may contain, and without silent conversions.

PyTorch's reader unpickles ``.metadata`` without limits, unpickles every entry that is not a tensor, casts to
the dtype in the model and ignores entries that were not asked for. Here ``.metadata`` is read with an
allow-list of classes, and the other three are errors.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from kempnerforge.checkpoint.manifest import METADATA, CheckpointError
from kempnerforge.checkpoint.ranks import agreed, in_group
from kempnerforge.util.reading import irregular

TensorInfo = tuple[tuple[int, ...], torch.dtype]

_METADATA_CLASSES = "Metadata MetadataIndex TensorStorageMetadata TensorProperties ChunkStorageMetadata BytesStorageMetadata StorageMeta _MEM_FORMAT_ENCODING"
_ALLOWED = {("torch.distributed.checkpoint.metadata", name) for name in _METADATA_CLASSES.split()} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "PurePosixPath"),
}


def _member(cls: Any, name: Any) -> Enum:
    """What ``getattr`` is in a pickle: Python 3.11.0 to 3.11.3 write a member of an enum as ``getattr(cls,
    name)``.
    """
    if not (isinstance(cls, type) and issubclass(cls, Enum) and name in cls.__members__):
        raise CheckpointError("refusing to unpickle builtins.getattr")
    return cls[name]


class _SafeUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) == ("builtins", "getattr"):
            return _member
        if (module_name, global_name) in _ALLOWED:
            return super().find_class(module_name, global_name)
        if module_name == "torch" and isinstance(dtype := getattr(torch, global_name, None), torch.dtype):
            return dtype
        raise CheckpointError(f"refusing to unpickle {module_name}.{global_name}")


class _SafeReader(FileSystemReader):
    """DCP's reader, with metadata that was checked before."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


def _read_metadata(path: Path) -> Metadata:
    _check_regular(path, [METADATA])
    try:
        with (path / METADATA).open("rb") as file:
            metadata = _SafeUnpickler(file).load()
    except (CheckpointError, OSError):
        raise
    except Exception as error:
        raise CheckpointError(f"{METADATA} is damaged ({type(error).__name__}: {error})") from None
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise CheckpointError(f"{METADATA} does not describe a checkpoint")
    pickled = [key for key, entry in metadata.state_dict_metadata.items() if not isinstance(entry, TensorStorageMetadata)]
    if pickled:
        raise CheckpointError(f"{METADATA} lists pickled entries, which are refused: {_some(pickled)}")
    outside = {str(info.relative_path) for info in metadata.storage_data.values() if Path(info.relative_path).name != info.relative_path}
    if outside:
        raise CheckpointError(f"{METADATA} points outside the checkpoint: {_some(outside)}")
    _check_regular(path, {info.relative_path for info in metadata.storage_data.values()})
    if metadata.storage_meta is None:
        metadata.storage_meta = StorageMeta()
    return metadata


def _check_regular(path: Path, names: Iterable[str]) -> None:
    for name in names:
        if kind := irregular(path / name):
            raise CheckpointError(f"{path / name}: is {kind}")


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _info(metadata: Metadata) -> dict[str, TensorInfo]:
    entries = metadata.state_dict_metadata.items()
    return {key: (tuple(entry.size), entry.properties.dtype) for key, entry in entries if isinstance(entry, TensorStorageMetadata)}


def tensor_info(path: Path) -> dict[str, TensorInfo]:
    """Global shape and dtype of every tensor in the checkpoint directory ``path``. Call it on all ranks.

    Raises:
        CheckpointError: on all ranks, when the metadata is missing, damaged or unsafe on any.
    """
    path = Path(path)
    with agreed(f"cannot read {path}"):
        return _info(_read_metadata(path))


def load(path: Path, tensors: dict[str, Tensor], *, prefix: str = "") -> None:
    """Fills ``tensors`` in place from the checkpoint directory ``path``. Call it on all ranks.

    Args:
        path: a checkpoint directory. Checksums are not compared here; ``verify`` does it.
        tensors: plain tensors or DTensors of any placement, on any device, one for each entry.
        prefix: only entries with this prefix are read.

    Raises:
        CheckpointError: on all ranks, before anything is read, when a name is missing or unexpected, or a
            shape or dtype differs; also when a file cannot be read.
    """
    path, reader = Path(path), None
    with agreed(f"cannot load {path}"):
        metadata = _read_metadata(path)
        stored = {key: value for key, value in _info(metadata).items() if key.startswith(prefix)}
        _compare(stored, {key: (tuple(t.shape), t.dtype) for key, t in tensors.items()})
        reader = _SafeReader(path, metadata)
    with agreed(f"cannot load {path}"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp_load(
            {key: tensor.detach() for key, tensor in tensors.items()},
            storage_reader=reader,
            planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            no_dist=not in_group(),
        )


def _compare(stored: dict[str, TensorInfo], wanted: dict[str, TensorInfo]) -> None:
    if missing := wanted.keys() - stored.keys():
        raise CheckpointError(f"{len(missing)} tensors are not in the checkpoint: {_some(missing)}")
    if unexpected := stored.keys() - wanted.keys():
        raise CheckpointError(f"{len(unexpected)} tensors of the checkpoint are not asked for: {_some(unexpected)}")
    for i, kind in enumerate(("shape", "dtype")):
        different = [f"{key} is {stored[key][i]}, not {wanted[key][i]}" for key in wanted if stored[key][i] != wanted[key][i]]
        if different:
            raise CheckpointError(f"{len(different)} tensors have another {kind} in the checkpoint: {_some(different)}")
