"""Layers that see the last positions alone: the rule, every form that a mask can have, and what a model then reads. That it is what
transformers' classes do is shown by ``tests/interop/test_round_trip.py``, in every arch by ``tests/vlm/test_layer_kinds.py``.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from kempnerforge.config import ModelConfig
from kempnerforge.model import attention
from kempnerforge.model.attention import DOCUMENTS_FROM, FLEX_FROM, ByWindow, Mask, Prefix, Segments, additive, attend
from kempnerforge.model.documents import Documents
from kempnerforge.model.rope import rope_tables
from kempnerforge.model.transformer import Cache, Context, Transformer
from tests.model.test_attention import SAMPLE, TEXT, by_hand, drawn, ids, qkv, segments
from tests.model.test_documents import ROWS, inputs, read, structure

POSITIONS = [0, 1, 2, 3, 4, 2, 3, 0]
"""Of ``SAMPLE``: an image of two tokens, a text of three, a text of two which begins after the image again, padding."""


def cut(length: int, window: int, all_slide: bool = False) -> Segments:
    """Two rows of one text each, for layers with and without a window."""
    one = torch.zeros(2, length, dtype=torch.int64)
    windows = (window,) if all_slide else (0, window)
    return Segments(one, one, has_documents=False, positions=torch.arange(length).expand(2, -1), windows=windows)


def counted(found: Segments, window: int) -> Segments:
    """``found`` with positions that begin anew with every sample."""
    stream = found.order if found.order is not None else torch.arange(found.num_keys).expand_as(found.sample_ids)
    begins = torch.full_like(stream, 0)
    for row, sample in ((row, sample) for row in range(len(stream)) for sample in range(int(found.sample_ids.max()) + 1)):
        own = found.sample_ids[row] == sample
        if own.any():
            begins[row, own] = stream[row, own].min()
    return replace(found, positions=(stream - begins) * (found.sample_ids >= 0), windows=(0, window))


def masks(mask: Mask | ByWindow | None, window: int) -> Mask | None:
    assert isinstance(mask, ByWindow) and set(mask.masks) == {0, window}
    return mask.masks[window]


# ---- [model] ------------------------------------------------------------------------------------------------------------


def test_the_pattern_is_repeated() -> None:
    cfg = ModelConfig(n_layers=5, sliding_window=7, window_pattern="SSF")
    assert [cfg.window(layer) for layer in range(5)] == [7, 7, 0, 7, 7]
    assert cfg.windows == (0, 7)
    assert ModelConfig(sliding_window=7).windows == (7,)
    assert ModelConfig().windows == (0,)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"sliding_window": -1}, "sliding_window = -1"),
        ({"window_pattern": "SF"}, "window_pattern = 'SF': only sliding_window reads it"),
        ({"window_pattern": ""}, "window_pattern = '': needs a letter"),
        ({"window_pattern": "SL"}, "window_pattern = 'SL': needs a letter"),
        ({"sliding_window": 8, "window_pattern": "FFS", "n_layers": 2}, "sliding_window = 8: window_pattern = 'FFS' has it in no layer"),
    ],
)
def test_what_makes_no_sense_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**keys)


# ---- the rule -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "groups", "picture"),
    [
        (2, None, "x....... xx...... .xx..... ..xx.... ...xx... .x...x.. .....xx. .......x"),
        (3, None, "x....... xx...... xxx..... .xxx.... ..xxx... xx...x.. .x...xx. .......x"),
        (1, [1, 1, 0, 0, 0, 0, 0, 0], "xx...... xx...... ..x..... ...x.... ....x... .....x.. ......x. .......x"),
        (2, [1, 1, 1, 1, 0, 0, 0, 0], "xx...... xx...... xxxx.... xxxx.... ...xx... .x...x.. .....xx. .......x"),
    ],
    ids=["2", "3", "an image is whole", "a prefix is whole"],
)
def test_an_image_and_two_texts(window: int, groups: list[int] | None, picture: str) -> None:
    """The second text is as far from the image as the first: the distance does not count the first. What is in a group sees all of it."""
    found = replace(segments(SAMPLE, TEXT, groups), positions=torch.tensor([POSITIONS]))
    assert torch.equal(found.visible(window=window)[0, 0], drawn(picture))
    assert torch.equal(found.visible(window=100), found.visible())


places = st.lists(st.integers(0, 9), min_size=12, max_size=12)


@settings(max_examples=100, deadline=None)
@given(ids, places, st.integers(1, 9), st.booleans(), st.integers(1, 11))
def test_a_window_takes_away_what_is_far(row: list[tuple[int, int, int]], where: list[int], window: int, grouped: bool, first: int) -> None:
    """Nothing else, whatever is stored in which order and whether some of it is in a cache."""
    samples, texts, groups = (torch.tensor([list(column)]) for column in zip(*row, strict=True))
    positions = torch.tensor([where[: len(row)]])
    found = Segments(samples, texts, groups if grouped else None, positions=positions)
    visible, want = found.visible()[0, 0], torch.zeros(len(row), len(row), dtype=torch.bool)
    for q in range(len(row)):
        for k in range(len(row)):
            together = grouped and int(groups[0, q]) == int(groups[0, k]) > 0
            want[q, k] = visible[q, k] and (together or where[q] - where[k] < window)
    assert torch.equal(found.visible(window=window)[0, 0], want)
    order = torch.randperm(len(row), generator=torch.Generator().manual_seed(window))
    assert torch.equal(found.take(order[None]).visible(window=window)[0, 0], want[order][:, order])
    if first < len(row):
        early, late = (
            Segments(samples[:, s], texts[:, s], groups[:, s] if grouped else None, positions=positions[:, s])
            for s in (slice(first), slice(first, None))
        )
        assert torch.equal(early.extend(late).visible(len(row) - first, window)[0, 0], want[first:])


# ---- forms of a mask ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 7, 69])
def test_a_causal_stream(window: int) -> None:
    q, k, v = qkv(4, 2, 70, 70)
    far = torch.arange(70)[:, None] - torch.arange(70)
    found = cut(70, window).mask(70, torch.float32)
    assert isinstance(found, ByWindow) and found.masks[0] is None
    mask = found.masks[window]
    assert isinstance(mask, Tensor) and mask.shape == (1, 1, 70, 70), "all rows are alike"
    got = attend(q, k, v, mask)
    want = by_hand(q, k, v, ((far >= 0) & (far < window)).expand(2, -1, -1), 8**-0.5)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_a_window_that_holds_all_is_none() -> None:
    """Layers with and without one share the mask that they have today, whatever its form."""
    assert cut(70, 70).mask(70, torch.float32) is None
    assert cut(70, 70, all_slide=True).mask(70, torch.float32) is None
    assert isinstance(cut(70, 69, all_slide=True).mask(70, torch.float32), Tensor)
    long = (((DOCUMENTS_FROM // 2, 1),) * 2, ((DOCUMENTS_FROM, 3),))
    found = counted(structure(long, DOCUMENTS_FROM), DOCUMENTS_FROM)
    shared = found.mask(DOCUMENTS_FROM, torch.float32)
    assert isinstance(shared, Documents)
    wanted = replace(found, windows=(0,)).mask(DOCUMENTS_FROM, torch.float32)
    assert isinstance(wanted, Documents) and torch.equal(shared.back, wanted.back)
    short = counted(structure(long[:1], DOCUMENTS_FROM), DOCUMENTS_FROM // 2)
    assert isinstance(short.mask(DOCUMENTS_FROM, torch.float32), Documents), "the row is longer than the window, its samples are not"
    assert isinstance(replace(short, documents=None).mask(DOCUMENTS_FROM, torch.float32), ByWindow)


@pytest.mark.parametrize("window", [1, 6, 29, 39])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("shuffled", [False, True])
def test_documents_are_the_dense_mask(window: int, grouped: bool, shuffled: bool) -> None:
    """A bucket of one text each has no mask as long as its samples are no longer than the window."""
    found = counted(structure(ROWS, 96, grouped, shuffled), window)
    values = inputs(len(ROWS), found.num_keys, 4, 2, torch.float32)
    apart = found.apart(ROWS, torch.float32, window)
    if not grouped:
        assert any(bucket.mask is None for bucket in apart.buckets)
        assert all(bucket.mask is not None for bucket in apart.buckets if bucket.places.shape[1] > window)
    got, want = read(found, apart, values, 0.0), read(found, additive(found.visible(window=window), torch.float32), values, 0.0)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize("cuda", [True, False])
def test_the_form(cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image in front is one group: all of it is seen by itself in every layer, so it stays a prefix without a mask."""
    monkeypatch.setattr(attention, "on_cuda", lambda tensor: cuda)
    seen = []
    for length, leading in ((80, 0), (80, 70), (FLEX_FROM, 70)):
        plain = cut(length, 8)
        if leading:
            plain = replace(plain, groups=(torch.arange(length) < 70).long().expand(2, -1))
        mask = masks(plain.mask(length, torch.float32, leading), 8)
        seen.append(type(mask))
        if isinstance(mask, Prefix):
            assert mask.rest is not None
            assert torch.equal(mask.rest, additive(plain.visible(window=8)[:, :, leading:], torch.float32))
    assert seen == [Tensor, Prefix, BlockMask] if cuda else [Tensor] * 3


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("found", [structure(ROWS, 96, True), structure(ROWS, 96, True, True), cut(96, 6)], ids=["", "shuffled", "causal"])
def test_blocks_are_the_dense_mask(found: Segments, monkeypatch: pytest.MonkeyPatch) -> None:
    found = found if found.positions is not None else counted(found, 6)
    with monkeypatch.context() as patch:
        patch.setattr(attention, "on_cuda", lambda tensor: True)
        patch.setattr(attention, "FLEX_FROM", 90)
        blocks = masks(found.mask(found.num_keys, torch.float32), 6)
    assert isinstance(blocks, BlockMask)
    q, k, v = (x.detach() for x in inputs(len(found.sample_ids), found.num_keys, 4, 2, torch.float32))
    got, want = (attend(q, k, v, mask) for mask in (blocks, additive(found.visible(window=6), torch.float32)))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_blocks_on_cuda() -> None:
    found = counted(structure((((300, 1), (500, 2), (224, 1)), ((FLEX_FROM, 1),)), FLEX_FROM, True), 40)
    moved: dict[str, Any] = {f.name: x.cuda() for f in fields(found) if isinstance(x := getattr(found, f.name), Tensor)}
    found = replace(found, **moved)
    mask = masks(found.mask(FLEX_FROM, torch.bfloat16), 40)
    assert isinstance(mask, BlockMask)
    q, k, v = (torch.randn(2, heads, FLEX_FROM, 32, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2))
    want = attend(q, k, v, additive(found.visible(window=40), torch.bfloat16))
    torch.testing.assert_close(attend(q, k, v, mask), want, rtol=0.03, atol=0.03)


