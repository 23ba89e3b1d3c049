"""``attend`` against a loop over single scores and against PyTorch's own kernel; ``Segments`` against masks written by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint

from kempnerforge.model import attention
from kempnerforge.model.attention import FLEX_FROM, Mask, Prefix, Segments, additive, attend

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


# ---- a stream in another order ------------------------------------------------------------------------------------------


def test_taking_another_order_permutes_the_mask() -> None:
    """Image tokens first, words after them: everybody sees whom they saw before."""
    index = torch.tensor([[5, 2, 0, 7, 1, 6, 4, 3]])
    for groups in (None, GROUPS):
        whole = segments(SAMPLE, TEXT, groups)
        assert torch.equal(whole.take(index).visible()[0, 0], whole.visible()[0, 0][index[0]][:, index[0]])
        again = torch.randperm(8, generator=torch.Generator().manual_seed(0))[None]
        twice = whole.take(index).take(again)
        assert torch.equal(twice.visible()[0, 0], whole.visible()[0, 0][index[0, again[0]]][:, index[0, again[0]]])


def test_taking_makes_padding_and_leaves_out() -> None:
    """Rows with fewer images are padded; padding sees padding alone, wherever it stands."""
    taken = segments(SAMPLE, TEXT, GROUPS).take(torch.tensor([[-1, 1, 0, -1, 3]]))
    assert taken.order is not None and taken.order.tolist() == [[-1, 1, 0, -1, 3]]
    assert torch.equal(taken.visible()[0, 0], drawn("x..x. .xx.. .xx.. x..x. .xx.x"))
    causal = segments(SAMPLE, TEXT).take(torch.tensor([[-1, 1, 0, -1, 3]]))
    assert torch.equal(causal.visible()[0, 0], drawn("x..x. .xx.. ..x.. x..x. .xx.x"))


@pytest.mark.parametrize("groups", [None, GROUPS])
def test_a_cache_extends_another_order(groups: list[int] | None) -> None:
    """The prompt is stored in another order, what follows it is not."""
    whole = segments(SAMPLE[:7], TEXT[:7], groups and groups[:7])
    first = segments(SAMPLE[:5], TEXT[:5], groups and groups[:5]).take(torch.tensor([[2, 3, 4, 1, 0]]))
    joined = first.extend(segments(SAMPLE[5:6], TEXT[5:6], groups and groups[5:6])).extend(
        segments(SAMPLE[6:7], TEXT[6:7], groups and groups[6:7])
    )
    order = torch.tensor([2, 3, 4, 1, 0, 5, 6])
    assert joined.order is not None and joined.order.tolist() == [order.tolist()]
    assert torch.equal(joined.visible()[0, 0], whole.visible()[0, 0][order][:, order])
    assert torch.equal(joined.visible(1), joined.visible()[:, :, -1:])


@settings(max_examples=100, deadline=None)
@given(ids, st.booleans(), st.randoms(use_true_random=False))
def test_order_of_storage_does_not_matter(row: list[tuple[int, int, int]], grouped: bool, random: object) -> None:
    samples, texts, groups = (list(column) for column in zip(*row, strict=True))
    order = list(range(len(row)))
    random.shuffle(order)  # type: ignore[attr-defined]
    whole = segments(samples, texts, groups if grouped else None)
    want = whole.visible()[0, 0][order][:, order]
    assert torch.equal(whole.take(torch.tensor([order])).visible()[0, 0], want)


# ---- forms of a mask ----------------------------------------------------------------------------------------------------


def prefixed(length: int, prefix: int, texts: int = 1, batch: int = 2) -> Segments:
    """Rows of ``prefix`` image tokens and ``texts`` texts after them."""
    sample = torch.zeros(batch, length, dtype=torch.int64)
    text = sample.clone()
    text[:, prefix:] = 1 + torch.arange(length - prefix) * texts // (length - prefix)
    group = sample.clone()
    group[:, :prefix] = 1
    if texts > 1:
        sample[1, -3:], text[1, -3:] = -1, 0
    return Segments(sample, text, group, has_documents=texts > 1)


def gradients(inputs: tuple[Tensor, Tensor, Tensor], mask: Mask | None, softcap: float) -> list[Tensor]:
    q, k, v = (x.clone().requires_grad_() for x in inputs)
    o = attend(q, k, v, mask, softcap=softcap)
    (o.float() * torch.linspace(-1, 1, o.numel(), device=o.device).view_as(o)).sum().backward()
    return [o.detach().float(), *(x.grad.float() for x in (q, k, v) if x.grad is not None)]


@pytest.mark.parametrize("texts", [1, 3])
@pytest.mark.parametrize("softcap", [0.0, 0.7])
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize(("length", "prefix"), [(SHORT, 4), (96, 70)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prefix_is_its_dense_mask(dtype: torch.dtype, length: int, prefix: int, groups: int, softcap: float, texts: int) -> None:
    structure = prefixed(length, prefix, texts)
    rest = additive(structure.visible(length - prefix), dtype) if texts > 1 else None
    inputs = qkv(4, groups, length, length, dtype)
    got = gradients(inputs, Prefix(prefix, rest), softcap)
    want = gradients(inputs, additive(structure.visible(), dtype), softcap)
    tolerance = 1e-6 if dtype == torch.float32 else 0.02
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


def test_the_form_on_a_cpu() -> None:
    plain = Segments(torch.zeros(2, 80, dtype=torch.int64), torch.ones(2, 80, dtype=torch.int64), has_documents=False)
    assert plain.mask(80, torch.float32) is None
    others = (prefixed(80, 70), prefixed(80, 70, texts=3), plain.extend(plain), plain.take(torch.arange(80).flip(0).expand(2, -1)))
    for structure in others:
        for leading in (0, 70):
            got = structure.mask(structure.num_keys, torch.float32, leading)
            assert isinstance(got, Tensor) and torch.equal(got, additive(structure.visible(), torch.float32))


@pytest.mark.parametrize("cuda", [True, False])
def test_the_form_on_cuda(cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "on_cuda", lambda tensor: cuda)
    dtype, seen = torch.bfloat16, []
    for length, texts, leading in [(80, 1, 16), (80, 1, 70), (80, 3, 70), (FLEX_FROM, 1, 70), (FLEX_FROM, 3, 70), (FLEX_FROM, 1, 0)]:
        structure = prefixed(length, leading or 70, texts)
        mask = structure.mask(length, dtype, leading)
        seen.append(type(mask))
        if isinstance(mask, Prefix):
            assert mask.length == leading and (mask.rest is None) == (texts == 1)
            assert mask.rest is None or torch.equal(mask.rest, additive(structure.visible()[:, :, leading:], dtype))
        step = structure.extend(structure).mask(3, dtype, leading)
        assert isinstance(step, Tensor) and step.shape == (2, 1, 3, 2 * length)
    assert seen == ([Tensor, Prefix, Prefix, Prefix, BlockMask, BlockMask] if cuda else [Tensor] * 6)


@pytest.mark.parametrize("form", ["prefix", "dense", "none"])
def test_on_meta(form: str) -> None:
    with torch.device("meta"):
        structure = prefixed(96, 70, texts=1)
        q, k, v = (torch.empty(2, h, 96, 8, requires_grad=True) for h in (4, 2, 2))
        index = torch.zeros(2, 96, dtype=torch.int64)
    mask = {
        "prefix": Prefix(70, additive(structure.visible(26), q.dtype)),
        "dense": structure.take(index).extend(structure.take(index)).mask(96, q.dtype),
    }.get(form)
    if form == "dense":
        k, v = torch.cat([k, k], dim=2), torch.cat([v, v], dim=2)
    assert isinstance(mask, {"prefix": Prefix, "dense": Tensor, "none": type(None)}[form])
    o = attend(q, k, v, mask)
    o.sum().backward()
    assert o.shape == (2, 96, 32) and q.grad is not None and q.grad.is_meta


class Layer(torch.nn.Module):
    """Takes the mask inside a frozen dataclass, as a block does."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(32, 3 * 32)

    def forward(self, x: Tensor, holder: Holder) -> Tensor:
        q, k, v = self.proj(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)  # (B, H, S, E)
        return x + attend(q, k, v, holder.mask)


