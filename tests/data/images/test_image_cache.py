"""Views are made once, and are bitwise the same from wherever they come."""

from __future__ import annotations

import io
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kempnerforge.config.images import AugmentConfig, ImagesConfig
from kempnerforge.data import ImageError, Layout, Tokenizer
from kempnerforge.data.fingerprint import Signature
from kempnerforge.data.images.cache import DiskCache, ImageCache, KnownFiles, content_key
from kempnerforge.data.images.views import Views
from tests.data.samples import noise

LAYOUT = Layout(image_tokens=2, image_size=32, max_text_len=8, seq_len=64, pad_to=32)
TOKENIZER = Tokenizer.train(["."], 300)


def views_of(folder: Path, mib: int = 0, **cfg: object) -> Views:
    settings = {"fit": "tiles", "max_side": 64, "markers": False, "cache_dir": str(folder), **cfg}
    return Views(ImagesConfig(**settings), LAYOUT, TOKENIZER, ImageCache(mib))  # type: ignore[arg-type]


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def count_decodes(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    decoded: list[object] = []
    made = Views._made

    def counting(self: Views, image: object, *args: object) -> list[np.ndarray]:
        decoded.append(image)
        return made(self, image, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Views, "_made", counting)
    return decoded


def test_memory_keeps_what_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = count_decodes(monkeypatch)
    sources = [noise(90, 60, k) for k in range(3)]
    (tmp_path / "a.png").write_bytes(sources[0])
    views = Views(ImagesConfig(), Layout(2, 512, 8, 64, 32), TOKENIZER, ImageCache(2))  # 768 kB an image
    for source in (sources[0], tmp_path / "a.png", sources[0], tmp_path / "a.png"):
        assert views.load(source)[0] is views.load(sources[0])[0], "one content, one image"
    assert len(decoded) == 1
    views.load(sources[1])
    views.load(sources[0])
    views.load(sources[2])  # sends the second away, the least recently used
    assert len(decoded) == 3
    views.load(tmp_path / "a.png")
    assert len(decoded) == 3
    views.load(sources[1])
    assert len(decoded) == 4
    off = Views(ImagesConfig(), LAYOUT, TOKENIZER, ImageCache(0))
    off.load(sources[2])
    off.load(sources[2])
    assert len(decoded) == 6


def test_one_memory_for_sections_that_make_different_views() -> None:
    cache, image = ImageCache(8), noise(90, 60, 0)
    by_fit = {fit: Views(ImagesConfig(fit=fit), LAYOUT, TOKENIZER, cache) for fit in ("squash", "crop", "letterbox")}
    first = {fit: views.load(image)[0] for fit, views in by_fit.items()}
    assert all(views.load(image)[0] is first[fit] for fit, views in by_fit.items())
    assert not np.array_equal(first["squash"], first["crop"]) and not np.array_equal(first["crop"], first["letterbox"])


def test_disk_gives_bitwise_the_same_without_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = count_decodes(monkeypatch)
    (tmp_path / "a.png").write_bytes(noise(90, 60, 1))
    plain = views_of(tmp_path / "unused", cache_dir="")
    for source in (noise(90, 60, 0), tmp_path / "a.png"):  # of other content
        want = plain.load(source)
        assert len(want) == 5  # 2 x 2 tiles
        first, again = views_of(tmp_path / "cache").load(source), views_of(tmp_path / "cache").load(source)
        for got in (first, again):
            assert len(got) == len(want) and all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))
            assert not any(view.flags.writeable for view in got)
    assert len(decoded) == 4
    assert len(files(tmp_path / "cache")) == 2 and not (tmp_path / "unused").exists()


def test_what_decides_the_views_is_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = count_decodes(monkeypatch)
    image = tmp_path / "a.png"
    image.write_bytes(noise(90, 60, 1))
    variants: list[dict[str, object]] = [{}, {"max_side": 96}, {"global_view": False}, {"resize_to_max_side": False}]
    for variant in variants:
        views_of(tmp_path / "cache", **variant).load(image)
    assert len(decoded) == len(variants)
    views_of(tmp_path / "cache", number_images=True).load(image)  # tokens are no part of it
    assert len(decoded) == len(variants)
    image.write_bytes(noise(90, 60, 2))
    os.utime(image, ns=(1, 1))
    changed = views_of(tmp_path / "cache").load(image)
    assert len(decoded) == len(variants) + 1
    assert np.array_equal(changed[0], views_of(tmp_path, cache_dir="").load(noise(90, 60, 2))[0])


