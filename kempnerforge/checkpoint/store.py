"""Writes checkpoint directories, complete or not at all, and finds the newest.

``root/step-%08d`` is written as ``.tmp-...`` beside it: tensors through ``torch.distributed.checkpoint`` (one
file per rank), small extra files, then ``manifest.json`` with a checksum of each file. Everything is flushed
to disk before the directory gets its name. So a process that is killed leaves either the whole step or a
``.tmp-...`` directory. The files ``latest`` and ``best`` name steps; a path to one of them means that step.

All functions but ``verify`` are collective: with a process group every rank calls them, rank 0 decides, and
an error on one rank is raised on all. Without a process group they work on the calling process alone. One job
at a time may write to a root: see ``RunLock``.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import uuid
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from kempnerforge.checkpoint.manifest import (
    FORMAT,
    METADATA,
    NAME,
    CheckpointError,
    FileEntry,
    Manifest,
    check_name,
    checksum,
    is_checkpoint,
    verify,
)
from kempnerforge.checkpoint.ranks import agreed, from_rank0, gather, group, in_group, rank, world_size
from kempnerforge.util.paths import start_of

log = logging.getLogger("kempnerforge")

T = TypeVar("T")
_STEP = re.compile(r"(\.old-)?step-(\d{8,})")


class _Writer(FileSystemWriter):
    """DCP's writer, which raises the OSError of a full disk; torch's serializer hides it."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            raise cause or error from None


def save(
    root: Path,
    step: int,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    files: dict[str, bytes],
    keep: int,
    best: int | None = None,
) -> Path:
    """Writes the checkpoint ``root/step-%08d``. Of the steps up to it the newest ``keep`` stay; an existing
    one of the same step is replaced.

    Args:
        root: the folder of checkpoints; made if missing.
        step: optimizer steps done.
        tensors: plain tensors (equal on all ranks) and DTensors, by name; the names are equal, too.
        state: plain JSON for the manifest; rank 0's is written.
        files: small extra files by relative name, such as ``config.toml``; rank 0's are written.
        keep: at least 1.
        best: a step that stays, too, and that ``best`` names.

    Returns:
        The directory.

    Raises:
        CheckpointError: on all ranks; earlier checkpoints stay, and no half-written directory is left.
    """
    assert keep >= 1 and step >= 0, (keep, step)
    root = Path(root)
    final = root / f"step-{step:08d}"
    what = f"cannot save {final}"
    tmp = from_rank0(lambda: _start(root, step), what)
    try:
        written = _write(tmp, tensors, files, what)
        from_rank0(lambda: _finish(tmp, final, Manifest(FORMAT, step, world_size(), str(torch.__version__), state, written)), what)
    except CheckpointError:
        if rank() == 0:
            shutil.rmtree(tmp, ignore_errors=True)
        raise
    from_rank0(lambda: _tidy(root, step, keep, best))
    return final


def name_best(root: Path, step: int) -> None:
    """Makes ``root/best`` name the checkpoint of ``step``. Called by rank 0 alone."""
    _point(root, "best", step)


def _start(root: Path, step: int) -> Path:
    """An empty directory to write in. Leftovers of interrupted saves are removed first."""
    root.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(root, ".tmp-*", ".trash-*")
    tmp = root / f".tmp-{step:08d}-{uuid.uuid4().hex[:8]}"
    tmp.mkdir()
    return tmp


def _write(tmp: Path, tensors: dict[str, Tensor], files: dict[str, bytes], what: str) -> dict[str, FileEntry]:
    """Writes tensors and extra files. Returns every file with its checksum."""
    with agreed(what):
        for key, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise CheckpointError(f"{key!r} is a {type(tensor).__name__}; only tensors are stored as such")
        if rank() == 0:
            _write_files(tmp, files)
    if len(set(gather(zlib.crc32("\n".join(sorted(tensors)).encode())))) > 1:
        raise CheckpointError(f"{what}: ranks give tensors of different names")
    with agreed(what), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp_save(
            {key: tensor.detach() for key, tensor in tensors.items()},
            storage_writer=_Writer(tmp, overwrite=False),
            planner=DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            no_dist=not in_group(),
            process_group=group(),
        )
    written: dict[str, FileEntry] = {}
    with agreed(what):
        paths = list(tmp.glob(f"__{rank()}_*.distcp"))
        if rank() == 0:
            paths += [tmp / METADATA, *(tmp / name for name in files)]
        written = {path.relative_to(tmp).as_posix(): checksum(path) for path in paths}
    return {name: entry for part in gather(written) for name, entry in sorted(part.items())}


