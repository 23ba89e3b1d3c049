from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kempnerforge.config.adapter import (
    AvgPoolConfig,
    GridAdapterConfig,
    LinearAdapterConfig,
    MLPAdapterConfig,
    PerceiverConfig,
    PixelShuffleConfig,
)
from kempnerforge.config.vision import ViTConfig

GRIDS = [PixelShuffleConfig, AvgPoolConfig]


@pytest.mark.parametrize("cls", GRIDS)
@pytest.mark.parametrize(("size", "patch", "factor", "tokens"), [(224, 14, 1, 256), (512, 16, 2, 256), (512, 16, 4, 64)])
def test_tokens_behind_the_encoder(cls: type[GridAdapterConfig], size: int, patch: int, factor: int, tokens: int) -> None:
    assert cls(factor=factor).num_tokens(ViTConfig(image_size=size, patch_size=patch).num_tokens()) == tokens


@pytest.mark.parametrize("cls", GRIDS)
def test_grids_that_do_not_fit(cls: type[GridAdapterConfig]) -> None:
    with pytest.raises(ValueError, match=r"factor = 2: does not divide the grid of 7 x 7"):
        cls(factor=2).num_tokens(49)
    with pytest.raises(ValueError, match="square grid.*50"):
        cls(factor=1).num_tokens(50)


@pytest.mark.parametrize("cls", GRIDS)
@given(side=st.integers(1, 40), factor=st.integers(1, 8))
def test_each_token_stands_for_a_window(cls: type[GridAdapterConfig], side: int, factor: int) -> None:
    assert cls(factor=factor).num_tokens((side * factor) ** 2) == side**2


def test_projections_keep_the_count() -> None:
    assert [cls().num_tokens(50) for cls in (LinearAdapterConfig, MLPAdapterConfig)] == [50, 50]


@given(features=st.integers(1, 5000), latents=st.integers(1, 100))
def test_a_resampler_gives_its_latents(features: int, latents: int) -> None:
    assert PerceiverConfig(latents=latents).num_tokens(features) == latents


def test_a_resampler_by_default_is_flamingos() -> None:
    cfg = PerceiverConfig()
    assert (cfg.latents, cfg.depth, cfg.heads, cfg.head_dim, cfg.ff_mult) == (64, 6, 8, 64, 4)


@pytest.mark.parametrize("key", ["latents", "depth", "heads", "head_dim", "ff_mult"])
def test_a_resampler_without_something(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} = 0: must be >= 1"):
        PerceiverConfig(**{key: 0})


def test_bad_values() -> None:
    with pytest.raises(ValueError, match="hidden_dim = 5"):
        LinearAdapterConfig(hidden_dim=5)
    with pytest.raises(ValueError, match="hidden_dim = -1"):
        MLPAdapterConfig(hidden_dim=-1)
    with pytest.raises(ValueError, match="factor = 0"):
        PixelShuffleConfig(factor=0)