# ---- a model ------------------------------------------------------------------------------------------------------------

CFG = ModelConfig(dim=32, n_layers=1, n_heads=2, vocab_size=40, max_seq_len=64, sliding_window=5)


def run(model: Transformer, tokens: Tensor, cache: Cache | None = None, start: int = 0) -> Tensor:
    """(B, S, V)."""
    one, positions = torch.zeros_like(tokens), (start + torch.arange(tokens.shape[1])).expand_as(tokens)
    found = Segments(one, one, has_documents=False, positions=positions, windows=model.cfg.windows)
    if cache is not None:
        found = cache.segments = found if cache.segments is None else cache.segments.extend(found)
    ctx = Context(rope_tables(positions, model.cfg), found.mask(tokens.shape[1], torch.float32), cache)
    return model.unembed(model.run(model.embed(tokens), ctx))


def model_of(cfg: ModelConfig) -> Transformer:
    torch.manual_seed(0)
    return Transformer(cfg).eval()


@torch.no_grad()
@pytest.mark.parametrize(("layers", "pattern", "reach"), [(1, "S", 5), (2, "S", 9), (3, "S", 13), (2, "SF", 24), (2, "FS", 24)])
def test_a_token_is_read_by_the_next_ones_alone(layers: int, pattern: str, reach: int) -> None:
    """Each layer passes it on by ``window - 1``; one full layer reads all."""
    model = model_of(replace(CFG, n_layers=layers, window_pattern=pattern, init_std=0.2))
    tokens = torch.randint(40, (1, 24), generator=torch.Generator().manual_seed(1)).repeat(25, 1)
    tokens[torch.arange(24), torch.arange(24)] += 1  # row t has token t changed, the last row none
    tokens %= 40
    logits = run(model, tokens)
    moved = (logits[:-1] != logits[-1:]).any(-1)  # (token, position)
    far = torch.arange(24) - torch.arange(24)[:, None]
    assert torch.equal(moved, (far >= 0) & (far < reach))


