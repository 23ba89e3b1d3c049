"""Caches of views: in memory, and on disk for later runs."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np

from kempnerforge.data.fingerprint import Signature, signature
from kempnerforge.data.images.decode import contents
from kempnerforge.util.entries import Entries

SETTLED_NS = 2 * 10**9
"""A file that was written later than this before it was read may be written again without its times showing
it.
"""
REMEMBERED = 2**16
"""Files of which it is remembered what they hold."""


def content_key(data: bytes) -> str:
    """Identifies an encoded image by its content; its path does not count."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


class KnownFiles:
    """Content keys of files that have been read, for as long as the system says that they are the same."""

    def __init__(self) -> None:
        self._known: OrderedDict[Path, tuple[Signature, str]] = OrderedDict()

    def key(self, path: Path) -> str | None:
        """The key of the content of ``path``, if the file was read and was not written since."""
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
    """Views in the memory of one process; the views of the least recently used image are dropped first.

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
        """The views of the image with this content ``key`` under ``transform``, shared and read-only, if they
        are here.
        """
        views = self._kept.get((key, transform))
        if views is not None:
            self._kept.move_to_end((key, transform))
        return views

    def put(self, key: str, transform: str, views: list[np.ndarray]) -> None:
        """Keeps ``views``, which must not be written to any more."""
        self._kept[key, transform] = views
        self.free -= sum(view.nbytes for view in views)
        while self.free < 0:
            _, oldest = self._kept.popitem(last=False)
            self.free += sum(view.nbytes for view in oldest)


class DiskCache:
    """Views on disk, uncompressed, for each image. The key is the content of the image: a copied or moved
    image is found again, and a file with new content is another image.

    Args:
        directory: where the entries are.
        transform: all settings that, with the image, decide its views.
        side: of a view, in pixels.

    Raises:
        InputError: the directory cannot be written to.
    """

    def __init__(self, directory: str, transform: str, side: int) -> None:
        self.entries = Entries(Path(directory), "data.images.cache_dir")
        self.entries.check()
        self.transform, self.side = transform, side

    def read(self, image: str) -> list[np.ndarray] | None:
        """The views of the image with the content key ``image``, read-only, if they are there and whole."""
        pixels = self.entries.read(self._key(image), self.side * self.side * 3)
        return None if pixels is None else list(np.frombuffer(pixels, np.uint8).reshape(-1, self.side, self.side, 3))

    def write(self, image: str, views: list[np.ndarray]) -> None:
        self.entries.write(self._key(image), np.stack(views).data.cast("B"))

    def _key(self, image: str) -> str:
        return f"{self.transform}\0{image}"
