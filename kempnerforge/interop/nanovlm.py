"""nanoVLM's checkpoints (``config.json`` of its ``VLMConfig``, one safetensors file) as data: names and settings."""

from __future__ import annotations

import re
from typing import Any

from kempnerforge.config.adapter import PixelShuffleConfig
from kempnerforge.config.errors import InputError
from kempnerforge.config.job import JobConfig
from kempnerforge.config.model import ModelConfig
from kempnerforge.config.template import TurnsConfig
from kempnerforge.config.vision import ViTConfig
from kempnerforge.config.vlm import VLMConfig

DATA: dict[str, Any] = {
    "template": "turns",
    "turns": TurnsConfig(
        user="<|im_start|>user\n<image>{prompt}<|im_end|>\n",
        assistant="<|im_start|>assistant\n",
        end="<|im_end|>",
        separator="\n",
        bos=False,
    ),
}
"""Keys of ``[data]``: its chat template, with one image in front of the prompt."""

NAMES = {
    "transformer.token_embedding.": "decoder.token_embedding.",
    "transformer.norm.": "decoder.norm.",
    "transformer.output_head.": "decoder.head.",
    "vision_encoder.patch_embedding.": "vision_encoder.patch_embedding.conv.",
    "vision_encoder.position_embedding": "vision_encoder.patch_embedding.position_embedding",
    "vision_encoder.norm.": "vision_encoder.layer_norm.",
    "adapter.proj.": "MP.proj.",
}
"""Beginnings of names outside the layers, ours -> theirs."""

TEXT_LAYER = {"attention_norm": "norm1", "mlp_norm": "norm2", "attention.o_proj": "attn.out_proj", "attention": "attn", "mlp": "mlp"}
VISION_LAYER = {"norm1": "ln1", "norm2": "ln2", "attention.out_proj": "attn.out_proj", "mlp": "mlp"}
"""Parts of a layer, ours -> theirs. Of two that fit the first counts."""

QKV = {"attention.q_proj": 0, "attention.k_proj": 1, "attention.v_proj": 2}
"""Third of the rows of the vision layers' ``attn.qkv_proj``."""

HEAD = "decoder.head.weight"
KEYS = ("vit_hidden_dim", "lm_hidden_dim", "mp_pixel_shuffle_factor")
SPARE = re.compile(r"decoder\.(head\.weight|rotary_embd\.(inv_freq|cos_cached|sin_cached))$")


def is_one(config: dict[str, Any]) -> bool:
    """Whether this ``config.json`` is nanoVLM's."""
    return all(key in config for key in KEYS)


def is_spare(name: str) -> bool:
    """Whether a tensor says nothing that others do not: the tied head, tables of angles."""
    return bool(SPARE.search(name))


def job_of(config: dict[str, Any]) -> JobConfig:
    """The sections that make the model. Its images have RGB in [0, 1], without further normalisation.

    Raises:
        ValueError: a setting that we have not.
    """
    if config.get("vit_cls_flag"):
        raise InputError("vit_cls_flag = true: the CLS token alone stands for an image; only patches are read")
    if not config.get("lm_tie_weights", True):
        raise InputError("lm_tie_weights = false: cannot be read")
    model = ModelConfig(
        dim=config["lm_hidden_dim"],
        n_layers=config["lm_n_blocks"],
        n_heads=config["lm_n_heads"],
        n_kv_heads=config["lm_n_kv_heads"],
        ffn_dim=config["lm_inter_dim"],
        norm_eps=config.get("lm_rms_eps", 1e-5),
        rope_theta=float(config.get("lm_re_base", 100_000)),
        max_seq_len=config.get("lm_max_position_embeddings", 8192),
        vocab_size=config["lm_vocab_size"],
    )
    vision = ViTConfig(
        image_size=config["vit_img_size"],
        patch_size=config["vit_patch_size"],
        dim=config["vit_hidden_dim"],
        n_layers=config["vit_n_blocks"],
        n_heads=config["vit_n_heads"],
        mlp_dim=config["vit_inter_dim"],
        norm_eps=config.get("vit_ln_eps", 1e-6),
        mean=[0.0] * 3,
        std=[1.0] * 3,
    )
    adapter = PixelShuffleConfig(factor=config["mp_pixel_shuffle_factor"], bias=False)
    return JobConfig(model=model, vision_encoder=vision, adapter=adapter, vlm=VLMConfig())


def place(ours: str) -> tuple[str, int, int]:
    """The tensor that holds our parameter, the part of its rows, and how many parts it has."""
    for start, theirs in NAMES.items():
        if ours.startswith(start):
            return theirs + ours.removeprefix(start), 0, 1
    found = re.fullmatch(r"(transformer|vision_encoder)\.layers\.(\d+)\.(.*)", ours)
    assert found is not None, ours
    text = found[1] == "transformer"
    layer, rest = f"{'decoder' if text else found[1]}.blocks.{found[2]}", found[3]
    for part, number in QKV.items():
        if not text and rest.startswith(part):
            return f"{layer}.attn.qkv_proj{rest.removeprefix(part)}", number, 3
    parts = TEXT_LAYER if text else VISION_LAYER
    part = next(part for part in parts if rest.startswith(part + "."))
    return f"{layer}.{parts[part]}{rest.removeprefix(part)}", 0, 1