@dataclass(frozen=True)
class Holder:
    mask: Mask | None


def forms(length: int, prefix: int) -> list[Mask | None]:
    structure = prefixed(length, prefix, texts=3)
    dense = additive(structure.visible(), torch.float32)
    return [dense, Prefix(prefix, additive(structure.visible(length - prefix), torch.float32)), Prefix(prefix), None]


@pytest.mark.slow
def test_compiled_without_breaks_and_checkpointed() -> None:
    torch.manual_seed(0)
    layer = Layer()
    seen = []
    compiled = torch.compile(layer, dynamic=True, fullgraph=True, backend=lambda graph, _: seen.append(1) or graph.forward)
    for length in (12, 15):
        x = torch.randn(2, length, 32)
        for mask in forms(length, 5):
            holder = Holder(mask)
            want = layer(x, holder)
            torch.testing.assert_close(compiled(x, holder), want, rtol=1e-5, atol=1e-6)
            again = checkpoint(layer, x, holder, use_reentrant=False)
            assert torch.equal(again, want)
            a, b = (torch.autograd.grad(y.square().sum(), layer.proj.weight)[0] for y in (again, want))
            assert torch.equal(a, b)
    assert len(seen) <= 8, "one graph or two for each form, not one for each length"
    torch._dynamo.reset()


# ---- FlexAttention ------------------------------------------------------------------------------------------------------


