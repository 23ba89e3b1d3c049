"""Every key of every family's ``config.json``, changed: we follow it, transformers does not read it, or it is refused by name."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers.initialization import no_init_weights

from kempnerforge.interop.external import backbone_parameters
from kempnerforge.interop.families import FAMILIES, text_names
from kempnerforge.interop.keys import BOOKKEEPING, _source, allowed, class_defaults, followed_keys
from kempnerforge.interop.settings import complete, model_config
from kempnerforge.model.transformer import Transformer
from kempnerforge.util.errors import InputError
from tests.dist import ROOT
from tests.interop.families import THEIRS, logits
from tests.params import quick

LAYERS = 3
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
BASE: dict[str, Any] = THEIRS | {"num_hidden_layers": LAYERS, "head_dim": 12, "tie_word_embeddings": True}
WINDOWS: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 16, "layer_types": KINDS}
MORE: dict[str, dict[str, Any]] = {
    "smollm3": {"no_rope_layer_interval": 3},
    "gemma2": {"query_pre_attn_scalar": 24},
    "gemma3_text": {"query_pre_attn_scalar": 24},
}
VALUES: dict[str, list[Any]] = {
    "hidden_act": ["gelu", "gelu_pytorch_tanh", "relu"],
    "hidden_activation": ["silu", "gelu"],
    "layer_types": [KINDS, ["full_attention", *KINDS[:2]], ["sliding_attention"] * LAYERS, ["chunked_attention"] * LAYERS],
    "sliding_window": [8, 40, None],
    "use_sliding_window": [False],
    "no_rope_layers": [[1, 0, 1], [1, 1, 1], [0, 1, 1], [1, 0, 1, 0]],
    "rope_parameters": [
        {"rope_type": "default", "rope_theta": 77.0},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0, "partial_rotary_factor": 0.5},
        {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 16},
        {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
        {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in (("full_attention", 1e3), ("sliding_attention", 55.0))},
        {kind: {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0} for kind in ("full_attention", "sliding_attention")},
    ],
    "rope_scaling": [{"type": "linear", "factor": 4.0}, {"rope_type": "yarn", "factor": 2.0}],
    "rope_theta": [77.0],
    "rope_local_base_freq": [77.0],
    "partial_rotary_factor": [0.5],
    "head_dim": [8],
    "hidden_size": [64],
    "num_attention_heads": [2, 6],
    "num_key_value_heads": [1, 4],
    "num_hidden_layers": [2],
    "quantization_config": [{"quant_method": "bitsandbytes", "load_in_4bit": True}],
    "sliding_window_pattern": [3],
    "max_position_embeddings": [32, 4096],
}
OWN_TERMS = {"transformers_version", "model_type", "id2label", "label2id", "architectures", "dtype", "torch_dtype", "vocab_size"}
"""Not changed here: names, versions, and what the weights say."""


def keys(family: str) -> list[str]:
    """All that any class reads or writes, and what its own files read without a declaration."""
    read = set(re.findall(r"(?:self\.)?config\.([a-z]\w+)|getattr\((?:self\.)?config, \"(\w+)\"", _source(family)))
    named = {name for pair in read for name in pair if name}
    every = {*class_defaults(family), *named, *VALUES, "is_causal", "mlp_bias", "attention_multiplier"} - OWN_TERMS
    return sorted(every if family == "llama" else every - hf.PretrainedConfig().to_dict().keys())


def changed(value: Any) -> list[Any]:
    if isinstance(value, bool) or value is None:
        return [True, 3.0]
    if isinstance(value, int | float):
        return [value + 1]
    return [True]


@torch.no_grad()
def filled(model: Any) -> Any:
    draws = torch.Generator().manual_seed(0)
    for name, p in sorted(model.named_parameters()):
        p.copy_(torch.randn(p.shape, generator=draws) * 0.2 + float("norm" in name))
    return model.eval()


def ids() -> Tensor:
    return torch.randint(3, 90, (1, 48), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def theirs(family: str, config: dict[str, Any]) -> tuple[Any, Tensor]:
    with no_init_weights():
        made = getattr(hf, FAMILIES[family].architecture)(hf.AutoConfig.for_model(family, **config))
    made.tie_weights()
    return filled(made), made(input_ids=ids(), use_cache=False).logits


@torch.no_grad()
def ours(family: str, config: dict[str, Any], source: Any, made: dict[str, Tensor]) -> Tensor:
    """NOTE: weights follow from names and shapes, so one ``[model]`` has one answer, kept in ``made``."""
    cfg = model_config(complete(config | {"model_type": family}), THEIRS["vocab_size"])
    if (key := repr(cfg)) not in made:
        model, state = Transformer(cfg).eval(), source.state_dict()
        names = text_names(backbone_parameters(cfg), family)
        model.load_state_dict({name.removeprefix("transformer."): state[there] for name, there in names.items()})
        made[key] = logits(model, ids())
    return made[key]


@lru_cache
def plain(family: str) -> tuple[Any, Tensor]:
    return theirs(family, BASE | WINDOWS | MORE.get(family, {}))


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("family", quick(FAMILIES, *list(FAMILIES)[::3]))
def test_every_key_is_followed_or_inert_or_refused(family: str) -> None:
    base = BASE | WINDOWS | MORE.get(family, {})
    made: dict[str, Tensor] = {}
    assert apart(ours(family, base, plain(family)[0], made), plain(family)[1]) < 1e-4
    moved, wrong = set(), []
    for key in keys(family):
        for value in VALUES.get(key) or changed(class_defaults(family).get(key)):
            config = base | {key: value}
            try:
                model, want = theirs(family, config)
            except Exception:  # no such model there
                continue
            difference = apart(want, plain(family)[1]) if want.shape == plain(family)[1].shape else 1.0
            if difference > 1e-4:
                moved.add(key)
                if key not in followed_keys(family) | allowed(family).keys():
                    wrong.append(f"{key} = {value}: is not in the table, and logits move by {difference:.2g}")
            try:
                found = ours(family, config, model, made)
            except InputError as error:
                if not any(word in str(error) for word in (key, "rope_type", "partial_rotary_factor", "layer")):
                    wrong.append(f"{key} = {value}: refused, but not by name: {error}")
                continue
            if (there := apart(found, want)) > 1e-4:
                wrong.append(f"{key} = {value}: {there:.2g} apart")
    assert not wrong, "\n".join(wrong)
    assert {"hidden_size", "rms_norm_eps", "rope_parameters", "num_key_value_heads"} <= moved


def test_an_unknown_key_that_the_class_reads_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later version of transformers may read more than is sorted here."""
    monkeypatch.setattr("kempnerforge.interop.keys._source", lambda family: "self.scale = config.residual_multiplier")
    config = complete(BASE | {"model_type": "llama"})
    with pytest.raises(InputError, match=r"residual_multiplier = 0\.5: the class of a llama reads it"):
        model_config(config | {"residual_multiplier": 0.5}, 97)
    model_config(config | {"something_else": 0.5}, 97)


