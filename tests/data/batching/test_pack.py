"""Packing: knapsack and sampler by their properties; joined samples against each alone; rows with unusable samples; the loader."""

from __future__ import annotations

import pickle
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kempnerforge.config.data import DataConfig
from kempnerforge.config.training import TrainConfig
from kempnerforge.data import Batch, Encoder, Sample, Text, build_loader
from kempnerforge.data.batching.batch import IGNORE
from kempnerforge.data.batching.collate import collate
from kempnerforge.data.batching.order import Mixed, Order, Shuffled
from kempnerforge.data.batching.pack import Pack, PackedRow, PackSampler, Sizes, join, knapsack
from kempnerforge.data.batching.rows import DataError, EncodedSamples
from tests.data.samples import ListSource

MakeEncoder = Callable[..., Encoder]

# ---- knapsack -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 4)), max_size=60), st.integers(30, 80), st.sampled_from([0, 4, 7]))
@settings(max_examples=200, deadline=None)
def test_every_sample_is_in_one_row_that_has_room(found: list[tuple[int, int]], capacity: int, max_images: int) -> None:
    sizes = np.asarray(found, dtype=np.int64).reshape(-1, 2)
    rows = knapsack(sizes, capacity, max_images)
    assert sorted(k for row in rows for k in row) == list(range(len(sizes))) and all(rows)
    for row in rows:
        positions, images = sizes[row].sum(axis=0)
        assert positions <= capacity and (not max_images or images <= max_images)
    assert knapsack(sizes, capacity, max_images) == rows
    # two rows that would fit into one are not both half empty
    if not max_images:
        loads = sorted(int(sizes[row, 0].sum()) for row in rows)
        assert len(loads) <= 2 * max(1, -(-sum(loads) // capacity)) + 1


def captions(n: int, image_tokens: int) -> np.ndarray:
    """Sizes with heavy-tailed texts, mean 25, beside one image each."""
    words = np.random.default_rng(0).lognormal(2.75, 0.9, n).clip(3, 400).astype(np.int64)
    return np.stack([words + image_tokens, np.ones(n, dtype=np.int64)], axis=1)


@pytest.mark.parametrize("image_tokens", [0, 64, 196])
def test_rows_of_captions_are_full_and_have_as_many_images(image_tokens: int) -> None:
    sizes = captions(4096, image_tokens)
    begin = time.process_time()
    rows = knapsack(sizes, 2048)
    assert time.process_time() - begin < 1
    images = [len(row) for row in rows]
    assert sizes[:, 0].sum() / (len(rows) * 2048) > 0.95
    assert max(images) < 1.4 * np.mean(images)


def test_images_are_spread_over_rows() -> None:
    """Texts without an image share rows with samples of nine tiles, and the limit leaves few rows half full."""
    rng = np.random.default_rng(1)
    views = rng.choice([0, 0, 1, 1, 2, 5, 9], 2048)
    sizes = np.stack([64 * views + rng.integers(10, 400, 2048), views], axis=1)
    mean = views.sum() / (sizes[:, 0].sum() / 2048)
    for limit in (0, int(1.2 * mean) + 1):
        rows = knapsack(sizes, 2048, limit)
        loads = np.asarray([sizes[row].sum(axis=0) for row in rows])
        assert loads[:, 0].mean() / 2048 > 0.95
        assert loads[:, 1].max() < 1.3 * loads[:, 1].mean()


# ---- sampler ------------------------------------------------------------------------------------------------------------


class Known:
    """Sizes of a table; some samples are unusable."""

    def __init__(self, n: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.table = np.stack([rng.integers(3, 60, n), rng.integers(0, 3, n)], axis=1)
        self.table[rng.random(n) < 0.1] = 0
        self.asked: list[np.ndarray] = []

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        self.asked.append(indices)
        return self.table[indices]


def sampler(n: int = 300, rows: int = 8, order: Order | None = None, **kwargs: Any) -> PackSampler:
    return PackSampler(order or Shuffled(n, 3), Known(n), rows, 100, seed=3, **kwargs)


def global_stream(n: int, rows: int, world: int, accum: int, start: int, stop: int) -> list[list[Pack]]:
    """Per step what all ranks together take, micro-batch by micro-batch, by iterating the samplers."""
    ranks = [iter(sampler(n, rows, rank=r, world=world, accum=accum, start_step=start)) for r in range(world)]
    return [[row for _ in range(accum) for rank in ranks for row in next(rank)] for _ in range(start, stop)]


@given(st.integers(1, 90), st.sampled_from([(w, a) for w in (1, 2, 4) for a in (1, 2)]), st.integers(0, 30), st.integers(1, 2))
@settings(max_examples=30, deadline=None)
def test_global_stream_is_the_same_for_any_sharing_and_resume(n: int, share: tuple[int, int], start: int, per_micro: int) -> None:
    rows = 8 * per_micro
    reference = global_stream(n, rows, 1, 1, 0, start + 2)
    assert global_stream(n, rows, *share, start, start + 2) == reference[start:]
    for step, found in enumerate(reference):
        assert len(found) == rows and all(row and {s for _, s in row} == {step} for row in found)


def test_windows_cover_the_stream_and_fill_rows() -> None:
    it = sampler()
    size = it.window_size
    assert 50 <= size * it.sizes.table[:, 0].mean() / 100 <= 80  # type: ignore[attr-defined]
    seen = [index for step in range(60) for row in it.global_rows(step) for index in row]
    first = Counter(seen[:size])  # about one window, in another order
    assert max(first.values()) <= -(-size // 300) + 1
    whole = [0]
    for window in it._windows[1:-1]:
        whole.append(sum(len(row) for row in [r for s in range(60) for r in it.global_rows(s)][: window.first_row]))
        assert Counter(seen[: whole[-1]]) == Counter(it._order.indices(0, window.begin).tolist())
    assert len(whole) > 3
    assert seen[: whole[1]] != it._order.indices(0, whole[1]).tolist()
    table = it.sizes.table  # type: ignore[attr-defined]
    loads = [table[row, 0].sum() for step in range(40) for row in it.global_rows(step)]
    assert max(loads) <= 100
    assert np.mean(loads) > 75  # samples are large for such rows; a tenth of them is unusable, and their room is free


def test_images_of_a_row() -> None:
    it = sampler(max_images=3)
    table = it.sizes.table  # type: ignore[attr-defined]
    assert max(table[row, 1].sum() for step in range(20) for row in it.global_rows(step)) == 3


def test_random_access_pickles_and_measures_what_it_needs() -> None:
    it = sampler(rank=1, world=2, accum=2, start_step=5)
    want = [it.batch(step) for step in range(20)]
    copy = pickle.loads(pickle.dumps(it))
    assert [copy.batch(step) for step in reversed(range(20))] == want[::-1]
    assert next(iter(copy)) == it.micro_batch(5, 0)
    fresh = sampler(100_000)
    fresh.batch(0)
    assert sum(len(asked) for asked in fresh.sizes.asked) < 1000  # type: ignore[attr-defined]


def test_a_phase_begins_with_a_window() -> None:
    """From the first window that begins at or after its step, samples come from the other part alone."""
    order = Mixed([Shuffled(150, 0), Shuffled(150, 1)], [0, 150], [(0, (1.0, 0.0)), (20, (0.0, 1.0))])
    it = sampler(order=order)
    parts = [{index >= 150 for row in it.global_rows(step) for index in row} for step in range(60)]
    change = parts.index({True}) if {True} in parts else -1
    assert 20 <= change < 40 and parts[:20] == [{False}] * 20 and parts[change:] == [{True}] * (60 - change)
    resumed = sampler(order=order, start_step=45)
    assert next(iter(resumed)) == it.micro_batch(45, 0)


@pytest.mark.parametrize(("world", "accum"), [(3, 1), (2, 3)])
def test_rows_that_cannot_be_shared_out_are_refused(world: int, accum: int) -> None:
    with pytest.raises(ValueError, match=f"train.batch_size = 8: must be a multiple of .* {world} x {accum}"):
        sampler(world=world, accum=accum)


# ---- joined samples -----------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(png: Callable[..., bytes]) -> list[Sample]:
    """Images in front, between words, in several texts, none; texts together; a window of running text."""
    a, b = png((9, 9, 9)), png((99, 9, 9))
    return [
        Sample("front", (a,), (Text("what?", "red"), Text("and?", "blue")), part=0),
        Sample("between", (a, b), (Text("is <image> like <image>?", "no"),)),
        Sample("none", (), (Text("", "yes"),)),
        Sample("late", (b,), (Text("<image>one", "no"), Text("two <image>", "yes"))),
        Sample("window", (), (Text("", (7, 8, 9, 10)),)),
    ]


def cut(batch: Batch, row: int, sample: int) -> dict[str, list[int]]:
    """What the batch says of one sample."""
    here = batch.sample_ids[row] == sample
    begin = int(here.nonzero()[0])
    found = {name: getattr(batch, name)[row, here].tolist() for name in ("input_ids", "labels", "positions", "text_ids", "kinds")}
    mine = (batch.image_rows == row) & (batch.image_sample_ids == sample)
    found["image_starts"] = (batch.image_starts[mine] - begin).tolist()
    found["image_text_ids"] = batch.image_text_ids[mine].tolist()
    found["image_slots"] = (batch.image_slots[mine] - batch.image_slots[mine][:1]).tolist()
    assert batch.images is not None
    found["images"] = batch.images[batch.image_index[mine]].flatten().tolist()
    return found


@pytest.mark.parametrize("image_tokens", [0, 2])
def test_a_joined_sample_is_what_it_is_alone(mixed: list[Sample], make_encoder: MakeEncoder, image_tokens: int) -> None:
    encoder = make_encoder(image_tokens=image_tokens, prompt_template="{prompt} \n")
    encoded = [encoder.encode(sample, 0) for sample in mixed]
    rows = ([0, 1, 2, 3, 4], [4, 3], [2])
    batch = collate([join([encoded[k] for k in row]) for row in rows], 3, 120)
    assert batch.sample_names == [mixed[k].id for row in rows for k in row]
    assert batch.parts == [0] * 8 and batch.has_documents
    assert batch.documents == tuple(tuple((encoded[k].table.shape[1], len(mixed[k].texts)) for k in row) for row in rows)
    for at, row in enumerate(rows):
        assert batch.sample_ids[at].unique().tolist() == [-1, *range(len(row))]
        slots = batch.image_slots[batch.image_rows == at].tolist()
        assert slots == list(range(len(slots)))
        for number, k in enumerate(row):
            assert cut(batch, at, number) == cut(collate([encoded[k]], 3, None), 0, 0)
    assert batch.row_images == 5 and batch.leading_images == 0
    assert batch.row_words == int((batch.kinds > 1).sum(1).max())
    pad = batch.sample_ids < 0
    assert (batch.input_ids[pad] == 3).all() and (batch.labels[pad] == IGNORE).all() and not batch.kinds[pad].any()
    assert torch.equal(batch.targets, (batch.labels.flatten() != IGNORE).nonzero().flatten())


def test_single_samples_and_packs_make_one_batch(mixed: list[Sample], make_encoder: MakeEncoder) -> None:
    encoder = make_encoder()
    one, other = encoder.encode(mixed[1], 0), encoder.encode(mixed[2], 0)
    batch = collate([one, join([other, other])], 0, None)
    assert batch.sample_names == ["between", "none", "none"] and [len(row) for row in batch.documents] == [1, 2]
    alone = collate([join([one]), other], 0, None)
    assert alone.documents == () and not alone.has_documents
    assert torch.equal(alone.input_ids, collate([one, other], 0, None).input_ids)


# ---- sizes and rows -----------------------------------------------------------------------------------------------------


def test_sizes_are_those_of_rows(mixed: list[Sample], make_encoder: MakeEncoder) -> None:
    for image_tokens, image_size in ((0, 8), (2, 8), (0, 0)):
        encoder = make_encoder(image_tokens=image_tokens, image_size=image_size, prompt_template="{prompt} \n")
        sizes = Sizes(ListSource([*mixed, None]), encoder)
        want = [(e.table.shape[1], len(e.images)) for e in (encoder.encode(sample, 0) for sample in mixed)]
        assert sizes(np.arange(6)).tolist() == [*map(list, want), [0, 0]]
        assert pickle.loads(pickle.dumps(sizes))(np.asarray([1, 1])).tolist() == [list(want[1])] * 2


def test_a_size_is_asked_once(mixed: list[Sample], make_encoder: MakeEncoder, list_source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = Sizes(list_source([*mixed, None]), make_encoder())
    asked: list[int] = []
    measure = sizes.measure
    monkeypatch.setattr(sizes, "measure", lambda index: asked.append(index) or measure(index))
    first = sizes(np.asarray([5, 0, 3, 0])).tolist()
    assert sizes(np.asarray([5, 0, 3, 0])).tolist() == first
    sizes(np.asarray([1, 0]))
    assert asked == [0, 3, 5, 1]  # in the order of the source


def packed(source: Any, encoder: Encoder) -> EncodedSamples:
    return EncodedSamples(source, encoder, seed=0)


def test_a_pack_holds_its_samples(mixed: list[Sample], make_encoder: MakeEncoder, list_source: Any) -> None:
    row = packed(list_source(mixed), make_encoder(batching="pack"))[((3, 7), (0, 7))]
    assert isinstance(row, PackedRow) and row.names == ["late", "front"] and row.skipped == []


def test_what_fits_comes_in_place_of_the_unusable(pictures: list[Sample], make_encoder: MakeEncoder, list_source: Any) -> None:
    """The same on every run; the reasons are kept; nothing that is there already has to leave."""
    broken = Sample("broken", (b"zz",), (Text("", "red"),))
    samples = [None, broken, *pictures]
    encoder = make_encoder(batching="pack")
    items = packed(list_source(samples), encoder)
    rows = [items[((0, step), (5, step), (1, step))] for step in range(6)]
    names = set()
    for step, row in enumerate(rows):
        assert isinstance(row, PackedRow) and row.table.shape[1] <= encoder.layout.seq_len and "s3" in row.names
        names |= set(row.names)
        assert {name for name, _ in row.skipped} == {"list/train[0]", "list/train[1]"}
        again = packed(list_source(samples), encoder)[((0, step), (5, step), (1, step))]
        assert isinstance(again, PackedRow) and again.names == row.names and np.array_equal(again.table, row.table)
    assert len(names) > 4


def test_without_room_its_place_stays_free(pictures: list[Sample], make_encoder: MakeEncoder, list_source: Any) -> None:
    sizes = [make_encoder(seq_len=200, max_text_len=150).measure(sample)[0] for sample in pictures]
    encoder = make_encoder(batching="pack", seq_len=max(sizes), max_text_len=150)
    longest = int(np.argmax(sizes))
    row = packed(list_source([*pictures, None]), encoder)[((len(pictures), 2), (longest, 2))]
    assert (
        isinstance(row, PackedRow)
        and row.names == [f"s{longest}"]
        and [name for name, _ in row.skipped] == [f"list/train[{len(pictures)}]"]
    )


def test_room_for_images(png: Callable[..., bytes], make_encoder: MakeEncoder, list_source: Any) -> None:
    many = Sample("many", tuple(png((k, 0, 0)) for k in range(4)), (Text("", "red"),))
    one = Sample("one", (png((9, 0, 0)),), (Text("", "blue"),))
    encoder = make_encoder(batching="pack", max_images_per_row=3)
    source = list_source([many, one, one, one])
    assert Sizes(source, encoder)(np.arange(2)).tolist() == [[0, 0], [encoder.measure(one)[0], 1]]
    row = packed(source, encoder)[((0, 0), (1, 0))]
    assert isinstance(row, PackedRow) and row.names == ["one", "one"]
    assert row.skipped == [("list/train[0]", "sample many: 4 images, room in its row for 3 (data.max_images_per_row)")]


def test_nothing_usable_in_a_pack(make_encoder: MakeEncoder, list_source: Any) -> None:
    found = packed(list_source([None] * 5), make_encoder(batching="pack"))[((0, 0), (1, 0))]
    assert isinstance(found, DataError) and "samples in a row cannot be used, the last because: row" in str(found)


def test_max_images_is_for_packs() -> None:
    with pytest.raises(ValueError, match="max_images_per_row = 3: only batching = 'pack' reads it"):
        DataConfig(max_images_per_row=3)


# ---- the loader ---------------------------------------------------------------------------------------------------------


def batches(source: Any, encoder: Encoder, count: int, world: int = 1, accum: int = 1, start: int = 0) -> list[list[Batch]]:
    """For each step the micro-batches of all ranks, in the order of the global batch."""
    train_cfg = TrainConfig(batch_size=4, grad_accum_steps=accum, seed=3)
    ranks = [
        iter(
            build_loader(
                source, encoder, cfg=encoder.cfg, layout=encoder.layout, train_cfg=train_cfg, rank=r, world=world, start_step=start
            )
        )
        for r in range(world)
    ]
    return [[next(rank) for _ in range(accum) for rank in ranks] for _ in range(count)]


def rows_of(step: list[Batch]) -> list[Any]:
    """Names, ids, documents and pixels of a step's rows."""
    documents = [row for b in step for row in (b.documents or [()] * len(b.input_ids))]
    pixels = [b.images[b.image_index].sum().item() for b in step if b.images is not None]
    return [
        [name for b in step for name in b.sample_names],
        [row for b in step for row in b.sample_ids.tolist()],
        [row for b in step for row in b.input_ids.tolist()],
        [bad for b in step for bad in b.skipped],
        documents if all(b.documents for b in step) else None,
        sum(pixels),
    ]


def test_workers_resume_and_ranks_give_the_same_rows(pictures: list[Sample], make_encoder: MakeEncoder, list_source: Any) -> None:
    """Mid-window: a step takes four rows of the many in one."""
    broken = Sample("broken", (b"zz",), (Text("", "red"),))
    source, encoder = list_source([*pictures, None, broken]), make_encoder(batching="pack", seq_len=100)
    reference = [rows_of(step) for step in batches(source, encoder, 12)]
    assert any(skipped for _, _, _, skipped, _, _ in reference) and len(reference[0][0]) > 8
    workers = make_encoder(batching="pack", seq_len=100, num_workers=2)
    for other, world, accum, start in ((encoder, 1, 1, 5), (workers, 1, 1, 7), (encoder, 2, 1, 5), (encoder, 2, 2, 3)):
        got = [rows_of(step) for step in batches(source, other, 12 - start, world, accum, start)]
        assert got == reference[start:]


def test_rows_are_full(pictures: list[Sample], make_encoder: MakeEncoder, list_source: Any) -> None:
    encoder = make_encoder(batching="pack", seq_len=400, max_text_len=300, num_workers=0)
    found = [batch for step in batches(list_source(pictures), encoder, 15) for batch in step]
    assert {batch.input_ids.shape for batch in found} == {(4, 400)}
    assert sum(batch.useful_tokens for batch in found) / sum(batch.input_ids.numel() for batch in found) > 0.95
    names = Counter(name for batch in islice(found, 8) for name in batch.sample_names)
    assert len(names) == len(pictures)


def test_a_batch_moves_with_its_documents(mixed: list[Sample], make_encoder: MakeEncoder) -> None:
    encoder = make_encoder()
    batch = collate([join([encoder.encode(sample, 0) for sample in mixed])], 0, None)
    moved = batch.to("meta")
    assert moved.documents == batch.documents and moved.parts == batch.parts
    assert all(getattr(moved, f.name).is_meta for f in fields(Batch) if isinstance(getattr(batch, f.name), Tensor))
