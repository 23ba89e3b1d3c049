"""Views that have been made before: in memory, and on disk for later runs."""

from __future__ import annotations

import hashlib
import os
import struct
import warnings
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np

from kempnerforge.config.errors import InputError
from kempnerforge.data.files import write_whole
from kempnerforge.data.sample import ImageSource

HEADER = struct.Struct("<4sIII")  # MAGIC, CRC-32 of the pixels, number of views, their side in pixels
MAGIC = b"kfv1"


def content_key(image: ImageSource) -> str:
    """A file by its path; encoded bytes by what they are."""
    return os.fspath(image) if isinstance(image, Path) else hashlib.blake2b(image, digest_size=16).hexdigest()


class ImageCache:
    """Views of one process, those of the least recently used image leaving first.

    Args:
        mib: memory for pixels; 0 keeps none.
    """

    def __init__(self, mib: int) -> None:
        self.free = mib * 2**20
        self._kept: OrderedDict[tuple[str, str], list[np.ndarray]] = OrderedDict()

    def get(self, image: str, transform: str) -> list[np.ndarray] | None:
        """The views of ``image`` under ``transform``, shared and read-only, if they are here."""
        views = self._kept.get((image, transform))
        if views is not None:
            self._kept.move_to_end((image, transform))
        return views

    def put(self, image: str, transform: str, views: list[np.ndarray]) -> None:
        """Keeps ``views``, which nobody may write to any more."""
        self._kept[image, transform] = views
        self.free -= sum(view.nbytes for view in views)
        while self.free < 0:
            _, oldest = self._kept.popitem(last=False)
            self.free += sum(view.nbytes for view in oldest)


class DiskCache:
    """Views in files, one for each image, uncompressed. Several processes may use the same directory.

    A file appears whole or not at all, and carries a checksum: one that is damaged, or of another kind, counts as absent. An image that
    changes on disk (size or time of change) has another key.

    Args:
        directory: made if it is not there.
        transform: everything besides the image that decides what its views are.

    Raises:
        ValueError: the directory cannot be made or written to.
    """

    def __init__(self, directory: str, transform: str) -> None:
        self.directory, self.transform = Path(directory), transform
        self.writable = True
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"data.images.cache_dir = {directory!r}: {error.strerror or error}") from None
        if not os.access(self.directory, os.W_OK | os.X_OK):
            raise InputError(f"data.images.cache_dir = {directory!r}: cannot be written to")

    def path(self, image: ImageSource) -> Path | None:
        """Where the views of ``image`` lie; None: there is no such file."""
        parts = [self.transform, content_key(image)]
        if isinstance(image, Path):
            try:
                found = image.stat()
            except (OSError, ValueError):
                return None
            parts = [self.transform, os.path.abspath(image), str(found.st_size), str(found.st_mtime_ns)]
        key = hashlib.blake2b("\0".join(parts).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
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
