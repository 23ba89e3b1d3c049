"""The backbone's own rules; that it computes what the known families compute is in ``test_transformer_oracle``."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from kempnerforge.config.model import ModelConfig
from kempnerforge.model.rope import rope_tables
from kempnerforge.model.transformer import Block, Cache, Context, RMSNorm, Transformer

CFG = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, vocab_size=50)
IDS = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))


def logits(model: Transformer, ids: Tensor = IDS) -> Tensor:
    return model.unembed(model.run(model.embed(ids), Context(rope_tables(torch.arange(ids.shape[1]).expand_as(ids), model.cfg))))


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        # embedding, per layer: q and o, k and v, mlp, two norms; final norm
        ({}, 50 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32) + 32),
        ({"tie_embeddings": False}, 2 * 50 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32) + 32),
        ({"activation": "gelu"}, 50 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 2 * 32 * 48 + 2 * 32) + 32),
        ({"qkv_bias": True, "qk_norm": True}, 50 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 64 + 16 + 3 * 32 * 48 + 2 * 32) + 32),
        ({"head_dim": 20}, 50 * 32 + 2 * (2 * 32 * 80 + 2 * 32 * 40 + 3 * 32 * 48 + 2 * 32) + 32),
    ],
    ids=["default", "untied", "gelu", "bias and qk norm", "head_dim"],
)
def test_parameter_counts(changes: dict, want: int) -> None:
    assert sum(p.numel() for p in Transformer(replace(CFG, **changes)).parameters()) == want


def test_a_tied_head_is_the_embedding() -> None:
    model = Transformer(CFG)
    x = torch.randn(3, 32)
    torch.testing.assert_close(model.unembed(x), model.norm(x) @ model.token_embedding.weight.T)
    assert not any("output_head" in name for name in model.state_dict())
    untied = Transformer(replace(CFG, tie_embeddings=False))
    assert untied.output_head is not None
    torch.testing.assert_close(untied.unembed(x), untied.norm(x) @ untied.output_head.weight.T)
    assert not torch.equal(untied.output_head.weight, untied.token_embedding.weight)


def test_logits_are_capped_and_fp32() -> None:
    model, capped = Transformer(CFG), Transformer(replace(CFG, logit_softcap=2.0))
    capped.load_state_dict(model.state_dict())
    x = 30 * torch.randn(3, 32)
    for m in (model, capped):
        nn.init.normal_(m.token_embedding.weight, generator=torch.Generator().manual_seed(1))
    plain, got = model.unembed(x), capped.unembed(x)
    assert plain.abs().max() > 4
    torch.testing.assert_close(got, 2 * torch.tanh(plain / 2))
    assert capped.bfloat16().unembed(x.bfloat16()).dtype == torch.float32


def test_embed_scale() -> None:
    model = Transformer(replace(CFG, embed_scale=True))
    torch.testing.assert_close(model.embed(IDS), model.token_embedding.weight[IDS] * 32**0.5)
    model.bfloat16()  # Gemma rounds the factor to the compute dtype
    factor = torch.tensor(32**0.5, dtype=torch.bfloat16)
    assert torch.equal(model.embed(IDS), model.token_embedding.weight[IDS] * factor)


@pytest.mark.parametrize("knob", [{"attention_softcap": 0.1}, {"attention_scale": 2.0}, {"qk_norm": True}])
def test_knobs_of_attention_reach_it(knob: dict) -> None:
    torch.manual_seed(0)
    model = Transformer(replace(CFG, init_std=0.3))
    other = Transformer(replace(CFG, init_std=0.3, **knob))
    other.load_state_dict(model.state_dict(), strict=False)
    assert (logits(other) - logits(model)).abs().max() > 1e-3


@pytest.mark.parametrize("plus_one", [False, True])
def test_rms_norm_is_pytorchs(plus_one: bool) -> None:
    norm, theirs = RMSNorm(32, 1e-5, plus_one), nn.RMSNorm(32, 1e-5)
    weight = torch.randn(32)
    norm.weight.data.copy_(weight - 1 if plus_one else weight)
    theirs.weight.data.copy_(weight)
    x = 5 * torch.randn(4, 32)
    torch.testing.assert_close(norm(x), theirs(x))
    assert torch.equal(RMSNorm(32, 1e-5, plus_one)(x), RMSNorm(32, 1e-5, not plus_one)(x)), "at first both scale by one"


def test_init_std() -> None:
    torch.manual_seed(0)
    model = Transformer(replace(CFG, dim=256, vocab_size=400, init_std=0.05))
    for p in model.parameters():
        if p.ndim == 2:
            assert abs(p.std().item() / 0.05 - 1) < 0.05
    assert abs(Transformer(replace(CFG, dim=256, vocab_size=400)).token_embedding.weight.std().item() / 0.02 - 1) < 0.05


def test_cache_keeps_layers_apart() -> None:
    cache = Cache()
    k, v = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4)
    assert all(torch.equal(a, b) for a, b in zip(cache.update(0, k, v), (k, v), strict=True))
    cache.update(1, 2 * k, 2 * v)
    got_k, got_v = cache.update(0, k[:, :, :1], v[:, :, :1])
    assert torch.equal(got_k, torch.cat([k, k[:, :, :1]], 2))
    assert torch.equal(got_v, torch.cat([v, v[:, :, :1]], 2))


def test_the_two_halves_are_the_block() -> None:
    torch.manual_seed(0)
    block = Block(CFG, 0)
    x = torch.randn(2, 5, 32)
    ctx = Context(rope_tables(torch.arange(5).expand(2, -1), CFG))
    q, k, v = block.pre(x, ctx.rope)
    assert q.shape == (2, 4, 5, 8) and k.shape == v.shape == (2, 2, 5, 8)
    assert torch.equal(block(x, ctx), block.post(x, block.attend(q, k, v, ctx)))


def test_an_arch_makes_the_layers() -> None:
    made = []

    def block(cfg: ModelConfig, layer: int) -> Block:
        made.append(layer)
        return Block(cfg, layer)

    assert list(Transformer(CFG, block).state_dict()) == list(Transformer(CFG).state_dict())
    assert made == [0, 1]


def test_the_vocabulary_must_be_known() -> None:
    with pytest.raises(AssertionError, match="vocabulary"):
        Transformer(replace(CFG, vocab_size=0))
