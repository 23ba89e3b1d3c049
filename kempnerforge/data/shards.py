"""Where the samples of a tar are: an index made of its headers alone.

A member ``dir/0001.txt`` is extension "txt" of sample "dir/0001": the key reaches to the first dot of the
file's name. Members of one key make one sample, wherever they are in the tar. A name is never used as a path
on disk, and links are not followed.
"""

from __future__ import annotations

import os
import tarfile
from array import array
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

from kempnerforge.data.sample import SampleError
from kempnerforge.util.reading import regular

BLOCK = 512
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}
MAX_HEADER = 2**20
"""Bytes of a header that says more than fits into a block, a long name for example."""


class ShardError(SampleError):
    """This tar cannot be used, and why."""


class Member(NamedTuple):
    """Where the content of a member is."""

    offset: int
    size: int


class Header(NamedTuple):
    """A header in a tar.

    Attributes:
        name: of the file; empty for a link, a directory or a device.
        offset, size: of its content.
        following: where the next header is.
    """

    name: str
    offset: int
    size: int
    following: int


@dataclass
class Shard:
    """The index of one tar, about 50 bytes a member. S samples, M members.

    Attributes:
        keys, key_ends: the keys of all samples in a row (UTF-8, as in the tar), and where each ends.
        firsts: (S + 1,) number of each sample's first member.
        kinds: (M,) which extension.
        offsets, sizes: (M,) where the contents are.
    """

    path: str
    extensions: list[str]
    keys: bytes
    key_ends: array[int]
    firsts: array[int]
    kinds: array[int]
    offsets: array[int]
    sizes: array[int]

    def __len__(self) -> int:
        return len(self.key_ends)

    def key(self, index: int) -> str:
        """Of sample ``index``."""
        begin = self.key_ends[index - 1] if index else 0
        return self.keys[begin : self.key_ends[index]].decode("utf-8", "replace")

    def members(self, index: int) -> dict[str, Member]:
        """Of sample ``index``, by extension. Raises SampleError: one is there twice."""
        found: dict[str, Member] = {}
        for number in range(self.firsts[index], self.firsts[index + 1]):
            extension = self.extensions[self.kinds[number]]
            if extension in found:
                raise SampleError(f"two members .{extension}")
            found[extension] = Member(self.offsets[number], self.sizes[number])
        return found

    def read(self, member: Member) -> bytes:
        """The content of ``member``. Raises SampleError: it is no longer there."""
        try:
            with open(self.path, "rb", buffering=0) as file:  # opened anew: an offset shared with forked workers would move under them
                file.seek(member.offset)
                content = file.read(member.size)
        except OSError as error:
            raise SampleError(f"no longer readable: {error.strerror or error}") from None
        if len(content) < member.size:
            raise SampleError("no longer readable: the file has become shorter")
        return content


def index_tar(path: str) -> Shard:
    """Reads the headers of a tar, about 10 microseconds each, and none of its contents. Links, directories
    and devices are passed over, and so are names that begin with a dot or have none.

    Raises:
        ShardError: no such file, compressed, damaged, cut off.
    """
    numbers: dict[str, int] = {}
    kinds: dict[str, int] = {}
    owners: defaultdict[int, list[tuple[int, int, int]]] = defaultdict(list)
    try:
        with open(regular(path), "rb") as file:
            for header in _members(file):
                folder, _, base = header.name.rpartition("/")
                stem, dot, extension = base.partition(".")
                if stem and dot and extension:
                    number = numbers.setdefault(f"{folder}/{stem}" if folder else stem, len(numbers))
                    owners[number].append((kinds.setdefault(extension.lower(), len(kinds)), header.offset, header.size))
    except OSError as error:
        raise ShardError(f"{path}: {error.strerror or error}") from None
    except ShardError as error:
        raise ShardError(f"{path}: {error}") from None
    shard = Shard(path, list(kinds), b"", array("q"), array("q", [0]), array("I"), array("q"), array("q"))
    written = [key.encode("utf-8", "surrogateescape") for key in numbers]
    shard.keys = b"".join(written)
    for number, key in enumerate(written):
        shard.key_ends.append((shard.key_ends[-1] if number else 0) + len(key))
        for kind, offset, size in owners[number]:
            shard.kinds.append(kind)
            shard.offsets.append(offset)
            shard.sizes.append(size)
        shard.firsts.append(len(shard.kinds))
    return shard


def _members(file: BinaryIO) -> Iterator[Header]:
    """The headers of the regular files in a tar; raises ShardError if it is damaged."""
    total = os.fstat(file.fileno()).st_size
    start = file.read(BLOCK)
    for magic, name in COMPRESSED.items():
        if start.startswith(magic):
            raise ShardError(f"compressed with {name}; unpack it: only a plain tar can be read from any place")
    at = 0
    while True:
        file.seek(at)
        block = file.read(BLOCK)
        if len(block) < BLOCK:
            raise ShardError(f"cut off: {total} bytes, and no end mark")
        if not any(block):
            return
        header = _plain(block, at) or _any(file, block, at)
        if header.size < 0 or header.following <= at:
            raise ShardError(f"damaged at byte {at}: a size below 0")
        if header.following > total:
            raise ShardError(f"cut off: {header.name!r} ends at byte {header.offset + header.size}, the file has {total}")
        if header.name:
            yield header
        at = header.following


def _plain(block: bytes, at: int) -> Header | None:
    """The header, if it is of the usual form: most are, and ``tarfile`` takes several times as long."""
    if block[156:157] not in (b"0", b"\0") or block[257:263] not in (b"ustar\0", b"ustar "):
        return None
    try:
        size, checksum = (int(block[a:b].strip(b" \0") or b"0", 8) for a, b in ((124, 136), (148, 156)))
        name = block[:100].split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
        prefix = block[345:500].split(b"\0", 1)[0].decode("utf-8", "surrogateescape") if block[262] == 0 else ""
    except ValueError:
        return None
    if sum(block) - sum(block[148:156]) + 8 * 32 != checksum or size < 0 or name.endswith("/"):
        return None
    return Header(f"{prefix}/{name}" if prefix else name, at + BLOCK, size, at + BLOCK + -(-size // BLOCK) * BLOCK)


def _any(file: BinaryIO, block: bytes, at: int) -> Header:
    """Any header, through ``tarfile``: long names of GNU and of PAX, sizes above 8 GiB, entries that are no
    regular file.
    """
    try:
        long = block[156:157] in (b"x", b"g", b"X", b"L", b"K")
        if long and tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").size > MAX_HEADER:
            raise ValueError(f"a header of more than {MAX_HEADER} bytes")
        file.seek(at)
        tar = tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape")
        info = tar.next()
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise ShardError(f"damaged at byte {at}: {error}") from None
    if info is None:
        raise ShardError(f"damaged at byte {at}: a header without a member")
    return Header(info.name if info.isreg() and not info.issparse() else "", info.offset_data, info.size, tar.offset)
