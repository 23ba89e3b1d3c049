"""Tiles whose tokens are in rows across the image (``data.images.rows``), in every arch that has tokens."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

from kempnerforge.config import TrainConfig
from kempnerforge.config.adapter import PerceiverConfig
from kempnerforge.config.data import JsonlConfig
from kempnerforge.config.images import ImagesConfig
from kempnerforge.data.batching.batch import Kind
from kempnerforge.data.images.tiling import shown_parts
from kempnerforge.data.sample import Sample, Text
from kempnerforge.data.text.interleave import INPUT_IDS, KINDS, LABELS
from kempnerforge.data.text.tokenizer import Tokenizer
from kempnerforge.training.setup import assemble
from kempnerforge.util.errors import InputError
from tests.data.samples import noise
from tests.vlm.test_grids import GRID_OF_4
from tests.vlm.tiny import MODEL, Tiny, all_logits, shake, tiny_job
from tests.vlm.views import generation_is_the_full_forward_pass, samples_are_as_alone

PINPOINTS = [(1, 2), (2, 1), (2, 2), (1, 3), (3, 1)]
ANYRES = ImagesConfig(fit="tiles", tiling="anyres", pinpoints=PINPOINTS, markers=False, rows=True)
MOLMO = ImagesConfig(fit="tiles", tiling="overlap", overlap=0.5, max_tiles=4, markers=False, rows=True)
WRITTEN = replace(MOLMO, single_tile=True, row_token="<im_col>", start_token="<im_start>", end_token="<im_end>")
"""With the tokens that Molmo writes around both parts and after each row."""
SIZES = [(40, 15), (9, 30), (30, 30), (33, 64), (64, 33), (100, 7), (5, 90), (31, 32)]
WIDE, TALL, SQUARE = noise(40, 15, 0), noise(9, 30, 1), noise(30, 30, 2)
SAMPLES = [
    Sample("leading", (WIDE,), (Text("what colour is it?", "red"), Text("is it red?", "yes"))),
    Sample("among words", (TALL, SQUARE), (Text("is <image> like <image> ?", "no"),)),
    Sample("inside an answer", (SQUARE,), (Text("what?", "red <image> blue"),)),
    Sample("none", (), (Text("what?", "no"),)),
]
CASES = [(arch, images) for arch in ("joint_decoder", "mot", "moma") for images in (ANYRES, MOLMO)] + [
    ("joint_decoder", WRITTEN),
    ("mot", WRITTEN),
]
each_arch = pytest.mark.parametrize(
    ("arch", "images"), CASES, ids=[f"{arch}-{'written' if images is WRITTEN else images.tiling}" for arch, images in CASES]
)


def build(arch: str = "joint_decoder", images: ImagesConfig = ANYRES, mask: str = "causal", **sections: Any) -> Tiny:
    """With a tokenizer that no other test has: it gets a token."""
    train = TrainConfig(max_steps=4, seq_len=200, mixed_precision="fp32")
    sections = {"model": replace(MODEL, max_seq_len=256), "vision_encoder": GRID_OF_4, "train": train, **sections}
    job = tiny_job(arch, mask, **{"data": JsonlConfig(path="unread.jsonl", images=images), **sections})
    tokenizer = Tokenizer.train(["what colour is it?\n", "red", "blue", "yes", "no"] * 4, 300)
    tokenizer.add_tokens(MODEL.new_tokens)
    assembly = assemble(job, tokenizer, data=False)
    shake(assembly.model, 0.3)
    assembly.model.train(assembly.model.causal_in_training)
    return Tiny(assembly.job, assembly.model, assembly.stages, assembly.data.encoder(assembly.stages[0]))


def image_tokens(it: Tiny, sample: Sample, features: Tensor) -> Tensor:
    """(K, D): the tokens of the sample's only image in the stream, tokens at the end of rows included; ``features`` of its views."""
    batch = it.batch(sample)
    words = it.model.transformer.embed(batch.input_ids)
    stream = it.model.insert(words, features, batch)
    newline = it.encoder.tokenizer.token_id(ANYRES.row_token)
    return stream[(batch.kinds == Kind.IMAGE) | (batch.input_ids == newline)]


