"""How a stream is cut for ranks that share it, and the mask of each rank's queries against the whole mask. What ranks then exchange:
``tests/vlm/test_shared_rows.py``.
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

from kempnerforge.model import attention
from kempnerforge.model.attention import FLEX_FROM, ByWindow, Mask, Segments, additive, attend
from kempnerforge.model.row_share import cut
from tests.model.test_documents import ROWS, inputs, structure
from tests.model.test_windows import counted
from tests.model.test_windows import cut as one_text


@given(st.lists(st.integers(0, 70), min_size=1, max_size=3), st.integers(1, 5))
def test_each_place_has_one_rank(parts: list[int], ranks: int) -> None:
    found, before = cut(parts, ranks), 0
    for size, places in zip(parts, found, strict=True):
        assert len(places) == ranks and places.shape[1] * ranks < size + 2 * ranks
        assert sorted(places[places >= 0].tolist()) == list(range(before, before + size))
        before += size


def test_ranks_have_as_many_keys_to_look_at() -> None:
    (places,) = cut([4096], 4)
    assert places[0].tolist() == [*range(512), *range(3584, 4096)]
    assert len({int(own.sum()) for own in places}) == 1, "of causal queries, the number of keys is the place"


@settings(max_examples=40)
@given(st.integers(1, 5), st.booleans(), st.booleans(), st.sampled_from([0, 6]))
def test_masks_of_ranks_are_rows_of_the_whole_mask(ranks: int, grouped: bool, shuffled: bool, window: int) -> None:
    whole = counted(structure(ROWS, 96, grouped, shuffled), 6)
    check_rows(whole, ranks, window)


@pytest.mark.parametrize("length", [1, 7, 40])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_masks_of_rows_that_are_alike(length: int, ranks: int) -> None:
    for window in (0, 6):
        got = check_rows(one_text(length, 6), ranks, window)
        assert len(got) == 1, "one mask for all rows"


def check_rows(whole: Segments, ranks: int, window: int) -> Tensor:
    """Of each rank: what it shows of the real queries and keys is what the whole mask shows; padding sees padding alone."""
    visible, index = whole.visible(window=window)[:, 0], cut([whole.num_keys], ranks)[0]
    shared, length = whole.shared(index.flatten()), index.shape[1]
    for rank, own in enumerate(index):
        mask: Mask | ByWindow | None = shared.mask(length, torch.float32, first=rank * length)
        got = mask.masks[window] if isinstance(mask, ByWindow) else mask
        assert isinstance(got, Tensor) and got.shape[2:] == (length, index.numel())
        shown = (got[:, 0] == 0).expand(len(visible), -1, -1)
        keys, queries = index.flatten(), own
        want = visible[:, queries.clamp(min=0)][:, :, keys.clamp(min=0)]
        padded = (queries < 0)[:, None] | (keys < 0)
        real = ~padded & (whole.sample_ids >= 0)[:, queries.clamp(min=0), None]
        assert torch.equal(shown & real, want & real)
        assert not (shown & ((queries < 0)[:, None] != (keys < 0)) & real).any() and shown.any(-1).all(), "and no softmax is over nothing"
    return got


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    "found", [structure(ROWS, 96, True), structure(ROWS, 96, True, True), one_text(96, 6)], ids=["", "shuffled", "causal"]
)
def test_blocks_are_the_dense_mask(found: Segments, monkeypatch: pytest.MonkeyPatch) -> None:
    found = found if found.positions is not None else counted(found, 6)
    (index,) = cut([found.num_keys], 2)
    length = index.shape[1]
    q, k, v = (x.detach() for x in inputs(len(found.sample_ids), 2 * length, 4, 2, torch.float32))
    for rank in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(attention, "on_cuda", lambda tensor: True)
            patch.setattr(attention, "FLEX_FROM", 90)
            blocks = found.shared(index.flatten()).mask(length, torch.float32, first=rank * length)
        assert isinstance(blocks, ByWindow) and isinstance(blocks.masks[6], BlockMask)
        dense = found.shared(index.flatten()).visible(length, 6, rank * length)
        own = q[:, :, rank * length : (rank + 1) * length]
        got, want = (attend(own, k, v, mask) for mask in (blocks.masks[6], additive(dense, torch.float32)))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_blocks_on_cuda() -> None:
    found = counted(structure((((300, 1), (500, 2), (223, 1)), ((FLEX_FROM - 1, 1),)), FLEX_FROM, True), 40)
    moved: dict[str, Any] = {f.name: x.cuda() for f in fields(found) if isinstance(x := getattr(found, f.name), Tensor)}
    (index,) = cut([found.num_keys], 2, torch.device("cuda"))
    shared, length = replace(found, **moved).shared(index.flatten()), index.shape[1]
    q, k, v = (
        torch.randn(2, heads, n, 32, device="cuda", dtype=torch.bfloat16) for heads, n in ((4, length), (2, 2 * length), (2, 2 * length))
    )
    for rank in range(2):
        mask = shared.mask(length, torch.bfloat16, first=rank * length)
        assert isinstance(mask, ByWindow) and isinstance(mask.masks[40], BlockMask)
        want = attend(q, k, v, additive(shared.visible(length, 40, rank * length), torch.bfloat16))
        torch.testing.assert_close(attend(q, k, v, mask.masks[40]), want, rtol=0.03, atol=0.03)
