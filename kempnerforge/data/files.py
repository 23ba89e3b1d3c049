"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
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
