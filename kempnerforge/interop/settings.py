"""Whether a model that was trained elsewhere computes what ``[model]`` says: shapes do not show a wrong ``rope_theta`` or norm."""

from __future__ import annotations

import math
from typing import Any

from kempnerforge.config.model import ModelConfig, RopeScaling
from kempnerforge.interop.names import ACTIVATIONS, FAMILIES, SETTINGS, SWITCHES


def facts(cfg: ModelConfig) -> dict[str, Any]:
    """What decides how the backbone computes, by key of ``[model]``, with zeros resolved. Vocabulary and head are left to the tensors."""
    resolved: dict[str, Any] = {"n_kv_heads": cfg.kv_heads, "head_dim": cfg.head_width, "ffn_dim": cfg.ffn_width}
    resolved["attention_scale"] = cfg.attention_scale or cfg.head_width**-0.5
    plain = ("dim", "n_layers", "n_heads", "activation", "norm_eps", "rope_theta", "rope_scaling", "attention_softcap", "logit_softcap")
    return {key: getattr(cfg, key) for key in (*plain, *SWITCHES)} | resolved


def hf_facts(config: dict[str, Any]) -> dict[str, Any]:
    """The same of a ``config.json`` (the text part of it), as far as it says so.

    Raises:
        ValueError: a model, activation or position scaling that the backbone does not have.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"model_type = {family!r}: text weights are read from {', '.join(sorted(FAMILIES))}")
    found: dict[str, Any] = {ours: config[theirs] for ours, theirs in SETTINGS.items() if config.get(theirs) is not None}
    if "head_dim" not in found and {"dim", "n_heads"} <= found.keys():
        found["head_dim"] = found["dim"] // found["n_heads"]
    found |= dict.fromkeys(SWITCHES, False) | {"attention_softcap": 0.0, "logit_softcap": 0.0} | FAMILIES[family]
    found["qkv_bias"] |= bool(config.get("attention_bias"))
    if (activation := _activation(family, config)) is not None:
        found["activation"] = activation
    rope = config.get("rope_parameters") or {}
    if (theta := rope.get("rope_theta", config.get("rope_theta"))) is not None:
        found["rope_theta"] = theta
    found["rope_scaling"] = _rope_scaling(config.get("rope_scaling") or rope)
    return found


def _activation(family: str, config: dict[str, Any]) -> str | None:
    """Gemma's tanh GELU is called "gelu" in older files."""
    name = config.get("hidden_activation") or config.get("hidden_act")
    if name is None or (family == "gemma" and name == "gelu"):
        return "geglu" if family == "gemma" else None
    if name not in ACTIVATIONS:
        raise ValueError(f"hidden_act = {name!r}: the backbone has {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]


def _rope_scaling(rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", float(rope["factor"]))
    if kind == "llama3":
        length = int(rope["original_max_position_embeddings"])
        return RopeScaling("llama3", float(rope["factor"]), float(rope["low_freq_factor"]), float(rope["high_freq_factor"]), length)
    raise ValueError(f"rope_type = {kind!r}: the backbone has 'default', 'linear' and 'llama3'")


def check_window(config: dict[str, Any], cfg: ModelConfig) -> None:
    """Refuses streams that are longer than the window of a model whose tokens see the last ones alone.

    Raises:
        ValueError: ``model.max_seq_len`` is longer.
    """
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if window and cfg.max_seq_len > window:
        raise ValueError(
            f"sliding_window = {window}: the model was trained to see no further, set model.max_seq_len = {cfg.max_seq_len} to it"
        )


def check_facts(cfg: ModelConfig, theirs: dict[str, Any], names: dict[str, str]) -> None:
    """Compares ``[model]`` with what another model's config says.

    Args:
        names: our key -> what that config calls it.

    Raises:
        ValueError: naming every key that differs, with both values.
    """
    ours = facts(cfg)
    lines = [
        f"{names.get(key, key)} = {value!r} there, model.{key} = {ours[key]!r} here"
        for key, value in theirs.items()
        if key in ours and not _same(ours[key], value)
    ]
    if lines:
        raise ValueError("another model than [model] describes: " + "; ".join(lines))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, int | float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=1e-6)
    return a == b
