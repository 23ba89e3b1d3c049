"""Adapters against naive loops."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import IdeficsConfig
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

from kempnerforge.config import registry
from kempnerforge.config.adapter import (
    AdapterConfig,
    AvgPoolConfig,
    LinearAdapterConfig,
    MLPAdapterConfig,
    NoAdapterConfig,
    PerceiverConfig,
    PixelShuffleConfig,
)
from kempnerforge.model.adapters import Adapter, AvgPoolAdapter, PerceiverAdapter, PixelShuffleAdapter, build_adapter
from kempnerforge.model.attention_pool import AttentionPoolConfig
from kempnerforge.model.fused_mlp import FusedMLPConfig

PERCEIVER = PerceiverConfig(latents=5, depth=2, heads=3, head_dim=4)
ALL = [
    LinearAdapterConfig(),
    MLPAdapterConfig(),
    PixelShuffleConfig(),
    AvgPoolConfig(),
    PERCEIVER,
    FusedMLPConfig(),
    AttentionPoolConfig(heads=3, head_dim=4),
]
by_type = pytest.mark.parametrize("cfg", ALL, ids=lambda c: c.type)


def shuffled(x: Tensor, factor: int) -> Tensor:
    """Space to depth, one number at a time."""
    n, f, c = x.shape
    side = int(f**0.5)
    out = torch.empty(n, (side // factor) ** 2, factor * factor * c)
    for row in range(side):
        for column in range(side):
            token = row // factor * (side // factor) + column // factor
            place = (row % factor * factor + column % factor) * c
            out[:, token, place : place + c] = x[:, row * side + column]
    return out


def pooled(x: Tensor, factor: int) -> Tensor:
    """The mean over windows, read off the shuffled form."""
    return shuffled(x, factor).unflatten(-1, (factor**2, x.shape[-1])).mean(2)


@settings(deadline=None, max_examples=25)
@given(n=st.integers(0, 2), windows=st.integers(1, 3), factor=st.integers(1, 3), dim=st.integers(1, 4))
def test_grids_equal_the_loop(n: int, windows: int, factor: int, dim: int) -> None:
    features = (windows * factor) ** 2
    x = torch.randn(n, features, dim)
    shuffle = PixelShuffleAdapter(PixelShuffleConfig(factor=factor), dim, 5, features)
    pool = AvgPoolAdapter(AvgPoolConfig(factor=factor), dim, 5, features)
    assert torch.equal(shuffle.prepare(x), shuffled(x, factor))
    assert torch.allclose(pool.prepare(x), pooled(x, factor), atol=1e-6)
    assert shuffle(x).shape == pool(x).shape == (n, windows**2, 5)


def test_order_by_hand() -> None:
    x = torch.arange(16.0).view(1, 16, 1)
    adapter = PixelShuffleAdapter(PixelShuffleConfig(factor=2), 1, 1, 16)
    assert adapter.prepare(x)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


@pytest.mark.parametrize(("features", "factor", "tokens"), [(256, 1, 256), (1024, 2, 256), (1024, 4, 64)])
def test_token_counts_of_known_models(features: int, factor: int, tokens: int) -> None:
    adapter = build_adapter(PixelShuffleConfig(factor=factor), 8, 16, features)
    assert adapter.num_tokens == tokens
    assert adapter(torch.randn(1, features, 8)).shape == (1, tokens, 16)


@by_type
def test_shapes_and_gradients(cfg: AdapterConfig) -> None:
    adapter = build_adapter(cfg, 6, 10, 16)
    assert adapter.num_tokens == cfg.num_tokens(16)
    out = adapter(torch.randn(3, 16, 6))
    assert out.shape == (3, adapter.num_tokens, 10)
    (out * torch.randn_like(out)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())
    assert adapter(torch.randn(0, 16, 6)).shape == (0, adapter.num_tokens, 10)


@by_type
def test_meta_and_bf16(cfg: AdapterConfig) -> None:
    with torch.device("meta"):
        assert build_adapter(cfg, 6, 10, 16)(torch.empty(2, 16, 6)).shape[-1] == 10
    adapter = build_adapter(cfg, 6, 10, 16).to(torch.bfloat16)
    assert adapter(torch.randn(2, 16, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("cfg", "widths"),
    [
        (LinearAdapterConfig(), [(6, 10)]),
        (MLPAdapterConfig(), [(6, 10), (10, 10)]),
        (MLPAdapterConfig(hidden_dim=7), [(6, 7), (7, 10)]),
        (PixelShuffleConfig(), [(24, 10)]),
        (PixelShuffleConfig(hidden_dim=7), [(24, 7), (7, 10)]),
        (AvgPoolConfig(), [(6, 10)]),
        (AvgPoolConfig(hidden_dim=7, factor=4), [(6, 7), (7, 10)]),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_layers(cfg: AdapterConfig, widths: list[tuple[int, int]], bias: bool) -> None:
    cfg.bias = bias
    layers = [m for m in build_adapter(cfg, 6, 10, 16).modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in layers] == widths
    assert all((m.bias is not None) == bias for m in layers)


def test_none_is_nothing() -> None:
    adapter, x = build_adapter(NoAdapterConfig(), 6, 10, 5), torch.randn(2, 5, 6)
    assert adapter(x) is x and (adapter.out_dim, adapter.num_tokens) == (6, 5) and not list(adapter.parameters())
    with pytest.raises(ValueError, match="bias = False: only a type with a projection reads it"):
        NoAdapterConfig(bias=False)


def test_mlp_is_llavas() -> None:
    adapter = build_adapter(MLPAdapterConfig(hidden_dim=7), 6, 10, 5)
    one, two = (m for m in adapter.modules() if isinstance(m, nn.Linear))
    x = torch.randn(2, 5, 6)
    assert torch.equal(adapter(x), two(torch.nn.functional.gelu(one(x))))


@pytest.mark.parametrize("config", [PixelShuffleConfig, AvgPoolConfig])
def test_grids_that_do_not_fit(config: type[PixelShuffleConfig]) -> None:
    with pytest.raises(ValueError, match=r"square grid.*gives 15$"):
        build_adapter(config(), 6, 10, 15)
    with pytest.raises(ValueError, match=r"square grid.*gives 17 \(that is 4 x 4 and one more: leave out the CLS token"):
        build_adapter(config(), 6, 10, 17)
    with pytest.raises(ValueError, match=r"factor = 3: does not divide the grid of 4 x 4"):
        build_adapter(config(factor=3), 6, 10, 16)
    with pytest.raises(ValueError, match=r"factor = 2: does not divide the grid of 1 x 1 vision features$"):
        build_adapter(config(), 6, 10, 1)


def idefics_resampler(cfg: PerceiverConfig, dim: int) -> IdeficsPerceiverResampler:
    """Transformers' own, with GELU for its ReLU."""
    whole = IdeficsConfig()
    whole.vision_config.embed_dim = dim
    it = IdeficsPerceiverResampler(whole, dim, cfg.depth, cfg.heads, cfg.head_dim, cfg.latents)
    for module in it.modules():
        if hasattr(module, "act"):
            module.act = nn.GELU()
    return it