def _item(head: str, keys: Iterable[str], only: Mapping[str, tuple[Any, ...]]) -> str:
    """A list item: ``keys``, then those of which one value can be read, with their values."""
    values = [f"`{key}` ({' or '.join('null' if v is None else str(v).lower() for v in only[key])})" for key in sorted(only)]
    text = f"* {head}: {', '.join([*(f'`{key}`' for key in sorted(keys)), *values]) or 'nothing more'}"
    return textwrap.fill(text, 110, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _lists() -> str:
    """What is made of the keys of each family's class, in Markdown."""
    families = list(FAMILIES)
    keys = {family: {*class_defaults(family), *BOOKKEEPING} for family in families}
    kept = {family: keys[family] & followed_keys(family) for family in families}
    rest = {family: frozenset(keys[family] - followed_keys(family) - allowed(family).keys()) for family in families}
    assert len(set(rest.values())) == 1, "what no class reads is one list"
    both = set.intersection(*kept.values())
    only = {key: values for key, values in allowed(families[0]).items() if all(key in allowed(family) for family in families)}
    lines = [_item("followed", both, {}), _item("one value can be read", (), only), _item("not read by the class", rest[families[0]], {})]
    for family in families:
        more = {key: values for key, values in allowed(family).items() if key not in only}
        lines.append(_item(family, kept[family] - both, more))
    return "\n".join([*lines[:3], "", "Besides, by family:", "", *lines[3:]]) + "\n"


def test_the_page_has_the_lists() -> None:
    page = (ROOT / "docs" / "weights.md").read_text(encoding="utf-8")
    assert _lists() in page, f"docs/weights.md: put these lists in the place of those that are there:\n{_lists()}"
