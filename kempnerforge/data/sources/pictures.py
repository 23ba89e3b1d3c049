"""What a row says of its images: files below the data root, encoded bytes, base64."""

from __future__ import annotations

import base64
import binascii
import os
import re
from pathlib import Path
from typing import Any

from kempnerforge.data.sample import ImageSource, SampleError
from kempnerforge.util.errors import show

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
DATA_URL = re.compile(r"data:(?:image/[\w.+-]+)?((?:;[^;,]*)*),", re.IGNORECASE)
HEADS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk")
"""How JPEG, PNG, GIF, WebP and BMP begin in base64."""
MIN_BASE64, MAX_BASE64 = 64, 64 * 2**20
"""Characters of an image in base64: a shorter text is a path; a longer one is refused."""


def images_of(value: Any, column: str, root: str, follow_links: bool) -> tuple[ImageSource, ...]:
    """The images that a row's ``value`` names: a path, bytes, base64, an undecoded image of `datasets`, a
    list of these, or None.

    Raises:
        SampleError: it names none, or one outside ``root``; or an entry of a list is null.
    """
    if value is None:
        return ()
    if isinstance(value, list):
        missing = next((k for k, entry in enumerate(value, 1) if entry is None), 0)
        if missing:
            raise SampleError(f"column {column!r}: image {missing} of {len(value)} is null")
        return tuple(image for entry in value for image in images_of(entry, column, root, follow_links))
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
        if value is None:
            raise SampleError(f"column {column!r}: an image with neither bytes nor path")
    if isinstance(value, bytes):
        return (value,)
    if isinstance(value, str):
        return (from_base64(value) or resolve_image(value, root, follow_links),)
    raise SampleError(f"column {column!r}: an image is a path, bytes or base64, not {type(value).__name__}")


def from_base64(value: str) -> bytes | None:
    """The image in ``value``, a ``data:`` URL or bare base64; None: it is neither. Raises SampleError: too
    long, or not base64.
    """
    url = DATA_URL.match(value)
    if url is None and value[:5].lower() == "data:":
        raise SampleError(f"image {show(value)}: not a data: URL of an image")
    if url is None and not (len(value) >= MIN_BASE64 and value.startswith(HEADS) and "." not in value):
        return None
    if len(value) > MAX_BASE64:
        raise SampleError(f"an image of {len(value):,} characters in base64; {MAX_BASE64:,} are allowed")
    if url is not None and ";base64" not in url[1].lower():
        raise SampleError(f"image {show(value)}: a data: URL must be base64")
    try:
        return base64.b64decode("".join(value[url.end() if url else 0 :].split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise SampleError(f"image {show(value)}: not base64: {error}") from None


def resolve_image(value: str, root: str, follow_links: bool = False) -> Path:
    """The file that a row means by ``value``. Rows come from anywhere, so they may name files below ``root``
    only.

    Args:
        value: a path, relative to ``root`` or absolute below it.
        root: an absolute directory without links in it.
        follow_links: links may lead out of ``root``; paths still may not.

    Raises:
        SampleError: the path leaves ``root`` (also through a link), or is a URL, which would be fetched from
            wherever it says.
    """
    if not value or "\0" in value:
        raise SampleError(f"image path {show(value)}: empty or with a NUL character")
    if URL.match(value):
        raise SampleError(f"image {show(value)}: URLs are not fetched; name a file below data.root")
    if path := _without_links(value, root):
        return Path(path)
    try:
        path = os.path.realpath(os.path.join(root, value))
    except (OSError, ValueError) as error:
        raise SampleError(f"image path {show(value)}: {getattr(error, 'strerror', None) or error}") from None
    if os.path.commonpath((root, path)) == root:
        return Path(path)
    if os.path.isabs(value) or ".." in Path(value).parts:
        raise SampleError(f"image path {show(value)} leaves the data root {root}; set data.root to a folder that holds all images")
    if follow_links:
        return Path(path)
    link = _link(value, root)
    raise SampleError(
        f"image path {show(value)} leaves the data root {root}: {show(link)} is a link to {os.path.realpath(link)};"
        " set data.root to where the images are, or data.follow_links = true"
    )


def _without_links(value: str, root: str) -> str | None:
    """The path of ``value`` below ``root``, if nothing on the way is a link or leads upwards: a look at each part, and none at ``root``."""
    path = root
    for part in value.split("/"):
        path = f"{path}/{part}"
        if part in ("", ".", "..") or os.path.islink(path):
            return None
    return path


def _link(value: str, root: str) -> str:
    """The first part of ``value`` that leads out of ``root``."""
    path = root
    for part in Path(value).parts:
        path = os.path.join(path, part)
        if os.path.commonpath((root, os.path.realpath(path))) != root:
            return path
    return path


def count_images(value: Any) -> int:
    """Images that a row's ``value`` names, as ``images_of`` reads it."""
    return sum(count_images(entry) for entry in value) if isinstance(value, list) else int(value is not None)