@pytest.mark.parametrize("features", [1, 9, 100])
def test_perceiver_is_that_of_transformers(features: int) -> None:
    ours = build_adapter(PERCEIVER, 6, 10, 16)
    assert isinstance(ours, PerceiverAdapter)
    theirs = idefics_resampler(PERCEIVER, 6)
    ordered = [ours.latents]
    for layer in ours.layers:
        attention = (layer.media_norm, layer.latents_norm, layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj)
        ordered += chain.from_iterable(part.parameters() for part in (*attention, layer.mlp_norm, layer.mlp))
    ordered += ours.norm.parameters()
    with torch.no_grad():
        for mine, other in zip(ordered, theirs.parameters(), strict=True):
            other.copy_(mine.add_(0.3 * torch.randn_like(mine)))
    x = torch.randn(2, features, 6)
    torch.testing.assert_close(ours(x), ours.proj(theirs(x)), rtol=1e-4, atol=1e-5)


def test_perceiver_by_default_is_flamingos() -> None:
    """64 latents, 6 layers of 8 heads of 64, feed-forward 4 times as wide: counted by hand."""
    with torch.device("meta"):
        adapter = build_adapter(PerceiverConfig(), 1024, 2048, 256)
    layer = 3 * 1024 * 512 + 512 * 1024 + 8 * 1024**2 + 3 * 2 * 1024
    assert sum(p.numel() for p in adapter.parameters()) == 64 * 1024 + 6 * layer + 2 * 1024 + 1024 * 2048 + 2048


def test_perceiver_takes_features_in_any_number_and_order() -> None:
    adapter = build_adapter(PERCEIVER, 6, 10, 16)
    x = torch.randn(2, 17, 6)  # with a CLS token, no square grid
    assert adapter(x).shape == adapter(x[:, :3]).shape == (2, 5, 10)
    assert build_adapter(PERCEIVER, 6, 10, 17).num_tokens == 5
    torch.testing.assert_close(adapter(x), adapter(x[:, torch.randperm(17)]), rtol=1e-4, atol=1e-5)


def test_a_config_without_a_model_says_so() -> None:
    @dataclass
    class Config(AdapterConfig):
        type: str = "resampler"

    with pytest.raises(
        NotImplementedError, match=r"^adapter.type = 'resampler': has a config but no model; registered: attention_pool, avg_pool"
    ):
        build_adapter(Config(), 6, 10, 16)


def test_every_config_has_a_model() -> None:
    assert {c.type for c in ALL} <= set(registry.adapters)
    with pytest.raises(TypeError, match="abstract method forward"):
        Adapter(LinearAdapterConfig(), 6, 10, 16)
