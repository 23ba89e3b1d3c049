"""Views that have been made before: in memory, and on disk for later runs."""

from __future__ import annotations

import hashlib
import struct
import time
import warnings
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np

from kempnerforge.config.errors import InputError
from kempnerforge.data.files import why_not_writable, write_whole
from kempnerforge.data.fingerprint import Signature, signature
from kempnerforge.data.images import contents

HEADER = struct.Struct("<4sIII")  # MAGIC, CRC-32 of the pixels, number of views, their side in pixels
MAGIC = b"kfv1"


SETTLED_NS = 2 * 10**9
"""A file that was written later than this before it was read may be written again without its times showing it."""
REMEMBERED = 2**16
"""Files of which it is remembered what they hold."""


def content_key(data: bytes) -> str:
    """Identifies an encoded image by its content, whatever its path."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


class KnownFiles:
    """Content keys of files that have been read, for as long as the system says that they are the same."""

    def __init__(self) -> None:
        self._known: OrderedDict[Path, tuple[Signature, str]] = OrderedDict()

    def key(self, path: Path) -> str | None:
        """The key of what ``path`` holds now, if it was read and has not been written since."""
        known = self._known.get(path)
        return known[1] if known is not None and known[0] == signature(path) else None

    def read(self, path: Path) -> tuple[bytes, str]:
        """What ``path`` holds, and its key.

        Raises:
            ImageError: it cannot be read.
        """
        before = signature(path)
        data = contents(path)
        key = content_key(data)
        self._known.pop(path, None)
        if before is not None and before == signature(path) and before.written_ns + SETTLED_NS < time.time_ns():
            self._known[path] = before, key
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        return data, key


class ImageCache:
    """Views of one process, those of the least recently used image leaving first.

    Args:
        mib: memory for pixels; 0 keeps none.

    Attributes:
        files: which contents the files have that the views were made of.
    """

    def __init__(self, mib: int) -> None:
        self.free = mib * 2**20
        self.keeps = mib > 0
        self.files = KnownFiles()
        self._kept: OrderedDict[tuple[str, str], list[np.ndarray]] = OrderedDict()

    def get(self, key: str, transform: str) -> list[np.ndarray] | None:
        """The views of the image with this content ``key`` under ``transform``, shared and read-only, if they are here."""
        views = self._kept.get((key, transform))
        if views is not None:
            self._kept.move_to_end((key, transform))
        return views

    def put(self, key: str, transform: str, views: list[np.ndarray]) -> None:
        """Keeps ``views``, which nobody may write to any more."""
        self._kept[key, transform] = views
        self.free -= sum(view.nbytes for view in views)
        while self.free < 0:
            _, oldest = self._kept.popitem(last=False)
            self.free += sum(view.nbytes for view in oldest)


class DiskCache:
    """Views in files, one for each image, uncompressed. Several processes may use the same directory.

    A file appears whole or not at all, and carries a checksum: one that is damaged, or of another kind, counts as absent. It goes by what an
    image holds, so an image that is copied or moved is found again, and one that is written anew is another one.

    Args:
        directory: made with its first file.
        transform: everything besides the image that decides what its views are.

    Raises:
        ValueError: the directory cannot be written to.
    """

    def __init__(self, directory: str, transform: str) -> None:
        self.directory, self.transform = Path(directory), transform
        self.writable = True
        if reason := why_not_writable(self.directory):
            raise InputError(f"data.images.cache_dir = {directory!r}: {reason}")

    def path(self, image: str) -> Path:
        """Where the views of the image with the content key ``image`` lie."""
        key = hashlib.blake2b(f"{self.transform}\0{image}".encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
        return self.directory / key[:2] / f"{key[2:]}.views"

    def read(self, path: Path, side: int) -> list[np.ndarray] | None:
        """The views in ``path``, read-only, if they are there, whole, and squares of ``side`` pixels."""
        try:
            data = path.read_bytes()
        except OSError:
            return None
        if len(data) < HEADER.size:
            return None
        magic, checksum, count, found = HEADER.unpack_from(data)
        pixels = memoryview(data)[HEADER.size :]
        if magic != MAGIC or found != side or not count or len(pixels) != count * side * side * 3 or zlib.crc32(pixels) != checksum:
            return None
        return list(np.frombuffer(pixels, np.uint8).reshape(count, side, side, 3))

    def write(self, path: Path, views: list[np.ndarray]) -> None:
        """Writes ``views`` to ``path``. A disk that takes no more is no reason to stop: from then on nothing is written."""
        if not self.writable:
            return
        pixels = np.stack(views)

        def fill(part: Path) -> None:
            with part.open("xb") as file:
                file.write(HEADER.pack(MAGIC, zlib.crc32(pixels.data), len(views), len(views[0])))
                file.write(pixels.data)

        try:
            write_whole(path, fill)
        except OSError as error:
            self.writable = False
            warnings.warn(f"data.images.cache_dir = {str(self.directory)!r}: {error.strerror or error}; nothing more is kept", stacklevel=2)
