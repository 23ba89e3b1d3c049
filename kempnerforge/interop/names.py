"""Names and settings of the language models of transformers that the text backbone can be, as data. Nothing here reads a file."""

from __future__ import annotations

import re

EMBEDDING, NORM, HEAD = "token_embedding.weight", "norm.weight", "output_head.weight"
"""Our names outside the layers; all of ours are relative to ``transformer.``."""

HF_EMBEDDING, HF_HEAD = "embed_tokens.weight", "lm_head.weight"

TOP = {EMBEDDING: HF_EMBEDDING, NORM: NORM}
"""Our name -> theirs, which is relative to the text model ("model." in most files)."""

LAYER = {
    "attention_norm": "input_layernorm",
    "attention": "self_attn",
    "mlp_norm": "post_attention_layernorm",
    "mlp": "mlp",
}
"""Parts of ``layers.{i}``: ours -> theirs. What is inside them (``q_proj.weight``, ``k_norm.weight``, ``gate_proj.weight``) is called the same."""

FAMILIES: dict[str, dict[str, bool]] = {
    "llama": {},  # Llama 1 to 3, SmolLM, SmolLM2, Vicuna
    "mistral": {},
    "qwen2": {"qkv_bias": True},  # Qwen2, Qwen2.5
    "qwen3": {"qk_norm": True},
    "gemma": {"norm_plus_one": True, "embed_scale": True},
}
"""``model_type`` -> the ``[model]`` switches that it has on; ``SWITCHES`` it does not name are off."""

SWITCHES = ("qkv_bias", "qk_norm", "norm_plus_one", "embed_scale")

SETTINGS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
}
"""``[model]`` key -> key of ``config.json`` that means the same."""

ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}
"""``hidden_act`` of a gated feed-forward -> ``model.activation``."""

OTHER_PARTS = re.compile(
    r"(model\.)?(vision_tower|vision_model|vision_encoder|visual|image_newline|multi_modal_projector|mm_projector|connector|projector)(\.|$)"
)
"""Tensors of a vision-language model that are not its text model."""

IGNORED = re.compile(r"rotary_emb\.inv_freq$")
"""Tensors that follow from the settings."""


def hf_name(ours: str) -> str:
    """``layers.0.attention.q_proj.weight`` -> ``layers.0.self_attn.q_proj.weight``. The head is not among them: its prefix is another."""
    if ours in TOP:
        return TOP[ours]
    layers, index, part, rest = ours.split(".", 3)
    assert layers == "layers", ours
    return f"{layers}.{index}.{LAYER[part]}.{rest}"
