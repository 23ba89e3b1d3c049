"""Names and settings of the language models of transformers that the text backbone can be, as data. Nothing here reads a file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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

FOUR_NORMS = LAYER | {
    "attention.post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp.post_norm": "post_feedforward_layernorm",
}
"""``LAYER`` where a layer has a norm after each half, too. Of two names that fit the longer one counts."""


@dataclass(frozen=True)
class Family:
    """One kind of language model in transformers.

    Attributes:
        architecture: its class there.
        on: the ``[model]`` switches that it has on; ``SWITCHES`` it does not name are off.
        layer: names inside a layer, ours -> theirs.
        activation_key: the key of ``config.json`` that names the activation.
        activations: ``model.activation`` -> value of that key.
        settings: ``[model]`` key -> key of ``config.json``, for what other families do not have.
        window_pattern: ``model.window_pattern`` of the layers that slide where ``layer_types`` does not say; empty: the class has no windows.
        constants: further keys of ``config.json``; they say that something which the class could do is off.
        also: further keys that it follows; see ``interop.keys``.
    """

    architecture: str
    on: frozenset[str] = frozenset()
    layer: Mapping[str, str] = field(default_factory=lambda: LAYER)
    activation_key: str = "hidden_act"
    activations: Mapping[str, str] = field(default_factory=lambda: {"swiglu": "silu", "geglu": "gelu_pytorch_tanh"})
    settings: Mapping[str, str] = field(default_factory=dict)
    window_pattern: str = ""
    constants: Mapping[str, Any] = field(default_factory=dict)
    also: tuple[str, ...] = ()


_GEMMA = frozenset({"norm_plus_one", "embed_scale"})
_SCALE = {"attention_scale": "query_pre_attn_scalar"}
_CAP = {"logit_softcap": "final_logit_softcapping"}
_NO_BIAS = {"attention_bias": False}
_NO_WINDOW = {"use_sliding_window": False}
_CHOICE = ("layer_types", "use_sliding_window")

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", constants=_NO_BIAS | {"mlp_bias": False}),  # Llama 1 to 3, SmolLM, SmolLM2, Vicuna
    "mistral": Family("MistralForCausalLM", window_pattern="S", constants={"sliding_window": None}),
    "qwen2": Family(
        "Qwen2ForCausalLM",  # Qwen2, Qwen2.5
        frozenset({"qkv_bias"}),
        window_pattern="F",
        constants=_NO_WINDOW,
        also=(*_CHOICE, "max_window_layers"),
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        frozenset({"qk_norm"}),
        window_pattern="F",
        constants=_NO_BIAS | _NO_WINDOW,
        also=(*_CHOICE, "max_window_layers"),
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        settings={"nope_interval": "no_rope_layer_interval"},
        window_pattern="F",
        constants=_NO_BIAS | _NO_WINDOW,
        also=(*_CHOICE, "no_rope_layers"),
    ),
    "gemma": Family("GemmaForCausalLM", _GEMMA, constants=_NO_BIAS),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _GEMMA | {"post_norms"},
        FOUR_NORMS,
        "hidden_activation",
        settings=_SCALE | _CAP | {"attention_softcap": "attn_logit_softcapping"},
        window_pattern="SF",
        constants=_NO_BIAS,
        also=("layer_types",),
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _GEMMA | {"post_norms", "qk_norm"},
        FOUR_NORMS,
        "hidden_activation",
        settings=_SCALE | _CAP | {"rope_local_theta": "rope_local_base_freq", "rope_global_interval": "sliding_window_pattern"},
        window_pattern="SSSSSF",
        constants=_NO_BIAS,
        also=("layer_types", "_sliding_window_pattern"),
    ),
}
"""``model_type`` -> family. A model is written as the first that can say all that its ``[model]`` does."""

SWITCHES = ("qkv_bias", "qk_norm", "norm_plus_one", "embed_scale", "post_norms")

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


def hf_name(ours: str, family: str) -> str:
    """``layers.0.attention.q_proj.weight`` -> ``layers.0.self_attn.q_proj.weight``. The head is not among them: its prefix is another."""
    if ours in TOP:
        return TOP[ours]
    layers, index, rest = ours.split(".", 2)
    assert layers == "layers", ours
    parts = FAMILIES[family].layer
    part = max((part for part in parts if rest.startswith(part + ".")), key=len)
    return f"{layers}.{index}.{parts[part]}{rest.removeprefix(part)}"
