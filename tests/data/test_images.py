"""A decoder against files as they come from the wild. The matrix is made here; nothing is read from elsewhere."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kempnerforge.data import ImageError, load_image
from kempnerforge.data.images import ImageCache

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


def text_bomb() -> bytes:
    """A PNG with a comment that unpacks to 100 MB."""
    plain = encoded(NOISE)
    at = plain.index(b"IDAT") - 4
    return plain[:at] + chunk(b"zTXt", b"k\0\0" + zlib.compress(b"A" * 100_000_000, 9)) + plain[at:]


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :]


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
    "text bomb": (text_bomb(), "not an image|cannot be decoded"),
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
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise: the upper half comes to the right
    pixels = load_image(encoded(picture, "JPEG", exif=exif.tobytes(), quality=95), 16)
    assert pixels[:, 10:].mean() > 240
    assert pixels[:, :6].mean() < 15


def test_first_frame_of_several() -> None:
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    pixels = load_image(encoded(first, "GIF", save_all=True, append_images=[second]), 8)
    assert pixels[4, 4].tolist() == [255, 0, 0]


def test_large_jpeg_is_close_to_a_full_decode() -> None:
    smooth = Image.fromarray(RNG.integers(0, 255, (6, 8, 3), dtype=np.uint8)).resize((1600, 1200), Image.Resampling.BICUBIC)
    full = np.asarray(smooth.resize((64, 64), Image.Resampling.BICUBIC)).astype(int)
    assert abs(load_image(encoded(smooth, "JPEG", quality=95), 64) - full).mean() < 2


def test_damaged_files_never_raise_anything_else() -> None:
    """Random damage to every kind of file: an array or an ``ImageError``."""
    rng = np.random.default_rng(1)
    small = NOISE.resize((24, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [encoded(small, kind) for kind in ("PNG", "WEBP", "GIF", "BMP")] + [encoded(small, "JPEG", exif=exif.tobytes())]
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
    with pytest.raises(ImageError, match="no such file"):
        load_image(tmp_path, 8)
    with pytest.raises(ImageError, match="no such file"):
        load_image(Path("a\0b"), 8)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="no such file"):
        load_image(tmp_path / "pipe.png", 8)


def test_cache_keeps_what_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[object] = []

    def counting(source: Path | bytes, size: int) -> np.ndarray:
        decoded.append(source)
        return load_image(source, size)

    monkeypatch.setattr("kempnerforge.data.images.load_image", counting)
    sources = [encoded(Image.new("RGB", (512, 512), (k, 0, 0))) for k in range(3)]  # 768 kB each when decoded
    (tmp_path / "a.png").write_bytes(sources[0])
    cache = ImageCache(2)
    for source in (sources[0], tmp_path / "a.png", sources[0], tmp_path / "a.png"):
        assert cache.load(source, 512)[0, 0, 0] == 0
    assert len(decoded) == 2
    cache.load(sources[1], 512)  # sends sources[0] away, the least recently used
    cache.load(tmp_path / "a.png", 512)
    assert len(decoded) == 3
    cache.load(sources[0], 512)
    assert len(decoded) == 4
    off = ImageCache(0)
    off.load(sources[2], 512)
    off.load(sources[2], 512)
    assert len(decoded) == 6
