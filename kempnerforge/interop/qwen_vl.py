"""Qwen2.5-VL and Qwen3-VL (Bai et al. 2025, arXiv 2502.13923 and 2511.21631) in both directions: one stream
with positions by row and column, the class's tower under its own names, and its patch mergers as adapters.

An image is one frame, which fills its patches in time. Videos, whose patches hold two frames, are not read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kempnerforge.config.images import ImagesConfig
from kempnerforge.config.job import JobConfig
from kempnerforge.config.model import ModelConfig
from kempnerforge.config.template import TurnsConfig
from kempnerforge.config.vlm import VLMConfig
from kempnerforge.interop.families import HEAD, hf_name
from kempnerforge.interop.settings import complete, hf_config, model_config
from kempnerforge.interop.vlm_family import FileLayout, Ids, Normalisation, VLMFamily, VLMSections
from kempnerforge.model.hf_checks import names_keys
from kempnerforge.model.patch_merger import PatchMergerConfig
from kempnerforge.model.qwen_vl import QwenTowerConfig, cut, qwen_settings
from kempnerforge.util.errors import InputError, show

SIDE = 16
"""Tokens along a side of the largest image, in the config that is made."""
_OF_GRIDS = ("mrope_section", "mrope_interleaved")
"""Keys of ``rope_parameters`` that are keys of ``[model]`` here."""


@dataclass(frozen=True, kw_only=True)
class QwenVL(VLMFamily):
    """One of the classes.

    Attributes:
        text: the family of its text model.
        norm: of a merger, as ``adapter.norm``.
        interleaved: as ``model.rope_interleaved``.
        rope_sections: where its files do not say.
        merger: our names in an adapter -> those in a merger.
    """

    text: str
    norm: str
    interleaved: bool
    rope_sections: tuple[int, int, int]
    merger: Mapping[str, str]

    def sections(self, config: dict[str, Any], rows: int, normalisation: Normalisation) -> VLMSections:
        for part in ("text", "vision"):
            allowed = f"{self.kind}_{part}", self.kind  # the second in older files
            if (named := (config.get(f"{part}_config") or {}).get("model_type", self.kind)) not in allowed:
                raise InputError(f"{part}_config.model_type = {show(named)}: of a {self.kind} it can be {allowed[0]!r}")
        full = complete(config)
        text, vision = full["text_config"], full["vision_config"]
        rope = text.get("rope_parameters") or {}
        found = {"rope_parameters": {key: value for key, value in rope.items() if key not in _OF_GRIDS}}
        found |= {"model_type": self.text, "tie_word_embeddings": full["tie_word_embeddings"]}
        model, parts = model_config(text | found, rows or 1), rope.get("mrope_section", self.rope_sections)
        if not isinstance(parts, list | tuple) or [type(part) for part in parts] != [int] * 3 or 2 * sum(parts) != model.head_width:
            wanted = f"must be three whole numbers whose sum is {model.head_width // 2}, half the width of a head"
            raise InputError(f"text_config.rope_parameters.mrope_section = {show(parts)}: {wanted}")
        with names_keys({"mrope_section": parts}):
            model = replace(model, rope_sections=list(parts), rope_interleaved=self.interleaved)
        return VLMSections(model, self._tower(vision, normalisation), self._adapter(vision, model), VLMConfig())

    def _tower(self, vision: dict[str, Any], normalisation: Normalisation) -> QwenTowerConfig:
        known = self._vision_config()
        if (rope := vision["rope_parameters"]) != known.rope_parameters:
            raise InputError(f"vision_config.rope_parameters = {show(rope)}: must be {known.rope_parameters}")
        depth, indexes = vision["depth"], list(vision.get("deepstack_visual_indexes", ()))
        if any(not 0 <= index < depth for index in indexes) or indexes != sorted({*indexes}):
            raise InputError(f"vision_config.deepstack_visual_indexes = {indexes}: must be layers in order, from 0; depth = {depth}")
        return QwenTowerConfig(
            deepstack_layers=[index - depth for index in indexes],
            full_attention_layers=list(vision.get("fullatt_block_indexes", ())),
            settings=qwen_settings(vision, known),
            image_size=SIDE * vision["spatial_merge_size"] * vision["patch_size"],
            mean=normalisation.mean,
            std=normalisation.std,
        )

    def _adapter(self, vision: Mapping[str, Any], model: ModelConfig) -> PatchMergerConfig:
        merge, patch = vision["spatial_merge_size"], vision["patch_size"]
        if vision["out_hidden_size"] != model.dim:
            raise InputError(f"vision_config.out_hidden_size = {vision['out_hidden_size']}: must be text_config.hidden_size = {model.dim}")
        if (window := vision.get("window_size", merge * patch)) // patch % merge:
            raise InputError(f"vision_config.window_size = {window}: must be a multiple of a token's {merge * patch} pixels")
        return PatchMergerConfig(factor=merge, norm=self.norm)

    def _vision_config(self) -> Any:
        from transformers import CONFIG_MAPPING

        return CONFIG_MAPPING[self.kind]().vision_config

    def image_id(self, config: Mapping[str, Any]) -> int | None:
        return super().image_id(complete(dict(config)))

    def tensor_name(self, name: str, job: JobConfig, text_family: str, layout: FileLayout) -> str:
        part, _, rest = name.partition(".")
        if part == "vision_encoder":
            return layout.vision + rest
        if rest.startswith("deepstack."):
            _, number, inner = rest.split(".", 2)
            return f"{layout.vision}deepstack_merger_list.{number}.{self.merger[inner]}"
        if part == "adapter":
            return layout.projector + self.merger[rest]
        return layout.head if rest == HEAD else layout.text + hf_name(rest, self.text)

    def is_unread(self, name: str, layout: FileLayout, used: Collection[str]) -> bool:
        return name == layout.head

    def check(self, job: JobConfig) -> str:
        cfg, tower, adapter = job.model, job.vision_encoder, job.adapter
        if job.vlm is None or job.vlm.arch != VLMConfig.arch:
            raise InputError(f"vlm.arch is not {VLMConfig.arch!r}")
        if job.vlm.attention_mask != "causal":
            raise InputError(f"vlm.attention_mask = {job.vlm.attention_mask!r}, not 'causal'")
        if not isinstance(tower, QwenTowerConfig):
            raise InputError(f"vision_encoder.type = {tower.type!r}, not {QwenTowerConfig.type!r}")
        if not cfg.rope_sections or cfg.rope_interleaved != self.interleaved:
            raise InputError(f"model.rope_sections = {cfg.rope_sections}, model.rope_interleaved = {cfg.rope_interleaved}: in its class "
                             f"they are three counts and {self.interleaved}")  # fmt: skip
        wanted = PatchMergerConfig(factor=getattr(adapter, "factor", 1), norm=self.norm)
        if adapter != wanted:
            raise InputError(f"[adapter] is {adapter}, not {wanted}")
        if tower.deepstack_layers != sorted(tower.deepstack_layers):
            raise InputError(f"vision_encoder.deepstack_layers = {tower.deepstack_layers}: in its class they are in order")
        if "attention_bias" not in (text := hf_config(cfg, self.text)) and cfg.head_width * cfg.n_heads != cfg.dim:
            raise InputError(f"model.head_dim = {text['head_dim']}, not model.dim / model.n_heads")
        return self.text

    def check_built(self, job: JobConfig, encoder: Any, tokenizer: Any) -> None:
        if (kind := encoder.tower.config.model_type) != self._vision_config().model_type:
            raise InputError(f"the tower is a {kind}, which a {self.kind} does not have")

    def config(self, job: JobConfig, encoder: Any, image_tokens: int, image_id: int | None, ids: Ids) -> dict[str, Any]:
        tower, cfg = encoder.tower.config, job.model
        text = hf_config(cfg, self.text) | dict(ids) | {"model_type": f"{self.kind}_text", "tie_word_embeddings": cfg.tie_embeddings}
        rope: Any = text.pop("rope_scaling", {"rope_type": "default"})
        rope |= {"mrope_section": cfg.rope_sections, "rope_theta": text.pop("rope_theta")}
        text["rope_parameters"] = rope | ({"mrope_interleaved": True} if self.interleaved else {})
        del text["architectures"]
        lists = {key: list(getattr(tower, key)) for key in ("deepstack_visual_indexes", "fullatt_block_indexes") if hasattr(tower, key)}
        vision = qwen_settings(tower.to_dict(), self._vision_config()) | lists
        return {
            "architectures": [self.architecture],
            "model_type": self.kind,
            self.image_key: image_id,
            "tie_word_embeddings": cfg.tie_embeddings,
            "text_config": text,
            "vision_config": vision | {"spatial_merge_size": getattr(job.adapter, "factor", 1), "out_hidden_size": cfg.dim},
        }

    def tensors(self, job: JobConfig, encoder: Any, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {self.tensor_name(name, job, self.text, self.layouts[0]): tensor for name, tensor in parameters.items()}

    def class_inputs(self, inputs: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
        """As the processor of the class makes them of images that are squares."""
        inputs, vision = dict(inputs), config.vision_config
        if "pixel_values" in inputs and "image_grid_thw" not in inputs:
            pixels = inputs.pop("pixel_values")
            patches = cut(pixels, vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size)  # (N, F, 3 * frames * patch^2)
            side = pixels.shape[-1] // vision.patch_size
            inputs |= {"pixel_values": patches.flatten(0, 1), "image_grid_thw": torch.tensor([[1, side, side]] * len(pixels))}
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == config.image_token_id).int()
        return inputs


def _layout(vision: str, text: str) -> FileLayout:
    return FileLayout(vision, f"{vision}merger.", text, "lm_head.weight")


def _names(norm: str, first: str, second: str) -> dict[str, str]:
    parts = {"norm": norm, "proj.fc1": first, "proj.fc2": second}
    return {f"{own}.{kind}": f"{theirs}.{kind}" for own, theirs in parts.items() for kind in ("weight", "bias")}


_IMAGE = "<|image_pad|>"
_DATA: Mapping[str, Any] = {
    "template": "turns",
    "image_placeholder": _IMAGE,
    "images": ImagesConfig(fit="native", around=["<|vision_start|>", "<|vision_end|>"]),
    "turns": TurnsConfig(
        system="<|im_start|>system\n{system}<|im_end|>\n",
        user=f"<|im_start|>user\n{_IMAGE}{{prompt}}<|im_end|>\n",
        assistant="<|im_start|>assistant\n",
        end="<|im_end|>",
        separator="\n",
        bos=False,
    ),
}
"""Keys of ``[data]``: the format of the instruct models, with one image in front of the prompt."""
_NOW = _layout("model.visual.", "model.language_model.")
_COMMON: dict[str, Any] = {
    "image_key": "image_token_id",
    "notes": (
        "an image keeps its shape inside a square of vision_encoder.image_size and is never enlarged; there min_pixels and max_pixels "
        "bound its area",
    ),
}

QWEN_VL = (
    QwenVL(
        kind="qwen2_5_vl",
        architecture="Qwen2_5_VLForConditionalGeneration",
        layouts=(_layout("visual.", "model."), _NOW),
        text="qwen2",
        norm="rms_norm",
        interleaved=False,
        rope_sections=(16, 24, 24),
        merger=_names("ln_q", "mlp.0", "mlp.2"),
        data={**_DATA, "system": "You are a helpful assistant."},
        **_COMMON,
    ),
    QwenVL(
        kind="qwen3_vl",
        architecture="Qwen3VLForConditionalGeneration",
        layouts=(_NOW,),
        text="qwen3",
        norm="layer_norm",
        interleaved=True,
        rope_sections=(24, 20, 20),
        merger=_names("norm", "linear_fc1", "linear_fc2"),
        data=_DATA,
        **_COMMON,
    ),
)
