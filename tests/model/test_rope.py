"""Rotary positions: what defines them, and the scalings against transformers."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kempnerforge.config.model import ModelConfig, RopeScaling
from kempnerforge.model.rope import inverse_frequencies, rope_tables, rotate

CFG = ModelConfig(dim=64, n_heads=4, rope_theta=5e5)


def at(x: Tensor, *positions: int) -> Tensor:
    """``x`` (E,) at each position: (S, E)."""
    return rotate(x.expand(1, 1, len(positions), -1), rope_tables(torch.tensor([positions]), CFG))[0, 0]


def vectors() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(16, generator=g), torch.randn(16, generator=g)


def test_tables() -> None:
    cos, sin = rope_tables(torch.tensor([[0, 1, 5], [7, 7, 0]]), CFG)
    assert cos.shape == sin.shape == (2, 1, 3, 8)
    assert cos.dtype == torch.float32
    torch.testing.assert_close(
        cos[1, 0, 0, 3].item(), torch.tensor(7 * 5e5 ** (-6 / 16), dtype=torch.float64).cos().item(), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(cos.square() + sin.square(), torch.ones(2, 1, 3, 8))


def test_rotation_keeps_norms_and_position_0() -> None:
    x, _ = vectors()
    turned = at(x, 0, 1, 100, 1000)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm().expand(4))
    assert torch.equal(turned[0], x)
    assert (turned[1:] - x).abs().amax(-1).min() > 0.1


@pytest.mark.parametrize("shift", [1, 17, 500])
def test_scores_depend_on_the_distance_alone(shift: int) -> None:
    q, k = vectors()
    near, far = at(q, 9, 9 + shift), at(k, 4, 4 + shift)
    torch.testing.assert_close(near[0] @ far[0], near[1] @ far[1], rtol=1e-3, atol=1e-3)
    assert abs(float(near[0] @ far[0] - near[0] @ far[1])) > 1e-2


def test_the_dtype_stays() -> None:
    x = torch.randn(1, 1, 2, 16, dtype=torch.bfloat16)
    tables = rope_tables(torch.tensor([[3, 300]]), CFG)
    got = rotate(x, tables)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, rotate(x.float(), tables).bfloat16())


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (RopeScaling("linear", 4.0), {"rope_type": "linear", "factor": 4.0}),
        (
            RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
        (
            RopeScaling("llama3", 32.0, 2.0, 6.0, 512),
            {
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 2.0,
                "high_freq_factor": 6.0,
                "original_max_position_embeddings": 512,
            },
        ),
    ],
    ids=["linear", "llama 3.1", "other bounds"],
)
def test_scalings_are_transformers(ours: RopeScaling, theirs: dict) -> None:
    cfg = ModelConfig(dim=128, n_heads=1, rope_theta=5e5, rope_scaling=ours)
    config = transformers.LlamaConfig(
        hidden_size=128, num_attention_heads=1, max_position_embeddings=131072, rope_parameters={**theirs, "rope_theta": 5e5}
    )
    want, attention_factor = ROPE_INIT_FUNCTIONS[theirs["rope_type"]](config, torch.device("cpu"))
    got = inverse_frequencies(cfg)
    assert attention_factor == 1.0
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    assert not torch.allclose(got, inverse_frequencies(ModelConfig(dim=128, n_heads=1, rope_theta=5e5)))
