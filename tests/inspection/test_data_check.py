from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kempnerforge.config import TrainConfig
from kempnerforge.data import Batch, Encoder, Sample, Source, Text, build_loader
from kempnerforge.data.traces import shared
from kempnerforge.inspection.check_facts import batching_modes, distribution, histogram, recommended, row_limits
from kempnerforge.inspection.read_all import Found, SampleReader, read_all, spread
from tests.data.samples import ListSource, png

RED = png((200, 0, 0))


@pytest.fixture
def mixed() -> list[Sample | None]:
    """Samples that can be used, and one of each kind that cannot."""
    return [
        Sample("good", (RED,), (Text("what?", "red"), Text("is it a circle?", "no"))),
        None,
        Sample("no image", (b"nothing",), (Text("what?", "red"),)),
        Sample("empty", (RED,), (Text("what?", "  "),)),
        Sample("long", (RED,), (Text("what?", "yes " * 60),)),
        Sample("text", (), (Text("", "yes"),)),
        Sample("many", (RED, RED), tuple(Text("what?", "yes no yes") for _ in range(8))),
        Sample("places", (RED,), (Text("<image><image>?", "yes"),)),
    ]


def read(source: Source, encoder: Encoder, images: bool = True) -> Found:
    return read_all(SampleReader(source, encoder, images), range(len(source)), workers=1)


def test_every_sample_gets_its_size_or_its_reason(mixed: list[Sample | None], make_encoder: Callable[..., Encoder]) -> None:
    encoder = make_encoder(max_text_len=32, seq_len=40)
    found = read(ListSource(mixed), encoder)
    assert [(bad.index, bad.id, bad.kind) for bad in found.bad] == [
        (1, "list/train[1]", "row"),
        (2, "no image", "image"),
        (3, "empty", "text"),
        (4, "long", "length"),
        (7, "places", "text"),
    ]
    reasons = {bad.id: bad.reason for bad in found.bad}
    assert "row 1 is broken" in reasons["list/train[1]"] and "not an image" in reasons["no image"] and "empty answer" in reasons["empty"]
    assert "max_text_len" in reasons["long"] or "seq_len" in reasons["long"]
    good = encoder.encode(mixed[0], 0)  # type: ignore[arg-type]
    assert found.column("positions")[0] == found.column("row")[0] == good.table.shape[1]
    assert found.column("text_tokens")[0] == good.table.shape[1] - 2
    assert found.sizes[0, -3:].tolist() == [2, 1, 1] and found.column("trained")[0] == (good.table[1] >= 0).sum()
    assert found.column("needed")[0] == 2 + found.column("longest")[0]
    assert found.column("row")[4] == 0 < found.column("positions")[4]  # too long now, but it has a size
    assert found.column("row")[6] <= 40 < found.column("positions")[6]  # some of its texts fit
    assert found.has_size.tolist() == [True, False, False, False, True, True, True, False]


def test_without_images_none_is_opened(mixed: list[Sample | None], make_encoder: Callable[..., Encoder]) -> None:
    found = read(ListSource(mixed), make_encoder(), images=False)
    assert 2 not in [bad.index for bad in found.bad] and len(found.marks["image"].digests) == 0


def test_an_exception_that_would_end_training_is_listed(make_encoder: Callable[..., Encoder]) -> None:
    class Crashing(ListSource):
        def __getitem__(self, index: int) -> Sample:
            if index == 1:
                raise KeyError("caption")
            return super().__getitem__(index)

    found = read(Crashing([Sample("a", (), (Text("", "yes"),))] * 3), make_encoder())
    assert [(bad.index, bad.kind, bad.reason) for bad in found.bad] == [(1, "crash", "KeyError: 'caption'")]


@pytest.mark.slow
def test_a_pool_finds_the_same(pictures: list[Sample], mixed: list[Sample | None], make_encoder: Callable[..., Encoder]) -> None:
    source = ListSource([*pictures, *mixed] * 10)
    encoder = make_encoder()
    told: list[int] = []
    reader = SampleReader(source, encoder, True)
    alone, pooled = read_all(reader, range(len(source)), 1), read_all(reader, range(len(source)), 2, told.append, alone_s=0)
    assert (alone.sizes == pooled.sizes).all() and (alone.indices == pooled.indices).all() and alone.bad == pooled.bad
    assert all((a == b).all() for a, b in zip(alone.marks["image"], pooled.marks["image"], strict=True))
    assert sum(told) == len(source) and len(told) > 1


