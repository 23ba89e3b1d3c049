"""``[model]`` from a ``config.json``, and the reverse: shapes do not show a wrong ``rope_theta`` or norm."""

from __future__ import annotations

import math
from typing import Any

from kempnerforge.config.model import ModelConfig, RopeScaling
from kempnerforge.interop.families import ACTIVATIONS, FAMILIES, SETTINGS, SWITCHES, Family
from kempnerforge.interop.keys import check_keys, followed_keys
from kempnerforge.model.hf_checks import class_call
from kempnerforge.util.errors import InputError, cut, show

PLAIN = (
    *("dim", "n_layers", "n_heads", "activation", "norm_eps", "rope_theta", "rope_scaling", "rope_local_theta", "nope_interval"),
    *("attention_softcap", "logit_softcap", "norm", "bias", "positions"),
)

ABSENT = {"rope_local_theta": 0.0, "rope_global_interval": 0, "nope_interval": 0, "attention_softcap": 0.0, "logit_softcap": 0.0,
          "norm": "rms_norm", "bias": False, "positions": "rope"}  # fmt: skip
"""``[model]`` key -> its value in families without such a setting."""


def complete(config: dict[str, Any]) -> dict[str, Any]:
    """``config.json`` with every setting written: files leave out defaults of the class. The config of an
    unknown model is not changed.

    Raises:
        ValueError: the class does not take it.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    if config.get("model_type") not in CONFIG_MAPPING:
        return config
    given = {key: value for key, value in config.items() if key != "transformers_version"}
    with class_call(config["model_type"], "transformers does not take this config", given):
        return AutoConfig.for_model(**given).to_dict()


def facts(cfg: ModelConfig) -> dict[str, Any]:
    """The settings that decide what the backbone computes, by key of ``[model]``, with zeros resolved. The
    tensors decide vocabulary and head.
    """
    resolved: dict[str, Any] = {"n_kv_heads": cfg.kv_heads, "head_dim": cfg.head_width, "ffn_dim": cfg.ffn_width}
    resolved["attention_scale"] = cfg.attention_scale or cfg.head_width**-0.5
    resolved["rope_global_interval"] = cfg.rope_global_interval if cfg.rope_local_theta else 0
    resolved |= _windows(cfg.sliding_window, "".join("S" if cfg.window(layer) else "F" for layer in range(cfg.n_layers)))
    return {key: getattr(cfg, key) for key in (*PLAIN, *SWITCHES)} | resolved


def _windows(size: int, layers: str) -> dict[str, Any]:
    """``sliding_window``, and the shortest ``window_pattern`` that gives ``layers``."""
    if not size or "S" not in layers:
        return {"sliding_window": 0, "window_pattern": ""}
    patterns = (layers[:length] for length in range(1, len(layers) + 1))
    return {"sliding_window": size, "window_pattern": next(p for p in patterns if (p * len(layers))[: len(layers)] == layers)}


def hf_facts(config: dict[str, Any]) -> dict[str, Any]:
    """``facts`` of a ``config.json`` (of its text part), as far as it states them.

    Raises:
        ValueError: a model, activation, position scaling or other setting that the backbone does not have.
    """
    name = config.get("model_type")
    if name not in FAMILIES:
        raise InputError(f"model_type = {cut(repr(name))}: text weights are read from {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[name]
    check_keys(name, config)
    for key in ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "sliding_window"):
        if key in followed_keys(name) and (value := config.get(key)) is not None and value <= 0:
            raise InputError(f"{key} = {value}: must be more than 0, or null")
    found: dict[str, Any] = {key: config[hf_key] for key, hf_key in SETTINGS.items() if config.get(hf_key) is not None}
    if "head_dim" not in found and {"dim", "n_heads"} <= found.keys():
        found["head_dim"] = found["dim"] // found["n_heads"]
    found |= dict.fromkeys(SWITCHES, False) | dict.fromkeys(family.switches, True)
    found |= ABSENT | {key: config.get(hf_key) or ABSENT.get(key, 0) for key, hf_key in family.settings.items()}
    if "attention_scale" in family.settings:
        found["attention_scale"] = (found["attention_scale"] or 256) ** -0.5  # the default of the classes
    elif "head_dim" in found:
        found["attention_scale"] = found["head_dim"] ** -0.5
    if (activation := _activation(family, config)) is not None:
        found["activation"] = activation
    return found | _rope_facts(family, config) | _window_facts(family, config)


def _window_facts(family: Family, config: dict[str, Any]) -> dict[str, Any]:
    """``sliding_window`` and the shortest ``window_pattern``, by the class's own rule where ``layer_types``
    is not followed.
    """
    if not family.window_pattern:
        return _windows(0, "")
    kinds = config.get("layer_types") if "layer_types" in family.also else None
    size = config.get("sliding_window") or 0
    if other := set(kinds or ()) - {"full_attention", "sliding_attention"}:
        raise InputError(f"layer_types has {sorted(other)[0]!r}: the backbone has 'full_attention' and 'sliding_attention'")
    if not size and "sliding_attention" in (kinds or ()):
        raise InputError("layer_types has 'sliding_attention', and sliding_window = null: its class has no such layers")
    layers = "".join("S" if kind == "sliding_attention" else "F" for kind in kinds) if kinds else family.window_pattern
    return _windows(size, layers)


def _activation(family: Family, config: dict[str, Any]) -> str | None:
    """Files of the first Gemma name its tanh GELU "gelu"."""
    key, default = family.activation_key, family.default_activation
    value = config.get(key)
    if value is None or (default and key == "hidden_act" and value == "gelu"):
        return default or None
    if value not in ACTIVATIONS:
        raise InputError(f"{key} = {value!r}: the backbone has {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[value]


def _rope_facts(family: Family, config: dict[str, Any]) -> dict[str, Any]:
    rope = config.get("rope_parameters") or {}
    found: dict[str, Any] = {}
    if "rope_local_theta" in family.settings:
        found |= _layers_apart(config)
        rope = rope.get("full_attention", rope)
    elif "nope_interval" in family.settings:
        found["nope_interval"] = _without_rope(config)
    if (theta := rope.get("rope_theta", config.get("rope_theta"))) is not None:
        found["rope_theta"] = _number({"rope_theta": theta}, "rope_theta")
    return found | {"rope_scaling": _rope_scaling(config.get("rope_scaling") or rope)}


def _layers_apart(config: dict[str, Any]) -> dict[str, Any]:
    """Which layers are global (every n-th one), and the base of the rotary positions in the others."""
    kinds = config.get("layer_types")
    interval = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
    if kinds:
        interval = kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1
        if kinds != [("sliding_attention", "full_attention")[(layer + 1) % interval == 0] for layer in range(len(kinds))]:
            raise InputError(f"layer_types = {kinds}: the backbone has every n-th layer global, all others local")
    local = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
    if local.get("rope_type", "default") != "default":
        raise InputError(f"rope_type = {local['rope_type']!r} of sliding_attention: the backbone scales global layers alone")
    return {"rope_global_interval": interval, "rope_local_theta": local.get("rope_theta") or config.get("rope_local_base_freq") or 1e4}


def _without_rope(config: dict[str, Any]) -> int:
    """n, if every n-th layer has no rotary positions; 0: all have them."""
    layers, interval = config.get("no_rope_layers"), config.get("no_rope_layer_interval") or 4
    if layers:
        interval = layers.index(0) + 1 if 0 in layers else 0
        if list(layers) != [int(not interval or (layer + 1) % interval != 0) for layer in range(len(layers))]:
            raise InputError(f"no_rope_layers = {layers}: the backbone leaves out the positions of every n-th layer")
    return interval


def _rope_scaling(rope: dict[str, Any]) -> RopeScaling | None:
    if any(isinstance(value, dict) for value in rope.values()):
        raise InputError(f"rope_parameters = {rope}: this class has the same rotary positions in all layers")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if (part := rope.get("partial_rotary_factor")) not in (None, 1):
        raise InputError(f"partial_rotary_factor = {part}: the backbone turns whole heads")
    if kind == "linear":
        return RopeScaling("linear", _number(rope, "factor"))
    if kind == "llama3":
        length = int(_number(rope, "original_max_position_embeddings"))
        factor, low, high = (_number(rope, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
        return RopeScaling("llama3", factor, low, high, length)
    raise InputError(f"rope_type = {cut(repr(kind))}: the backbone has 'default', 'linear' and 'llama3'")


def _number(table: dict[str, Any], key: str) -> float:
    """A setting of rotary positions.

    Raises:
        ValueError: it is not there, or no number above 0.
    """
    value = table.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise InputError(f"{key} = {show(value)}: must be a number above 0")
    return float(value)


# ---- both directions -----------------------------------------------------------------------------


def model_config(config: dict[str, Any], vocab_size: int) -> ModelConfig:
    """``[model]`` of a ``config.json`` (the text part of it) in which every setting is written.

    Raises:
        ValueError: the backbone cannot be that model.
    """
    found, length = hf_facts(config), int(config["max_position_embeddings"])
    if "rope_theta" not in found:
        raise InputError("rope_theta = null: must be a number above 0")
    if not found["rope_local_theta"]:
        del found["rope_global_interval"]
    if not found["sliding_window"]:
        del found["window_pattern"]
    if math.isclose(found["attention_scale"], found["head_dim"] ** -0.5):
        del found["attention_scale"]
    floats: dict[str, Any] = {key: float(found[key]) for key in ("rope_theta", "rope_local_theta", "attention_softcap", "logit_softcap")}
    tied = bool(config.get("tie_word_embeddings", True))
    return ModelConfig(**found | floats, vocab_size=vocab_size, max_seq_len=length, tie_embeddings=tied)


def hf_config(cfg: ModelConfig, family: str | None = None) -> dict[str, Any]:
    """The ``config.json`` of ``cfg``, without what the tokenizer knows, in the form that files on the hub
    have.

    Args:
        family: as what; None takes the first that can say it all.

    Raises:
        ValueError: no family can, or ``family`` cannot.
    """
    if family is not None and family not in FAMILIES:
        raise InputError(f"family {family!r}: allowed are {', '.join(FAMILIES)}")
    if cfg.unwritten_new_tokens:
        raise InputError(f"model.unwritten_new_tokens = {cfg.unwritten_new_tokens}: its head has a row for each token")
    problems = []
    for name in FAMILIES if family is None else [family]:
        try:
            written = _written(cfg, name)
            check_facts(cfg, hf_facts(written), {})
        except InputError as error:
            problems.append(f"{name}: {error}")
        else:
            return written
    reasons = "; ".join(problems) if family else f"not even {problems[0]}"
    raise InputError(f"[model] is no language model of transformers ({reasons})")


def _written(cfg: ModelConfig, name: str) -> dict[str, Any]:
    family, known = FAMILIES[name], facts(cfg)
    if cfg.activation not in family.activations:
        raise InputError(f"model.activation = {cfg.activation!r}: it has {', '.join(family.activations)}")
    config: dict[str, Any] = {hf_key: known[key] for key, hf_key in SETTINGS.items()}
    config |= {hf_key: known[key] or None for key, hf_key in family.settings.items()}
    if "attention_scale" in family.settings:
        config["query_pre_attn_scalar"] = _whole(known["attention_scale"] ** -2)
    if "nope_interval" in family.settings:
        every = cfg.nope_interval
        config["no_rope_layers"] = [int(not every or (layer + 1) % every != 0) for layer in range(cfg.n_layers)]
        config["no_rope_layer_interval"] = every or cfg.n_layers + 1
    config |= {
        "architectures": [family.architecture],
        "model_type": name,
        family.activation_key: family.activations[cfg.activation],
        "vocab_size": cfg.vocab_size + len(cfg.new_tokens),
        "max_position_embeddings": cfg.max_seq_len,
        "tie_word_embeddings": cfg.tie_embeddings,
        "rope_theta": cfg.rope_theta,
        "attention_dropout": 0.0,
    }
    if (scaling := cfg.rope_scaling) is not None:
        config["rope_scaling"] = {"rope_type": scaling.type, "factor": scaling.factor}
        if scaling.type == "llama3":
            config["rope_scaling"] |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_seq_len,
            }
    return config | dict(family.constants) | _written_windows(cfg, family)


def _written_windows(cfg: ModelConfig, family: Family) -> dict[str, Any]:
    """A window is written only if a row can be longer: then the family needs windows, in the same layers."""
    known = facts(cfg)
    if family.window_pattern and _bites(known, cfg):
        kinds = ["sliding_attention" if cfg.window(layer) else "full_attention" for layer in range(cfg.n_layers)]
        chosen = {} if family.window_pattern == "S" else {"layer_types": kinds}
        switch = {"use_sliding_window": True} if "use_sliding_window" in family.constants else {}
        return {"sliding_window": known["sliding_window"]} | chosen | switch
    if "S" in family.window_pattern and "sliding_window" not in family.constants:  # this class always has one
        return {"sliding_window": max(cfg.max_seq_len, known["sliding_window"])}
    return {}


def _bites(facts: dict[str, Any], cfg: ModelConfig) -> bool:
    """Whether a row of ``cfg`` can be longer than the window in ``facts``."""
    return 0 < facts.get("sliding_window", 0) < cfg.max_seq_len


def _whole(value: float) -> float | int:
    """``value``, as an integer where it is one."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-9) else value


def check_facts(cfg: ModelConfig, other: dict[str, Any], names: dict[str, str]) -> None:
    """Compares ``[model]`` with ``facts`` of another model. Windows that no row is longer than are equal.

    Args:
        names: key of ``[model]`` -> its name in the config of that model.

    Raises:
        ValueError: naming every key that differs, with both values.
    """
    known = facts(cfg)
    if not _bites(known, cfg) and not _bites(other, cfg):
        known = {key: value for key, value in known.items() if key not in ("sliding_window", "window_pattern")}
    lines = [
        f"{names.get(key, key)} = {value!r} there, model.{key} = {known[key]!r} here"
        for key, value in other.items()
        if key in known and not _same(known[key], value)
    ]
    if lines:
        raise InputError("another model than [model] describes: " + "; ".join(lines))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, int | float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=1e-6)
    return a == b