@pytest.mark.parametrize("size", SIZES)
def test_anyres_is_that_of_llava_next(size: tuple[int, int]) -> None:
    it = build()
    sample = Sample("one", (noise(*size, 0),), (Text("what?", "no"),))
    count = len(it.encode(sample).images)
    features = torch.randn(count, 16, it.job.model.dim, generator=torch.Generator().manual_seed(0))
    vision = SimpleNamespace(image_size=16, patch_size=4)
    theirs = SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=[[16 * r, 16 * c] for r, c in PINPOINTS]))
    newline = it.model.transformer.embed(torch.tensor([[it.encoder.tokenizer.token_id(ANYRES.row_token)]]))[0, 0]
    with torch.no_grad():
        (want,), _ = LlavaNextModel.pack_image_features(theirs, [features], torch.tensor([size[::-1]]), "full", newline)  # pyright: ignore
        assert torch.equal(image_tokens(it, sample, features), want)


def test_overlapping_tiles_meet_in_the_middle() -> None:
    """By hand: 2 x 2 tiles of 4 x 4 tokens that share two; a tile next to another leaves out one row or column."""
    ((a, b), (c, d)) = shown_parts(MOLMO, 4, (30, 30), (2, 2))
    assert [(p.rows, p.columns, p.top, p.left) for p in (a, b, c, d)] == [(3, 3, 0, 0), (3, 3, 0, 1), (3, 3, 1, 0), (3, 3, 1, 1)]
    (row,) = shown_parts(MOLMO, 12, (30, 30), (1, 3))
    assert [(p.columns, p.left, p.rows, p.top) for p in row] == [(9, 0, 12, 0), (6, 3, 12, 0), (9, 3, 12, 0)]
    it = build(images=MOLMO)
    ids = it.batch(Sample("one", (SQUARE,), (Text("what?", "no"),)))
    newlines = int((ids.input_ids == it.encoder.tokenizer.token_id(ANYRES.row_token)).sum())
    shown = it.encode(SAMPLES[2])
    rows = {part.top: part.rows for part in shown.image_parts[1:]}
    assert newlines == sum(rows.values()) and int((ids.kinds == Kind.IMAGE).sum()) == sum(p.rows * p.columns for p in shown.image_parts)


@pytest.mark.parametrize(
    ("size", "tiles", "rows", "columns"),
    [((40, 15), (1, 4), 4, 10), ((9, 30), (3, 1), 8, 4), ((30, 30), (2, 2), 6, 6), ((7, 5), (1, 1), 4, 4)],
)
def test_molmos_layout(size: tuple[int, int], tiles: tuple[int, int], rows: int, columns: int) -> None:
    """Written down by hand: the 4 x 4 tokens of all of it, then those of the tiles, which are 4 wide and share two, each part and each
    row with its tokens; the tokens of a tile are where its pixels are."""
    it = build(images=WRITTEN)
    start, end, col = (it.encoder.tokenizer.token_id(name) for name in ("<im_start>", "<im_end>", "<im_col>"))
    encoded = it.encode(Sample("one", (noise(*size, 0),), (Text("what?", "no"),)))
    ids = np.where(encoded.table[KINDS] == Kind.IMAGE, -1, encoded.table[INPUT_IDS]).tolist()
    want = [start, *([-1] * 4 + [col]) * 4, end, start, *([-1] * columns + [col]) * rows, end]
    assert ids[: len(want)] == want and it.encoder.tokenizer.bos_id == ids[len(want)]
    assert not (encoded.table[LABELS, : len(want) - 1] >= 0).any()

    batch = it.batch(Sample("one", (noise(*size, 0),), (Text("what?", "no"),)))
    count = 1 + tiles[0] * tiles[1]
    features = torch.arange(1.0, count * 16 + 1).view(count, 16, 1).expand(-1, -1, it.job.model.dim)
    stream = it.model.insert(torch.zeros(*batch.input_ids.shape, it.job.model.dim), features, batch)[0, :, 0]
    grid = torch.zeros(rows, columns)
    for number in range(1, count):
        row, column = divmod(number - 1, tiles[1])
        top, left = 1 if row else 0, 1 if column else 0  # half of what is shared is the tile's before
        own = features[number, :, 0].view(4, 4)[top : 4 - (row < tiles[0] - 1), left : 4 - (column < tiles[1] - 1)]
        grid[2 * row + top :, 2 * column + left :][: own.shape[0], : own.shape[1]] = own
    assert grid.all()
    shown = [F.pad(part, (0, 1)).flatten() for part in (features[0, :, 0].view(4, 4), grid)]
    assert torch.equal(stream[: len(want)], torch.cat([F.pad(part, (1, 1)) for part in shown]))


