"""What untrusted images and videos may be, and the error that says what is wrong with one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kempnerforge.data.sample import SampleError
from kempnerforge.util.errors import cut

MAX_PIXELS = 64_000_000
MAX_ASPECT = 200


class ImageError(SampleError):
    """An image that cannot be used; the message says why."""


def check_size(width: int, height: int) -> None:
    """
    Raises:
        ImageError: too many pixels, none, or a strip.
    """
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width}x{height} exceeds {MAX_PIXELS} pixels")
    if min(width, height) < 1 or max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(f"degenerate size {width}x{height}")


@contextmanager
def decoding() -> Iterator[None]:
    """Whatever a decoder raises says that the image is damaged."""
    try:
        yield
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(f"cannot be decoded ({type(error).__name__}: {cut(str(error))})") from None
