"""``CLIPModel`` (Radford et al. 2021) and ``SiglipModel`` (Zhai et al. 2023; SigLIP 2 of one resolution,
Tschannen et al. 2025) of transformers in both directions: a text tower, a vision tower with its own pooling,
and a projection of each.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from kempnerforge.config.adapter import NoAdapterConfig
from kempnerforge.config.job import JobConfig
from kempnerforge.config.model import ModelConfig
from kempnerforge.config.vision import ClipConfig, ResizedTowerConfig, SiglipConfig
from kempnerforge.config.vlm import VLMConfig
from kempnerforge.data.text.tokenizer import Tokenizer
from kempnerforge.interop.settings import complete
from kempnerforge.interop.vlm_family import FileLayout, Ids, Normalisation, VLMFamily, VLMSections, arch_of, tower_settings
from kempnerforge.util.errors import InputError, show

ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu_exact", "gelu_pytorch_tanh": "gelu", "gelu_new": "gelu"}
"""``hidden_act`` -> ``model.activation``."""

TEXT = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "ffn_dim": "intermediate_size",
    "norm_eps": "layer_norm_eps",
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
}
"""``[model]`` key -> key of ``text_config`` that means the same."""

FIXED: Mapping[str, Any] = {"norm": "layer_norm", "positions": "learned", "bias": True}
"""``[model]`` keys that a text tower of these classes has."""

FREE = ("dropout", "init_std", "vocab_size", "new_tokens")
"""``[model]`` keys that change no text tower."""

OLD_END = 2
"""``eos_token_id`` of a text tower of CLIP whose files do not say the end of a text: it is the highest id."""

PARTS = {
    "token_embedding": "embeddings.token_embedding",
    "position_embedding": "embeddings.position_embedding",
    "norm": "final_layer_norm",
    "attention_norm": "layer_norm1",
    "attention.o_proj": "self_attn.out_proj",
    "attention": "self_attn",
    "mlp_norm": "layer_norm2",
    "mlp.up_proj": "mlp.fc1",
    "mlp.down_proj": "mlp.fc2",
}
"""Parts of a text tower or of a layer of it: our name -> the one in files. Of two that fit the longer one
counts."""


def text_name(name: str) -> str:
    """``layers.0.mlp.up_proj.bias`` -> ``encoder.layers.0.mlp.fc1.bias``."""
    before = ""
    if name.startswith("layers."):
        _, index, name = name.split(".", 2)
        before = f"encoder.layers.{index}."
    part = max((part for part in PARTS if name.startswith(part + ".")), key=len)
    return before + PARTS[part] + name.removeprefix(part)


@dataclass(frozen=True, kw_only=True)
class DualEncoderFamily(VLMFamily):
    """One of the classes.

    Attributes:
        tower: our config class of its vision tower.
        vlm: keys of ``[vlm]`` that the class fixes.
        others: our names outside the towers -> those in files; parameters that only this class has are among
            them.
    """

    tower: type[ResizedTowerConfig]
    vlm: Mapping[str, Any]
    others: Mapping[str, str]

    @property
    def projects_images(self) -> bool:
        """Whether its embeddings have a width of their own, ``projection_dim``."""
        return self.vlm["image_projection"]

    # ---- reading

    def sections(self, config: dict[str, Any], rows: int, normalisation: Normalisation) -> VLMSections:
        full = complete(config)
        text, vision = full["text_config"], full["vision_config"]
        width = number(full, "projection_dim") if self.projects_images else number(text, "projection_size")
        if not self.projects_images and width != vision["hidden_size"]:
            raise InputError(f"text_config.projection_size = {width}: must be vision_config.hidden_size = {vision['hidden_size']}")
        if vision.get("vision_use_head") is False:
            raise InputError("vision_config.vision_use_head = false: without its pooling head an image has no embedding")
        tower = self.tower(
            settings=tower_settings(vision, self._vision_config()), pooled=True, mean=normalisation.mean, std=normalisation.std
        )
        vlm = VLMConfig.for_arch(arch_of(self.kind), **self.vlm, embed_dim=width)
        return VLMSections(text_tower(text), tower, NoAdapterConfig(), vlm)

    def image_id(self, config: Mapping[str, Any]) -> int | None:
        return None

    def end_id(self, config: dict[str, Any]) -> int | None:
        found = complete(config)["text_config"]["eos_token_id"]
        return found if self.projects_images and found != OLD_END else None

    def parameters(self, job: JobConfig) -> dict[str, Tensor]:
        found, width = super().parameters(job), vars(job.vlm)["embed_dim"]
        shapes = {
            "image_projection.weight": (width, len(found["vision_encoder.post_layernorm.weight"])),
            "text_projection.weight": (width, job.model.dim),
            "text_projection.bias": (width,),
        }
        return found | {name: torch.empty(shapes.get(name, (1,)), device="meta") for name in self.others}

    def tensor_name(self, name: str, job: JobConfig, text_family: str, layout: FileLayout) -> str:
        part, _, rest = name.partition(".")
        if part == "vision_encoder":
            return layout.vision + rest
        return layout.text + text_name(rest) if part == "transformer" else self.others[name]

    def is_unread(self, name: str, layout: FileLayout, used: Collection[str]) -> bool:
        return name.endswith("embeddings.position_ids")

    # ---- writing

    def check(self, job: JobConfig) -> str:
        how, tower, fixed = vars(job.vlm), job.vision_encoder, {**self.vlm, "caption_weight": 0.0}
        wrong = [f"vlm.{key} = {how[key]!r}, not {value!r}" for key, value in fixed.items() if how[key] != value]
        if not isinstance(tower, self.tower):
            wrong.append(f"vision_encoder.type = {tower.type!r}, not {self.tower.type!r}")
        elif not tower.pooled:
            wrong.append("vision_encoder.pooled = false, not true")
        elif tower.image_size not in (0, tower.settings.get("image_size")):
            wrong.append(f"vision_encoder.image_size = {tower.image_size}, not the size that its positions are for")
        if not isinstance(job.adapter, NoAdapterConfig):
            wrong.append(f"adapter.type = {job.adapter.type!r}, not 'none'")
        if job.model.activation not in ACTIVATIONS.values():
            wrong.append(f"model.activation = {job.model.activation!r}, not {' or '.join(map(repr, dict.fromkeys(ACTIVATIONS.values())))}")
        else:
            wrong += other_keys(job.model, text_tower(text_config(job.model)))
        if wrong:
            raise InputError("; ".join(wrong))
        return f"{self.kind}_text_model"

    def check_built(self, job: JobConfig, encoder: Any, tokenizer: Tokenizer) -> None:
        if self.projects_images and tokenizer.eos_id == OLD_END:
            raise InputError(
                f"the tokenizer's EOS has id {OLD_END}: a {self.architecture} takes the highest id of a text for its end then; another id is needed"
            )

    def config(self, job: JobConfig, encoder: Any, image_tokens: int, image_id: int | None, ids: Ids) -> dict[str, Any]:
        tower, width = encoder.tower.config, vars(job.vlm)["embed_dim"]
        text = text_config(job.model) | dict(ids) | {"projection_dim" if self.projects_images else "projection_size": width}
        return {
            "architectures": [self.architecture],
            "model_type": self.kind,
            "text_config": text | {"model_type": self.check(job)},
            "vision_config": tower_settings(tower.to_dict(), self._vision_config()) | {"model_type": f"{self.kind}_vision_model"},
            **({"projection_dim": width} if self.projects_images else {}),
        }

    def tensors(self, job: JobConfig, encoder: Any, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {self.tensor_name(name, job, "", self.layouts[0]): tensor for name, tensor in parameters.items()}
        return found | ({"logit_scale": found["logit_scale"].squeeze(0)} if self.projects_images else {})  # a scalar there

    # ---- running

    def class_embeddings(self, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """(P, 2, E): image and text of each row, of length 1."""
        found = model(**inputs)
        return torch.stack([found.image_embeds, found.text_embeds], dim=1)

    def _vision_config(self) -> Any:
        from transformers import CLIPVisionConfig, SiglipVisionConfig

        return CLIPVisionConfig() if self.tower is ClipConfig else SiglipVisionConfig()


def text_tower(config: Mapping[str, Any]) -> ModelConfig:
    """``[model]`` of a ``text_config`` in which every setting is written.

    Raises:
        InputError: an activation that the backbone does not have.
    """
    if (name := config["hidden_act"]) not in ACTIVATIONS:
        raise InputError(f"text_config.hidden_act = {show(name)}: the backbone has {', '.join(ACTIVATIONS)}")
    return ModelConfig(**{key: number(config, theirs) for key, theirs in TEXT.items()}, activation=ACTIVATIONS[name], **FIXED)


def number(config: Mapping[str, Any], key: str) -> Any:
    """A number of a config; raises InputError if it is null."""
    if config[key] is None:
        raise InputError(f"{key} = null: must be a number")
    return config[key]


def text_config(cfg: ModelConfig) -> dict[str, Any]:
    """The ``text_config`` of ``[model]``, as far as the class has its keys."""
    resolved = replace(cfg, ffn_dim=cfg.ffn_width)
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return {theirs: getattr(resolved, key) for key, theirs in TEXT.items()} | {"hidden_act": names[cfg.activation]}


def other_keys(cfg: ModelConfig, wanted: ModelConfig) -> list[str]:
    """Keys of ``[model]`` in which ``cfg`` computes otherwise than the text tower ``wanted``, for people."""
    same = {"n_kv_heads": cfg.kv_heads, "head_dim": cfg.head_width, "ffn_dim": cfg.ffn_width}
    other = {"n_kv_heads": wanted.kv_heads, "head_dim": wanted.head_width, "ffn_dim": wanted.ffn_width}
    keys = [each.name for each in fields(cfg) if each.name not in FREE and not (each.name == "qkv_bias" and cfg.bias)]
    pairs = {key: (same.get(key, getattr(cfg, key)), other.get(key, getattr(wanted, key))) for key in keys}
    return [f"model.{key} = {ours!r}, not {theirs!r}" for key, (ours, theirs) in pairs.items() if ours != theirs]


_LAYOUTS = (FileLayout("vision_model.", "", "text_model.", ""),)
_SCALE = {"text_projection.weight": "text_projection.weight", "logit_scale": "logit_scale"}
DUAL_ENCODERS: tuple[DualEncoderFamily, ...] = (
    DualEncoderFamily(
        kind="clip",
        architecture="CLIPModel",
        layouts=_LAYOUTS,
        data={"template": "caption", "prompt_column": ""},
        image_processor="CLIPImageProcessor",
        tower=ClipConfig,
        vlm={
            "loss": "clip",
            "pooling": "last",
            "attention_mask": "causal",
            "image_projection": True,
            "text_projection_bias": False,
        },
        others={**_SCALE, "image_projection.weight": "visual_projection.weight"},
    ),
    DualEncoderFamily(
        kind="siglip",
        architecture="SiglipModel",
        layouts=_LAYOUTS,
        data={"template": "padded_caption", "prompt_column": ""},
        image_processor="SiglipImageProcessor",
        tower=SiglipConfig,
        vlm={
            "loss": "siglip",
            "pooling": "last",
            "attention_mask": "bidirectional",
            "image_projection": False,
            "text_projection_bias": True,
        },
        others={
            "text_projection.weight": "text_model.head.weight",
            "text_projection.bias": "text_model.head.bias",
            "logit_scale": "logit_scale",
            "logit_bias": "logit_bias",
        },
    ),
)