@pytest.mark.parametrize(("mib", "on_disk"), [(8, False), (0, True), (8, True), (0, False)])
@pytest.mark.parametrize("settled", [True, False])
def test_a_file_is_what_it_holds(tmp_path: Path, mib: int, on_disk: bool, settled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written anew with as many bytes and its old times, in place or by a rename, it is the new image; moved back it is the old one, and known."""
    decoded = count_decodes(monkeypatch)
    if settled:
        monkeypatch.setattr("kempnerforge.data.images.cache.SETTLED_NS", 0)
    else:  # a clock so coarse that it shows nothing
        same = Signature(1, 1, 1, time.time_ns() + 10**9, time.time_ns() + 10**9)
        monkeypatch.setattr("kempnerforge.data.images.cache.signature", lambda path: same)
    views = views_of(tmp_path / "cache", mib, cache_dir=str(tmp_path / "cache") if on_disk else "")
    plain = views_of(tmp_path, cache_dir="")
    red, blue = (bmp(colour) for colour in ("red", "blue"))
    assert len(red) == len(blue)
    image = tmp_path / "a.bmp"

    def check(data: bytes) -> None:
        got = [views.load(image), views.load(image)]
        assert all(np.array_equal(found[0], plain.load(data)[0]) for found in got)

    image.write_bytes(red)
    before = image.stat()
    check(red)
    time.sleep(0.02)  # more than the system's clock for files ticks
    image.write_bytes(blue)
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    check(blue)
    (tmp_path / "other.bmp").write_bytes(red)
    os.utime(tmp_path / "other.bmp", ns=(before.st_atime_ns, before.st_mtime_ns))
    (tmp_path / "other.bmp").replace(image)
    before_last = len(decoded)
    check(red)
    if mib or on_disk:
        assert len(decoded) == before_last + 2, "by the plain one alone: the cache knows the content"


def test_what_is_known_of_files_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kempnerforge.data.images.cache.SETTLED_NS", 0)
    monkeypatch.setattr("kempnerforge.data.images.cache.REMEMBERED", 2)
    known, paths = KnownFiles(), [tmp_path / f"{k}.png" for k in range(3)]
    for k, path in enumerate(paths):
        path.write_bytes(noise(90, 60, k))
        time.sleep(0.01)
        assert known.read(path) == (noise(90, 60, k), content_key(noise(90, 60, k)))
    assert [known.key(path) for path in paths] == [None, content_key(noise(90, 60, 1)), content_key(noise(90, 60, 2))]
    paths[1].unlink()
    assert known.key(paths[1]) is None


def bmp(colour: str) -> bytes:
    Image.new("RGB", (32, 32), colour).save(buffer := io.BytesIO(), "BMP")
    return buffer.getvalue()


def test_damaged_entries_are_made_anew(tmp_path: Path) -> None:
    """What is wrong with an entry as such is in ``test_entries``."""
    want = views_of(tmp_path).load(noise(90, 60, 0))
    (entry,) = files(tmp_path)
    good = entry.read_bytes()
    for damaged in (b"", good[:-1], good[:-1] + bytes([good[-1] ^ 1])):
        entry.write_bytes(damaged)
        assert all(np.array_equal(a, b) for a, b in zip(views_of(tmp_path).load(noise(90, 60, 0)), want, strict=True))
        assert entry.read_bytes() == good


def test_changed_images_and_unusable_ones_are_not_kept(tmp_path: Path) -> None:
    views = views_of(tmp_path, mib=8, augment=AugmentConfig(flip=1.0))
    flipped = views.load(noise(90, 60, 0), rng=np.random.default_rng(0))
    assert files(tmp_path) == []
    assert np.array_equal(flipped[0][:, ::-1], views.load(noise(90, 60, 0))[0])
    with pytest.raises(ImageError):
        views.load(b"no image")
    with pytest.raises(ImageError, match="no such file"):
        views.load(tmp_path / "missing.png")
    assert len(files(tmp_path)) == 1


def _fill(folder: str, results: multiprocessing.Queue[bytes]) -> None:
    views = views_of(Path(folder))
    for _ in range(3):
        for k in range(12):
            results.put(b"".join(view.tobytes() for view in views.load(noise(90, 60, k))))


def test_two_processes_share_a_directory(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    queues = [context.Queue() for _ in range(2)]
    workers = [context.Process(target=_fill, args=(str(tmp_path), queue)) for queue in queues]
    for worker in workers:
        worker.start()
    found = [[queue.get(timeout=60) for _ in range(36)] for queue in queues]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    plain = views_of(tmp_path, cache_dir="")
    assert found[0] == found[1] == [b"".join(view.tobytes() for view in plain.load(noise(90, 60, k))) for k in range(12)] * 3
    assert len(files(tmp_path)) == 12 and not list(tmp_path.rglob(".*.part"))


def test_a_disk_that_takes_no_more_is_no_reason_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    views = views_of(tmp_path)
    first = views.load(noise(90, 60, 0))
    assert np.array_equal(first[0], views.load(noise(90, 60, 0))[0])
    assert [record.getMessage() for record in caplog.records] == [
        f"data.images.cache_dir = {str(tmp_path)!r}: No space left on device; nothing more is kept"
    ]
    assert files(tmp_path) == []


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="data.images.cache_dir = '.*file/below': .*file is not a directory"):
        DiskCache(str(tmp_path / "file" / "below"), "", 32)


def test_a_directory_is_made_with_its_first_file(tmp_path: Path) -> None:
    """So that a command that is refused leaves none."""
    views = views_of(tmp_path / "deep" / "cache")
    assert not (tmp_path / "deep").exists()
    views.load(noise(90, 60, 0))
    assert len(files(tmp_path / "deep" / "cache")) == 1
