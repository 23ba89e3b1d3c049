"""Untrusted video files: frames at chosen times, through PyAV (FFmpeg), imported when one is opened."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from fractions import Fraction
from functools import cached_property
from typing import Any, BinaryIO

from PIL import Image

from kempnerforge.data.images.limits import ImageError, check_size, decoding

HEAD = 12
"""Bytes at the beginning of a file that say what it is."""
STILLS = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")
"""Brands of single images in the container of MP4."""
SEEK_S = 2
"""Seconds between two frames from which on those between them are skipped, not decoded."""
MAX_DECODED = 20_000
"""Frames that are decoded for those that are taken, at most."""
MISSING = "needs the package av: pip install 'kempnerforge[video]'"


def video_kind(head: bytes) -> str:
    """What FFmpeg calls the container of a file that begins with ``head``: MP4 and MOV, Matroska and WebM,
    AVI; empty: it is no video.
    """
    if head[4:8] == b"ftyp":
        return "" if head[8:12] in STILLS else "mov"
    if head[:4] == b"\x1aE\xdf\xa3":
        return "matroska"
    return "avi" if head[:4] == b"RIFF" and head[8:12] == b"AVI " else ""


def can_read_videos() -> bool:
    """Whether PyAV is installed."""
    return importlib.util.find_spec("av") is not None


def moments(seconds: float, count: int) -> list[float]:
    """The middles of ``count`` equal parts of ``seconds``."""
    return [(k + 0.5) / count * seconds for k in range(count)]


class Video:
    """A video file that is not opened yet. Only the container that its first bytes name is read, from the
    bytes of the file: no other file and no address that it may name.

    Raises:
        ImageError: by every method and attribute but ``allow``: it cannot be used; the message says why.
    """

    def __init__(self, data: BinaryIO, kind: str) -> None:
        self._data, self._kind = data, kind

    def allow(self, frames: int) -> None:
        """Raises ImageError if ``frames`` is 0: without ``data.images.frames`` nothing is opened."""
        if not frames:
            raise ImageError("is a video; with data.images.frames = n it is n of its frames")

    @cached_property
    def _opened(self) -> tuple[Any, Any]:
        """Container and stream."""
        if not can_read_videos():
            raise ImageError(f"a video {MISSING}")
        import av

        with decoding():
            container = av.open(self._data, format=self._kind)
        stream = next((one for one in container.streams.video if one.codec_context is not None), None)
        if stream is None:
            raise ImageError("has no video in it that can be decoded")
        stream.codec_context.thread_count = 1  # loaders have several processes
        check_size(stream.codec_context.width, stream.codec_context.height)
        return container, stream

    @cached_property
    def seconds(self) -> float:
        """How long it is, as its header says."""
        container, stream = self._opened
        length = stream.duration * stream.time_base if stream.duration else Fraction(container.duration or 0, 1_000_000)
        if length <= 0:
            raise ImageError("does not say how long it is")
        return float(length)

    @cached_property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels, upright."""
        return self.pixels((1, 1)).size

    def pixels(self, least: tuple[int, int]) -> Image.Image:
        """The frame in the middle, upright, in RGB, at its full size."""
        return next(self.frames(1, least))

    def frames(self, count: int, least: tuple[int, int]) -> Iterator[Image.Image]:
        """What is shown at ``moments``, upright, in RGB, at full size; a frame may come several times."""
        container, stream = self._opened
        first, decoded = stream.start_time or 0, 0
        shown = ahead = source = None
        for moment in moments(self.seconds, count):
            target = first + int(moment / stream.time_base)
            with decoding():
                if source is None or self.seconds / count > SEEK_S:
                    container.seek(target, stream=stream)
                    source, shown, ahead = container.decode(stream), None, None
                while ahead is None or ahead.pts <= target:
                    shown, ahead, decoded = ahead or shown, next(source, None), decoded + 1
                    if ahead is None:
                        break
                    if decoded > MAX_DECODED:
                        raise ImageError(f"more than {MAX_DECODED} frames have to be decoded for {count}")
                shown = shown or ahead
                if shown is None or shown.is_corrupt or (ahead is None and self._late(target, shown, stream)):
                    raise ImageError(f"cannot be decoded at {moment:.1f} of {self.seconds:.1f} seconds")
                check_size(shown.width, shown.height)
                image = shown.to_image().rotate(shown.rotation, expand=True)
            yield image

    def _late(self, target: int, last: Any, stream: Any) -> bool:
        """Whether the ``last`` frame ends so much before ``target`` that others must be missing. (Sound may be a
        little longer.)
        """
        return (target - last.pts - (last.duration or 0)) * stream.time_base > max(1, self.seconds / 10)
