"""Llama 3.2 Vision (``MllamaForConditionalGeneration``; Llama Team 2024, section 7) in both directions: a Llama with gated cross-attention.

In transformers a block of cross-attention is a layer among the others. Ours is before every n-th layer, as a part of it, so the two
count differently: with n = 4 their layers 0 1 2 *3* 4 5 6 7 *8* 9 are our layers 0 1 2, 3 with a block, 4 5 6, 7 with a block.

An image is one tile. What several tiles of one image are to each other has no place in ours, and neither have their aspect ratios.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kempnerforge.config import registry
from kempnerforge.config.adapter import LinearAdapterConfig
from kempnerforge.config.job import JobConfig
from kempnerforge.config.model import ModelConfig
from kempnerforge.config.template import TurnsConfig
from kempnerforge.config.vision import MllamaTowerConfig
from kempnerforge.config.vlm import VLMConfig
from kempnerforge.interop.names import EMBEDDING, HEAD, hf_name
from kempnerforge.interop.settings import complete, hf_config, model_config
from kempnerforge.interop.vlms import BOOKKEEPING, FileLayout, VLMSections, scalars
from kempnerforge.model.mllama import MllamaTower, grids
from kempnerforge.util.errors import InputError

KIND, ARCHITECTURE, FAMILY = "mllama", "MllamaForConditionalGeneration", "llama"
SPARE = 8
"""Its embedding has so many rows more than its head; the first of them is the image token's."""

LAYOUTS = (
    FileLayout("vision_model.", "multi_modal_projector.", "language_model.model.", "language_model.lm_head.weight"),
    FileLayout("model.vision_model.", "model.multi_modal_projector.", "model.language_model.", "lm_head.weight"),
)
"""The forms that its files have had; the first is written."""