class Deadly(ListSource):
    """Ends the process that reads sample 20, unless that is the one that the test runs in."""

    def __getitem__(self, index: int) -> Sample:
        if index == 20 and multiprocessing.parent_process() is not None:
            os._exit(1)
        return super().__getitem__(index)


def test_a_worker_that_dies_is_reported(make_encoder: Callable[..., Encoder]) -> None:
    source = Deadly([Sample("a", (), (Text("", "yes"),))] * 32)
    with pytest.raises(ValueError, match=r"died while it read samples 0 to 31.*--workers 1"):
        read_all(SampleReader(source, make_encoder(), True), range(32), 2, alone_s=0)


def test_more_images_than_a_row_may_have(mixed: list[Sample | None], make_encoder: Callable[..., Encoder]) -> None:
    source = ListSource([sample for sample in mixed if sample is not None and sample.id in ("good", "many")])
    found = read(source, make_encoder(max_text_len=90, seq_len=96, batching="pack", max_images_per_row=1))
    assert [(bad.id, bad.kind) for bad in found.bad] == [("many", "length")] and "max_images_per_row = 1" in found.bad[0].reason


def test_shared_images_are_found_by_content(tmp_path: Path, make_encoder: Callable[..., Encoder]) -> None:
    red, blue, green = RED, png((0, 0, 200)), png((0, 200, 0))
    path = tmp_path / "copy.png"
    path.write_bytes(red)
    say = (Text("", "yes"),)
    first = ListSource([Sample("a", (blue,), say), Sample("b", (red, blue), say), Sample("c", (red,), say)])
    second = ListSource([Sample("x", (green,), say), Sample("y", (green, path), say), Sample("z", (), say)])
    found = read(first, make_encoder()), read(second, make_encoder())
    other = read(ListSource([Sample("x", (green,), say)]), make_encoder())
    first_marks, *others = (each.marks["image"] for each in (*found, other))
    assert [shared(first_marks, marks) for marks in others] == [[(1, 1)], []]
    assert found[0].distinct_images == 2 and hashlib.blake2b(red, digest_size=16).digest() in first_marks.digests.tolist()


class Mixture(ListSource):
    """Two thirds of the samples are of part 0."""

    def part(self, index: int) -> int:
        return int(3 * index >= 2 * len(self))


@given(st.integers(1, 300), st.integers(0, 400))
def test_spread_takes_as_many_as_asked_from_all_over(n: int, limit: int) -> None:
    chosen = spread(ListSource([None] * n), limit, 0)
    assert chosen == sorted(set(chosen)) and len(chosen) == (min(n, limit) or n) and set(chosen) <= set(range(n))
    assert chosen == spread(ListSource([None] * n), limit, 0)
    source = Mixture([None] * n)
    counts = np.bincount([source.part(index) for index in spread(source, limit, 0)], minlength=2)
    whole = np.bincount([source.part(index) for index in range(n)], minlength=2)
    assert (counts == np.minimum(whole, limit or n)).all()


@given(st.lists(st.integers(0, 3000), min_size=1), st.integers(1, 60))
def test_a_histogram_counts_each_value_once(values: list[int], bins: int) -> None:
    counts, edges = histogram(np.array(values), bins)
    assert counts.sum() == len(values) and len(counts) <= bins and len(edges) == len(counts) + 1
    for count, begin, end in zip(counts, edges, edges[1:], strict=False):
        assert count == sum(begin <= value < end for value in values)


def test_limits_and_what_is_recommended(make_encoder: Callable[..., Encoder]) -> None:
    """Texts of 1 to 400 letters, one each: 99.5 percent of them have at most 398."""
    encoder = make_encoder(image_tokens=16, max_text_len=8, seq_len=24)
    source = ListSource([Sample(str(k), (RED,), (Text("", "7" * k),)) for k in range(1, 401)])
    found = read(source, encoder, images=False)
    tokens = found.column("text_tokens")
    wrap = int(tokens[0]) - 1
    assert tokens.tolist() == [k + wrap for k in range(1, 401)]
    now = row_limits(found, 8, 24)
    assert now.too_long == 400 - (8 - wrap) == len(found.bad) and now.shortened == 0
    advice = recommended(found, encoder.layout)
    assert advice.max_text_len == 448 and advice.seq_len == 512  # 398 + wrap, and 16 positions of the image more, up to the next 64
    assert advice.too_long == 0 and row_limits(found, 384, 512).too_long == 400 - (384 - wrap)
    assert distribution(tokens)["max"] == 400 + wrap and distribution(tokens)["p50"] == pytest.approx(200.5 + wrap)


