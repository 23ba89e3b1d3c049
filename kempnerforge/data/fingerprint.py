"""Short digests of data, to notice when what lies behind an unchanged path was changed."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

WHOLE = 8 * 2**20
"""Bytes of a file up to which all of it is read."""
BLOCK, BLOCKS = 2**16, 64
"""Of a larger one so many blocks of so many bytes are read, spread evenly from its head to its tail."""


def digest(*parts: object) -> str:
    """16 hex digits that depend on all ``parts``."""
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def file_fingerprint(path: str | Path) -> str:
    """Of the size and content of a file, or of all files below a directory. Times do not count, so a copy has the fingerprint of the original.

    NOTE: of a file beyond ``WHOLE`` a sample is read; an edit inside it that keeps the size may go unseen.

    Raises:
        OSError: it cannot be read.
    """
    if os.path.isdir(path):
        files = sorted(file for file in Path(path).rglob("*") if file.is_file())
        return digest(*((str(file.relative_to(path)), _checksum(file)) for file in files))
    return digest(_checksum(path))


def _checksum(path: str | Path) -> tuple[int, int]:
    size, checksum = os.path.getsize(path), 0
    with open(path, "rb") as file:
        for begin, length in _looked_at(size):
            file.seek(begin)
            checksum = zlib.crc32(file.read(length), checksum)
    return size, checksum


def _looked_at(size: int) -> Iterator[tuple[int, int]]:
    """(begin, length) of what is read of a file of ``size`` bytes."""
    if size <= WHOLE:
        yield 0, size
        return
    for k in range(BLOCKS):
        yield k * (size - BLOCK) // (BLOCKS - 1), BLOCK
