"""Results that are kept on disk, one file each, found by its key: views of images, features of encoders."""

from __future__ import annotations

import hashlib
import logging
import os
import struct
import zlib
from pathlib import Path

from kempnerforge.util.errors import InputError
from kempnerforge.util.files import why_not_writable, write_whole

LOG = logging.getLogger("kempnerforge")

HEADER = struct.Struct("<4s16sI")  # MAGIC, the entry's key, CRC-32 of key and content
MAGIC = b"kfe1"
NAMED = 3
"""Damaged entries that are named; of more it is said that there are."""


class Entries:
    """A directory of entries. Several processes may use it at the same time.

    A file appears whole or not at all, and carries its key and a checksum: one that is damaged, or belongs to
    another key, is named and counts as absent, so it is made anew.

    Args:
        directory: made with its first file.
        where: the key of the config that names it.
    """

    def __init__(self, directory: Path, where: str) -> None:
        self.directory, self.where = directory, where
        self._writable, self._damaged = True, 0

    def check(self) -> None:
        """Raises ``InputError`` if the directory cannot be written to."""
        if reason := why_not_writable(self.directory):
            raise InputError(f"{self.where} = {str(self.directory)!r}: {reason}")

    def path(self, key: str) -> Path:
        """Where the entry of ``key`` is."""
        name = _digest(key).hex()
        return self.directory / name[:2] / f"{name[2:]}.entry"

    def read(self, key: str, unit: int) -> memoryview | None:
        """The content of the entry of ``key``, if it is there and whole.

        Args:
            unit: bytes of which the content is a multiple.
        """
        path = self.path(key)
        if not os.path.lexists(path):
            return None
        try:
            data = path.read_bytes() if path.is_file() else b""
        except OSError as error:
            return self._name(path, f"cannot be read ({error.strerror or error})")
        content = memoryview(data)[HEADER.size :]
        if len(data) < HEADER.size or data[:4] != MAGIC:
            return self._name(path, "is cut off, or no entry of such a cache")
        _, found, checksum = HEADER.unpack_from(data)
        if zlib.crc32(content, zlib.crc32(found)) != checksum:
            return self._name(path, "is damaged")
        if found != _digest(key) or not content or len(content) % unit:
            return self._name(path, "is the entry of something else")
        return content

    def _name(self, path: Path, what: str) -> None:
        self._damaged += 1
        if self._damaged <= NAMED:
            more = "; further ones are not named" if self._damaged == NAMED else ""
            LOG.warning("%s: %s %s; it is made anew%s", self.where, path, what, more)

    def write(self, key: str, content: bytes | memoryview) -> None:
        """Makes the entry of ``key``. A disk that takes no more is no reason to stop: from then on nothing is
        written.
        """
        if not self._writable:
            return

        def fill(part: Path) -> None:
            with part.open("xb") as file:
                file.write(HEADER.pack(MAGIC, digest, zlib.crc32(content, zlib.crc32(digest))))
                file.write(content)

        digest = _digest(key)
        try:
            write_whole(self.path(key), fill)
        except OSError as error:
            self._writable = False
            LOG.warning("%s = %r: %s; nothing more is kept", self.where, str(self.directory), error.strerror or error)


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=16).digest()
