"""Untrusted image files: refused with a reason, or decoded to upright RGB."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from kempnerforge.data.images.limits import MAX_PIXELS, ImageError, check_size, decoding
from kempnerforge.data.images.video import HEAD, Video, video_kind
from kempnerforge.data.sample import ImageSource
from kempnerforge.util.errors import cut, visible
from kempnerforge.util.reading import irregular

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""What is opened. EPS would start Ghostscript; TIFF and the rest are rare in training data and wide open."""
MAX_BYTES = 256 * 2**20
TURNED = (5, 6, 7, 8)
"""EXIF orientations in which width and height are exchanged."""
ORIENTATION_MARKS = ("eXIf", "Raw profile type exif", "XML:com.adobe.xmp")
"""One of these is in the bytes of a PNG that says how it is to be turned; it may say so after the pixels."""
MAX_NOTE = 16 * 2**20
"""Bytes of a text or a colour profile in a PNG, unpacked: no pixel depends on them, and larger ones are
refused as bombs.
"""
PngImagePlugin.MAX_TEXT_CHUNK = MAX_NOTE  # Pillow's own bound refuses a whole image for a note of 1 MiB


class Picture:
    """An image whose header is read and checked, and whose pixels are not decoded yet.

    Attributes:
        size: (width, height) in pixels, upright.
    """

    def __init__(self, data: BinaryIO) -> None:
        if not data.read(1):
            raise ImageError("empty")
        data.seek(0)
        try:
            self._image = Image.open(data, formats=FORMATS)
        except Image.DecompressionBombError:
            raise ImageError(f"exceeds {MAX_PIXELS} pixels") from None
        except UnidentifiedImageError:
            raise ImageError(f"not an image of {', '.join(FORMATS)}") from None
        except Exception as error:
            raise ImageError(f"not an image of {', '.join(FORMATS)} that can be read ({type(error).__name__}: {cut(str(error))})") from None
        width, height = self._image.size
        check_size(width, height)
        with decoding():
            self._turned = _orientation(self._image, data) in TURNED
        self.size = (height, width) if self._turned else (width, height)

    def allow(self, frames: int) -> None:
        """Nothing: a still image is used with any number of frames."""

    def frames(self, count: int, least: tuple[int, int]) -> Iterator[Image.Image]:
        """As ``pixels``, alone: only of a video there are ``count``."""
        yield self.pixels(least)

    def pixels(self, least: tuple[int, int]) -> Image.Image:
        """The decoded image, upright, in RGB. A JPEG may come at a reduced scale, never below twice ``least``
        (width, height).
        """
        image = self._image
        width, height = least[::-1] if self._turned else least
        with decoding():
            if image.format == "JPEG":
                image.draft("RGB", (2 * width, 2 * height))
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))


def load_image(source: ImageSource, size: int) -> np.ndarray:
    """Decode an image, first frame of several, to RGB and squash it to a square (bicubic).

    EXIF orientation is applied, transparency is laid on white, 16-bit gray is scaled. Size and shape are
    judged before pixels are decoded.

    Args:
        source: a file, or the encoded image.

    Returns:
        (size, size, 3) uint8.

    Raises:
        ImageError: no such file, not an image, damaged, too large or degenerate.
    """
    with opened(source) as picture:
        image = picture.pixels((size, size))
        with decoding():
            return np.asarray(image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BICUBIC))  # (H, W, 3)


def image_size(source: ImageSource) -> tuple[int, int]:
    """(width, height) of an image, not of a video, in pixels, upright. Of a file no more than the header is read, unless it is
    a PNG.

    Raises:
        ImageError: as ``load_image``, as far as the header shows it.
    """
    with opened(source, whole=False) as picture:
        picture.allow(0)
        return picture.size


@contextmanager
def opened(source: ImageSource, data: bytes | None = None, *, whole: bool = True) -> Iterator[Picture | Video]:
    """The image or video, and its name in front of what is wrong with it.

    Args:
        source: a file, or the encoded image.
        data: what it holds, where it has been read.
        whole: read a file at once, as its pixels will be wanted.

    Raises:
        ImageError: no such file, not an image, too large or degenerate.
    """
    try:
        data = source if isinstance(source, bytes) else data
        file = io.BytesIO(data) if data is not None else _file(Path(os.fspath(source)), whole)  # pyright: ignore[reportArgumentType]
        # Pillow warns of large images between its two bounds; the bound here is lower than both
        with file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind = video_kind(file.read(HEAD))
            file.seek(0)
            yield Video(file, kind) if kind else Picture(file)
    except ImageError as error:
        raise ImageError(f"image {image_name(source)}: {error}") from None


def encode_png(image: Image.Image, compress_level: int = -1) -> bytes:
    """``image`` as the content of a PNG file; -1 is the default level of zlib."""
    image.save(buffer := io.BytesIO(), "PNG", compress_level=compress_level)
    return buffer.getvalue()


def contents(path: Path) -> bytes:
    """What an image file holds, as it is.

    Raises:
        ImageError: no such file, or too large.
    """
    try:
        with _file(path, whole=True) as file:
            return file.read()
    except ImageError as error:
        raise ImageError(f"image {image_name(path)}: {error}") from None


def image_name(source: ImageSource) -> str:
    """What messages call an image."""
    return visible(cut(str(source), 300)) if isinstance(source, Path) else f"{len(source)} bytes"


def _file(path: Path, whole: bool) -> BinaryIO:
    if not os.path.isfile(path):
        raise ImageError(f"is {kind}, not a file" if (kind := irregular(path)) else "no such file")
    try:
        file = path.open("rb")
        size = os.fstat(file.fileno()).st_size
        if size > MAX_BYTES:
            file.close()
            raise ImageError(f"more than {MAX_BYTES} bytes")
        if not whole:
            return file
        with file:
            return io.BytesIO(file.read(MAX_BYTES))
    except OSError as error:
        raise ImageError(str(error.strerror or error)) from None


def _orientation(image: Image.Image, data: BinaryIO) -> int:
    """The EXIF orientation. Only a PNG that may give it after its pixels is decoded for that."""
    if image.format == "PNG" and not any(key in image.info for key in ("exif", *ORIENTATION_MARKS)):
        here = data.tell()
        data.seek(0)
        content = data.read(MAX_BYTES)
        data.seek(here)
        if any(mark.encode() in content for mark in ORIENTATION_MARKS):
            image.load()
    return Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)  # of a PNG the attribute decodes


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB by meaning: ``convert("RGB")`` alone would clip 16-bit gray to white and drop alpha."""
    if image.mode.startswith("I"):
        scaled = (np.asarray(image, dtype=np.float64) / 256).clip(0, 255)
        image = Image.fromarray(scaled.astype(np.uint8))
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")
