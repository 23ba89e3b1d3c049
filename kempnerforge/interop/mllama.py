"""Llama 3.2 Vision (``MllamaForConditionalGeneration``; Llama Team 2024, section 7) in both directions: a
Llama with gated cross-attention.

In transformers a block of cross-attention is a layer among the others. Ours is before every n-th layer, as a
part of it, so the numbers of layers differ: with n = 4 layers 0 1 2 *3* 4 5 6 7 *8* 9 of the class are our
layers 0 1 2, 3 with a block, 4 5 6, 7 with a block.

An image is one tile. Several tiles of one image, and their aspect ratios, are not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kempnerforge.config.adapter import LinearAdapterConfig
from kempnerforge.config.job import JobConfig
from kempnerforge.config.model import ModelConfig
from kempnerforge.config.template import TurnsConfig
from kempnerforge.config.vision import MllamaTowerConfig
from kempnerforge.config.vlm import VLMConfig
from kempnerforge.data.text.tokenizer import Tokenizer
from kempnerforge.interop.families import EMBEDDING, HEAD, hf_name
from kempnerforge.interop.settings import complete, hf_config, model_config
from kempnerforge.interop.vlm_family import FileLayout, Ids, Normalisation, VLMFamily, VLMSections, arch_of, tower_settings
from kempnerforge.model.mllama import MllamaTower, grids
from kempnerforge.util.errors import InputError

KIND, FAMILY = "mllama", "llama"
"""``model_type`` of the whole and of its text model."""
SPARE = 8
"""Rows of the embedding that the head does not have; the first of them is for the image token."""

BLOCK = {
    "norm.weight": "input_layernorm.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "attention_gate": "cross_attn_attn_gate",
    "mlp_gate": "cross_attn_mlp_gate",
    **{f"{part}.weight": f"cross_attn.{part}.weight" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")},
    **{name: name for name in ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")},
}
"""Parameters of a block of cross-attention: our name -> the one in files."""

_HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n".format
_DATA: Mapping[str, Any] = {
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


def options(model: ModelConfig, tile_tokens: int) -> dict[str, Any]:
    """Keys of ``[vlm]`` with which our blocks compute the same as the class, except the number of blocks and
    of rows.
    """
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


def _interval(blocks: list[int], layers: int) -> int:
    """n, if the class with ``layers`` and ``blocks`` of cross-attention among them is ours."""
    every = blocks[0] + 1 if blocks else 0
    if every and blocks == block_layers(every, layers - len(blocks)):
        return every
    raise InputError(f"text_config.cross_attention_layers = {blocks} of {layers}: ours are before every n-th of the other layers")


def block_layers(every: int, layers: int) -> list[int]:
    """Numbers that the blocks before every n-th of our ``layers`` have in the class."""
    return [(number + 1) * every - 1 + number for number in range(layers // every)]


def added_parameters(job: JobConfig) -> dict[str, Tensor]:
    """Parameters that text backbone, tower and adapter do not have, and the head, which is narrower; on the
    meta device.
    """
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


def tensor_name(name: str, every: int, layout: FileLayout) -> str:
    """Our parameter name -> the one in files of this layout.

    Args:
        every: n.
    """
    part, _, rest = name.partition(".")
    if part == "vision_encoder":
        return layout.vision + rest.removeprefix("tower.")
    if part == "adapter":
        return layout.projector + rest.removeprefix("proj.")
    if rest == HEAD:
        return layout.head
    if not rest.startswith("layers."):
        return layout.text + hf_name(rest, FAMILY)
    _, index, inner = rest.split(".", 2)
    number = int(index) + (int(index) + 1) // every  # after the blocks so far, the one before it included
    if (parameter := inner.removeprefix("cross_attention.")) != inner:
        return f"{layout.text}layers.{number - 1}.{BLOCK[parameter]}"
    return layout.text + hf_name(f"layers.{number}.{inner}", FAMILY)


@dataclass(frozen=True, kw_only=True)
class Mllama(VLMFamily):
    """The class. Parameters have the same names, but for the numbers of layers."""

    def sections(self, config: dict[str, Any], rows: int, normalisation: Normalisation) -> VLMSections:
        full = complete(config)
        text, vision = full["text_config"], full["vision_config"]
        if rows not in (0, text["vocab_size"] + SPARE):
            raise InputError(f"text_config.vocab_size = {text['vocab_size']}: the embedding has {rows} rows, not {SPARE} more")
        blocks = text["cross_attention_layers"]
        every, layers = _interval(blocks, text["num_hidden_layers"]), text["num_hidden_layers"] - len(blocks)
        model = model_config(
            text | {"model_type": FAMILY, "num_hidden_layers": layers, "tie_word_embeddings": False}, text["vocab_size"] + SPARE
        )
        if vision["supported_aspect_ratios"] != (ratios := grids(vision["max_num_tiles"])):
            raise InputError(f"vision_config.supported_aspect_ratios = {vision['supported_aspect_ratios']}: must be {ratios}")
        tower = MllamaTowerConfig(
            settings=tower_settings(vision, _vision_config()),
            intermediate_layers=vision["intermediate_layers_indices"],
            mean=normalisation.mean,
            std=normalisation.std,
        )
        tile_tokens = (int(tower.settings["image_size"]) // int(tower.settings["patch_size"])) ** 2 + 1
        how = {"cross_attention_every_n_layers": every, "unwritten_tokens": SPARE} | options(model, tile_tokens)
        return VLMSections(model, tower, LinearAdapterConfig(), VLMConfig.for_arch(arch_of(KIND), **how))

    def image_id(self, config: Mapping[str, Any]) -> int | None:
        return super().image_id(complete(dict(config)))

    def parameters(self, job: JobConfig) -> dict[str, Tensor]:
        return super().parameters(job) | added_parameters(job)

    def tensor_name(self, name: str, job: JobConfig, text_family: str, layout: FileLayout) -> str:
        return tensor_name(name, vars(job.vlm)["cross_attention_every_n_layers"], layout)

    def check(self, job: JobConfig) -> str:
        cfg, tower = job.model, job.vision_encoder
        if not isinstance(tower, MllamaTowerConfig):
            raise InputError(f"vision_encoder.type = {tower.type!r}, not {MllamaTowerConfig.type!r}")
        how = dict(vars(job.vlm))
        how["cross_attention_n_heads"] = how["cross_attention_n_heads"] or cfg.n_heads
        how["cross_attention_n_kv_heads"] = how["cross_attention_n_kv_heads"] or how["cross_attention_n_heads"]
        wanted = options(cfg, how["cross_attention_seen_tokens"])  # the tower knows how many: see ``check_built``
        wrong = [f"vlm.{key} = {how[key]!r}, not {value!r}" for key, value in wanted.items() if how[key] != value]
        if how["unwritten_tokens"] > SPARE:
            wrong.append(f"vlm.unwritten_tokens = {how['unwritten_tokens']}, not {SPARE} or less")
        if not isinstance(job.adapter, LinearAdapterConfig) or not job.adapter.bias:
            wrong.append(f"[adapter] is {job.adapter}, not {LinearAdapterConfig()}")
        if cfg.head_width * cfg.n_heads != cfg.dim:
            wrong.append(f"model.head_dim = {cfg.head_width}, not model.dim / model.n_heads")
        if wrong:
            raise InputError("; ".join(wrong))
        hf_config(cfg, FAMILY)
        return FAMILY

    def check_built(self, job: JobConfig, encoder: Any, tokenizer: Tokenizer) -> None:
        assert isinstance(encoder, MllamaTower), "the config of its tower has been checked"
        if (seen := vars(job.vlm)["cross_attention_seen_tokens"]) != encoder.tile_tokens:
            raise InputError(f"vlm.cross_attention_seen_tokens = {seen}: a tile has {encoder.tile_tokens}")
        if (name := job.data.image_placeholder) not in tokenizer.appended:
            raise InputError(f"data.image_placeholder = {name!r}: in a {KIND} this is a token of the stream, and here it is not")

    def config(self, job: JobConfig, encoder: Any, image_tokens: int, image_id: int | None, ids: Ids) -> dict[str, Any]:
        how, cfg, tower = vars(job.vlm), job.model, encoder.tower.config
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
        lists = {key: getattr(tower, key) for key in ("supported_aspect_ratios", "intermediate_layers_indices")}
        return {
            "architectures": [self.architecture],
            "model_type": self.kind,
            self.image_key: image_id,
            "tie_word_embeddings": False,
            "text_config": text,
            "vision_config": tower_settings(tower.to_dict(), _vision_config()) | lists | {"vision_output_dim": encoder.dim},
        }

    def tensors(self, job: JobConfig, encoder: Any, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rows of the embedding that only the class has are the mean of the others."""
        how, embedding = vars(job.vlm), parameters[f"transformer.{EMBEDDING}"]
        spare = embedding.mean(0, keepdim=True).expand(SPARE - how["unwritten_tokens"], -1)
        whole = {f"transformer.{HEAD}": embedding, **parameters, f"transformer.{EMBEDDING}": torch.cat([embedding, spare])}  # (V + 8, D)
        return {tensor_name(name, how["cross_attention_every_n_layers"], self.layouts[0]): tensor for name, tensor in whole.items()}

    def class_inputs(self, inputs: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
        """As the processor of the class makes them of images of one tile."""
        if "pixel_values" not in inputs:
            return dict(inputs)
        from transformers.models.mllama.processing_mllama import (
            convert_sparse_cross_attention_mask_to_dense,
            get_cross_attention_token_mask,
        )

        ids, pixels, tiles = inputs["input_ids"], inputs["pixel_values"], config.vision_config.max_num_tiles
        images = len(pixels) // len(ids)
        views = pixels.new_zeros(len(ids), images, tiles, *pixels.shape[1:])  # (B, images, T, 3, H, H)
        views[:, :, 0] = pixels.unflatten(0, (len(ids), images))
        is_tile = torch.zeros(len(ids), images, tiles, dtype=torch.long)
        is_tile[:, :, 0] = 1
        spans = [get_cross_attention_token_mask(row, config.image_token_index) for row in ids.tolist()]
        seen = convert_sparse_cross_attention_mask_to_dense(spans, [[1] * images] * len(ids), tiles, ids.shape[1])
        masks = {"aspect_ratio_ids": is_tile[:, :, 0], "aspect_ratio_mask": is_tile, "cross_attention_mask": torch.from_numpy(seen)}
        return {**inputs, "pixel_values": views, **masks}


def _vision_config() -> Any:
    from transformers.models.mllama.configuration_mllama import MllamaVisionConfig

    return MllamaVisionConfig()


MLLAMA = Mllama(
    kind=KIND,
    architecture="MllamaForConditionalGeneration",
    layouts=(
        FileLayout("vision_model.", "multi_modal_projector.", "language_model.model.", "language_model.lm_head.weight"),
        FileLayout("model.vision_model.", "model.multi_modal_projector.", "model.language_model.", "lm_head.weight"),
    ),
    data=_DATA,
    image_key="image_token_index",
    image_is_word=True,
)
