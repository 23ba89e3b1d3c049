"""``attend`` against a loop over single scores and against PyTorch's own kernel; ``Segments`` against masks written by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kempnerforge.model.attention import Segments, additive, attend

SHORT, LONG = 9, 70
"""Lengths in fp32 on both sides of where the fused kernel takes over on a CPU."""


def qkv(
    heads: int, groups: int, queries: int, keys: int, dtype: torch.dtype = torch.float32, width: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, h, n, width, generator=g).to(dtype) for h, n in ((heads, queries), (groups, keys), (groups, keys)))  # type: ignore[return-value]


def by_hand(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, softcap: float = 0.0) -> Tensor:
    """One query of one head at a time, in float64. ``visible`` is (B, Q, K) bool."""
    batch, heads, queries, width = q.shape
    out = torch.zeros(batch, queries, heads, width, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            g = h * k.shape[1] // heads
            for i in range(queries):
                scores = k[b, g].double() @ q[b, h, i].double() * scale
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                keep = visible[b, i]
                out[b, i, h] = scores[keep].softmax(0) @ v[b, g][keep].double()
    return out.flatten(2)


def causal(queries: int, keys: int) -> Tensor:
    """(2, Q, K): query i is the key number K - Q + i."""
    return (torch.arange(keys)[None, :] <= torch.arange(keys - queries, keys)[:, None]).expand(2, -1, -1)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 2), (4, 1)], ids=["mha", "gqa", "gqa 3", "mqa"])
@pytest.mark.parametrize(("queries", "keys"), [(SHORT, SHORT), (LONG, LONG), (1, SHORT), (4, SHORT), (1, LONG), (5, LONG)])
@pytest.mark.parametrize("softcap", [0.0, 0.7])
def test_causal(heads: int, groups: int, queries: int, keys: int, softcap: float) -> None:
    q, k, v = qkv(heads, groups, queries, keys)
    got = attend(q, k, v, softcap=softcap)
    assert got.shape == (2, queries, heads * 8)
    torch.testing.assert_close(got.double(), by_hand(q, k, v, causal(queries, keys), 8**-0.5, softcap), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [SHORT, LONG])
@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("groups", [4, 2])
def test_a_mask_says_everything(length: int, scale: float | None, groups: int) -> None:
    """With a mask nothing is causal by itself, and it may differ from row to row."""
    q, k, v = qkv(4, groups, length, length)
    visible = torch.rand(2, length, length, generator=torch.Generator().manual_seed(1)) < 0.4
    visible |= torch.eye(length, dtype=torch.bool)
    got = attend(q, k, v, additive(visible[:, None], torch.float32), scale=scale)
    torch.testing.assert_close(got.double(), by_hand(q, k, v, visible, scale or 8**-0.5), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [SHORT, LONG])
def test_not_causal(length: int) -> None:
    q, k, v = qkv(2, 2, length, length)
    got = attend(q, k, v, causal=False)
    torch.testing.assert_close(
        got.double(), by_hand(q, k, v, torch.ones(2, length, length, dtype=torch.bool), 8**-0.5), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [SHORT, LONG, 520])
@pytest.mark.parametrize("groups", [4, 2])
def test_values_and_gradients_are_pytorchs(dtype: torch.dtype, length: int, groups: int) -> None:
    results = []
    for ours in (True, False):
        q, k, v = (x.requires_grad_() for x in qkv(4, groups, length, length, dtype))
        if ours:
            o = attend(q, k, v)
        else:
            o = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)
        (o.float() * torch.linspace(-1, 1, o.numel()).view_as(o)).sum().backward()
        assert o.dtype == (dtype if ours else torch.float32)
        results.append([o.detach().float(), *(x.grad.float() for x in (q, k, v) if x.grad is not None)])
    rtol = 1e-4 if dtype == torch.float32 else 0.02
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=rtol, atol=rtol * float(want.abs().max()))


def test_both_paths_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lengths above really lie on both sides; a soft cap is always written out."""
    calls = []
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(a[1].shape[2]) or fused(*a, **k))
    attend(*qkv(2, 2, SHORT, SHORT))
    attend(*qkv(2, 2, LONG, LONG), softcap=1.0)
    attend(*qkv(2, 2, LONG, LONG, torch.bfloat16))
    assert calls == []
    attend(*qkv(2, 2, LONG, LONG))
    attend(*qkv(2, 2, 1, 520, torch.bfloat16))
    assert calls == [LONG, 520]


