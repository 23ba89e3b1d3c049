"""Molmo's pooling: a window worked by hand, and ``torch.nn.MultiheadAttention`` window by window."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from kempnerforge.model.adapters import build_adapter
from kempnerforge.model.attention_pool import AttentionPoolAdapter, AttentionPoolConfig


def pool(cfg: AttentionPoolConfig, in_dim: int, out_dim: int, features: int) -> AttentionPoolAdapter:
    torch.manual_seed(0)
    adapter = build_adapter(cfg, in_dim, out_dim, features)
    assert isinstance(adapter, AttentionPoolAdapter)
    return adapter


def test_a_window_by_hand() -> None:
    """Identities for all layers, one head: the weight of a patch is the softmax of its product with the mean."""
    adapter = pool(AttentionPoolConfig(heads=1, head_dim=2, hidden_dim=2), 2, 2, 4)
    with torch.no_grad():
        for layer in (
            adapter.q_proj,
            adapter.k_proj,
            adapter.v_proj,
            adapter.o_proj,
            adapter.proj.gate,
            adapter.proj.up,
            adapter.proj.down,
        ):
            layer.weight.copy_(torch.eye(2))
            if layer.bias is not None:
                layer.bias.zero_()
        adapter.image_token.copy_(torch.tensor([10.0, -10.0]))
    patches = [(1.0, 0.0), (0.0, 2.0), (3.0, 0.0), (0.0, 2.0)]  # their mean is (1, 1)
    weights = [math.exp((x + y) / math.sqrt(2)) for x, y in patches]
    pooled = [sum(w * p[i] for w, p in zip(weights, patches, strict=True)) / sum(weights) for i in (0, 1)]
    want = [token + value * value / (1 + math.exp(-value)) for value, token in zip(pooled, (10, -10), strict=True)]  # silu(x) * x
    assert adapter(torch.tensor([patches]))[0, 0].tolist() == pytest.approx(want, rel=1e-6)


def padded(x: Tensor, side: int, full: int) -> Tensor:
    """The grid of an image with zeros at the right and at the bottom, patch by patch."""
    out = torch.zeros(full, full, x.shape[-1])
    for row in range(side):
        for column in range(side):
            out[row, column] = x[row * side + column]
    return out


@pytest.mark.parametrize(("side", "factor"), [(4, 2), (6, 3), (3, 2), (5, 3), (2, 1)])
@torch.no_grad()
def test_windows_equal_multi_head_attention_one_by_one(side: int, factor: int) -> None:
    adapter = pool(AttentionPoolConfig(factor=factor, heads=3, head_dim=4), 12, 10, side**2)
    theirs = nn.MultiheadAttention(12, 3, batch_first=True)
    theirs.in_proj_weight.copy_(torch.cat([adapter.q_proj.weight, adapter.k_proj.weight, adapter.v_proj.weight]))
    theirs.in_proj_bias.copy_(torch.cat([adapter.q_proj.bias, adapter.k_proj.bias, adapter.v_proj.bias]))
    theirs.out_proj.load_state_dict(adapter.o_proj.state_dict())
    images, windows = torch.randn(2, side**2, 12), -(-side // factor)
    want = []
    for image in images:
        grid = padded(image, side, windows * factor)
        for row in range(0, windows * factor, factor):
            for column in range(0, windows * factor, factor):
                window = grid[row : row + factor, column : column + factor].reshape(1, factor**2, 12)
                want.append(theirs(window.mean(dim=1, keepdim=True), window, window)[0][0, 0])
    torch.testing.assert_close(adapter.prepare(images).flatten(0, 1), torch.stack(want), rtol=1e-5, atol=1e-6)
    assert adapter.num_tokens == windows**2


@pytest.mark.parametrize(("features", "tokens"), [(24 * 24, 12 * 12), (27 * 27, 14 * 14), (16 * 16, 8 * 8)])
def test_token_counts_of_molmo(features: int, tokens: int) -> None:
    """A crop of 336 pixels by CLIP, of 378 by SigLIP, of 224."""
    assert AttentionPoolConfig().num_tokens(features) == tokens


def test_sizes_of_molmo_7b_d() -> None:
    """Two layers of CLIP ViT-L, 16 heads of 64, into a Qwen2 7B: counted by hand."""
    with torch.device("meta"):
        adapter = build_adapter(AttentionPoolConfig(hidden_dim=18944), 2 * 1024, 3584, 576)
    attention = 3 * (2 * 1024 + 1) * 1024 + (1024 + 1) * 1024
    assert sum(p.numel() for p in adapter.parameters()) == attention + 2 * 1024 * 18944 + 18944 * 3584 + 3584
    assert adapter(torch.empty(2, 576, 2048, device="meta")).shape == (2, 144, 3584)


def test_bad_values() -> None:
    with pytest.raises(ValueError, match=r"heads = 0: must be >= 1"):
        AttentionPoolConfig(heads=0)
    with pytest.raises(ValueError, match=r"factor = 5: is larger than the grid of 4 x 4 vision features"):
        build_adapter(AttentionPoolConfig(factor=5), 4, 4, 16)
    with pytest.raises(ValueError, match=r"square grid.*gives 15"):
        build_adapter(AttentionPoolConfig(), 4, 4, 15)
