"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> Path:
    """Makes ``path``, in one move and whoever else makes it at the same time, and its directory; ``write`` fills the file it is given."""
    part = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    return path


def write_text(path: Path, text: str) -> Path:
    """As ``write_whole``, a text as it is."""
    return write_whole(path, lambda part: part.write_text(text, encoding="utf-8", newline="\n"))


def why_not_writable(directory: Path) -> str:
    """Why nothing can be written below ``directory``, which need not be there; empty: as far as can be seen without writing, it can."""
    there = next(path for path in (directory, *directory.parents) if os.path.lexists(path))
    if not there.is_dir():
        return f"{there} is not a directory"
    return "" if os.access(there, os.W_OK | os.X_OK) else f"{there} cannot be written to"