BLOCK = {
    "norm.weight": "input_layernorm.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "attention_gate": "cross_attn_attn_gate",
    "mlp_gate": "cross_attn_mlp_gate",
    **{f"{part}.weight": f"cross_attn.{part}.weight" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")},
    **{name: name for name in ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")},
}
"""Parameters of a block of cross-attention: ours -> theirs."""

_HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n".format
DATA: Mapping[str, Any] = {
    "template": "turns",
    "image_placeholder": "<|image|>",
    "turns": TurnsConfig(
        system=_HEADER("system") + "{system}<|eot_id|>",
        user=_HEADER("user") + "<|image|>{prompt}<|eot_id|>",
        assistant=_HEADER("assistant"),
        end="<|eot_id|>",
    ),
}
"""Keys of ``[data]``: the format of the instruct models, with one image in front of the prompt."""


def arch() -> str:
    """The arch whose blocks these are."""
    return next(name for name in registry.vlm_configs if registry.vlm_configs.get(name).stands_for == KIND)


def options(model: ModelConfig, tile_tokens: int) -> dict[str, Any]:
    """Keys of ``[vlm]`` that make our blocks theirs, but for the number of blocks and of rows."""
    return {
        "attention_mask": "causal",
        "cross_attention_n_heads": model.n_heads,
        "cross_attention_n_kv_heads": model.kv_heads,
        "cross_attention_media": "latest_group",
        "cross_attention_qk_norm": True,
        "cross_attention_media_norm": False,
        "cross_attention_blind": "attention",
        "cross_attention_seen_tokens": tile_tokens,
    }


def read_mllama_config(config: dict[str, Any], rows: int, norm: tuple[list[float], list[float]] | None) -> VLMSections:
    """The sections of a model.

    Args:
        config: ``config.json`` as it is.
        rows: of the embedding in the files; 0: there is none.
        norm: mean and std of the pixels, where the image processor beside it says.

    Raises:
        ValueError: a kind of it that ours cannot be.
    """
    full = complete(config)
    text, vision = full["text_config"], full["vision_config"]
    if rows not in (0, text["vocab_size"] + SPARE):
        raise InputError(f"text_config.vocab_size = {text['vocab_size']}: the embedding has {rows} rows, not {SPARE} more")
    every = _interval(text["cross_attention_layers"], text["num_hidden_layers"])
    layers = text["num_hidden_layers"] - len(text["cross_attention_layers"])
    model = model_config(
        text | {"model_type": FAMILY, "num_hidden_layers": layers, "tie_word_embeddings": False}, text["vocab_size"] + SPARE
    )
    if vision["supported_aspect_ratios"] != (ratios := grids(vision["max_num_tiles"])):
        raise InputError(f"vision_config.supported_aspect_ratios = {vision['supported_aspect_ratios']}: must be {ratios}")
    mean, std = norm or ([], [])
    tower = MllamaTowerConfig(
        settings=_tower_settings(vision), intermediate_layers=vision["intermediate_layers_indices"], mean=mean, std=std
    )
    tile_tokens = (int(tower.settings["image_size"]) // int(tower.settings["patch_size"])) ** 2 + 1
    how = {"cross_attention_every_n_layers": every, "unwritten_tokens": SPARE} | options(model, tile_tokens)
    return VLMSections(model, tower, LinearAdapterConfig(), VLMConfig.for_arch(arch(), **how))


def _interval(blocks: list[int], layers: int) -> int:
    """n, if their ``layers`` have ``blocks`` of cross-attention where ours would be."""
    every = blocks[0] + 1 if blocks else 0
    if every and blocks == block_layers(every, layers - len(blocks)):
        return every
    raise InputError(f"text_config.cross_attention_layers = {blocks} of {layers}: ours are before every n-th of the other layers")


def block_layers(every: int, layers: int) -> list[int]:
    """Where the blocks in front of every n-th of our ``layers`` are among theirs."""
    return [(number + 1) * every - 1 + number for number in range(layers // every)]


def _tower_settings(vision: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    from transformers import PretrainedConfig
    from transformers.models.mllama.configuration_mllama import MllamaVisionConfig

    known = MllamaVisionConfig()
    kept = known.to_dict().keys() - PretrainedConfig().to_dict().keys() - BOOKKEEPING
    return {"model_type": known.model_type} | scalars(vision, kept)


# ---- names and shapes -----------------------------------------------------------------------------------------------


def added_shapes(job: JobConfig) -> dict[str, Tensor]:
    """What ``job``'s model has besides text backbone, tower and adapter, and the head, which is narrower; on the meta device."""
    cfg, how = job.model, vars(job.vlm)
    dim, width, hidden, every = cfg.dim, cfg.head_width, cfg.ffn_width, how["cross_attention_every_n_layers"]
    q, kv = cfg.n_heads * width, cfg.kv_heads * width
    block = {
        **dict.fromkeys(("norm.weight", "mlp_norm.weight"), (dim,)),
        **dict.fromkeys(("q_norm.weight", "k_norm.weight"), (width,)),
        **dict.fromkeys(("attention_gate", "mlp_gate"), (1,)),
        **dict.fromkeys(("k_proj.weight", "v_proj.weight"), (kv, dim)),
        **dict.fromkeys(("mlp.gate_proj.weight", "mlp.up_proj.weight"), (hidden, dim)),
        "q_proj.weight": (q, dim),
        "o_proj.weight": (dim, q),
        "mlp.down_proj.weight": (dim, hidden),
    }
    shapes = {
        f"transformer.layers.{layer}.cross_attention.{name}": shape
        for layer in range(every - 1, cfg.n_layers, every)
        for name, shape in block.items()
    }
    shapes[f"transformer.{HEAD}"] = (cfg.vocab_size - how["unwritten_tokens"], dim)
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def tensor_name(ours: str, every: int, layout: FileLayout) -> str:
    """Our parameter name -> the one in files of this layout.

    Args:
        every: n.
    """
    part, _, rest = ours.partition(".")
    if part == "vision_encoder":
        return layout.vision + rest.removeprefix("tower.")
    if part == "adapter":
        return layout.projector + rest.removeprefix("proj.")
    if rest == HEAD:
        return layout.head
    if not rest.startswith("layers."):
        return layout.text + hf_name(rest, FAMILY)
    _, index, inner = rest.split(".", 2)
    number = int(index) + (int(index) + 1) // every  # after the blocks so far, that in front of it among them
    if (parameter := inner.removeprefix("cross_attention.")) != inner:
        return f"{layout.text}layers.{number - 1}.{BLOCK[parameter]}"
    return layout.text + hf_name(f"layers.{number}.{inner}", FAMILY)


# ---- ours to theirs -------------------------------------------------------------------------------------------------


def check(job: JobConfig) -> None:
    """Refuses what the class cannot be.

    Raises:
        ValueError: naming each key that is in the way.
    """
    cfg, tower = job.model, job.vision_encoder
    if not isinstance(tower, MllamaTowerConfig):
        raise InputError(
            f"no class of transformers is this model ({KIND}: vision_encoder.type = {tower.type!r}, not {MllamaTowerConfig.type!r})"
        )
    how = dict(vars(job.vlm))
    how["cross_attention_n_heads"] = how["cross_attention_n_heads"] or cfg.n_heads
    how["cross_attention_n_kv_heads"] = how["cross_attention_n_kv_heads"] or how["cross_attention_n_heads"]
    wanted = options(cfg, how["cross_attention_seen_tokens"])  # how many those are is known of the tower
    wrong = [f"vlm.{key} = {how[key]!r}, not {value!r}" for key, value in wanted.items() if how[key] != value]
    if how["unwritten_tokens"] > SPARE:
        wrong.append(f"vlm.unwritten_tokens = {how['unwritten_tokens']}, not {SPARE} or less")
    if not isinstance(job.adapter, LinearAdapterConfig) or not job.adapter.bias:
        wrong.append(f"[adapter] is {job.adapter}, not {LinearAdapterConfig()}")
    if cfg.head_width * cfg.n_heads != cfg.dim:
        wrong.append(f"model.head_dim = {cfg.head_width}, not model.dim / model.n_heads")
    if wrong:
        raise InputError(f"no class of transformers is this model ({KIND}: {'; '.join(wrong)})")
    hf_config(cfg, FAMILY)


def check_tiles(job: JobConfig, encoder: MllamaTower) -> None:
    """Refuses blocks that see another number of tokens of an image than ``encoder`` makes of a tile."""
    if (seen := vars(job.vlm)["cross_attention_seen_tokens"]) != encoder.tile_tokens:
        raise InputError(f"vlm.cross_attention_seen_tokens = {seen}: a tile has {encoder.tile_tokens}")


def write_mllama_config(job: JobConfig, encoder: MllamaTower, image_id: int, ids: Mapping[str, int | None]) -> dict[str, Any]:
    """The ``config.json`` of ``job``'s model.

    Args:
        image_id: the token of an image.
        ids: "bos_token_id", "eos_token_id" and "pad_token_id".

    Raises:
        ValueError: it cannot be one.
    """
    check(job)
    check_tiles(job, encoder)
    how, cfg = vars(job.vlm), job.model
    every = how["cross_attention_every_n_layers"]
    text = hf_config(cfg, FAMILY) | dict(ids)
    for key in ("architectures", "head_dim", "attention_bias", "attention_dropout", "mlp_bias"):
        del text[key]
    text |= {
        "model_type": "mllama_text_model",
        "num_hidden_layers": cfg.n_layers + cfg.n_layers // every,
        "cross_attention_layers": block_layers(every, cfg.n_layers),
        "vocab_size": cfg.vocab_size - how["unwritten_tokens"],
        "tie_word_embeddings": False,
    }
    tower = encoder.tower.config
    lists = {"supported_aspect_ratios": tower.supported_aspect_ratios, "intermediate_layers_indices": tower.intermediate_layers_indices}
    return {
        "architectures": [ARCHITECTURE],
        "model_type": KIND,
        "image_token_index": image_id,
        "tie_word_embeddings": False,
        "text_config": text,
        "vision_config": _tower_settings(tower.to_dict()) | lists | {"vision_output_dim": encoder.dim},
    }


def write_tensors(job: JobConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters under their names. Rows of the embedding that only theirs has are the mean of the others."""
    how, embedding = vars(job.vlm), tensors[f"transformer.{EMBEDDING}"]
    spare = embedding.mean(0, keepdim=True).expand(SPARE - how["unwritten_tokens"], -1)
    whole = {f"transformer.{HEAD}": embedding, **tensors, f"transformer.{EMBEDDING}": torch.cat([embedding, spare])}  # (V + 8, D)
    return {tensor_name(ours, how["cross_attention_every_n_layers"], LAYOUTS[0]): tensor for ours, tensor in whole.items()}


# ---- both on one batch ----------------------------------------------------------------------------------------------


def class_inputs(inputs: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """What the class takes, as its own processor makes it of images of one tile; each row has as many.

    Args:
        inputs: "input_ids" with the token of each image, "attention_mask", and "pixel_values" (N, 3, H, H), row after row; without these
            nothing is added.
        config: of the class.
    """
    if "pixel_values" not in inputs:
        return dict(inputs)
    from transformers.models.mllama import processing_mllama as theirs

    ids, pixels, tiles = inputs["input_ids"], inputs["pixel_values"], config.vision_config.max_num_tiles
    images = len(pixels) // len(ids)
    views = pixels.new_zeros(len(ids), images, tiles, *pixels.shape[1:])  # (B, images, T, 3, H, H)
    views[:, :, 0] = pixels.unflatten(0, (len(ids), images))
    there = torch.zeros(len(ids), images, tiles, dtype=torch.long)
    there[:, :, 0] = 1
    spans = [theirs.get_cross_attention_token_mask(row, config.image_token_index) for row in ids.tolist()]
    seen = theirs.convert_sparse_cross_attention_mask_to_dense(spans, [[1] * images] * len(ids), tiles, ids.shape[1])
    facts = {"aspect_ratio_ids": there[:, :, 0], "aspect_ratio_mask": there, "cross_attention_mask": torch.from_numpy(seen)}
    return {**inputs, "pixel_values": views, **facts}
