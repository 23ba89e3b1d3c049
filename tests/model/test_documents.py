"""Rows taken apart into their samples against one dense mask, and against each sample alone."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kempnerforge.model import attention
from kempnerforge.model.attention import DOCUMENTS_FROM, Segments, additive, attend, written_out
from kempnerforge.model.documents import SHORTEST, Documents, RowDocuments, in_buckets
from tests.model.test_attention import Holder, Layer

ROWS: RowDocuments = (((9, 1), (30, 2), (4, 1), (28, 1)), ((40, 3),), ((1, 1), (33, 1), (29, 1), (27, 2)))
"""Samples of one text, of several, of one token; a row of one sample."""


def structure(rows: RowDocuments, length: int, grouped: bool = False, shuffled: bool = False) -> Segments:
    """Each sample begins with an image of a quarter of its positions, a bidirectional group if ``grouped``; the texts share the rest."""
    sample, text, group = torch.full((len(rows), length), -1), *torch.zeros(2, len(rows), length, dtype=torch.int64)
    for row, samples in enumerate(rows):
        begin = 0
        for number, (size, texts) in enumerate(samples):
            image = size // 4
            sample[row, begin : begin + size] = number
            text[row, begin + image : begin + size] = 1 + torch.arange(size - image) * texts // (size - image)
            group[row, begin : begin + image] = number + 1
            begin += size
    found = Segments(sample, text, group if grouped else None, documents=rows)
    if not shuffled:
        return found
    order = torch.stack([torch.randperm(length, generator=torch.Generator().manual_seed(row)) for row in range(len(rows))])
    index = order.masked_fill(sample.gather(1, order) < 0, -1)
    return found.take(torch.cat([index, torch.full((len(rows), 3), -1)], dim=1))


def inputs(batch: int, length: int, heads: int, groups: int, dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(batch, h, length, 8, generator=g).to(dtype).requires_grad_() for h in (heads, groups, groups)]


def read(found: Segments, mask: Documents | Tensor, qkv: list[Tensor], softcap: float) -> list[Tensor]:
    """What each sample's positions read, and what that sends back."""
    if isinstance(mask, Tensor):  # the oracle
        o = written_out(*qkv, mask, 8**-0.5, softcap, causal=False)
    else:
        o = attend(*qkv, mask, softcap=softcap)
    o = o.float()[found.sample_ids >= 0]
    grads = torch.autograd.grad((o * torch.linspace(-1, 1, o.numel()).view_as(o)).sum(), qkv)
    return [o.detach(), *(grad.float() for grad in grads)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [0.0, 0.7])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 2), (4, 1)])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("shuffled", [False, True])
def test_documents_are_the_dense_mask(dtype: torch.dtype, softcap: float, heads: int, groups: int, grouped: bool, shuffled: bool) -> None:
    found = structure(ROWS, 96, grouped, shuffled)
    qkv = inputs(len(ROWS), found.num_keys, heads, groups, dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    got = read(found, found.apart(ROWS, dtype), qkv, softcap)
    want = read(found, additive(found.visible(), dtype), qkv, softcap)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


sizes = st.lists(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 3)), max_size=6), min_size=1, max_size=4).filter(any)


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(0, 5), st.booleans(), st.booleans())
def test_any_rows(rows: RowDocuments, padding: int, grouped: bool, shuffled: bool) -> None:
    found = structure(rows, max(sum(size for size, _ in row) for row in rows) + padding, grouped, shuffled)
    qkv = inputs(len(rows), found.num_keys, 2, 1, torch.float32)
    got = read(found, found.apart(rows, torch.float32), qkv, 0.0)
    want = read(found, additive(found.visible(), torch.float32), qkv, 0.0)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@settings(max_examples=100, deadline=None)
@given(sizes, st.booleans())
def test_buckets_hold_every_sample_once_and_little_padding(rows: RowDocuments, masked: bool) -> None:
    seen = []
    for needs_mask, spans in in_buckets(rows, masked):
        lengths = [length for _, _, length in spans]
        assert min(lengths) >= SHORTEST * lengths[0] and lengths[0] == max(lengths)
        for row, begin, length in spans:
            number = [sum(size for size, _ in rows[row][:k]) for k in range(len(rows[row]))].index(begin)
            assert rows[row][number][0] == length and needs_mask == (masked or rows[row][number][1] > 1)
            seen.append((row, number))
    assert sorted(seen) == [(row, number) for row, samples in enumerate(rows) for number in range(len(samples))]


def test_one_text_needs_no_mask() -> None:
    masks = {bucket.mask is None for bucket in structure((((9, 1), (30, 1)),), 40).apart((((9, 1), (30, 1)),), torch.float32).buckets}
    assert masks == {True}


def test_the_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no FlexAttention and rows are long, whatever is stored in which order; never with a cache."""
    rows = (((DOCUMENTS_FROM // 2, 1),) * 2,)
    for shuffled in (False, True):
        found = structure(rows, DOCUMENTS_FROM, shuffled=shuffled)
        assert isinstance(found.mask(found.num_keys, torch.float32), Documents)
        assert isinstance(replace(found, documents=None).mask(found.num_keys, torch.float32), Tensor)
        assert isinstance(found.mask(3, torch.float32), Tensor)
        longer = found.extend(structure(rows, DOCUMENTS_FROM))
        assert isinstance(longer.mask(longer.num_keys, torch.float32), Tensor)
    short = structure((((20, 1),) * 2,), 40)
    assert isinstance(short.mask(40, torch.float32), Tensor)
    monkeypatch.setattr(attention, "on_cuda", lambda tensor: True)
    assert isinstance(structure(rows, DOCUMENTS_FROM).mask(DOCUMENTS_FROM, torch.float32), Tensor)


def test_on_meta() -> None:
    found = structure(ROWS, 96, grouped=True, shuffled=True)
    on_meta = Segments(**{f.name: x.to("meta") if isinstance(x := getattr(found, f.name), Tensor) else x for f in fields(found)})
    o = attend(*(x.to("meta") for x in inputs(len(ROWS), found.num_keys, 4, 2, torch.float32)), on_meta.apart(ROWS, torch.float32))
    assert o.shape == (3, found.num_keys, 32) and o.is_meta


@pytest.mark.slow
def test_compiled_without_breaks_and_checkpointed() -> None:
    torch.manual_seed(0)
    layer, graphs = Layer(), []
    compiled = torch.compile(layer, dynamic=True, fullgraph=True, backend=lambda graph, _: graphs.append(1) or graph.forward)
    for rows in (ROWS, ROWS[::-1], tuple(((size + 1, texts),) for size, texts in (samples[0] for samples in ROWS))):
        found = structure(rows, 96)
        x, holder = torch.randn(len(rows), 96, 32), Holder(found.apart(rows, torch.float32))
        want = layer(x, holder)
        torch.testing.assert_close(compiled(x, holder), want, rtol=1e-5, atol=1e-6)
        again = checkpoint(layer, x, holder, use_reentrant=False)
        assert torch.equal(again, want)
        a, b = (torch.autograd.grad(y.square().sum(), layer.proj.weight)[0] for y in (again, want))
        assert torch.equal(a, b)
    assert len(graphs) <= 3
    torch._dynamo.reset()
