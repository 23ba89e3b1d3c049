"""Tiny random models of transformers, saved as it saves them, and the ``[model]`` that each of them is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from kempnerforge.config import ModelConfig, RopeScaling
from kempnerforge.model.attention import Segments
from kempnerforge.model.rope import rope_tables
from kempnerforge.model.transformer import Cache, Context, Transformer

VOCAB = 97
OURS: dict[str, Any] = {
    "dim": 48,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "ffn_dim": 80,
    "vocab_size": VOCAB,
    "max_seq_len": 64,
    "tie_embeddings": False,
}
THEIRS: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def rope(theta: float = 1e4, kind: str = "default", **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

GEMMA: dict[str, Any] = {"norm_plus_one": True, "embed_scale": True, "activation": "geglu", "head_dim": 16, "tie_embeddings": True}

# name -> (class in transformers, our knobs, theirs)
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("Llama", {"rope_theta": 5e5, "norm_eps": 1e-5}, {"rms_norm_eps": 1e-5, **rope(5e5)}),
    "llama 3.1": (
        "Llama",
        {"rope_scaling": RopeScaling("llama3", **LLAMA3, original_max_seq_len=32)},
        rope(kind="llama3", **LLAMA3, original_max_position_embeddings=32),
    ),
    "linear scaling": ("Llama", {"rope_scaling": RopeScaling("linear", 4.0)}, rope(kind="linear", factor=4.0)),
    "smollm2": ("Llama", {"rope_theta": 1e5, "tie_embeddings": True}, {"tie_word_embeddings": True, **rope(1e5)}),
    "mistral": ("Mistral", {"sliding_window": 8}, {"sliding_window": 8, "head_dim": 12}),
    "qwen2": ("Qwen2", {"qkv_bias": True, "tie_embeddings": True, "rope_theta": 1e6}, {"tie_word_embeddings": True, **rope(1e6)}),
    "qwen2 with windows": (
        "Qwen2",
        {"qkv_bias": True, "rope_theta": 1e6, "n_layers": 3, "sliding_window": 8, "window_pattern": "FSS"},
        {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, **rope(1e6)},
    ),
    "qwen3": ("Qwen3", {"qk_norm": True, "head_dim": 20, "rope_theta": 1e6}, {"head_dim": 20, **rope(1e6)}),
    "gemma": (
        "Gemma",
        GEMMA | {"n_kv_heads": 1},
        {"head_dim": 16, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "gemma2": (
        "Gemma2",
        GEMMA
        | {"post_norms": True, "attention_softcap": 5.0, "logit_softcap": 3.0, "attention_scale": 20**-0.5}
        | {"sliding_window": 8, "window_pattern": "SF"},
        {"head_dim": 16, "tie_word_embeddings": True, "query_pre_attn_scalar": 20, "sliding_window": 8}
        | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": (
        "Gemma3",
        GEMMA
        | {"post_norms": True, "qk_norm": True, "attention_scale": 20**-0.5, "n_layers": 4}
        | {"rope_theta": 1e6, "rope_scaling": RopeScaling("linear", 8.0), "rope_local_theta": 1e4, "rope_global_interval": 3}
        | {"sliding_window": 8, "window_pattern": "SSF"},
        {"head_dim": 16, "tie_word_embeddings": True, "query_pre_attn_scalar": 20, "sliding_window": 8, "num_hidden_layers": 4}
        | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]}
        | {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            }
        },
    ),
    "smollm3": (
        "SmolLM3",
        {"n_layers": 4, "nope_interval": 3, "rope_theta": 2e6, "tie_embeddings": True},
        {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 0, 1], "tie_word_embeddings": True, **rope(2e6)},
    ),
    "smollm3 with windows": (
        "SmolLM3",
        {"n_layers": 4, "nope_interval": 3, "rope_theta": 2e6, "sliding_window": 8, "window_pattern": "FFS"},
        {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 0, 1], "use_sliding_window": True, "sliding_window": 8, **rope(2e6)},
    ),
}


def config_of(family: str, **knobs: Any) -> ModelConfig:
    """Our ``[model]`` for ``family``."""
    return ModelConfig(**OURS | FAMILIES[family][1] | knobs)


def logits(model: Transformer, ids: Tensor, start: int = 0, cache: Cache | None = None) -> Tensor:
    """(B, S, V) of texts, or of what follows the first ``start`` tokens of them, which are in ``cache``."""
    positions, one = start + torch.arange(ids.shape[1]).expand_as(ids), torch.zeros_like(ids)
    segments = Segments(one, one, has_documents=False, positions=positions, windows=model.cfg.windows)
    if cache is not None:
        segments = cache.segments = segments if cache.segments is None else cache.segments.extend(segments)
    ctx = Context(rope_tables(positions, model.cfg), segments.mask(ids.shape[1], torch.float32), cache)
    return model.unembed(model.run(model.embed(ids), ctx))


def save(family: str, path: Path, shard_size: str = "1GB", dtype: torch.dtype = torch.float32) -> Any:
    """Writes a random model of ``family`` to ``path``; every tensor of it is away from its usual start."""
    name, _, knobs = FAMILIES[family]
    config = getattr(hf, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")
    model = getattr(hf, f"{name}ForCausalLM")(config(**THEIRS | knobs)).to(dtype).eval()
    draws = torch.Generator().manual_seed(0)
    for key, p in model.named_parameters():
        nn.init.normal_(p, mean=float("norm" in key and "Gemma" not in name), std=0.1, generator=draws)
    model.save_pretrained(path, max_shard_size=shard_size)
    return model


def backbone(weights: dict[str, Tensor], cfg: ModelConfig) -> Transformer:
    model = Transformer(cfg)
    model.load_state_dict({name.removeprefix("transformer."): value for name, value in weights.items()})
    return model.eval()
