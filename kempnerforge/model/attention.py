"""Masks (which position sees which), and the one function that computes attention.

Shapes: B rows, H query heads, G key/value heads, Q queries, K keys, S positions, E head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from kempnerforge.model.documents import Documents, RowDocuments, take_apart

FLEX_FROM = 1024
"""Keys from which FlexAttention is taken on CUDA: it skips blocks that are masked out and needs no (Q, K)
mask in memory."""
PREFIX_FROM = 64
"""Length from which a ``Prefix`` is taken on CUDA, where a kernel without a mask is the fast one.

NOTE: never on a CPU. There two products on slices take 1.3 to 1.7 times as long as one with a mask for 16
positions, and 0.9 (fp32) to 1.1 (bf16) times for 128 and 196. ``benchmarks/attention.py`` measures it.
"""
DOCUMENTS_FROM = 384
"""Keys from which rows of several samples are taken apart where there is no FlexAttention. On a CPU a dense
mask takes half to twice as long for 128 to 256 keys, twice as long for 384, ten times as long for 2048.
``benchmarks/attention.py`` measures it.
"""


@dataclass(frozen=True)
class Prefix:
    """The first positions of every row see exactly each other, in both directions.

    Attention is then two products on slices, and the first one needs no mask; with ``rest`` None neither
    does.

    Attributes:
        length: number of positions, the same in every row.
        rest: (B, 1, S - length, K) additive, the mask of the positions after them; None is plain causal.
    """

    length: int
    rest: Tensor | None = None


Mask = Tensor | Prefix | Documents | BlockMask
"""Any form of mask that ``attend`` takes; a tensor is additive, (B or 1, 1, Q, K)."""


@dataclass(frozen=True)
class ByWindow:
    """The masks of a model whose layers have different windows.

    Attributes:
        masks: by window of the layer; 0 has none.
    """

    masks: Mapping[int, Mask | None]


@dataclass(frozen=True)
class Segments:
    """The structure that attention follows, one number per key in storage order.

    A query sees a key of its own sample (padding, sample -1, sees padding) that belongs to the sample's
    shared part (text 0) or to its own text, if the key does not come later in the stream or is of the group
    that the query looks ahead at. With a window the key is fewer than so many positions back, too, unless it
    is of that group: PaliGemma 2 is trained so, and an image is whole in every layer. (Gemma 3 has its images
    within the window, so that it sees the same.) The distance is counted in positions of RoPE: places in the
    row would also count the other texts about the same image, which a text does not see.

    Attributes:
        sample_ids: (B, K) int64; -1 is padding.
        text_ids: (B, K) int64; 0 is the shared part of a sample.
        groups: (B, K) int64; a number above 0: the group of the key. None: there are no groups.
        ahead: (B, K) int64; a number above 0: the group that the query looks ahead at. None: its own, so that
            the tokens of a group see each other in both directions.
        order: (B, K) int64, the place of each key in the stream. None: the order of storage.
        has_documents: False promises that without groups a causal mask alone is right: one text a row, padded
            on the right.
        documents: for each row the (positions, texts) of its samples in the order of the stream, which has no
            gap and is padded after them. None: not known, or nowhere several in a row.
        positions: (B, K) int64, the position of each key in its text, as in RoPE. None: no layer has a
            window.
        windows: of the kinds of layers in the model; 0 is none.
    """

    sample_ids: Tensor
    text_ids: Tensor
    groups: Tensor | None = None
    order: Tensor | None = None
    has_documents: bool = True
    documents: RowDocuments | None = None
    positions: Tensor | None = None
    windows: tuple[int, ...] = (0,)
    ahead: Tensor | None = None

    @property
    def num_keys(self) -> int:
        return self.sample_ids.shape[1]

    def take(self, index: Tensor) -> Segments:
        """The structure of the stream stored in another order.

        Args:
            index: (B, S') int64, the position that comes to be at each place; -1 makes the place padding.
                With ``documents`` all positions of samples find one.
        """
        padding, place = index < 0, index.clamp(min=0)

        def taken(ids: Tensor, nothing: int) -> Tensor:
            return ids.gather(1, place).masked_fill(padding, nothing)

        order = index if self.order is None else taken(self.order, -1)
        groups, positions, ahead = (None if ids is None else taken(ids, 0) for ids in (self.groups, self.positions, self.ahead))
        ids = taken(self.sample_ids, -1), taken(self.text_ids, 0)
        return Segments(*ids, groups, order, documents=self.documents, positions=positions, windows=self.windows, ahead=ahead)

    def rows(self, rows: Tensor) -> Segments:
        """The structure of ``rows`` (B',) int64."""
        assert self.documents is None, "rows to generate from are one sample each"
        tensors = {each.name: value for each in fields(self) if isinstance(value := getattr(self, each.name), Tensor)}
        return replace(self, **{name: ids.index_select(0, rows) for name, ids in tensors.items()})

    def extend(self, later: Segments) -> Segments:
        """These keys followed by ``later`` ones, which come after all of these in the stream."""
        groups = order = positions = ahead = None
        if self.groups is not None or later.groups is not None:
            groups = torch.cat([s.groups if s.groups is not None else torch.zeros_like(s.text_ids) for s in (self, later)], dim=1)
        if self.ahead is not None or later.ahead is not None:
            ahead = torch.cat([s._ahead() for s in (self, later)], dim=1)
        if self.order is not None or later.order is not None:
            earlier = self._order()
            order = torch.cat([earlier, later._order() + earlier.amax(dim=1, keepdim=True) + 1], dim=1)
        ids = [torch.cat(pair, dim=1) for pair in ((self.sample_ids, later.sample_ids), (self.text_ids, later.text_ids))]
        if self.positions is not None and later.positions is not None:
            positions = torch.cat([self.positions, later.positions], dim=1)
        return Segments(ids[0], ids[1], groups, order, positions=positions, windows=self.windows, ahead=ahead)

    def _ahead(self) -> Tensor:
        """(B, K)."""
        found = self.groups if self.ahead is None else self.ahead
        return torch.zeros_like(self.text_ids) if found is None else found

    def _order(self) -> Tensor:
        """(B, K)."""
        if self.order is not None:
            return self.order
        return torch.arange(self.num_keys, device=self.sample_ids.device).expand_as(self.sample_ids)

    def rule(self, window: int = 0) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """``rule(row, head, query, key) -> bool``, all index tensors that broadcast; the form that
        FlexAttention takes.
        """
        samples, texts, groups, order, positions = self.sample_ids, self.text_ids, self.groups, self.order, self.positions
        ahead = groups if self.ahead is None else self.ahead
        assert not window or positions is not None, "a window is counted in positions"

        def may_look(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            text = texts[row, key]
            same_text = (samples[row, query] == samples[row, key]) & ((text == 0) | (text == texts[row, query]))
            reached = query >= key if order is None else order[row, query] >= order[row, key]
            if window and positions is not None:
                reached = reached & (positions[row, query] - positions[row, key] < window)
            if groups is not None and ahead is not None:
                group = ahead[row, query]
                reached = reached | ((group == groups[row, key]) & (group > 0))
            return same_text & reached

        return may_look

    def visible(self, num_queries: int | None = None, window: int = 0, first: int | None = None) -> Tensor:
        """(B, 1, Q, K) bool, True where ``num_queries`` positions (default: all) from ``first`` on (default:
        the last ones) may look in a layer with ``window``.
        """
        device = self.sample_ids.device
        row = torch.arange(self.sample_ids.shape[0], device=device)[:, None, None]
        key = torch.arange(self.num_keys, device=device)
        queries = self.num_keys if num_queries is None else num_queries
        query = key.narrow(0, self.num_keys - queries if first is None else first, queries)
        return self.rule(window)(row, row, query[:, None], key)[:, None]

    def mask(self, num_queries: int, dtype: torch.dtype, leading: int = 0, first: int | None = None) -> Mask | ByWindow | None:
        """The mask of ``num_queries`` positions, in the cheapest form on this device; None is plain causal.

        A window that every sample fits into is dropped, so that all layers share one mask.

        Args:
            num_queries: Q.
            dtype: of the scores.
            leading: that many positions at the start of every row form one bidirectional group and see
                nothing else, and there is no other group where ``has_documents`` is False; 0 makes no such
                promise.
            first: the first of the queries; None: they are the last positions.
        """
        longest = max((length for row in self.documents for length, _ in row), default=0) if self.documents else self.num_keys
        reach = {window: window if window < longest else 0 for window in self.windows}
        masks = {window: self._form(num_queries, dtype, leading, window, first) for window in sorted(set(reach.values()))}
        return ByWindow(masks) if len(masks) > 1 else masks[reach[self.windows[0]]]

    def _form(self, num_queries: int, dtype: torch.dtype, leading: int, window: int, first: int | None) -> Mask | None:
        if first is not None:
            if on_cuda(self.sample_ids) and self.num_keys >= FLEX_FROM:
                return self.blocks(window, num_queries, first)
            return additive(self.visible(num_queries, window, first), dtype)
        whole = num_queries == self.num_keys
        plain = whole and not self.has_documents and self.order is None
        alike = plain and self.groups is None
        if alike and not window:
            return None
        fast = whole and on_cuda(self.sample_ids)
        prefix = fast and leading >= PREFIX_FROM
        if plain and prefix and not window:
            return Prefix(leading)
        if fast and num_queries >= FLEX_FROM:
            return self.blocks(window)
        if whole and self.documents and not on_cuda(self.sample_ids) and num_queries >= DOCUMENTS_FROM:
            return self.apart(self.documents, dtype, window)
        if prefix:
            return Prefix(leading, additive(self.visible(num_queries - leading, window), dtype))
        return additive((self._any_row() if alike else self).visible(num_queries, window), dtype)

    def shared(self, index: Tensor) -> Segments:
        """The structure of the stream in the order in which ranks have it that share its rows.

        Args:
            index: (K,) int64, as of ``take``; the same for all rows.
        """
        flex = on_cuda(index) and len(index) >= FLEX_FROM  # whose kernel asks for each row
        alike = not flex and not self.has_documents and self.order is None and self.groups is None
        whole = replace(self._any_row(), windows=self.windows) if alike else self
        return whole.take(index.expand(len(whole.sample_ids), -1))

    def _any_row(self) -> Segments:
        """The structure that all rows of one text, padded on the right, share."""
        steps = torch.arange(self.num_keys, device=self.sample_ids.device)[None]  # (1, K)
        nothing = torch.zeros_like(steps)
        return Segments(nothing, nothing, positions=steps)

    def apart(self, rows: RowDocuments, dtype: torch.dtype, window: int = 0) -> Documents:
        """All positions against all, one sample at a time."""
        batch, keys = self.sample_ids.shape
        stored = torch.arange(batch * keys, device=self.sample_ids.device).view(batch, keys)
        if self.order is not None:  # sorted by the place in the stream; padding goes after its end
            end = max(sum(length for length, _ in row) for row in rows)
            place = torch.where(self.sample_ids < 0, end, self.order)
            stored = stored.new_zeros(batch, end + 1).scatter(1, place, stored)

        def mask(places: Tensor, in_sample: Tensor) -> Tensor:
            samples, texts = self.sample_ids.flatten()[places], self.text_ids.flatten()[places]  # (n, L)
            groups, positions, ahead = (None if ids is None else ids.flatten()[places] for ids in (self.groups, self.positions, self.ahead))
            bucket = Segments(samples.masked_fill(~in_sample, -1), texts, groups, positions=positions, ahead=ahead)
            return additive(bucket.visible(window=window), dtype)

        return take_apart(rows, stored, batch * keys, mask, self.groups is not None, window)

    def blocks(self, window: int = 0, num_queries: int | None = None, first: int = 0) -> BlockMask:
        """``num_queries`` positions (default: all) from ``first`` on against all, for FlexAttention (Dong et al.
        2024).
        """
        rows, device, rule = self.sample_ids.shape[0], self.sample_ids.device, self.rule(window)
        if num_queries is None:
            return create_block_mask(rule, rows, None, self.num_keys, self.num_keys, device=device)
        places = torch.arange(first, first + num_queries, device=device)  # for a number the kernel would be compiled anew

        def of_places(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return rule(row, head, places[query], key)

        return create_block_mask(of_places, rows, None, num_queries, self.num_keys, device=device)


def on_cuda(tensor: Tensor) -> bool:
    return tensor.is_cuda


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as scores to add: 0 where a query may look, -inf elsewhere. Adding costs nothing in the
    backward pass.
    """
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))


def fused_from(dtype: torch.dtype) -> int:
    """Keys from which the fused kernel is taken on a CPU, see ``attend``."""
    return 513 if dtype == torch.bfloat16 else 65


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None, *, scale: float | None = None, softcap: float = 0.0, causal: bool = True
) -> Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1), grouped-query when k and v have fewer heads.

    Args:
        q: (B, H, Q, E).
        k, v: (B, G, K, E); G divides H.
        mask: the whole mask; ``causal`` is not read then.
        scale: of the scores; None means ``E ** -0.5``.
        softcap: ``cap * tanh(scores / cap)`` before the mask (Gemma 2); 0 is off.
        causal: without a mask: query i sees keys up to K - Q + i; False sees all.

    Returns:
        (B, Q, H * E).

    NOTE: on a CPU the fused kernel's backward is slow for short sequences, in bf16 by far: 5.7 ms against 0.5
    ms written out for 64 tokens, 42 against 14 for 196; they meet near 512. Elsewhere the fused kernel wins.
    ``benchmarks/`` measures both.
    """
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    if isinstance(mask, Prefix):
        return _attend_prefix(q, k, v, mask, scale, softcap)
    if isinstance(mask, Documents):
        return mask.attend(q, k, v, partial(attend, scale=scale, softcap=softcap))
    if isinstance(mask, BlockMask):
        return _attend_blocks(q, k, v, mask, scale, softcap)
    if softcap or (q.device.type == "cpu" and k.shape[2] < fused_from(q.dtype)):
        return written_out(q, k, v, mask, scale, softcap, causal)
    aligned = causal and mask is None and q.shape[2] != k.shape[2]
    if aligned:  # SDPA's causal mask starts at the upper left, a cache needs the lower right
        mask = _causal_bias(q, k)
    o = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal and mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return o.transpose(1, 2).flatten(2)


def _attend_prefix(q: Tensor, k: Tensor, v: Tensor, mask: Prefix, scale: float, softcap: float) -> Tensor:
    length = mask.length
    assert q.shape[2] == k.shape[2] > length, "a prefix is part of the stream, and something follows it"
    first = attend(q[:, :, :length], k[:, :, :length], v[:, :, :length], scale=scale, softcap=softcap, causal=False)  # (B, length, H * E)
    if mask.rest is None and on_cuda(q) and not softcap:  # the causal kernel needs no mask; its first rows are thrown away
        rest = attend(q, k, v, scale=scale)[:, length:]
    else:
        rest = attend(q[:, :, length:], k, v, mask.rest, scale=scale, softcap=softcap)  # (B, S - length, H * E)
    return torch.cat([first, rest], dim=1)


_compiled_flex: Callable[..., Tensor] | None = None


def _attend_blocks(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, softcap: float) -> Tensor:
    def capped(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    kernel: Callable[..., Tensor] = flex_attention
    if on_cuda(q) and not torch.compiler.is_compiling():  # uncompiled it would write out all scores
        global _compiled_flex
        _compiled_flex = _compiled_flex or torch.compile(flex_attention)
        kernel = _compiled_flex
    o = kernel(q, k, v, score_mod=capped if softcap else None, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return o.transpose(1, 2).flatten(2)


def _causal_bias(q: Tensor, k: Tensor) -> Tensor:
    visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
    return additive(visible, q.dtype)


def written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float, causal: bool) -> Tensor:
    """``attend`` as matrix products, with a mask that is additive."""
    batch, heads, queries, _ = q.shape
    groups = k.shape[1]
    if groups != heads:  # each key/value head serves heads / groups query heads: fold them into the query axis
        q = q.reshape(batch, groups, heads // groups * queries, -1)  # (B, G, H/G * Q, E)
    scores = (q * scale) @ k.transpose(-1, -2)
    if groups != heads:
        scores = scores.unflatten(2, (heads // groups, queries)).flatten(1, 2)  # (B, H, Q, K)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None and causal and queries > 1:
        mask = _causal_bias(q[:, :, :queries], k)
    weights = (scores if mask is None else scores + mask).softmax(-1)
    if groups != heads:
        weights = weights.unflatten(1, (groups, heads // groups)).flatten(2, 3)  # (B, G, H/G * Q, K)
    o = weights @ v
    if groups != heads:
        o = o.unflatten(2, (heads // groups, queries)).flatten(1, 2)  # (B, H, Q, E)
    return o.transpose(1, 2).flatten(2)