@each_arch
def test_a_sample_in_a_pack_or_beside_others_is_as_alone(arch: str, images: ImagesConfig) -> None:
    it = build(arch, images)
    samples_are_as_alone(it, SAMPLES, ("vision_encoder", "adapter.proj"))
    assert it.encoder.measure(SAMPLES[1]) == (it.encode(SAMPLES[1]).table.shape[1], len(it.encode(SAMPLES[1]).images))


@each_arch
def test_generation_with_a_cache_is_the_full_forward_pass(arch: str, images: ImagesConfig) -> None:
    rows = [("what colour is it?", (WIDE,)), ("is <image> like <image> ?", (SQUARE, TALL)), ("what?", ()), ("is it <image>", (TALL,))]
    generation_is_the_full_forward_pass(build(arch, images), rows)


def test_each_token_is_at_its_place() -> None:
    """A change of one tile's pixels moves the first layer's input at the tokens that show it, and nothing else."""
    it = build(images=MOLMO)
    batch = it.batch(SAMPLES[2])
    assert batch.images is not None
    words = it.model.transformer.embed(batch.input_ids)
    with torch.no_grad():
        before = it.model.insert(words, it.model.features(batch), batch)
        for view, part in enumerate(batch.image_parts):
            pixels = batch.images.clone()
            pixels[view] = 255 - pixels[view]
            features = it.model.encode(pixels)
            moved = (it.model.insert(words, features, batch) - before).abs().amax(-1) > 0
            assert int(moved.sum()) == part.rows * part.columns and not moved[batch.kinds != Kind.IMAGE].any()


@pytest.mark.parametrize("mask", ["causal", "prefix"])
def test_nothing_leaks(mask: str) -> None:
    """A word changes no logit before it, except that a prompt sees all of itself under "prefix"."""
    it = build(mask=mask)
    columns, changed = it.each_word_changed(SAMPLES[1])
    logits = all_logits(it.model, changed)
    moved = (logits[:-1] - logits[-1:]).abs().amax(-1) > 1e-6  # (words, S)
    answer = int((it.batch(SAMPLES[1]).kinds[0] == Kind.ANSWER).nonzero()[0])
    earlier = [bool(word[:column].any()) for word, column in zip(moved, columns.tolist(), strict=True)]
    assert earlier == [mask == "prefix" and 0 < column < answer for column in columns.tolist()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: build(mask="image_bidirectional"), "attention_mask = 'image_bidirectional': not with data.images.rows"),
        (lambda: build(arch="cross_attention"), "rows = true: needs an adapter that keeps the grid, and image tokens in the stream"),
        (lambda: build(adapter=PerceiverConfig(latents=4)), "rows = true: needs an adapter that keeps the grid"),
        (
            lambda: build(images=ImagesConfig(fit="tiles", tiling="overlap", overlap=0.25, markers=False, rows=True)),
            "an even number of their 4",
        ),
        (lambda: ImagesConfig(fit="tiles", tiling="anyres", rows=True), "rows = true: needs tiling = .* not markers = true"),
        (lambda: ImagesConfig(fit="tiles", markers=False, rows=True), "not tiling = 'grid'"),
        (lambda: ImagesConfig(rows=True), "only fit = 'tiles' reads it"),
        (lambda: ImagesConfig(fit="tiles", start_token="<a>", end_token="<b>"), "start_token = '<a>': only rows = true reads it"),
        (lambda: replace(WRITTEN, end_token=""), "end_token = '': needs a row_token, and both or none of the others"),
        (lambda: replace(WRITTEN, end_token="<im_col>"), "with different names"),
        (lambda: replace(MOLMO, row_token=""), "row_token = '', .* needs a row_token"),
    ],
)
def test_what_cannot_be_is_refused(change: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        made = change()  # type: ignore[operator]
        made.job.validate()


def test_newlines_are_tokens_that_are_not_trained() -> None:
    it = build()
    batch = it.batch(*SAMPLES)
    newline = it.encoder.tokenizer.token_id(ANYRES.row_token)
    assert newline is not None and not (batch.labels == newline).any() and (batch.input_ids == newline).any()
    assert np.all(batch.kinds[batch.input_ids == newline].numpy() == Kind.PROMPT)