@torch.no_grad()
def test_the_cache_is_the_full_forward_pass() -> None:
    model, tokens = model_of(replace(CFG, n_layers=3, window_pattern="SF")), torch.arange(24)[None] % 40
    want, cache, got = run(model, tokens), Cache(), []
    for first, last in ((0, 9), (9, 10), (10, 17), (17, 18), (18, 24)):
        got.append(run(model, tokens[:, first:last], cache, first))
    torch.testing.assert_close(torch.cat(got, dim=1), want, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_within_the_window_nothing_changes() -> None:
    tokens = torch.arange(5).expand(2, -1)
    assert torch.equal(run(model_of(CFG), tokens), run(model_of(replace(CFG, sliding_window=0)), tokens))


def test_a_context_without_a_mask_is_refused_beyond_the_window() -> None:
    model, positions = model_of(CFG), torch.arange(6)[None]
    with pytest.raises(AssertionError, match="needs the mask of Segments"):
        model.run(model.embed(positions), Context(rope_tables(positions, CFG)))


@pytest.mark.slow
def test_compiled_without_breaks() -> None:
    model, graphs = model_of(replace(CFG, n_layers=2, window_pattern="SF")), []
    tokens = [torch.arange(length).expand(2, -1) for length in (12, 15, 17)]
    want = [run(model, each) for each in tokens]
    for layer in model.layers:
        layer.compile(dynamic=True, fullgraph=True, backend=lambda graph, _: graphs.append(1) or graph.forward)
    for each, full in zip(tokens, want, strict=True):
        torch.testing.assert_close(run(model, each), full, rtol=1e-5, atol=1e-6)
    assert len(graphs) <= 4, "one or two for each kind of layer, not one for each length"
    torch._dynamo.reset()
