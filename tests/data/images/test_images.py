"""A decoder against files as they come from the wild. The matrix is made here; nothing is read from elsewhere."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kempnerforge.data import ImageError, load_image
from kempnerforge.data.images.decode import image_size, opened

RNG = np.random.default_rng(0)
NOISE = Image.fromarray(RNG.integers(0, 255, (48, 64, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_bomb(width: int, height: int) -> bytes:
    """A valid 1-bit PNG: a small file of a huge picture."""
    row, packer = b"\0" * (1 + (width + 7) // 8), zlib.compressobj(9)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def with_chunk(name: bytes, data: bytes, before: bytes = b"IDAT") -> bytes:
    """A good PNG with one more chunk."""
    plain = encoded(NOISE)
    at = plain.rindex(before) - 4
    return plain[:at] + chunk(name, data) + plain[at:]


ZEROS = zlib.compress(b"A" * 100_000_000, 9)
"""100 MB in 97 kB."""


def gif_of_large_screen() -> bytes:
    """A GIF of a few bytes whose screen has 65,000 pixels a side."""
    return b"GIF89a" + struct.pack("<HHBBB", 65000, 65000, 0, 0, 0) + b",\0\0\0\0\x01\0\x01\0\0\x02\x02D\x01\0;"


def gif_with_frame_beyond_its_screen() -> bytes:
    """A screen of one pixel, and a first frame that makes it 65,000 wide and high."""
    frame = b"," + struct.pack("<HHHHB", 0, 0, 65000, 65000, 0)
    return b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0, 0, 0) + frame + b"\x02\x02D\x01\0;"


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("image.png", encoded(NOISE))
    return buffer.getvalue()


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :]


def rgb_of_16_bits() -> bytes:
    """A PNG of 16 bits a channel, which Pillow does not write."""
    high = np.asarray(NOISE)
    lines = np.zeros((48, 1 + 64 * 6), dtype=np.uint8)
    lines[:, 1::2] = high.reshape(48, -1)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 48, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(lines.tobytes())) + chunk(b"IEND", b"")


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif.tobytes()


TURNED = turned()
JPEG = encoded(NOISE.resize((640, 480)), "JPEG")
PNG = encoded(NOISE)

REFUSED = {
    "zero bytes": (b"", "empty"),
    "random bytes": (RNG.bytes(500), "not an image"),
    "html page": (b"<html><body>404</body></html>", "not an image"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg' width='10' height='10'/>", "not an image"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n", "not an image"),
    "float tiff": (encoded(Image.fromarray(RNG.random((48, 64), dtype=np.float32)), "TIFF"), "not an image"),
    "jpeg header only": (JPEG[:20], "not an image"),
    "jpeg cut at half": (JPEG[: len(JPEG) // 2], "cannot be decoded"),
    "jpeg cut at the end": (JPEG[:-20], "cannot be decoded"),
    "png cut at half": (PNG[: len(PNG) // 2], "cannot be decoded"),
    "png with a flipped bit": (flipped(PNG), "cannot be decoded"),
    "png bomb 20000x20000": (png_bomb(20000, 20000), "exceeds 64000000 pixels"),
    "png bomb 12000x12000": (png_bomb(12000, 12000), "12000x12000 exceeds 64000000 pixels"),
    "png 9000x9000": (png_bomb(9000, 9000), "9000x9000 exceeds 64000000 pixels"),
    "text bomb": (with_chunk(b"zTXt", b"k\0\0" + ZEROS), "not an image"),
    "international text bomb": (with_chunk(b"iTXt", b"k\0\1\0\0\0" + ZEROS), "not an image"),
    "text bomb after the pixels": (with_chunk(b"zTXt", b"k\0\0" + ZEROS, b"IEND"), "cannot be decoded"),
    "colour profile bomb": (with_chunk(b"iCCP", b"k\0\0" + ZEROS), "not an image"),
    "zip": (zipped(), "not an image"),
    "gif of a huge screen": (gif_of_large_screen(), "exceeds 64000000 pixels"),
    "gif with a huge first frame": (gif_with_frame_beyond_its_screen(), "exceeds 64000000 pixels"),
    "webp cut at half": (encoded(NOISE, "WEBP")[:2000], "not an image|cannot be decoded"),
    "1x3000": (encoded(NOISE.resize((1, 3000))), "degenerate size 1x3000"),
    "65000x1": (encoded(NOISE.resize((65000, 1))), "degenerate size 65000x1"),
}

ACCEPTED = {
    "jpeg": encoded(NOISE, "JPEG"),
    "jpeg with a flipped bit": flipped(JPEG),
    "cmyk jpeg": encoded(NOISE.convert("CMYK"), "JPEG"),
    "gray": encoded(NOISE.convert("L")),
    "palette": encoded(NOISE.convert("P")),
    "palette with transparency": encoded(NOISE.convert("P"), transparency=0),
    "rgba": encoded(NOISE.convert("RGBA")),
    "gray and alpha": encoded(NOISE.convert("LA")),
    "1-bit": encoded(NOISE.convert("1")),
    "16-bit gray": encoded(Image.fromarray(RNG.integers(0, 65535, (48, 64)).astype(np.uint16))),
    "1x1": encoded(NOISE.resize((1, 1))),
    "16-bit rgb": rgb_of_16_bits(),
    "exif orientation": encoded(NOISE, "JPEG", exif=TURNED),
    "damaged exif": encoded(NOISE, "JPEG", exif=b"Exif\0\0" + RNG.bytes(40)),
    "several pictures in a jpeg": encoded(NOISE, "MPO", save_all=True, append_images=[NOISE]),
    "more bytes after the end": encoded(NOISE, "JPEG") + RNG.bytes(500),
    "animated png": encoded(NOISE, "PNG", save_all=True, append_images=[NOISE.rotate(90)], duration=50),
    "animated webp": encoded(NOISE, "WEBP", save_all=True, append_images=[NOISE.rotate(90)], duration=50),
    "animated gif": encoded(NOISE, "GIF", save_all=True, append_images=[NOISE.rotate(90)], duration=50),
    "webp": encoded(NOISE, "WEBP"),
    "bmp": encoded(NOISE, "BMP"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_without_warnings(name: str) -> None:
    data, reason = REFUSED[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match=reason):
            load_image(data, 32)


@pytest.mark.parametrize("kind", [b"iCCP", b"zTXt", b"tEXt"])
@pytest.mark.parametrize("before", [b"IDAT", b"IEND"])
def test_large_notes_of_a_png_change_no_pixel(kind: bytes, before: bytes) -> None:
    body = b"k\0" + (bytes(2 * 2**20) if kind == b"tEXt" else b"\0" + zlib.compress(bytes(2 * 2**20)))
    assert np.array_equal(load_image(with_chunk(kind, body, before), 32), load_image(PNG, 32))


def test_a_refusal_has_the_reason_of_the_decoder() -> None:
    with pytest.raises(ImageError, match="Decompressed data too large"):
        load_image(REFUSED["text bomb"][0], 32)


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted_as_rgb(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = load_image(ACCEPTED[name], 32)
    assert pixels.shape == (32, 32, 3)
    assert pixels.dtype == np.uint8
    if name != "1x1":  # the noise has a mean near 127: neither black nor white
        assert 90 < pixels.mean() < 200
        assert pixels.std() > 5


def test_bombs_are_refused_before_pixels_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(self: Image.Image) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    with pytest.raises(ImageError, match="exceeds"):
        load_image(png_bomb(12000, 12000), 32)


def test_pixels_are_kept_when_nothing_is_to_be_done() -> None:
    square = NOISE.resize((32, 32))
    assert np.array_equal(load_image(encoded(square), 32), np.asarray(square))


def test_alpha_is_laid_on_white() -> None:
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert (load_image(encoded(clear), 4) == 255).all()
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert (abs(load_image(encoded(half), 4).astype(int) - 127) <= 1).all()


def test_16_bit_gray_is_scaled() -> None:
    ramp = np.linspace(0, 65535, 32).astype(np.uint16)[None].repeat(32, 0)
    pixels = load_image(encoded(Image.fromarray(ramp)), 32)
    assert np.array_equal(pixels[0, :, 0], ramp[0] // 256)


def test_exif_orientation_is_applied() -> None:
    picture = Image.new("RGB", (16, 16), "black")
    picture.paste("white", (0, 0, 16, 8))  # the upper half
    pixels = load_image(encoded(picture, "JPEG", exif=TURNED, quality=95), 16)  # by 90 degrees clockwise: the upper half is on the right
    assert pixels[:, 10:].mean() > 240
    assert pixels[:, :6].mean() < 15


def test_first_frame_of_several() -> None:
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    for kind, exact in (("GIF", True), ("PNG", True), ("WEBP", False), ("MPO", False)):
        red, green, blue = load_image(encoded(first, kind, save_all=True, append_images=[second]), 8)[4, 4].tolist()
        assert (red, green, blue) == (255, 0, 0) if exact else red > 240 and max(green, blue) < 20, kind


def test_16_bit_rgb_keeps_its_upper_bytes() -> None:
    with opened(ACCEPTED["16-bit rgb"]) as picture:
        assert np.array_equal(np.asarray(picture.pixels((64, 48))), np.asarray(NOISE))


def test_large_jpeg_is_close_to_a_full_decode() -> None:
    smooth = Image.fromarray(RNG.integers(0, 255, (6, 8, 3), dtype=np.uint8)).resize((1600, 1200), Image.Resampling.BICUBIC)
    full = np.asarray(smooth.resize((64, 64), Image.Resampling.BICUBIC)).astype(int)
    assert abs(load_image(encoded(smooth, "JPEG", quality=95), 64) - full).mean() < 2


def test_damaged_files_never_raise_anything_else() -> None:
    """Random damage to every kind of file: an array or an ``ImageError``."""
    rng = np.random.default_rng(1)
    small = NOISE.resize((24, 16))
    files = [encoded(small, kind) for kind in ("PNG", "WEBP", "GIF", "BMP")] + [encoded(small, "JPEG", exif=TURNED)]
    for data in files:
        for _ in range(150):
            damaged = bytearray(data)
            for at in rng.integers(0, len(data), size=int(rng.integers(1, 6))):
                damaged[at] = rng.integers(256)
            try:
                assert load_image(bytes(damaged), 16).shape == (16, 16, 3)
            except ImageError as error:
                assert str(error).startswith("image ")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such file"):
        load_image(tmp_path / "missing.png", 8)
    with pytest.raises(ImageError, match="is a directory"):
        load_image(tmp_path, 8)
    with pytest.raises(ImageError, match="no such file"):
        load_image(Path("a\0b"), 8)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="is a named pipe"):
        load_image(tmp_path / "pipe.png", 8)


def test_the_header_alone_says_the_upright_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    upright = {name: data for name, data in ACCEPTED.items() if name not in ("jpeg with a flipped bit", "1x1")}
    sizes = {name: load_through(data) for name, data in upright.items()}
    late = with_chunk(b"eXIf", TURNED.removeprefix(b"Exif\0\0"), b"IEND")  # after the pixels
    assert image_size(late) == load_through(late) == (48, 64)

    def decode(self: Image.Image) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    for name, data in upright.items():
        (tmp_path / "image").write_bytes(data)
        assert image_size(data) == image_size(tmp_path / "image") == sizes[name], name
    for kind in ("JPEG", "PNG", "WEBP"):
        assert image_size(encoded(NOISE, kind, exif=TURNED)) == (48, 64), kind
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    assert image_size(encoded(NOISE, "JPEG", xmp=xmp)) == (48, 64)
    for data, reason in REFUSED.values():
        if reason != "cannot be decoded":
            with pytest.raises(ImageError, match=reason):
                image_size(data)


def load_through(data: bytes) -> tuple[int, int]:
    """The size of the decoded image."""
    with opened(data) as picture:
        return picture.pixels((4000, 4000)).size
