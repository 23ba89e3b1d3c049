"""``manifest.json`` of a checkpoint directory: written last, with the size and CRC-32 of every other file.

A directory without a manifest that verifies is not a checkpoint.
"""

from __future__ import annotations

import json
import re
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

from kempnerforge.util.errors import InputError
from kempnerforge.util.reading import parse_json, read_bytes, regular

FORMAT = 1
NAME = "manifest.json"
METADATA = ".metadata"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read or trusted. The message names the path and the reason."""


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint: ``size`` in bytes and the CRC-32 of its content."""

    size: int
    crc32: int


@dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``; ``manifest.step`` and ``manifest["step"]`` are the same.

    Attributes:
        format: version of the directory's layout.
        step: optimizer steps done.
        world_size: number of ranks that wrote it; any number may read it.
        torch_version: version that wrote it.
        state: the JSON object given to ``save``.
        files: every other file, by its path relative to the directory.
    """

    format: int
    step: int
    world_size: int
    torch_version: str
    state: dict[str, Any]
    files: dict[str, FileEntry]

    def __getitem__(self, key: str) -> Any:
        return asdict(self)[key]

    def encode(self) -> bytes:
        """The bytes of ``manifest.json``, with a CRC-32 of the manifest itself.

        Raises:
            CheckpointError: JSON would change ``state`` (tuples, keys that are not strings, NaN, objects).
        """
        body = asdict(self)
        try:
            if json.loads(json.dumps(self.state, allow_nan=False)) != self.state:
                raise ValueError("keys must be strings and sequences lists")
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"state is not plain JSON: {error}") from None
        return json.dumps({**body, "crc32": _digest(body)}, indent=1).encode()

    @staticmethod
    def decode(data: bytes) -> Manifest:
        """The inverse of ``encode``.

        Raises:
            CheckpointError: it is not a manifest, is of another format, or was altered.
        """
        try:
            body = parse_json(data, NAME)
            crc = body.pop("crc32")
        except (InputError, KeyError, TypeError, AttributeError):
            raise CheckpointError(f"{NAME} is not a manifest ({len(data)} bytes)") from None
        if body.get("format") != FORMAT:
            raise CheckpointError(f"{NAME} has format {body.get('format')!r}; this version reads format {FORMAT}")
        if crc != _digest(body):
            raise CheckpointError(f"{NAME} is corrupt (checksum mismatch)")
        if set(body) != {f.name for f in fields(Manifest)}:
            raise CheckpointError(f"{NAME} has the keys {sorted(body)}")
        for key, wanted in (("step", int), ("world_size", int), ("torch_version", str), ("state", dict)):
            if type(body[key]) is not wanted or (wanted is int and body[key] < (key == "world_size")):
                raise CheckpointError(f"{NAME} has {key} = {str(body[key])[:80]!r}")
        try:
            files = {check_name(name): FileEntry(**entry) for name, entry in body.pop("files").items()}
            if any(type(n) is not int or n < 0 for entry in files.values() for n in (entry.size, entry.crc32)):
                raise TypeError
        except (TypeError, AttributeError):
            raise CheckpointError(f"{NAME} does not list files with size and crc32") from None
        return Manifest(files=files, **body)

    @property
    def crc32(self) -> int:
        """The CRC-32 of its content, and so of all files that it lists."""
        return _digest(asdict(self))


def _digest(body: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


def check_name(name: str) -> str:
    """Returns ``name``, a relative path that stays inside its directory; else raises CheckpointError."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\0" in name or "\\" in name:
        raise CheckpointError(f"{name!r} is no file name for a checkpoint: it must be relative and stay inside")
    return name


def checksum(path: Path) -> FileEntry:
    """Size and CRC-32 of the file at ``path``; raises InputError if it is no regular file."""
    size = crc = 0
    with regular(path).open("rb") as file:
        while block := file.read(1 << 20):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return FileEntry(size, crc)


def is_checkpoint(path: Path) -> bool:
    """Whether ``path`` is named or built like a checkpoint directory; it may still be a broken one."""
    return path.is_dir() and ((path / NAME).exists() or re.fullmatch(r"step-\d{8,}", path.name) is not None)


def verify(path: Path, *, content: bool = True) -> Manifest:
    """Reads the manifest of the checkpoint at ``path`` and every file that it lists, on this process alone.

    Args:
        content: False compares the sizes of the files and does not read them.

    Raises:
        CheckpointError: something is missing, altered or truncated.
    """
    path = Path(path)
    try:
        if not (path / NAME).exists():
            raise CheckpointError(f"no {NAME}; the checkpoint was not finished")
        manifest = Manifest.decode(read_bytes(path / NAME))
    except InputError as error:
        raise CheckpointError(str(error)) from None
    except (OSError, CheckpointError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    named = re.fullmatch(r"step-(\d{8,})", path.name)
    if named and int(named[1]) != manifest.step:
        raise CheckpointError(f"{path}: holds step {manifest.step}")
    if METADATA not in manifest.files:
        raise CheckpointError(f"{path}: {NAME} does not list {METADATA}")
    for name, expected in manifest.files.items():
        _verify_file(path, name, expected, content)
    return manifest


def _verify_file(path: Path, name: str, expected: FileEntry, content: bool) -> None:
    try:
        if not (path / name).resolve().is_relative_to(path.resolve()):
            raise CheckpointError(f"{path}: {name} is a link to the outside")
        size = (path / name).stat().st_size
        found = checksum(path / name) if content and size == expected.size else FileEntry(size, -1)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: {name} is missing") from None
    except InputError as error:
        raise CheckpointError(str(error)) from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if found.size != expected.size:
        raise CheckpointError(f"{path}: {name} has {found.size} bytes instead of {expected.size}")
    if content and found != expected:
        raise CheckpointError(f"{path}: {name} is corrupt (checksum mismatch)")
