"""The keys of a language model's ``config.json``: each is followed, or its class does not read it, or one
value of it can be read.

Keys that are not listed here pass only where they cannot matter: they have the class's default, or do not
occur in the class's own files. ``tests/interop/test_keys.py`` changes every key of every family and compares
logits with the logits of transformers.
"""

from __future__ import annotations

import inspect
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from kempnerforge.interop.families import FAMILIES, SETTINGS
from kempnerforge.util.errors import InputError, show

FOLLOWED = frozenset({"max_position_embeddings", "rope_parameters", "rope_scaling", "rope_theta", "tie_word_embeddings", "vocab_size"})
"""Keys that every family follows, in addition to ``SETTINGS`` and the keys of its entry in ``FAMILIES``."""

BOOKKEEPING = frozenset({
    *("architectures", "auto_map", "bos_token_id", "cache_implementation", "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label"),
    *("initializer_range", "is_decoder", "is_encoder_decoder", "label2id", "model_type", "output_attentions", "output_hidden_states"),
    *("pad_token_id", "pretraining_tp", "problem_type", "return_dict", "tokenizer_class", "torch_dtype", "transformers_version", "use_cache"),
    *("_attn_implementation", "_name_or_path", "attention_dropout", "unk_token_id"),
})  # fmt: skip
"""Facts about a model, its training or its files; none changes a logit. (``attention_dropout`` acts in
training: ``model.dropout`` here.)"""

_OFF = (None, False)
ONLY: dict[str, tuple[Any, ...]] = {
    "is_causal": (None, True),
    "quantization_config": (None,),
    "transformers_weights": (None,),
    "use_bidirectional_attention": _OFF,
}
"""Keys that every class, or its parts, reads -> the values that can be read here."""

_READS = r"\bconfig\.{0}\b|[\"']{0}[\"']"
"""How a class's files name a key that they read."""


def followed_keys(family: str) -> frozenset[str]:
    """Keys that ``[model]`` follows."""
    entry = FAMILIES[family]
    windows = ("sliding_window",) if entry.window_pattern else ()
    return FOLLOWED | set(SETTINGS.values()) | set(entry.settings.values()) | {entry.activation_key, *windows, *entry.also}


def allowed(family: str) -> dict[str, tuple[Any, ...]]:
    """Key -> the values that can be read."""
    return ONLY | dict.fromkeys(FAMILIES[family].off, _OFF)


def check_keys(family: str, config: dict[str, Any]) -> None:
    """
    Raises:
        InputError: naming a key, its value and what is allowed.
    """
    only, known = allowed(family), followed_keys(family) | BOOKKEEPING | {*FAMILIES[family].unread}
    for key, value in config.items():
        if key in only and value not in only[key]:
            what = " or ".join("null" if kept is None else str(kept).lower() for kept in only[key])
            raise InputError(f"{key} = {show(value)}: of a {family} only {what} can be read")
        if key in only or key in known or value is None:
            continue
        named = key in class_defaults(family) or re.search(_READS.format(re.escape(key)), _source(family))
        if named and value != class_defaults(family).get(key):
            raise InputError(
                f"{key} = {show(value)}: the class of a {family} reads it, and it has no place here; leave it out if it is off"
            )


@lru_cache
def class_defaults(family: str) -> dict[str, Any]:
    """The config that the class writes of a model with default settings."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[family]().to_dict()


@lru_cache
def _source(family: str) -> str:
    """The class's own files."""
    from transformers import CONFIG_MAPPING

    folder = Path(inspect.getfile(CONFIG_MAPPING[family])).parent
    return "\n".join(
        file.read_text(encoding="utf-8") for pattern in ("modeling_*.py", "configuration_*.py") for file in folder.glob(pattern)
    )
