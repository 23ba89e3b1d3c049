"""The tar shards that a path means: a tar, a directory, a pattern, a manifest, or several of them."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from kempnerforge.data.sources.rows import parse_row
from kempnerforge.util.errors import InputError, show
from kempnerforge.util.paths import PathText, start_of
from kempnerforge.util.reading import regular

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class Listed(NamedTuple):
    """A shard and how many samples its manifest says it has; None: nothing says so."""

    path: PathText
    samples: int | None


def list_shards(path: str, key: str) -> Iterator[Listed]:
    """The shards that ``path`` means, see ``WebDatasetConfig``.

    Raises:
        ValueError: there are none, one is missing, a manifest cannot be read; the message names ``key``.
    """
    for part in path.split("::"):
        if part.endswith(".jsonl"):
            yield from _manifest(part, key)
        elif os.path.isdir(part):
            yield from _globbed(os.path.join(glob.escape(part), "*.tar"), key, part)
        else:
            for pattern in expand_braces(part):
                yield from _globbed(pattern, key, pattern) if glob.has_magic(pattern) else [_existing(Listed(pattern, None), key)]


def expand_braces(pattern: str) -> Iterator[str]:
    """``a{08..10}`` is a08, a09, a10."""
    match = RANGE.search(pattern)
    if match is None:
        yield pattern
        return
    first, last = match[1], match[2]
    if int(last) < int(first):
        raise InputError(f"{pattern!r}: {match[0]} counts down; write the smaller number first")
    for number in range(int(first), int(last) + 1):
        yield from expand_braces(f"{pattern[: match.start()]}{number:0{len(first)}d}{pattern[match.end() :]}")


def _globbed(pattern: str, key: str, shown: str) -> Iterator[Listed]:
    found = sorted(glob.glob(pattern, recursive=True))
    if not found:
        raise InputError(f"{key} = {shown!r}: no tars there{start_of(pattern)}")
    return (Listed(path, None) for path in found)


def _existing(shard: Listed, where: str) -> Listed:
    if not os.path.isfile(shard.path):
        raise InputError(f"{where}: no such shard: {shard.path}")
    return shard


def _manifest(path: str, key: str) -> Iterator[Listed]:
    try:
        with open(regular(path, key), encoding="utf-8-sig") as file:
            lines = [(number, line) for number, line in enumerate(file, 1) if line.strip()]
    except OSError as error:
        raise InputError(f"{key} = {path!r}: {error.strerror or error}{start_of(path)}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{key} = {path!r}: not UTF-8 at byte {error.start}") from None
    if not lines:
        raise InputError(f"{key} = {path!r}: lists no shards")
    for number, line in lines:
        where = f"{path}, line {number}"
        try:
            entry = parse_row(line)
        except ValueError as error:
            raise InputError(f"{where}: {error}") from None
        name, samples = (entry.get("shard"), entry.get("num_sequences")) if type(entry) is dict else (None, None)
        if type(name) is not str or type(samples) is not int or samples < 0:
            raise InputError(f'{where}: must be like {{"shard": "shard-0000", "num_sequences": 8}}, not {show(line.strip())}')
        if not name or "\0" in name or ":" in name or os.path.isabs(name) or ".." in name.split("/"):
            raise InputError(f"{where}: shard = {show(name)}: must be a path below the manifest's directory")
        full = os.path.join(os.path.dirname(path), name if name.endswith(".tar") else f"{name}.tar")
        yield _existing(Listed(full, samples), where)