def documents(length: int, order: bool) -> Segments:
    """Two samples a row, two texts each, a bidirectional image first; padding at the end; permuted if ``order``."""
    g = torch.Generator().manual_seed(3)
    half = length // 2
    place = torch.arange(length) % half
    sample = (torch.arange(length) // half).expand(2, -1).clone()
    text = ((place > half // 4).long() + (place > half // 2).long()).expand(2, -1).clone()
    group = ((text == 0) * (1 + sample)).clone()
    for ids, nothing in ((sample, -1), (text, 0), (group, 0)):
        ids[1, -length // 8 :] = nothing
    structure = Segments(sample, text, group)
    return structure.take(torch.stack([torch.randperm(length, generator=g) for _ in range(2)])) if order else structure


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 0.7])
@pytest.mark.parametrize("groups", [4, 2])
def test_blocks_are_the_dense_mask(groups: int, softcap: float, order: bool) -> None:
    structure = documents(200, order)
    q, k, v = qkv(4, groups, 200, 200, width=16)
    want = attend(q, k, v, additive(structure.visible(), q.dtype), softcap=softcap)
    torch.testing.assert_close(attend(q, k, v, structure.blocks(), softcap=softcap), want, rtol=1e-5, atol=1e-5)


SAFE_FROM = 128
"""Keys of one block of FlexAttention. Compiled for fewer, it is known to let a query see other documents; not measured here."""


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("window", [0, 16])
def test_short_rows_are_never_blocks(order: bool, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on CUDA either, whatever else is asked: documents, groups, a prefix, a window, some queries of a cache."""
    monkeypatch.setattr(attention, "on_cuda", lambda tensor: True)
    monkeypatch.setattr(Segments, "blocks", lambda *args: pytest.fail("FlexAttention for a short row"))
    assert FLEX_FROM >= SAFE_FROM
    for length in (8, 64, SAFE_FROM - 1, SAFE_FROM, FLEX_FROM - 1):
        found = replace(documents(length, order), positions=torch.arange(length).expand(2, -1), windows=tuple({0, window}))
        for structure in (found, replace(found, groups=None), replace(found, documents=(((length, 1),),) * 2)):
            for leading in (0, length // 2):
                for queries in (length, 1):
                    assert structure.mask(queries, torch.bfloat16, leading) is not None
        assert found.extend(found).mask(length, torch.bfloat16) is not None, "a cache has more keys than queries"
    with pytest.raises(pytest.fail.Exception, match="FlexAttention for a short row"):
        documents(FLEX_FROM, order).mask(FLEX_FROM, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [48, 100, 127, 128, 200, FLEX_FROM])
def test_no_document_knows_another_on_cuda(length: int, record_property: Callable[[str, object], None]) -> None:
    """Keys and values of one document are changed, and what comes out at the other must not move. From ``SAFE_FROM`` on that is a rule;
    below, where a model never takes this kernel, the difference is recorded as a property of the test and the form that is taken must
    keep it.
    """
    half, g = length // 2, torch.Generator(device="cuda").manual_seed(0)
    ids = (torch.arange(length, device="cuda") >= half).long().expand(2, -1)
    structure = Segments(ids, torch.zeros_like(ids), has_documents=True)
    q, k, v = (torch.randn(2, 4, length, 32, device="cuda", dtype=torch.bfloat16, generator=g) for _ in range(3))
    later = [x.clone() for x in (k, v)]
    for x in later:
        x[:, :, :half] += 1  # the first document, which comes before the second one
    taken = structure.mask(length, torch.bfloat16)
    assert isinstance(taken, BlockMask) == (length >= FLEX_FROM)
    moved = {name: (attend(q, k, v, mask) - attend(q, *later, mask))[:, half:].abs().max() for name, mask in
             (("blocks", structure.blocks()), ("taken", taken))}  # fmt: skip
    record_property("compiled FlexAttention leaks", float(moved["blocks"]))
    assert moved["taken"] == 0 and (length < SAFE_FROM or moved["blocks"] == 0)


@pytest.mark.gpu
def test_prefix_on_cuda() -> None:
    structure = prefixed(200, 140)
    structure = Segments(structure.sample_ids.cuda(), structure.text_ids.cuda(), structure.groups.cuda(), has_documents=False)  # type: ignore[union-attr]
    inputs = tuple(x.cuda() for x in qkv(4, 2, 200, 200, torch.bfloat16, width=32))
    mask = structure.mask(200, torch.bfloat16, 140)
    assert mask == Prefix(140)
    got = gradients(inputs, mask, 0.0)  # type: ignore[arg-type]
    want = gradients(inputs, additive(structure.visible(), torch.bfloat16), 0.0)  # type: ignore[arg-type]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0.03, atol=0.03 * float(b.abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 0.7])
@pytest.mark.parametrize("groups", [4, 2])
def test_blocks_on_cuda(groups: int, softcap: float, order: bool) -> None:
    for length in (FLEX_FROM, FLEX_FROM + 200):
        structure = documents(length, order)
        moved = {f.name: getattr(structure, f.name) for f in fields(structure)}
        structure = Segments(**{name: x.cuda() if isinstance(x, Tensor) else x for name, x in moved.items()})
        inputs = tuple(x.cuda() for x in qkv(4, groups, length, length, torch.bfloat16, width=32))
        mask = structure.mask(length, torch.bfloat16)
        assert isinstance(mask, BlockMask)
        got = gradients(inputs, mask, softcap)  # type: ignore[arg-type]
        want = gradients(inputs, additive(structure.visible(), torch.bfloat16), softcap)  # type: ignore[arg-type]
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0.03, atol=0.03 * float(b.abs().max()))
