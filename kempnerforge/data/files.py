"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> Path:
    """Makes ``path``, in one move and whoever else makes it at the same time, and its directory; ``write`` fills the file it is given."""
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
    """As ``write_whole``, a text as it is."""
    return write_whole(path, lambda part: part.write_text(text, encoding="utf-8", newline="\n"))


@contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """A new directory beside ``path``, to make it in. It is gone afterwards, with all that is left in it, and so are those of processes that
    were killed, and parents of ``path`` that were made for it if it was not.
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
    """Gives what is at ``path`` a name with the time beside it, which is free, and returns that."""
    stem = f"{path.name}.{time.strftime('%Y%m%d-%H%M%S', time.localtime())}"
    names = chain([stem], (f"{stem}-{k}" for k in count(2)))
    aside = next(other for name in names if not os.path.lexists(other := path.with_name(name)))
    path.rename(aside)
    return aside


def same_files(a: Path, b: Path) -> bool:
    """Whether two directories hold files of the same names and content."""
    found = [
        {each.name: each.read_bytes() for each in folder.iterdir() if each.is_file()} if folder.is_dir() else None for folder in (a, b)
    ]
    return found[0] is not None and found[0] == found[1]


def why_not_writable(directory: Path) -> str:
    """Why nothing can be written below ``directory``, which need not be there; empty: as far as can be seen without writing, it can."""
    there = next(path for path in (directory, *directory.parents) if os.path.lexists(path))
    if not there.is_dir():
        return f"{there} is not a directory"
    return "" if os.access(there, os.W_OK | os.X_OK) else f"{there} cannot be written to"
