"""Files that others have written, read with limits: regular files alone, of a limited size, JSON of a limited
depth.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from kempnerforge.util.errors import InputError

MIB = 1 << 20
MAX_BYTES = 256 * MIB
"""Of a file that is read as a whole; a large tokenizer.json has 35 MiB."""
MAX_JSON, MAX_DEPTH = 64 * MIB, 64
"""Bytes (of a text: characters) and levels of JSON that is parsed here."""
READ_WHOLE = re.compile(r"(.*config|.*token.*|vocab|chat_template.*|.*\.index|asked|state)\.json|(merges|vocab)\.txt|.*\.(jinja|model)")
"""Names of files beside weights; others, as data, may lie there too."""
KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a directory",
}


def irregular(path: Path | str) -> str:
    """What ``path`` is instead of a file: "a named pipe", say; empty for a file, and where nothing is.
    Opening others may wait for ever.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return ""
    return "" if stat.S_ISREG(mode) else KINDS.get(stat.S_IFMT(mode), "no file")


def regular(path: Path | str, what: str = "") -> Path:
    """``path``, if it is a file or there is nothing.

    Args:
        what: whose path it is, for the message: "data.path".

    Raises:
        InputError: it is a pipe, a device, a socket or a directory.
    """
    if kind := irregular(path):
        raise InputError(f"{what}{' = ' if what else ''}{path}: is {kind}; only regular files are read")
    return Path(path)


def check_files(folder: Path | str, *patterns: str) -> None:
    """Looks at the files in a directory before a library opens them by their names; nothing if it is no
    directory.

    Args:
        patterns: further files below it.

    Raises:
        InputError: one is a pipe, a device or a socket; or one of ``READ_WHOLE``, weights or a config is a
            directory; or one of ``READ_WHOLE`` has more than ``MAX_BYTES``.
    """
    if not os.path.isdir(folder):
        return
    for path in sorted(path for pattern in ("*", *patterns) for path in Path(folder).glob(pattern)):
        whole = READ_WHOLE.fullmatch(path.name)
        if not os.path.isdir(path) or whole or path.suffix in (".safetensors", ".toml"):
            regular(path)
        if whole and os.path.isfile(path) and (size := os.path.getsize(path)) > MAX_BYTES:
            raise InputError(f"{path}: has {size:,} bytes; at most {MAX_BYTES:,} are read")


def read_bytes(path: Path | str, most: int = MAX_BYTES) -> bytes:
    """All of a file.

    Raises:
        InputError: it cannot be read, is no regular file, or has more than ``most`` bytes.
    """
    try:
        with regular(path).open("rb") as file:
            if (size := os.fstat(file.fileno()).st_size) > most:
                raise InputError(f"{path}: has {size:,} bytes; at most {most:,} are read")
            return file.read()
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot be read; {getattr(error, 'strerror', None) or error}") from None


def read_text(path: Path | str, most: int = MAX_BYTES) -> str:
    """As ``read_bytes``, UTF-8."""
    raw = read_bytes(path, most)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: cannot be read; byte 0x{raw[error.start]:02x} at {error.start} is not UTF-8") from None


def read_json(path: Path | str, most: int = MAX_JSON) -> Any:
    """A JSON file.

    Raises:
        InputError: it cannot be read, is no JSON, is too large or nested too deeply.
    """
    return parse_json(read_text(path, most), str(path))


def read_object(path: Path | str) -> dict[str, Any]:
    """As ``read_json``; a file that holds no object is an InputError."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds no JSON object")
    return found


def parse_json(text: str | bytes, where: str, **hooks: Any) -> Any:
    """``json.loads`` of at most ``MAX_JSON`` bytes, ``MAX_DEPTH`` levels deep.

    Args:
        where: what the text is, for messages; empty: they begin with what is wrong.
        hooks: of ``json.loads``.

    Raises:
        InputError: it is no JSON, too large or nested too deeply.
    """
    start = f"{where}: " if where else ""
    if len(text) > MAX_JSON:
        raise InputError(f"{start}has {len(text):,} bytes; of JSON at most {MAX_JSON:,} are read")
    try:
        found = _decoder(**hooks).decode(text) if type(text) is str and text[:1] != "\ufeff" else json.loads(text, **hooks)
    except RecursionError:
        found = None
    except json.JSONDecodeError as error:
        what, line = error.msg.removesuffix(" at"), f"line {error.lineno}, " * (error.lineno > 1)
        raise InputError(f"{start}not JSON: {what} at {line}column {error.colno}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{start}not UTF-8 at byte {error.start}") from None
    except InputError as error:  # of a hook
        raise InputError(f"{start}{error}") from None
    except ValueError as error:  # a number of thousands of digits
        raise InputError(f"{start}not JSON: {str(error)[:80]}") from None
    else:
        if not deeper_than(found, MAX_DEPTH):
            return found
    raise InputError(f"{start}not read: nested more than {MAX_DEPTH} levels deep")


@lru_cache(maxsize=16)
def _decoder(**hooks: Any) -> json.JSONDecoder:
    return json.JSONDecoder(**hooks)


def deeper_than(value: Any, levels: int) -> bool:
    """Whether tables and lists are nested in ``value`` more than ``levels`` deep."""
    here: list[Any] = [value] if isinstance(value, dict | list) else []
    for _ in range(levels):
        if not here:
            return False
        here = [child for part in here for child in (part.values() if isinstance(part, dict) else part) if isinstance(child, dict | list)]
    return bool(here)


class Entry(NamedTuple):
    """A key of a nested table: its dotted name ("text_config.hidden_size"), the last part of it, its value."""

    name: str
    key: str
    value: Any


def entries(table: dict[str, Any], at: str = "") -> Iterator[Entry]:
    """The keys of ``table`` and of all tables in it; ``at`` is put before their names."""
    for key, value in table.items():
        yield Entry(f"{at}{key}", str(key), value)
        if isinstance(value, dict):
            yield from entries(value, f"{at}{key}.")