def test_no_usable_sample_is_no_crash(make_encoder: Callable[..., Encoder]) -> None:
    source, encoder = ListSource([None, None]), make_encoder()
    found = read(source, encoder)
    assert len(found.bad) == 2 and batching_modes(found, source, encoder.layout, TrainConfig(batch_size=2), 0) == []
    assert recommended(found, encoder.layout).seq_len == encoder.layout.seq_len and distribution(found.column("row")[:0]) == {}


@pytest.mark.parametrize("accum", [1, 2])
def test_padding_is_that_of_the_real_batches(pictures: list[Sample], make_encoder: Callable[..., Encoder], accum: int) -> None:
    source = ListSource(pictures * 4)
    train_cfg = TrainConfig(batch_size=8, grad_accum_steps=accum, seq_len=96, seed=3)
    encoder = make_encoder(max_text_len=90, seq_len=96, pad_to=92)
    found = read(source, encoder)
    assert not found.bad and (found.column("row") == found.column("positions")).all()
    modes = {mode.name: mode for mode in batching_modes(found, source, encoder.layout, train_cfg, 0)}
    assert list(modes)[:3] == ["pad", "group", "pack, train.seq_len = 96"]
    total = int(found.column("row").sum())
    for name, steps in (("pad", 96 // 8), ("group", 96 // 8), ("pack, train.seq_len = 96", max(1, total // (8 * 96)))):
        cfg = replace(encoder.cfg, batching=name.split(",")[0])
        loader = build_loader(
            source, Encoder(encoder.tokenizer, cfg, encoder.layout, 0), cfg=cfg, layout=encoder.layout, train_cfg=train_cfg
        )
        batches: list[Batch] = [batch for batch, _ in zip(loader, range(steps * accum), strict=False)]
        positions = sum(batch.input_ids.numel() for batch in batches)
        assert modes[name].useful == sum(batch.useful_tokens for batch in batches) / positions, name
        assert modes[name].trained == sum(batch.num_targets for batch in batches) / positions, name
        assert modes[name].samples_per_row == sum(len(batch.sample_names) for batch in batches) / sum(len(b.input_ids) for b in batches)
    assert modes["pad"].useful < modes["group"].useful


def test_longer_packs_are_tried_until_they_are_full(make_encoder: Callable[..., Encoder]) -> None:
    source = ListSource([Sample(str(k), (RED,), (Text("", "7" * 30),)) for k in range(200)])
    encoder = make_encoder(max_text_len=40, seq_len=50, pad_to=50)
    modes = batching_modes(read(source, encoder, images=False), source, encoder.layout, TrainConfig(batch_size=2, seq_len=50), 0)
    packs = [mode for mode in modes if mode.mode == "pack"]
    assert [mode.seq_len for mode in packs] == [50, packs[-1].seq_len] and packs[-1].seq_len > 50
    assert packs[0].useful < 0.8 and packs[-1].useful >= 0.95
    few = batching_modes(read(source, encoder, images=False), source, encoder.layout, TrainConfig(batch_size=2, seq_len=50), 1)
    assert all(mode.samples_per_row == 1 for mode in few)  # of one view each


def test_a_part_of_a_source_stands_for_it(make_encoder: Callable[..., Encoder], pictures: list[Sample]) -> None:
    source, encoder = ListSource(pictures * 3), make_encoder(max_text_len=90, seq_len=96)
    found = read_all(SampleReader(source, encoder, False), spread(source, 20, 0), 1)
    assert len(found.indices) == 20
    modes = batching_modes(found, source, encoder.layout, TrainConfig(batch_size=4, seq_len=96), 0)
    assert all(0 < mode.useful <= 1 for mode in modes)
