"""Short digests of data, to notice that data changed while their path did not."""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kempnerforge.util.digest import digest

if TYPE_CHECKING:
    from kempnerforge.data.source import Source

WHOLE = 8 * 2**20
"""Bytes of a file up to which all of it is read."""
BLOCK, BLOCKS = 2**16, 64
"""Of a larger one so many blocks of so many bytes are read, spread evenly from its head to its tail."""

PICTURES = 256
"""Samples whose images represent all images of a source: if one in a hundred was replaced, it is noticed in
nine cases of ten.
"""


SizeAndChecksum = tuple[int, int]


class Signature(NamedTuple):
    """What the system knows of a file without reading it. It changes when the file is written or replaced."""

    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int

    @property
    def written_ns(self) -> int:
        """When it was last written, or its times set."""
        return max(self.modified_ns, self.changed_ns)


def signature(path: str | Path) -> Signature | None:
    """The signature of the file at ``path``; None if there is none."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return Signature(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def file_fingerprint(path: str | Path) -> str:
    """Of the size and content of a file, or of all files below a directory. Times do not count, so a copy has
    the fingerprint of the original.

    NOTE: of a file beyond ``WHOLE`` a sample is read; an edit inside it that keeps the size may go unseen.

    Raises:
        OSError: it cannot be read.
    """
    if os.path.isdir(path):
        files = sorted(file for file in Path(path).rglob("*") if file.is_file())
        return digest(*((str(file.relative_to(path)), _checksum(file)) for file in files))
    return digest(_checksum(path))


def pictures_fingerprint(source: Source) -> str:
    """Of the content of the images of ``PICTURES`` samples of ``source``, the same ones each time: of a
    stream those at its beginning. Names, places and times do not count, so data that were moved or copied
    have the fingerprint of the original.
    """
    count = len(source)
    sampled = range(count) if source.order(0).window is not None else random.Random(count).sample(range(count), min(count, PICTURES))
    return digest(*(_pictures(source, index) for index in sorted(sampled)[:PICTURES]))


def shards_fingerprint(paths: Sequence[str | Path]) -> str:
    """Of the content of all of these files, in their order: of all of it if that is little, else of blocks
    from each of them. Of up to 512 files some 128 MiB are read at most, of each further one 256 KiB.

    Raises:
        OSError: one cannot be read.
    """
    blocks = max(2, 16 * BLOCKS // max(1, len(paths)))
    return digest(*(_checksum(path, 2 * BLOCK * blocks, blocks) for path in paths))


def _pictures(source: Source, index: int) -> tuple[object, ...]:
    """Checksums of the images of a sample; nothing for those that cannot be read, which are counted when they
    are met.
    """
    try:
        images = source[index].images
    except ValueError:
        return ()
    return tuple(zlib.crc32(image) if isinstance(image, bytes) else _checksum(image) if os.path.isfile(image) else None for image in images)


def ends_checksum(path: str | Path, length: int) -> SizeAndChecksum:
    """Of the first and the last ``length`` bytes of a file. Raises OSError: it cannot be read."""
    return _checksum(path, whole=-1, blocks=2, length=length)


def _checksum(path: str | Path, whole: int = WHOLE, blocks: int = BLOCKS, length: int = BLOCK) -> SizeAndChecksum:
    """Of all bytes of a file up to ``whole``; of ``blocks`` blocks of ``length`` bytes of a larger one."""
    size, checksum = os.path.getsize(path), 0
    last = max(0, size - length)
    spans = [(0, size)] if size <= whole else [(k * last // (blocks - 1), length) for k in range(blocks)]
    with open(path, "rb") as file:
        for begin, count in spans:
            file.seek(begin)
            checksum = zlib.crc32(file.read(count), checksum)
    return size, checksum
