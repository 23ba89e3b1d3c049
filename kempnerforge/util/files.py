"""Files that appear whole or not at all, and files of one JSON object a line that a run goes on with."""

from __future__ import annotations

import contextlib
import glob
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Any

from kempnerforge.util.errors import InputError
from kempnerforge.util.reading import MAX_BYTES, parse_json, read_bytes

LOG = logging.getLogger("kempnerforge")


def write_whole(path: Path, write: Callable[[Path], object]) -> Path:
    """Makes the file ``path``, and its directory. ``write`` fills a temporary file, which is then renamed:
    there is never half a file, also when several processes write it at the same time.
    """
    part = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())  # else a loss of power could leave the name without the content
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    return path


def write_text(path: Path, text: str) -> Path:
    """Writes ``text`` as UTF-8 without changing line ends; see ``write_whole``."""
    return write_whole(path, lambda part: part.write_text(text, encoding="utf-8", newline="\n"))


@contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """A new directory beside ``path``, in which ``path`` can be prepared. It is removed afterwards with its
    content. So are directories that killed processes left, and new parents of ``path`` if it was not made.
    """
    path = path.resolve()
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.part-*"):
        if not _is_alive(left.name.rpartition("-")[2]):
            shutil.rmtree(left, ignore_errors=True)
    folder = path.with_name(f".{path.name}.part-{os.getpid()}")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def sync_files(folder: Path) -> None:
    """Everything in ``folder`` is on the disk afterwards."""
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def move_aside(path: Path) -> Path:
    """Renames ``path`` to an unused name beside it that ends with the time; returns the new path."""
    new_name = _aside(path)
    path.rename(new_name)
    return new_name


def _aside(path: Path) -> Path:
    stem = f"{path.name}.{time.strftime('%Y%m%d-%H%M%S', time.localtime())}"
    names = chain([stem], (f"{stem}-{k}" for k in count(2)))
    return next(other for name in names if not os.path.lexists(other := path.with_name(name)))


def same_files(a: Path, b: Path) -> bool:
    """Whether two directories hold files of the same names and content."""
    found = [
        {each.name: each.read_bytes() for each in folder.iterdir() if each.is_file()} if folder.is_dir() else None for folder in (a, b)
    ]
    return found[0] is not None and found[0] == found[1]


def why_not_writable(directory: Path) -> str:
    """Why nothing can be written below ``directory``, which need not exist; empty if writing seems possible,
    as far as can be seen without trying.
    """
    nearest = next(path for path in (directory, *directory.parents) if os.path.lexists(path))
    if not nearest.is_dir():
        return f"{nearest} is not a directory"
    return "" if os.access(nearest, os.W_OK | os.X_OK) else f"{nearest} cannot be written to"


# ---- one JSON object a line ----------------------------------------------------------------------


def read_objects(path: Path, key: str, kind: type) -> tuple[list[dict[str, Any]], list[int]]:
    """The lines of ``path`` that are objects with a ``kind`` at ``key``, and the numbers of the others. A
    last line without an end, as a kill leaves it, is neither.

    Raises:
        InputError: it cannot be read, or is no regular file.
    """
    found: list[dict[str, Any]] = []
    others: list[int] = []
    *lines, last = read_bytes(path, 16 * MAX_BYTES).split(b"\n")
    for number, line in enumerate([*lines, last], start=1):
        row = _parsed(line)
        if isinstance(row, dict) and type(row.get(key)) is kind:
            found.append(row)
        elif number <= len(lines) and line.strip():
            others.append(number)
    return found, others


def _parsed(line: bytes) -> Any:
    try:
        return parse_json(line, "")
    except InputError:
        return None


def mend_objects(path: Path, key: str, kind: type, belongs: Callable[[dict[str, Any]], bool] = lambda row: True) -> None:
    """Leaves in ``path`` the objects that belong there. If other lines were there, or it is no file, that is
    said, and what was there is kept beside it: a side file never stops a run.
    """
    if not os.path.lexists(path):
        return
    try:
        found, others = read_objects(path, key, kind)
    except InputError as error:
        LOG.warning("%s; moved to %s", error, move_aside(path).name)
        return
    if others:
        shutil.copyfile(path, aside := _aside(path))  # not moved: other ranks read it
        more = f" and {len(others) - 1} more cannot be read and are" if len(others) > 1 else " cannot be read and is"
        LOG.warning("%s: line %d%s left out; the file as it was is %s", path, others[0], more, aside.name)
    write_text(path, "".join(f"{json.dumps(row)}\n" for row in found if belongs(row)))
