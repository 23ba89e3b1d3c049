"""Images from files that nobody has checked: refused by name, or decoded to RGB of one size."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from kempnerforge.data.sample import SampleError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""What is opened. EPS would start Ghostscript; TIFF and the rest are rare in training data and wide open."""
MAX_PIXELS = 64_000_000
MAX_ASPECT = 200
MAX_BYTES = 256 * 2**20


class ImageError(SampleError):
    """This image cannot be used, and why."""


def load_image(source: Path | bytes, size: int) -> np.ndarray:
    """Decode an image, first frame of several, to RGB and squash it to a square (bicubic).

    EXIF orientation is applied, transparency is laid on white, 16-bit gray is scaled. Size and shape are judged before pixels are decoded.

    Args:
        source: a file, or the encoded image.
        size: pixels of a side.

    Returns:
        (size, size, 3) uint8.

    Raises:
        ImageError: no such file, not an image, damaged, too large or degenerate.
    """
    name = str(source) if isinstance(source, Path) else f"{len(source)} bytes"
    if not isinstance(source, bytes):
        source = _read(source)
    if not source:
        raise ImageError(f"image {name}: empty")
    with warnings.catch_warnings():
        # Pillow warns of large images between its two bounds; the bound here is lower than both
        warnings.simplefilter("ignore")
        try:
            return _decode(source, size)
        except ImageError as error:
            raise ImageError(f"image {name}: {error}") from None


def _read(path: Path) -> bytes:
    if not os.path.isfile(path):
        raise ImageError(f"image {path}: no such file")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ImageError(f"image {path}: {error.strerror or error}") from None
    if len(data) > MAX_BYTES:
        raise ImageError(f"image {path}: more than {MAX_BYTES} bytes")
    return data


def _decode(data: bytes, size: int) -> np.ndarray:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise ImageError(f"exceeds {MAX_PIXELS} pixels") from None
    except Exception as error:
        raise ImageError(f"not an image of {', '.join(FORMATS)} ({type(error).__name__})") from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width}x{height} exceeds {MAX_PIXELS} pixels")
    if min(width, height) < 1 or max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(f"degenerate size {width}x{height}")
    try:
        if image.format == "JPEG":
            image.draft("RGB", (2 * size, 2 * size))  # decodes at a reduced scale, no smaller than this
        image.load()
        image = _to_rgb(ImageOps.exif_transpose(image))
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BICUBIC)
        return np.asarray(image)  # (H, W, 3)
    except Exception as error:
        raise ImageError(f"cannot be decoded ({type(error).__name__}: {str(error)[:80]})") from None


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


class ImageCache:
    """Decoded images of one process, the least recently used leaving first.

    Args:
        mib: memory for decoded pixels; 0 keeps none.
    """

    def __init__(self, mib: int) -> None:
        self.free = mib * 2**20
        self._images: OrderedDict[tuple[object, int], np.ndarray] = OrderedDict()

    def load(self, source: Path | bytes, size: int) -> np.ndarray:
        """As ``load_image``; the result is shared and read-only."""
        key = (os.fspath(source) if isinstance(source, Path) else hashlib.blake2b(source, digest_size=16).digest(), size)
        image = self._images.get(key)
        if image is not None:
            self._images.move_to_end(key)
            return image
        image = load_image(source, size)
        image.setflags(write=False)
        self._images[key] = image
        self.free -= image.nbytes
        while self.free < 0:
            _, oldest = self._images.popitem(last=False)
            self.free += oldest.nbytes
        return image