def test_additive() -> None:
    got = additive(torch.tensor([[True, False]]), torch.bfloat16)
    assert got.dtype == torch.bfloat16
    assert got.tolist() == [[0.0, -math.inf]]


# ---- Segments -----------------------------------------------------------------------------------------------------------

# an image of two tokens, a text of three, a text of two, padding
SAMPLE = [0, 0, 0, 0, 0, 0, 0, -1]
TEXT = [0, 0, 1, 1, 1, 2, 2, 0]
CAUSAL = """
x.......
xx......
xxx.....
xxxx....
xxxxx...
xx...x..
xx...xx.
.......x
"""
# the image's tokens see each other, as do the first two tokens of each text (the prompts)
GROUPS = [1, 1, 2, 2, 0, 3, 3, 0]
GROUPED = """
xx......
xx......
xxxx....
xxxx....
xxxxx...
xx...xx.
xx...xx.
.......x
"""


def drawn(picture: str) -> Tensor:
    return torch.tensor([[c == "x" for c in line] for line in picture.split()])


def segments(samples: list[int], texts: list[int], groups: list[int] | None = None) -> Segments:
    return Segments(torch.tensor([samples]), torch.tensor([texts]), None if groups is None else torch.tensor([groups]))


def test_an_image_and_two_texts() -> None:
    got = segments(SAMPLE, TEXT).visible()
    assert got.shape == (1, 1, 8, 8)
    assert torch.equal(got[0, 0], drawn(CAUSAL))


def test_groups_see_both_ways() -> None:
    assert torch.equal(segments(SAMPLE, TEXT, GROUPS).visible()[0, 0], drawn(GROUPED))


def test_left_padding_and_two_samples_in_a_row() -> None:
    got = segments([-1, 0, 0, 1, 1, 1], [0, 0, 1, 0, 1, 1], [0, 1, 1, 1, 1, 0]).visible()[0, 0]
    assert torch.equal(got, drawn("x..... .x.... .xx... ...x.. ...xx. ...xxx"))


@pytest.mark.parametrize("groups", [None, GROUPS])
@pytest.mark.parametrize("first", [1, 3, 7])
def test_a_cache_extends_them(groups: list[int] | None, first: int) -> None:
    """The last queries of the whole row are what new positions see."""
    whole = segments(SAMPLE, TEXT, groups)
    parts = [segments(SAMPLE[s], TEXT[s], groups and groups[s]) for s in (slice(first), slice(first, None))]
    joined = parts[0].extend(parts[1])
    assert torch.equal(joined.visible(8 - first), whole.visible()[:, :, first:])
    assert torch.equal(joined.visible(), whole.visible())


def test_extending_by_ungrouped_keys() -> None:
    joined = segments(SAMPLE[:5], TEXT[:5], GROUPS[:5]).extend(segments([0], [1]))
    assert joined.groups is not None and joined.groups.tolist() == [[1, 1, 2, 2, 0, 0]]
    assert segments([0], [0]).extend(segments([0], [0])).groups is None


ids = st.lists(st.tuples(st.integers(-1, 2), st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(ids, st.booleans())
def test_never_another_sample_never_another_text(row: list[tuple[int, int, int]], grouped: bool) -> None:
    samples, texts, groups = (list(column) for column in zip(*row, strict=True))
    visible = segments(samples, texts, groups if grouped else None).visible()[0, 0]
    for q in range(len(row)):
        assert visible[q, q], "no row of the softmax is empty"
        for k in range(len(row)):
            if samples[q] != samples[k] or texts[k] not in (0, texts[q]):
                assert not visible[q, k]
            elif k > q:
                assert bool(visible[q, k]) == (grouped and groups[q] == groups[k] > 0)
            else:
                assert visible[q, k]
