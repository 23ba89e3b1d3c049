"""What the contract suite tries an arch on, for other tests too, with the archs of ``recipes/`` and a PaliGemma of transformers."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from kempnerforge.config import registry
from kempnerforge.config.plugins import load_plugins
from kempnerforge.contract.cases import *  # noqa: F403
from kempnerforge.contract.cases import FOREIGN, KEYS, MODEL, PLUGINS, SIZE, Plugin, tokenizer
from tests.dist import ROOT

load_plugins(sorted(str(path) for path in ROOT.glob("recipes/*/*.py")), ROOT, "recipes")
registry.archs.import_all()


@cache
def a_folder() -> tempfile.TemporaryDirectory[str]:
    """Lives as long as the process."""
    return tempfile.TemporaryDirectory()


@cache
def paligemma() -> dict[str, Any]:
    """Keys of ``[vlm]`` for a PaliGemma of transformers, its config alone. All of its weights are read, and none is tied."""
    vision = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": SIZE}
    text = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    sizes = {"intermediate_size": 64, "vocab_size": tokenizer(*MODEL.new_tokens).vocab_size, "max_position_embeddings": MODEL.max_seq_len}
    config = {
        "model_type": "paligemma",
        "vision_config": {"model_type": "siglip_vision_model", "patch_size": 8, "vision_use_head": False, **vision},  # 4 tokens
        "text_config": {"model_type": "gemma", "pad_token_id": None, "tie_word_embeddings": False, **text, **sizes},
        "projection_dim": 32,
        "tie_word_embeddings": False,
    }
    path = Path(a_folder().name, "paligemma")
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return {"path": str(path), "pretrained": False}


FOREIGN["hf"] = paligemma
KEYS["dual_encoder"] = {"caption_weight": 1.0, "embed_dim": 24}
PLUGINS.append(Plugin(__name__))
