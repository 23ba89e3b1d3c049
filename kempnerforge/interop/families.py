"""The families of language models of transformers that the text backbone can be: one entry of ``FAMILIES``
each. Nothing here reads a file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

EMBEDDING, NORM, HEAD = "token_embedding.weight", "norm.weight", "output_head.weight"
"""Our names outside the layers; all of ours are relative to ``transformer.``."""

HF_EMBEDDING, HF_HEAD = "embed_tokens.weight", "lm_head.weight"

TOP = {EMBEDDING: HF_EMBEDDING, NORM: NORM}
"""Our name -> the one in files, which is relative to the text model ("model." in most files)."""

LAYER = {
    "attention_norm": "input_layernorm",
    "attention": "self_attn",
    "mlp_norm": "post_attention_layernorm",
    "mlp": "mlp",
}
"""Parts of ``layers.{i}``: our name -> the one in files. Names inside the parts (``q_proj.weight``,
``k_norm.weight``) are equal."""

FOUR_NORMS = LAYER | {
    "attention.post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp.post_norm": "post_feedforward_layernorm",
}
"""``LAYER`` where a layer has a norm after each half, too. Of two names that fit the longer one counts."""


@dataclass(frozen=True)
class Family:
    """One kind of language model in transformers: all that is known of it here. ``interop/settings.py`` and
    ``interop/keys.py`` follow the entry.

    Attributes:
        architecture: its class in transformers.
        switches: the ``[model]`` switches that are on; ``SWITCHES`` that are not named are off.
        layer: names inside a layer, ours -> those in the files.
        activation_key: the key of ``config.json`` that names the activation.
        activations: ``model.activation`` -> value of that key.
        default_activation: ``model.activation`` where the key is null; empty: not said.
        settings: ``[model]`` key -> key of ``config.json``, for settings that other families do not have.
            Three of them are converted: ``attention_scale``, ``nope_interval`` (every n-th layer without
            positions), ``rope_local_theta`` (another base in local layers).
        window_pattern: ``model.window_pattern`` of the layers that slide where ``layer_types`` does not say;
            empty: the class has no windows.
        constants: further keys of ``config.json`` that are written: something that the class could do is off.
        also: further keys that are followed.
        off: further keys that must be off.
        unread: keys that its class's files name and that change no logit.
    """

    architecture: str
    switches: frozenset[str] = frozenset()
    layer: Mapping[str, str] = field(default_factory=lambda: LAYER)
    activation_key: str = "hidden_act"
    activations: Mapping[str, str] = field(default_factory=lambda: {"swiglu": "silu", "geglu": "gelu_pytorch_tanh"})
    default_activation: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)
    window_pattern: str = ""
    constants: Mapping[str, Any] = field(default_factory=dict)
    also: tuple[str, ...] = ()
    off: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()


_GEMMA = frozenset({"norm_plus_one", "embed_scale"})
_SCALE = {"attention_scale": "query_pre_attn_scalar"}
_CAP = {"logit_softcap": "final_logit_softcapping"}
_NO_BIAS = {"attention_bias": False}
_NO_WINDOW = {"use_sliding_window": False}
_CHOICE = ("layer_types", "use_sliding_window")

FAMILIES: dict[str, Family] = {
    "llama": Family(  # Llama 1 to 3, SmolLM, SmolLM2, Vicuna
        "LlamaForCausalLM",
        constants=_NO_BIAS | {"mlp_bias": False},
        off=("attention_bias", "mlp_bias"),
    ),
    "mistral": Family(
        "MistralForCausalLM",
        window_pattern="S",  # in all layers; ``layer_types`` is not read for it
        constants={"sliding_window": None},
        unread=("layer_types",),
    ),
    "qwen2": Family(  # Qwen2, Qwen2.5
        "Qwen2ForCausalLM",
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
        off=("attention_bias",),
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        settings={"nope_interval": "no_rope_layer_interval"},
        window_pattern="F",
        constants=_NO_BIAS | _NO_WINDOW,
        also=(*_CHOICE, "no_rope_layers"),
        off=("attention_bias", "mlp_bias"),
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        _GEMMA,
        default_activation="geglu",
        constants=_NO_BIAS,
        off=("attention_bias",),
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _GEMMA | {"post_norms"},
        FOUR_NORMS,
        "hidden_activation",
        default_activation="geglu",
        settings=_SCALE | _CAP | {"attention_softcap": "attn_logit_softcapping"},
        window_pattern="SF",
        constants=_NO_BIAS,
        also=("layer_types",),
        off=("attention_bias",),
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _GEMMA | {"post_norms", "qk_norm"},
        FOUR_NORMS,
        "hidden_activation",
        default_activation="geglu",
        settings=_SCALE | _CAP | {"rope_local_theta": "rope_local_base_freq", "rope_global_interval": "sliding_window_pattern"},
        window_pattern="SSSSSF",
        constants=_NO_BIAS,
        also=("layer_types", "_sliding_window_pattern"),
        off=("attention_bias", "attn_logit_softcapping"),  # its class takes the second and does not apply it
    ),
}
"""``model_type`` -> family. A model is written as the first that can say all that its ``[model]`` does."""

SWITCHES = ("qkv_bias", "qk_norm", "norm_plus_one", "embed_scale", "embed_norm", "post_norms")

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


def hf_name(name: str, family: str) -> str:
    """``layers.0.attention.q_proj.weight`` -> ``layers.0.self_attn.q_proj.weight``. The head has another
    prefix: see ``text_names``.
    """
    if name in TOP:
        return TOP[name]
    layers, index, rest = name.split(".", 2)
    assert layers == "layers", name
    parts = FAMILIES[family].layer
    part = max((part for part in parts if rest.startswith(part + ".")), key=len)
    return f"{layers}.{index}.{parts[part]}{rest.removeprefix(part)}"


def text_names(names: Iterable[str], family: str, prefix: str = "model.", head: str = HF_HEAD) -> dict[str, str]:
    """Our parameter name -> the one in the files, of a backbone without new tokens.

    Args:
        names: ours, ``transformer.*``.
        prefix: of the text model in the files.
        head: the full name of the output head there.
    """
    bare = {name: name.removeprefix("transformer.") for name in names}
    return {name: head if rest == HEAD else prefix + hf_name(rest, family) for name, rest in bare.items()}
