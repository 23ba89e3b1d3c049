"""The text backbone against transformers' own models: tiny random ones of every family that its knobs are for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from kempnerforge.config.model import ModelConfig, RopeScaling
from kempnerforge.model.rope import rope_tables
from kempnerforge.model.transformer import Cache, Context, Transformer

VOCAB = 97
OURS: dict[str, Any] = {"dim": 48, "n_layers": 2, "n_heads": 4, "ffn_dim": 80, "vocab_size": VOCAB, "max_seq_len": 256}
THEIRS: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NAMES = {
    "token_embedding": "model.embed_tokens",
    "output_head": "lm_head",
    "layers": "model.layers",
    "attention_norm": "input_layernorm",
    "attention": "self_attn",
    "mlp_norm": "post_attention_layernorm",
}


def default_rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GEMMA_OURS: dict[str, Any] = {"norm_plus_one": True, "activation": "geglu", "embed_scale": True, "tie_embeddings": True}

# family -> (our knobs, model class, config class, its knobs)
FAMILIES: dict[str, tuple[dict[str, Any], Any, Any, dict[str, Any]]] = {
    "llama": (
        {"n_kv_heads": 2, "tie_embeddings": False, "norm_eps": 1e-5, "rope_theta": 5e5},
        hf.LlamaForCausalLM,
        hf.LlamaConfig,
        {"num_key_value_heads": 2, "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "rope_parameters": default_rope(5e5)},
    ),
    "llama 3.1": (
        {"n_kv_heads": 2, "tie_embeddings": False, "rope_scaling": RopeScaling(type="llama3", original_max_seq_len=32, **LLAMA3)},
        hf.LlamaForCausalLM,
        hf.LlamaConfig,
        {
            "num_key_value_heads": 2,
            "tie_word_embeddings": False,
            "rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 1e4, "original_max_position_embeddings": 32},
        },
    ),
    "linear scaling": (
        {"rope_scaling": RopeScaling(type="linear", factor=4.0)},
        hf.LlamaForCausalLM,
        hf.LlamaConfig,
        {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    ),
    "smollm2": (
        {"n_kv_heads": 1, "rope_theta": 1e5, "norm_eps": 1e-5},
        hf.LlamaForCausalLM,
        hf.LlamaConfig,
        {"num_key_value_heads": 1, "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "rope_parameters": default_rope(1e5)},
    ),
    "qwen2": (
        {"n_kv_heads": 2, "qkv_bias": True, "rope_theta": 1e6},
        hf.Qwen2ForCausalLM,
        hf.Qwen2Config,
        {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_parameters": default_rope(1e6)},
    ),
    "qwen3": (
        {"n_kv_heads": 2, "qk_norm": True, "head_dim": 20, "tie_embeddings": False, "rope_theta": 1e6},
        hf.Qwen3ForCausalLM,
        hf.Qwen3Config,
        {"num_key_value_heads": 2, "head_dim": 20, "tie_word_embeddings": False, "rope_parameters": default_rope(1e6)},
    ),
    "gemma": (
        GEMMA_OURS | {"n_kv_heads": 1, "head_dim": 16},
        hf.GemmaForCausalLM,
        hf.GemmaConfig,
        {"num_key_value_heads": 1, "head_dim": 16, "hidden_act": "gelu_pytorch_tanh", "rope_parameters": default_rope(1e4)},
    ),
}
by_family = pytest.mark.parametrize("family", FAMILIES)


def pair(family: str) -> tuple[Transformer, Any]:
    """Our model and theirs with the same random weights, norms and biases included."""
    ours_knobs, model_class, config_class, theirs_knobs = FAMILIES[family]
    torch.manual_seed(0)
    theirs = model_class(config_class(**THEIRS | theirs_knobs)).eval()
    for name, p in theirs.named_parameters():
        nn.init.normal_(p, mean=float("norm" in name and family != "gemma"), std=0.2)
    ours = Transformer(ModelConfig(**OURS | ours_knobs)).eval()
    weights = theirs.state_dict()
    mapped = {name: weights[".".join(translate(name))] for name in ours.state_dict()}
    ours.load_state_dict(mapped)
    unused = set(weights) - {".".join(translate(name)) for name in mapped}
    assert unused == ({"lm_head.weight"} if ours.cfg.tie_embeddings else set())
    return ours, theirs


def translate(name: str) -> list[str]:
    """Our parameter name in theirs, in parts."""
    parts = [NAMES.get(part, part) for part in name.split(".")]
    return ["model.norm", *parts[1:]] if parts[0] == "norm" else parts


def tokens(length: int) -> Tensor:
    return torch.randint(3, VOCAB, (2, length), generator=torch.Generator().manual_seed(1))


def logits(model: Transformer, ids: Tensor, positions: Tensor, cache: Cache | None = None) -> Tensor:
    ctx = Context(rope=rope_tables(positions, model.cfg), cache=cache)
    return model.unembed(model.run(model.embed(ids), ctx))


@by_family
@pytest.mark.parametrize("length", [9, 90])
def test_logits(family: str, length: int) -> None:
    ours, theirs = pair(family)
    ids = tokens(length)
    positions = torch.arange(length).expand(2, -1)
    with torch.no_grad():
        want = theirs(input_ids=ids, use_cache=False).logits
        got = logits(ours, ids, positions)
    assert got.shape == (2, length, VOCAB)
    assert got.dtype == torch.float32
    assert want.std() > 0.5
    assert (got - want).abs().max() < 1e-4


@by_family
def test_logits_one_token_at_a_time(family: str) -> None:
    ours, theirs = pair(family)
    ids = tokens(12)
    cache, got = Cache(), []
    with torch.no_grad():
        want = theirs(input_ids=ids, use_cache=False).logits
        for first, last in [(0, 5), (5, 6), (6, 9), (9, 10), (10, 11), (11, 12)]:
            got.append(logits(ours, ids[:, first:last], torch.arange(first, last).expand(2, -1), cache))
    assert (torch.cat(got, dim=1) - want).abs().max() < 1e-4


@by_family
def test_gradients(family: str) -> None:
    ours, theirs = pair(family)
    ids = tokens(9)
    score = torch.randn(2, 9, VOCAB, generator=torch.Generator().manual_seed(2))
    (theirs(input_ids=ids, use_cache=False).logits * score).sum().backward()
    (logits(ours, ids, torch.arange(9).expand(2, -1)) * score).sum().backward()
    want = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        grad = want[".".join(translate(name))]
        assert p.grad is not None
        assert (p.grad - grad).abs().max() < 1e-4 * grad.abs().max() + 1e-4, name


def test_the_scalings_change_something() -> None:
    """Otherwise the comparisons above would pass with a model that does not scale."""
    positions = torch.arange(90)[None]
    plain = rope_tables(positions, ModelConfig(**OURS))
    for family in ("llama 3.1", "linear scaling"):
        scaled = rope_tables(positions, ModelConfig(**OURS | FAMILIES[family][0]))
        assert (scaled[0] - plain[0]).abs().max() > 0.5


GPT2 = {"wte": "token_embedding", "wpe": "position_embedding", "ln_f": "norm", "ln_1": "attention_norm", "ln_2": "mlp_norm"}
GPT2 |= {"attn.c_proj": "attention.o_proj", "mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj", "h": "layers"}


@torch.no_grad()
@pytest.mark.parametrize(("activation", "theirs_name"), [("gelu", "gelu_new"), ("gelu_exact", "gelu"), ("quick_gelu", "quick_gelu")])
def test_gpt2(activation: str, theirs_name: str) -> None:
    """Learned positions, biases everywhere, a feed-forward that is not gated; at once and one token at a time."""
    config = hf.GPT2Config(n_embd=48, n_layer=2, n_head=4, n_inner=80, vocab_size=VOCAB, n_positions=16, activation_function=theirs_name)
    theirs: Any = hf.GPT2LMHeadModel(config).eval()
    for name, p in theirs.named_parameters():
        nn.init.normal_(p, mean=float("ln_" in name and "weight" in name), std=0.2)
    knobs: dict[str, Any] = {"activation": activation, "positions": "learned", "bias": True, "max_seq_len": 16}
    ours = Transformer(ModelConfig(**OURS | knobs, norm="layer_norm", norm_eps=1e-5)).eval()
    weights: dict[str, Tensor] = {}
    for name, value in theirs.transformer.state_dict().items():
        value = value.T if name.endswith("weight") and "c_" in name else value
        for old, new in GPT2.items():
            name = f".{name}".replace(f".{old}.", f".{new}.").removeprefix(".")
        if "c_attn" in name:
            weights |= {name.replace("attn.c_attn", f"attention.{part}_proj"): row for part, row in zip("qkv", value.chunk(3), strict=True)}
        else:
            weights[name] = value
    ours.load_state_dict(weights)
    ids, cache = tokens(12), Cache()
    want = theirs(input_ids=ids, use_cache=False).logits
    assert (logits(ours, ids, torch.arange(12).expand(2, -1)) - want).abs().max() < 1e-4 < want.std()
    steps = [(0, 5), (5, 6), (6, 11), (11, 12)]
    got = [logits(ours, ids[:, first:last], torch.arange(first, last).expand(2, -1), cache) for first, last in steps]
    assert (torch.cat(got, dim=1) - want).abs().max() < 1e-4
    with pytest.raises(ValueError, match="rope_theta = 100.0: only positions = 'rope' reads it"):
        ModelConfig(positions="learned", rope_theta=100.0)
