"""Images that are several views, in rows: by hand, by hypothesis, and changed at random the same way every time."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kempnerforge.config.data import DataConfig
from kempnerforge.config.images import AugmentConfig, ImagesConfig
from kempnerforge.config.training import TrainConfig
from kempnerforge.data import (
    IGNORE,
    Batch,
    Encoder,
    ImageError,
    Kind,
    Layout,
    Sample,
    SampleError,
    Text,
    Tokenizer,
    build_loader,
    collate,
    prompt_batch,
)
from kempnerforge.data.images.augment import Change, draw_changes
from kempnerforge.data.text.interleave import KINDS
from kempnerforge.inspection.audit import audit
from tests.data.samples import ListSource, noise
from tests.data.text.test_interleave import columns, placements

NO, IMAGE, PROMPT, ANSWER = IGNORE, int(Kind.IMAGE), int(Kind.PROMPT), int(Kind.ANSWER)
SIDE = 8
GRID = ImagesConfig(fit="tiles", max_side=16, marker_grid=2)
TOKENIZER = Tokenizer.train(["."], 300)
TOKENIZER.add_tokens(["<image>", *GRID.new_tokens()])
IMAGE_ID, GLOBAL, R1C1, R1C2, R2C1, R2C2 = TOKENIZER.new_token_ids


WIDE, SQUARE, FLAT = noise(20, 9), noise(16, 16), noise(30, 6)  # 1 x 2 tiles (stretched), 2 x 2, 1 x 2


def encoder_of(
    image_tokens: int = 2, images: ImagesConfig = GRID, seq_len: int = 400, tokenizer: Tokenizer = TOKENIZER, **cfg: Any
) -> Encoder:
    settings = {"prompt_template": "{prompt}", "images": images, **cfg}
    return Encoder(tokenizer, DataConfig(**settings), Layout(image_tokens, SIDE, 200, seq_len, 64), seed=0)


def row(encoder: Encoder, images: tuple[bytes, ...], *texts: tuple[str, str]) -> Batch:
    return collate([encoder.encode(Sample("s", images, tuple(Text(*text) for text in texts)), 0)], 0, None)


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text)


# ---- rows by hand ----------------------------------------------------------------------------------------------------


def test_tiles_in_front() -> None:
    a, b = ids("ab")
    batch = row(encoder_of(), (FLAT,), ("a", "b"))
    assert columns(batch) == {
        "input_ids": [GLOBAL, 0, 0, R1C1, 0, 0, R1C2, 0, 0, 1, a, b, 2],
        "labels": [NO] * 10 + [b, 2, NO],
        "positions": list(range(13)),
        "text_ids": [0] * 9 + [1] * 4,
        "kinds": [2, 1, 1, 2, 1, 1, 2, 1, 1, 2, 2, 3, 3],
    }
    assert placements(batch) == [(0, 0, 1, 0, 0), (1, 0, 4, 0, 1), (2, 0, 7, 0, 2)]
    assert (batch.row_images, batch.row_words, batch.leading_images) == (3, 7, 0)
    assert batch.images is not None and batch.images.shape == (3, 3, SIDE, SIDE)


def test_tiles_among_the_words_of_two_texts() -> None:
    a, b = ids("ab")
    batch = row(encoder_of(), (FLAT, SQUARE), ("<image>a<image>", "b"), ("<image><image>", "b"))
    wide = [GLOBAL, 0, 0, R1C1, 0, 0, R1C2, 0, 0]
    square = [GLOBAL, 0, 0, R1C1, 0, 0, R1C2, 0, 0, R2C1, 0, 0, R2C2, 0, 0]
    assert columns(batch)["input_ids"] == [*wide, 1, a, *square, b, 2, *square, 1, b, 2]
    positions = [*range(9), *range(9, 28), *range(9, 27)]
    assert columns(batch)["positions"] == positions
    assert columns(batch)["labels"][25:28] == [b, 2, NO], "the last position of an image predicts what follows"
    starts = [(0, 1, 0), (1, 4, 0), (2, 7, 0), *((3 + k, 12 + 3 * k, 1) for k in range(5)), *((3 + k, 29 + 3 * k, 2) for k in range(5))]
    assert [(image, start, text) for image, _, start, text, _ in placements(batch)] == starts
    assert batch.images is not None and len(batch.images) == 8, "an image that is in two texts is encoded once"


def test_tiles_inside_an_answer_are_not_trained() -> None:
    a, b = ids("ab")
    encoder = encoder_of()
    batch = row(encoder, (FLAT,), ("a", "b<image>a"))
    assert columns(batch)["labels"] == [NO, b, *[NO] * 9, a, 2, NO]
    assert columns(batch)["kinds"] == [2, 2, 3, *[2, 1, 1] * 3, 3, 3]
    assert audit(batch, TOKENIZER.eos_id, markers=encoder.marker_ids) == []


def test_tiles_beside_the_stream() -> None:
    a, b = ids("ab")
    encoder = encoder_of(image_tokens=0, tokenizer=BARE)
    batch = row(encoder, (FLAT, FLAT), ("<image>a<image>", "b"), ("<image><image>", "b"))
    g, first, second = (BARE.token_id(name) for name in ("<|global_image|>", "<row_1_col_1>", "<row_1_col_2>"))
    assert columns(batch)["input_ids"] == [g, first, second, 1, a, g, first, second, b, 2, g, first, second, 1, b, 2]
    assert columns(batch)["labels"] == [NO] * 7 + [b, 2, NO] + [NO] * 3 + [b, 2, NO]
    assert columns(batch)["text_ids"] == [0] * 3 + [1] * 7 + [2] * 6
    assert [start for _, _, start, _, _ in placements(batch)] == [0, 1, 2, 5, 6, 7, 10, 11, 12], "a view is seen from its marker on"
    assert encoder.encode_question("a<image>", [FLAT]).length(0) == 2 + 3
    marked = row(encoder_of(image_tokens=0), (FLAT,), ("a<image>", "b"))
    assert columns(marked)["input_ids"] == [1, a, GLOBAL, R1C1, R1C2, IMAGE_ID, b, 2]


BARE = Tokenizer.train(["."], 300)
BARE.add_tokens(GRID.new_tokens())


def test_without_markers_the_views_follow_one_another() -> None:
    images = ImagesConfig(fit="tiles", max_side=16, markers=False)
    a, b = ids("ab")
    batch = row(encoder_of(images=images, tokenizer=BARE), (FLAT,), ("a", "b"))
    assert columns(batch)["input_ids"] == [*[0] * 6, 1, a, b, 2] and batch.leading_images == 3
    outside = row(encoder_of(0, images, tokenizer=BARE), (FLAT,), ("a", "b"))
    assert [start for _, _, start, _, _ in placements(outside)] == [0, 0, 0]
    with pytest.raises(SampleError, match="model.new_tokens"):
        row(encoder_of(0, images, tokenizer=BARE), (FLAT,), ("a<image>", "b"))


def test_several_images_are_numbered() -> None:
    images = ImagesConfig(number_images=True)
    a, b = ids("ab")
    two = columns(row(encoder_of(images=images), (FLAT, SQUARE), ("a", "b")))
    zero, one = ids("<image: 0>"), ids("<image: 1>")
    assert two["input_ids"] == [*zero, 0, 0, *one, 0, 0, 1, a, b, 2]
    assert two["kinds"] == [*[2] * len(zero), 1, 1, *[2] * len(one), 1, 1, 2, 2, 3, 3]
    assert columns(row(encoder_of(images=images), (FLAT,), ("a", "b")))["input_ids"] == [0, 0, 1, a, b, 2]
    tiled = ImagesConfig(fit="tiles", max_side=16, marker_grid=2, number_images=True)
    assert columns(row(encoder_of(images=tiled), (FLAT, FLAT), ("a", "b")))["input_ids"][: len(zero) + 1] == [*zero, GLOBAL]


def test_two_tokens_are_around_each_image() -> None:
    """Around all of its views, and its number."""
    begin, end = BARE.token_id("c"), BARE.token_id("d")
    a, b = ids("ab")
    around = ["c", "d"]
    batch = row(encoder_of(images=ImagesConfig(around=around), tokenizer=BARE), (FLAT, SQUARE), ("<image>a<image>", "b"))
    assert columns(batch)["input_ids"] == [begin, 0, 0, end, 1, a, begin, 0, 0, end, b, 2]
    assert [start for _, _, start, _, _ in placements(batch)] == [1, 7]
    tiles = ImagesConfig(fit="tiles", max_side=16, markers=False, around=around)
    assert columns(row(encoder_of(images=tiles, tokenizer=BARE), (FLAT,), ("a", "b")))["input_ids"] == [begin, *[0] * 6, end, 1, a, b, 2]
    assert encoder_of(images=ImagesConfig(around=around), tokenizer=BARE).measure(Sample("s", (FLAT,), (Text("a", "b"),))) == (8, 1)
    with pytest.raises(ValueError, match=r"around = \['c'\]: must be the names of two tokens"):
        ImagesConfig(around=["c"])


@pytest.mark.parametrize("fit", ["crop", "letterbox", "squash"])
def test_one_view_is_laid_out_as_ever(fit: str) -> None:
    plain, other = encoder_of(images=ImagesConfig()), encoder_of(images=ImagesConfig(fit=fit))
    for images, text in (((FLAT,), ("a", "b")), ((FLAT, SQUARE), ("<image>a<image>", "b"))):
        want, got = row(plain, images, text), row(other, images, text)
        assert columns(want) == columns(got) and placements(want) == placements(got)
        assert want.leading_images == got.leading_images
    assert np.array_equal(other.views(Sample("s", (FLAT,), ()))[0], row(other, (FLAT,), ("a", "b")).images[0].permute(1, 2, 0))  # type: ignore[index]


# ---- what does not fit -----------------------------------------------------------------------------------------------


def test_an_image_that_does_not_fit_is_never_cut() -> None:
    sample = Sample("s7", (SQUARE,), (Text("a", "b"),))
    assert encoder_of(seq_len=19).encode(sample, 0).table.shape[1] == 19
    with pytest.raises(SampleError) as error:
        encoder_of(seq_len=18).encode(sample, 0)
    assert str(error.value) == "sample s7: 10 image (of 5 views), 5 marker and 4 text tokens, train.seq_len = 18"
    assert encoder_of(seq_len=18).measure(sample) == (0, 0)


def test_tokens_and_sizes_are_checked_when_the_encoder_is_made() -> None:
    with pytest.raises(ValueError, match=r"data.images: the tokenizer has no token '<\|global_image\|>'"):
        encoder_of(tokenizer=Tokenizer.train(["."], 300))
    with pytest.raises(ValueError, match="data.images.max_side = 20: must be a multiple"):
        encoder_of(images=ImagesConfig(fit="tiles", max_side=20))
    text_only = Encoder(Tokenizer.train(["."], 300), DataConfig(images=GRID), Layout(0, 0, 200, 400, 64), seed=0)
    assert text_only.measure(Sample("s", (b"unread",), (Text("a", "b"),))) == (5, 0) and text_only.marker_ids == frozenset()
    assert encoder_of().marker_ids == {GLOBAL, R1C1, R1C2, R2C1, R2C2}


def test_a_file_that_changes_between_header_and_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(FLAT)
    views = encoder_of().images[0]
    (block,) = views.blocks([path])
    path.write_bytes(SQUARE)
    with pytest.raises(ImageError, match=r"a\.png: has changed while it was read"):
        views.load(path, len(block.starts))


# ---- by hypothesis -----------------------------------------------------------------------------------------------------

FITS: dict[str, dict[str, Any]] = {
    "grid": {"fit": "tiles", "max_side": 24, "marker_grid": 3},
    "grid, small ones stay": {"fit": "tiles", "max_side": 24, "marker_grid": 3, "resize_to_max_side": False},
    "no overview": {"fit": "tiles", "max_side": 24, "marker_grid": 3, "global_view": False},
    "anyres": {"fit": "tiles", "tiling": "anyres"},
    "overlap": {"fit": "tiles", "tiling": "overlap", "max_tiles": 4},
    "a tile even alone": {"fit": "tiles", "tiling": "overlap", "max_tiles": 4, "single_tile": True},
    "no markers": {"fit": "tiles", "max_side": 24, "markers": False},
    "letterbox": {"fit": "letterbox", "number_images": True},
}
NAMES = sorted({name for cfg in FITS.values() for name in ImagesConfig(**cfg).new_tokens()})
ALL = Tokenizer.train(["."], 300)
ALL.add_tokens(NAMES)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(st.integers(1, 70), st.integers(1, 70)), max_size=3),
    st.sampled_from(sorted(FITS)),
    st.sampled_from([0, 1, 3]),
    st.booleans(),
    st.integers(1, 3),
    st.sampled_from([60, 90, 400]),
)
def test_counts_never_mismatch(sizes: list[tuple[int, int]], fit: str, width: int, inside: bool, texts: int, seq_len: int) -> None:
    sizes = [size for size in sizes if max(size) <= 200 * min(size)]
    images = tuple(noise(*size, seed=k) for k, size in enumerate(sizes))
    encoder = encoder_of(width, ImagesConfig(**FITS[fit]), seq_len, ALL)
    prompt = "".join(f"a{'<image>' * inside}" for _ in images) + "q"
    sample = Sample("s", images, tuple(Text(prompt, "abc"[k]) for k in range(texts)))
    blocks = encoder.images[0].blocks(images)
    views = sum(len(block.starts) for block in blocks)
    try:
        encoded = encoder.encode(sample, 0)
    except SampleError as error:
        assert f"train.seq_len = {seq_len}" in str(error) and encoder.measure(sample) == (0, 0)
        return
    batch = collate([encoded], 0, None)
    assert batch.num_images == views == len(encoder.views(sample))
    assert int((batch.kinds == Kind.IMAGE).sum()) == width * len(batch.image_starts)
    for start in batch.image_starts.tolist() if width else []:
        assert (batch.kinds[0, start : start + width] == Kind.IMAGE).all()
    assert len(batch.image_starts) == (views if not inside else views * encoded.num_texts)
    assert audit(batch, ALL.eos_id, markers=encoder.marker_ids) == []
    positions, counted = encoder.measure(sample)
    assert counted == views
    assert encoded.table.shape[1] <= positions <= seq_len if encoded.left_out else positions == encoded.table.shape[1]
    asked = encoder.encode_question(prompt, images)
    pixels = torch.from_numpy(np.stack(encoder.views(sample))).permute(0, 3, 1, 2) if views else torch.zeros(0, 3, SIDE, SIDE)
    asked_row = prompt_batch([asked], pixels, [range(views)], encoder.layout, 0)
    length = asked_row.input_ids.shape[1]
    assert asked.length(width) == length
    single = collate([encoder.encode(Sample("s", images, sample.texts[:1]), 0)], 0, None)
    for name in ("input_ids", "positions", "text_ids", "kinds"):
        assert torch.equal(getattr(single, name)[:, :length], getattr(asked_row, name)), name
    assert int(single.kinds[0, length]) == ANSWER
    assert torch.equal(single.image_starts, asked_row.image_starts) and torch.equal(single.image_index, asked_row.image_index)


# ---- random changes ----------------------------------------------------------------------------------------------------

EVERYTHING = AugmentConfig(flip=0.5, crop_scale=0.5, brightness=0.3, contrast=0.3, saturation=0.3)


def test_a_change_is_what_was_drawn() -> None:
    drawn = [draw_changes(EVERYTHING, np.random.default_rng(k)) for k in range(200)]
    shares = [(c.box[2] - c.box[0]) * (c.box[3] - c.box[1]) for c in drawn]
    assert all(0 <= c.box[0] < c.box[2] <= 1 + 1e-9 and 0 <= c.box[1] < c.box[3] <= 1 + 1e-9 for c in drawn)
    assert min(shares) >= 0.4 and max(shares) > 0.9 and min(shares) < 0.6
    assert 60 < sum(c.flip for c in drawn) < 140
    for name in ("brightness", "contrast", "saturation"):
        values = [getattr(c, name) for c in drawn]
        assert 0.7 <= min(values) < 0.75 and 1.25 < max(values) <= 1.3
    assert draw_changes(AugmentConfig(), np.random.default_rng(0)) == Change()
    flips = [draw_changes(AugmentConfig(flip=0.5), np.random.default_rng(k)).flip for k in range(200)]
    assert flips == [c.flip for c in drawn], "one kind can be switched without changing the others"


def test_changes_keep_the_number_of_views_and_follow_the_image() -> None:
    images = ImagesConfig(fit="tiles", max_side=16, marker_grid=2, augment=AugmentConfig(flip=1.0))
    views = encoder_of(images=images).images[0]
    plain, flipped = views.load(FLAT), views.load(FLAT, 3, np.random.default_rng(0))
    assert np.array_equal(flipped[0], plain[0][:, ::-1])
    assert np.array_equal(flipped[1], plain[2][:, ::-1]) and np.array_equal(flipped[2], plain[1][:, ::-1]), "the left tile is the right one"
    boxed = encoder_of(images=ImagesConfig(fit="letterbox", augment=AugmentConfig(brightness=1.0))).images[0]
    assert all((boxed.load(FLAT, 1, np.random.default_rng(k))[0][0] == 127).all() for k in range(5)), "what is around it stays"


def test_only_training_changes_images() -> None:
    encoder = encoder_of(images=ImagesConfig(augment=EVERYTHING))
    sample = Sample("s", (SQUARE, SQUARE), (Text("a", "b"),))
    plain = encoder.views(sample)
    assert all(np.array_equal(a, b) for a, b in zip(encoder.encode(sample, 3).images, plain, strict=True))
    first, again, other = (encoder.encode(sample, seed, training=True).images for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], first[1]), "each image of a sample has its own"
    assert not np.array_equal(first[0], other[0]) and not np.array_equal(first[0], plain[0])
    reseeded = Encoder(TOKENIZER, encoder.cfg, encoder.layout, seed=1)
    assert not np.array_equal(first[0], reseeded.encode(sample, 3, training=True).images[0])


def test_changes_are_the_same_for_any_workers_ranks_and_restart() -> None:
    samples = [Sample(f"s{k}", (noise(20, 12, k),), (Text("a", "b"),)) for k in range(12)]

    def steps(workers: int = 0, world: int = 1, start: int = 0) -> list[dict[str, bytes]]:
        encoder = encoder_of(images=ImagesConfig(augment=EVERYTHING), num_workers=workers)
        train_cfg = TrainConfig(batch_size=4, seed=3)
        loaders = [
            iter(
                build_loader(
                    ListSource(samples),
                    encoder,
                    cfg=encoder.cfg,
                    layout=encoder.layout,
                    train_cfg=train_cfg,
                    rank=r,
                    world=world,
                    start_step=start,
                )
            )
            for r in range(world)
        ]
        found = []
        for batches in islice(zip(*loaders, strict=True), 9 - start):
            images = [image for b in batches if b.images is not None for image in b.images]
            names = [name for b in batches for name in b.sample_names]
            pairs = [(name, image.numpy().tobytes()) for name, image in zip(names, images, strict=True)]
            found.append(dict(sorted(pairs)))
        return found

    reference = steps()
    assert steps(workers=2) == reference and steps(world=2) == reference and steps(start=4) == reference[4:]
    seen: dict[str, set[bytes]] = {}
    for step in reference:
        for name, pixels in step.items():
            seen.setdefault(name, set()).add(pixels)
    assert all(len(pixels) == 3 for pixels in seen.values()), "another change in each of three epochs"


def test_the_row_says_which_positions_are_views() -> None:
    table = encoder_of().encode(Sample("s", (SQUARE,), (Text("a", "b"),)), 0).table
    assert table[KINDS].tolist() == [*[PROMPT, IMAGE, IMAGE] * 5, PROMPT, PROMPT, ANSWER, ANSWER]