def _write_files(tmp: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        path = tmp / check_name(name)
        if name in (NAME, METADATA) or name.endswith(".distcp"):
            raise CheckpointError(f"{name!r} is a name that the checkpoint itself uses")
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_file(path, data)
    for folder in {parent for name in files for parent in (tmp / name).parents if parent.is_relative_to(tmp)}:
        _sync_directory(folder)


def _finish(tmp: Path, final: Path, manifest: Manifest) -> None:
    """Writes the manifest, then renames. A complete step of the same name can be found until then."""
    _write_file(tmp / NAME, manifest.encode())
    _sync_directory(tmp)
    old = final.with_name(f".old-{final.name}")
    if final.exists():
        _remove(old)
        final.rename(old)
    try:
        tmp.rename(final)
    except OSError:
        if old.exists():
            old.rename(final)
        raise
    _sync_directory(final.parent)


def _tidy(root: Path, step: int, keep: int, best: int | None) -> None:
    """Removes old checkpoints. The new one is complete already, so an error here is only a warning.

    Later steps (broken ones; the run continued from before them) are neither counted nor removed.
    """
    try:
        _point(root, "latest", step)
        if best is not None:
            _point(root, "best", best)
        for found, path in [c for c in _candidates(root) if c[0] <= step and not c[1].name.startswith(".old-")][keep:]:
            if found != best:
                _remove(path)
        _remove_leftovers(root, ".old-step-*", ".trash-*")
    except OSError as error:
        log.warning("checkpoint step-%08d is saved, but tidying up failed: %s", step, error)


def _point(root: Path, name: str, step: int) -> None:
    """Writes the file ``root/name`` that names a step, in one move."""
    part = root / f".{name}.tmp"
    _write_file(part, f"step-{step:08d}\n".encode())
    part.replace(root / name)


def _remove(path: Path) -> None:
    """Renames first: a half-deleted directory must not look like a checkpoint."""
    if path.exists():
        trash = path.with_name(f".trash-{uuid.uuid4().hex[:8]}")
        path.rename(trash)
        shutil.rmtree(trash)


def _remove_leftovers(root: Path, *patterns: str) -> None:
    for pattern in patterns:
        for path in root.glob(pattern):
            _remove(path)


def _write_file(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _candidates(root: Path) -> list[tuple[int, Path]]:
    """(step, directory), newest first; a directory that was being replaced comes after its replacement."""
    found = [(int(m[2]), m[1] is None, path) for path in root.iterdir() if (m := _STEP.fullmatch(path.name)) and path.is_dir()]
    return [(step, path) for step, _, path in sorted(found, reverse=True)]


def newest_step(root: Path) -> int | None:
    """The step of the newest checkpoint under ``root``, by its name alone; None if there is none."""
    return next((step for step, _ in _candidates(root)), None) if root.is_dir() else None


def find(root: Path) -> tuple[Path, Manifest] | None:
    """The newest checkpoint under ``root`` that verifies; None if there are none. Broken ones are skipped.

    Raises:
        CheckpointError: on all ranks, when there are checkpoints and all are broken.
    """
    return from_rank0(lambda: _find(Path(root)))


def _find(root: Path, content: bool = True) -> tuple[Path, Manifest] | None:
    candidates = _candidates(root) if root.is_dir() else []
    errors = []
    for _, path in candidates:
        try:
            return path, verify(path, content=content)
        except CheckpointError as error:
            if not path.exists():  # removed meanwhile by the job that writes here, which keeps newer ones
                return _find(root, content)
            errors.append(str(error))
            log.warning("skipping a broken checkpoint: %s", error)
    if errors:
        raise CheckpointError(f"none of the {len(errors)} checkpoints in {root} can be used; the newest: {errors[0]}")
    return None


def resolve(path: Path, *, content: bool = True) -> Path:
    """``path`` if it is a checkpoint, the step that a file ``best`` or ``latest`` names, or the newest valid
    one in a folder of checkpoints or a run directory.

    Args:
        content: as of ``verify``.

    Raises:
        CheckpointError: on all ranks, when there is none, or when ``path`` is a broken checkpoint.
    """
    return from_rank0(lambda: _resolve(Path(path), content))


def reading(path: Path, read: Callable[[Path], T], *, content: bool = True) -> T:
    """The result of ``read`` on the checkpoint at ``path`` (see ``resolve``). If a job that trains there
    removes the checkpoint meanwhile, the newest one is read instead.
    """
    while True:
        found = resolve(path, content=content)
        try:
            return read(found)
        except Exception:
            if found == path or found.exists() or world_size() > 1:
                raise
            log.info("%s was removed while it was read, as newer ones are there: reading the newest", found)


def _resolve(path: Path, content: bool) -> Path:
    if path.name in ("best", "latest") and path.is_file():
        named = path.read_text(encoding="utf-8", errors="replace").strip()[:80]
        if not _STEP.fullmatch(named):
            raise CheckpointError(f"{path}: names no checkpoint: {named!r}")
        path = path.with_name(named)
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: {'not a directory' if path.exists() else f'no such directory{start_of(path)}'}; a checkpoint is a directory"
        )
    if is_checkpoint(path):
        verify(path, content=content)
        return path
    for root in (path, path / "checkpoints"):
        if (found := _find(root, content)) is not None:
            return found[0]
    raise CheckpointError(f"{path}: no checkpoint here; give a step-* directory, a folder of them, or a run directory")
