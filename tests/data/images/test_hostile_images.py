"""One source with every hostile image among good ones: what happens to a run that meets them."""

from __future__ import annotations

import re
import resource
import warnings
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kempnerforge.config.data import DataConfig
from kempnerforge.config.images import ImagesConfig
from kempnerforge.config.training import TrainConfig
from kempnerforge.data import Encoder, Layout, Sample, Text, Tokenizer, build_loader, load_image
from kempnerforge.data.batching.rows import EncodedSamples
from kempnerforge.data.text.encode import Encoded
from tests.data.images.test_images import ACCEPTED, REFUSED
from tests.data.samples import ListSource, png

TOKENIZER = Tokenizer.train(["."], 300)
TOKENIZER.add_tokens(ImagesConfig(fit="tiles").new_tokens())
GOOD = 40
FITS: dict[str, dict[str, Any]] = {
    "squash": {},
    "tiles": {"fit": "tiles", "max_side": 64},
    "letterbox": {"fit": "letterbox"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    for name, data in {**{name: data for name, (data, _) in REFUSED.items()}, **ACCEPTED}.items():
        (folder / name.replace(" ", "-")).write_bytes(data)
    (folder / "directory").mkdir()
    return folder


def source_of(folder: Path) -> ListSource:
    """Good samples, hostile ones in bytes and as files, and two files that are not there to be read."""
    text = (Text("", "yes"),)
    good = [Sample(f"good {k}", (png((6 * k, 0, 0)),), text) for k in range(GOOD)]
    hostile = [Sample(name, (data,), text) for name, (data, _) in REFUSED.items()] + [
        Sample(name, (data,), text) for name, data in ACCEPTED.items()
    ]
    on_disk = [Sample(f"file {s.id}", (folder / s.id.replace(" ", "-"),), text) for s in hostile]
    absent = [Sample(f"absent {name}", (folder / name,), text) for name in ("missing.png", "directory")]
    samples = [*good, *hostile, *on_disk, *absent]
    order = np.random.default_rng(0).permutation(len(samples))
    return ListSource([samples[k] for k in order])


def encoder_of(images: dict[str, Any], **cfg: Any) -> Encoder:
    return Encoder(TOKENIZER, DataConfig(images=ImagesConfig(**images), **cfg), Layout(1, 32, 64, 256, 65), seed=0)


def reason_of(sample: Sample) -> str | None:
    """Why it is refused, as a pattern; None: it is not."""
    if sample.id.startswith("absent"):
        return "no such file" if sample.id.endswith(".png") else "is a directory"
    found = REFUSED.get(sample.id.removeprefix("file "))
    return found[1] if found else None


@pytest.mark.parametrize("fit", FITS)
def test_each_is_handled_as_the_matrix_says(folder: Path, fit: str) -> None:
    source, encoder = source_of(folder), encoder_of(FITS[fit])
    rows = EncodedSamples(source, encoder, seed=0)
    bad = {k for k, sample in enumerate(source.samples) if sample is not None and reason_of(sample)}
    assert len(bad) == 2 * len(REFUSED) + 2 and len(source) == GOOD + 2 * (len(REFUSED) + len(ACCEPTED)) + 2
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = [rows[k, 0] for k in range(len(source))]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000, "kilobytes: a bomb has gone off"
    for k, (encoded, sample) in enumerate(zip(found, source.samples, strict=True)):
        assert isinstance(encoded, Encoded) and sample is not None
        if k not in bad:
            assert encoded.id == sample.id and not encoded.skipped
            continue
        names = [name for name, _ in encoded.skipped]
        assert names[0] == f"list/train[{k}]" and {int(name[11:-1]) for name in names} <= bad
        pattern = f"^sample {re.escape(sample.id)}: image .*({reason_of(sample)})"
        assert re.search(pattern, encoded.skipped[0][1]), (pattern, encoded.skipped[0])
        assert reason_of(next(s for s in source.samples if s is not None and s.id == encoded.id)) is None
    again = [rows[k, 0] for k in range(len(source))]
    for first, second in zip(found, again, strict=True):
        assert isinstance(first, Encoded) and isinstance(second, Encoded)
        assert first.id == second.id and first.skipped == second.skipped
        assert all(np.array_equal(a, b) for a, b in zip(first.images, second.images, strict=True))


def test_good_ones_come_through_untouched(folder: Path) -> None:
    source, encoder = source_of(folder), encoder_of({})
    rows = EncodedSamples(source, encoder, seed=0)
    for k, sample in enumerate(source.samples):
        if sample is not None and reason_of(sample) is None:
            encoded = rows[k, 0]
            assert isinstance(encoded, Encoded)
            assert np.array_equal(encoded.images[0], load_image(sample.images[0], 32))


def test_what_headers_show_is_measured_as_unusable(folder: Path) -> None:
    """Tiles need the size of an image; what is only seen when pixels are decoded is left to the row."""
    for fit, images in FITS.items():
        encoder = encoder_of(images)
        for sample in source_of(folder).samples:
            assert sample is not None
            size, reason = encoder.measure(sample), reason_of(sample)
            if reason is None or fit != "tiles":
                assert size[0] > 0, (fit, sample.id)
            elif "cannot be decoded" not in reason:
                assert size == (0, 0), (fit, sample.id)


def test_workers_see_the_same(folder: Path) -> None:
    def steps(workers: int) -> list[Any]:
        encoder = encoder_of(FITS["tiles"], num_workers=workers)
        train_cfg = TrainConfig(batch_size=16, seed=1)
        batches = build_loader(source_of(folder), encoder, cfg=encoder.cfg, layout=encoder.layout, train_cfg=train_cfg)
        return [(b.sample_names, b.skipped, None if b.images is None else b.images.sum().item()) for b in islice(batches, 8)]

    reference = steps(0)
    assert steps(2) == reference
    assert sum(len(skipped) for _, skipped, _ in reference) > 20
