"""The vision-language families of transformers that can be read and written: one entry of ``VLM_FAMILIES``
each.

Most are one stream of image tokens and words: the class's vision tower under its own names, an adapter, and a
text backbone of one of the ``FAMILIES``. Such a family is a ``StreamVLM``. A family of another kind is a file
with a subclass of ``VLMFamily``, as ``interop/mllama.py`` and ``interop/dual_encoders.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kempnerforge.config.adapter import AdapterConfig, LinearAdapterConfig, MLPAdapterConfig, PixelShuffleConfig
from kempnerforge.config.cross import image_sections
from kempnerforge.config.data import TextConfig
from kempnerforge.config.images import NEWLINE, ImagesConfig
from kempnerforge.config.job import JobConfig
from kempnerforge.config.template import TurnsConfig
from kempnerforge.config.vision import ClipConfig, HFTowerConfig, SiglipConfig, square_side
from kempnerforge.config.vlm import VLMConfig
from kempnerforge.data.text.tokenizer import Tokenizer
from kempnerforge.interop.dual_encoders import DUAL_ENCODERS
from kempnerforge.interop.families import HEAD, hf_name
from kempnerforge.interop.mllama import MLLAMA
from kempnerforge.interop.qwen_vl import QWEN_VL
from kempnerforge.interop.settings import complete, hf_config, model_config
from kempnerforge.interop.vlm_family import (
    FRAME,
    LLAVA,
    LLAVA_NEXT,
    PALIGEMMA,
    FileLayout,
    Ids,
    Normalisation,
    Settings,
    VLMFamily,
    VLMSections,
    tower_settings,
)
from kempnerforge.interop.write import NEW_EMBEDDING, without_last_name
from kempnerforge.model.hf_checks import pinpoint_grids
from kempnerforge.util.errors import InputError

UNREAD = re.compile(r"(post_layernorm\.(weight|bias)|head\..*|embeddings\.position_ids)$")
"""Tensors of a checkpoint's tower that our tower does not use, in addition to layers after ``feature_layer``:
a norm that is not applied to patches, and pooling."""

NORM_OF_CLS = ("post_layernorm.weight", "post_layernorm.bias")
"""In CLIP this norm is for the CLS token alone: our tower does not have it, and the class wants its
weights."""

HUB = FileLayout("vision_tower.vision_model.", "multi_modal_projector.", "language_model.model.", "language_model.lm_head.weight")
SAVED = HUB._replace(vision="vision_tower.")  # what save_pretrained of transformers 5 writes
MEMORY = FileLayout("model.vision_tower.", "model.multi_modal_projector.", "model.language_model.", "lm_head.weight")
CONNECTOR = FileLayout("model.vision_model.", "model.connector.", "model.text_model.", "lm_head.weight")


class MoreKeys(NamedTuple):
    """Further keys of a ``config.json`` that is written: of the whole, of ``text_config`` and of
    ``vision_config``.
    """

    whole: dict[str, Any]
    text: dict[str, Any]
    vision: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class StreamVLM(VLMFamily):
    """A class that is one stream of image tokens and words.

    Attributes:
        families: kinds of text model that it may have; the first that fits is written.
        tower: our config class of its vision tower.
        tower_type: ``model_type`` of that tower in its ``config.json``, and ``tower_aliases`` its names in
            older files.
        adapter: makes ``[adapter]`` from its ``config.json``.
        adapter_config: the inverse: keys of ``config.json`` that say what ``[adapter]`` does.
        adapter_names: our names in the adapter -> those in the files.
        mask: ``vlm.attention_mask``.
        fixed: keys of ``config.json`` -> the one value that can be read.
        more: (width of the text model, tokens of an image) -> further keys that are written.
    """

    families: tuple[str, ...]
    tower: type[HFTowerConfig]
    tower_type: str
    adapter: Callable[[dict[str, Any]], AdapterConfig]
    adapter_config: Callable[[AdapterConfig], dict[str, Any]]
    adapter_names: Mapping[str, str]
    mask: str = "causal"
    fixed: Mapping[str, Any]
    more: Callable[[int, int], MoreKeys] = lambda dim, image_tokens: MoreKeys({}, {}, {})
    tower_aliases: tuple[str, ...] = ()

    def sections(self, config: dict[str, Any], rows: int, normalisation: Normalisation) -> VLMSections:
        kinds = {"text_config": self.families, "vision_config": (self.tower_type, *self.tower_aliases)}
        for key, allowed in kinds.items():
            if (named := (config.get(key) or {}).get("model_type", allowed[0])) not in allowed:
                raise InputError(f"{key}.model_type = {named!r}: of a {self.kind} it can be {' or '.join(map(repr, allowed))}")
        full = complete(config)
        if wrong := [f"{key} = {full.get(key)!r}, not {value!r}" for key, value in self.fixed.items() if full.get(key) != value]:
            raise InputError(f"a {self.kind} with {'; '.join(wrong)}: cannot be read")
        text, vision = complete(text_part(full)), full["vision_config"]
        if vision["model_type"] != self.tower_type:
            raise InputError(f"vision_config.model_type = {vision['model_type']!r}: of a {self.kind} it can be {self.tower_type!r}")
        text["tie_word_embeddings"] = full.get("tie_word_embeddings", text["tie_word_embeddings"])
        layer = full.get("vision_feature_layer", -1)
        if not isinstance(layer, int) or layer >= 0:
            raise InputError(f"vision_feature_layer = {layer!r}: must be one layer, counted from the end")
        tower = self.tower(feature_layer=layer, settings=self._tower_settings(vision), mean=normalisation.mean, std=normalisation.std)
        return VLMSections(model_config(text, rows or 1), tower, self.adapter(full), VLMConfig(attention_mask=self.mask))

    def _tower_settings(self, config: Mapping[str, Any]) -> Settings:
        from transformers import CLIPVisionConfig, SiglipVisionConfig

        return tower_settings(config, CLIPVisionConfig() if self.tower is ClipConfig else SiglipVisionConfig())

    def tensor_name(self, name: str, job: JobConfig, text_family: str, layout: FileLayout) -> str:
        part, _, rest = name.partition(".")
        if part == "vision_encoder":
            return layout.vision + rest
        if part == "adapter":
            return layout.projector + self.adapter_names[rest]
        return layout.head if rest == HEAD else layout.text + hf_name(rest, text_family)

    def is_unread(self, name: str, layout: FileLayout, used: Collection[str]) -> bool:
        part = name.removeprefix(layout.vision)
        if part == name:
            return name == layout.head
        if layer := re.match(r"encoder\.layers\.\d+\.", part):
            return not any(other.startswith(layout.vision + layer[0]) for other in used)
        return UNREAD.match(part) is not None

    def check(self, job: JobConfig) -> str:
        if job.vlm is None or job.vlm.arch != VLMConfig.arch:
            raise InputError(f"vlm.arch is not {VLMConfig.arch!r}")
        if job.vlm.attention_mask != self.mask:
            raise InputError(f"vlm.attention_mask = {job.vlm.attention_mask!r}, not {self.mask!r}")
        if not isinstance(job.vision_encoder, self.tower):
            raise InputError(f"vision_encoder.type = {job.vision_encoder.type!r}, not {self.tower.type!r}")
        if job.model.rope_sections or job.vision_encoder.deepstack_layers:
            raise InputError("model.rope_sections and vision_encoder.deepstack_layers: its class has neither")
        self.check_images(job)
        if (layers := job.vision_encoder.feature_layers) != [-1] and (self.tower is SiglipConfig or len(layers) > 1):
            allowed = "-1" if self.tower is SiglipConfig else "one layer"
            raise InputError(f"vision_encoder.feature_layer = {job.vision_encoder.feature_layer}, not {allowed}")
        tower = job.vision_encoder
        if (size := getattr(tower, "image_size", 0)) not in (0, tower.settings.get("image_size")):
            raise InputError(f"vision_encoder.image_size = {size}: its class does not interpolate positions when it is called")
        wanted = self.adapter({"text_config": {"hidden_size": job.model.dim}, "scale_factor": getattr(job.adapter, "factor", 1)})
        given = job.adapter
        if isinstance(given, MLPAdapterConfig):
            given = MLPAdapterConfig(hidden_dim=given.hidden_dim or job.model.dim, bias=given.bias)
        if given != wanted:
            raise InputError(f"[adapter] is {given}, not {wanted}")
        problems = []
        for family in self.families:
            try:
                hf_config(job.model, family)
                return family
            except InputError as error:
                problems.append(str(error))
        raise InputError(problems[0])

    def check_images(self, job: JobConfig) -> None:
        """
        Raises:
            InputError: its class does not put the images of ``job`` in the stream as ``data.images`` does.
        """
        if any(section.images.rows for section in image_sections(job)):
            raise InputError("data.images.rows: in its class the tokens of a tile follow one another")

    def config(self, job: JobConfig, encoder: Any, image_tokens: int, image_id: int | None, ids: Ids) -> dict[str, Any]:
        tower, more = encoder.tower.config, self.more(job.model.dim, image_tokens)
        text = hf_config(job.model, self.check(job)) | dict(ids)
        del text["architectures"]
        vision = self._tower_settings(tower.to_dict()) | {"model_type": self.tower_type, "num_hidden_layers": tower.num_hidden_layers}
        return {
            "architectures": [self.architecture],
            "model_type": self.kind,
            "tie_word_embeddings": job.model.tie_embeddings,
            "text_config": text | more.text,
            "vision_config": vision | more.vision,
            **self.adapter_config(job.adapter),
            **ids,
            self.image_key: image_id,
            **more.whole,
        }

    def tensors(self, job: JobConfig, encoder: Any, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        layout, family = self.layouts[0], self.check(job)
        found = {self.tensor_name(name, job, family, layout): tensor for name, tensor in parameters.items()}
        for name, fill in zip(NORM_OF_CLS, (torch.ones, torch.zeros), strict=True):
            found.setdefault(layout.vision + name, fill(encoder.tower.config.hidden_size))
        return found


NEW_TOKENS = f"transformer.{NEW_EMBEDDING}"


@dataclass(frozen=True, kw_only=True)
class LlavaNext(StreamVLM):
    """LLaVA-NeXT, also called LLaVA 1.6 (Liu et al. 2024): the whole image, then tiles of it, without their
    padding and in rows, with one vector at the end of each: our token ``NEWLINE``, of which there is no logit.
    """

    def sections(self, config: dict[str, Any], rows: int, normalisation: Normalisation) -> VLMSections:
        found = super().sections(config, rows, normalisation)
        return replace(found, model=replace(found.model, new_tokens=[NEWLINE], unwritten_new_tokens=1))

    def images(self, config: dict[str, Any], fit: str) -> ImagesConfig:
        full = complete(config)
        side = square_side("vision_config.image_size", full["vision_config"]["image_size"])
        grids = pinpoint_grids("", full["image_grid_pinpoints"], side)
        if (1, 1) in grids:
            raise InputError(f"image_grid_pinpoints has {[side, side]}: its class shows such an image as a whole and as a tile, ours once")
        return ImagesConfig(fit="tiles", tiling="anyres", pinpoints=grids, markers=False, rows=True, padding="black")

    def tensor_name(self, name: str, job: JobConfig, text_family: str, layout: FileLayout) -> str:
        if name == NEW_TOKENS:
            return layout.projector.removesuffix("multi_modal_projector.") + "image_newline"
        return super().tensor_name(name, job, text_family, layout)

    def check(self, job: JobConfig) -> str:
        if job.model.new_tokens[-1:] == [NEWLINE]:
            job = replace(job, model=without_last_name(job.model))
        return super().check(job)

    def check_images(self, job: JobConfig) -> None:
        shown = _shown(job)
        rows = [one.tiling == "anyres" and one.rows and one.global_view and one.pinpoints == shown[0].pinpoints for one in shown]
        rows += [one.row_tokens() == [NEWLINE] for one in shown]
        if not rows or not all(rows):
            raise InputError(
                "data.images: in its class all images are a whole view and tiles in rows, with the same pinpoints (fit = 'tiles', "
                f"tiling = 'anyres', markers = false, rows = true, row_token = {NEWLINE!r}, global_view = true)"
            )
        if any(tuple(grid) == (1, 1) for grid in shown[0].pinpoints):
            raise InputError(f"data.images.pinpoints = {shown[0].pinpoints}: its class shows an image of [1, 1] as a tile, too")

    def check_built(self, job: JobConfig, encoder: Any, tokenizer: Tokenizer) -> None:
        if job.model.new_tokens[-1:] != [NEWLINE]:
            raise InputError(f"model.new_tokens = {job.model.new_tokens}: the last must be {NEWLINE!r}, which its class has as a vector")

    def config(self, job: JobConfig, encoder: Any, image_tokens: int, image_id: int | None, ids: Ids) -> dict[str, Any]:
        side, pinpoints = encoder.image_size, _shown(job)[0].pinpoints
        pixels = [[rows * side, columns * side] for rows, columns in pinpoints]
        return super().config(job, encoder, image_tokens, image_id, ids) | {"image_grid_pinpoints": pixels}


def _shown(job: JobConfig) -> list[ImagesConfig]:
    """``data.images`` of all data that may have some."""
    return [section.images for section in image_sections(job) if not isinstance(section, TextConfig)]


_LLAVA_KEYS = {"projector_hidden_act": "gelu", "multimodal_projector_bias": True, "vision_feature_select_strategy": "default"}


def _idefics(kind: str, name: str) -> StreamVLM:
    return StreamVLM(
        kind=kind,
        architecture=f"{name}ForConditionalGeneration",
        families=("llama",),
        tower=SiglipConfig,
        tower_type=f"{kind}_vision",
        tower_aliases=(kind,),
        layouts=(CONNECTOR,),
        adapter=lambda config: PixelShuffleConfig(factor=config["scale_factor"], bias=False),
        adapter_config=lambda adapter: {"scale_factor": getattr(adapter, "factor", 1)},
        adapter_names={"proj.weight": "modality_projection.proj.weight"},
        fixed={},
        image_key="image_token_id",
        images_by_row=True,
        processors=(f"{name}Processor", LLAVA),
        image_processor=f"{name}ImageProcessor",
        data={
            "template": "turns",
            "turns": TurnsConfig(
                user=f"User:{FRAME}{{prompt}}<end_of_utterance>\n",
                assistant="Assistant:",
                answer=" {answer}",
                end="<end_of_utterance>",
                separator="\n",
            ),
        },
    )


_LLAVA = StreamVLM(
    kind="llava",
    architecture="LlavaForConditionalGeneration",
    families=("llama", "mistral", "qwen2", "qwen3"),
    tower=ClipConfig,
    tower_type="clip_vision_model",
    layouts=(HUB, SAVED, MEMORY),
    adapter=lambda config: MLPAdapterConfig(hidden_dim=config["text_config"]["hidden_size"]),
    adapter_config=lambda adapter: _LLAVA_KEYS,
    adapter_names={f"proj.fc{k}.{part}": f"linear_{k}.{part}" for k in (1, 2) for part in ("weight", "bias")},
    fixed=_LLAVA_KEYS,
    image_key="image_token_index",
    more=lambda dim, image_tokens: MoreKeys({"image_seq_length": image_tokens, "vision_feature_layer": -1}, {}, {}),
    processors=(LLAVA,),
    image_processor="CLIPImageProcessor",
    data={"prompt_template": "USER: <image>\n{prompt} ASSISTANT:", "answer_template": " {answer}"},
)
_LLAVA_NEXT: dict[str, Any] = {
    **vars(_LLAVA),
    "kind": "llava_next",
    "architecture": "LlavaNextForConditionalGeneration",
    "processors": (LLAVA_NEXT,),
    "image_processor": "LlavaNextImageProcessor",
    "newline": True,
}

_FAMILIES = (
    StreamVLM(
        kind="paligemma",
        architecture="PaliGemmaForConditionalGeneration",
        families=("gemma", "gemma2"),
        tower=SiglipConfig,
        tower_type="siglip_vision_model",
        layouts=(HUB, SAVED, MEMORY),
        adapter=lambda config: LinearAdapterConfig(),
        adapter_config=lambda adapter: {},
        adapter_names={"proj.weight": "linear.weight", "proj.bias": "linear.bias"},
        mask="prefix",
        text_unread=("use_bidirectional_attention",),
        fixed={},
        image_key="image_token_index",
        more=lambda dim, image_tokens: MoreKeys(
            whole={"hidden_size": dim, "projection_dim": dim},
            text={"num_image_tokens": image_tokens},
            vision={"projection_dim": dim, "num_image_tokens": image_tokens, "vision_use_head": False},
        ),
        processors=(PALIGEMMA, LLAVA),
        image_processor="SiglipImageProcessor",
        data={"template": "paligemma"},
    ),
    _LLAVA,
    LlavaNext(**_LLAVA_NEXT),
    _idefics("idefics3", "Idefics3"),
    _idefics("smolvlm", "SmolVLM"),
    *QWEN_VL,
    MLLAMA,
    *DUAL_ENCODERS,
)
VLM_FAMILIES: dict[str, VLMFamily] = {family.kind: family for family in _FAMILIES}
"""``model_type`` -> family. A model of ours is written as the first that can be it."""


def text_part(config: dict[str, Any]) -> dict[str, Any]:
    """The language model in a ``config.json``, which may be all of it, without keys that are
    ``vlm.attention_mask`` here.
    """
    text, family = config.get("text_config", config), VLM_FAMILIES.get(str(config.get("model_type")))
    if family is not None and family.text_unread and isinstance(text, dict):
        return {key: value for key, value in text.items() if key not in family.text_unread}
    return text


class Fitting(NamedTuple):
    """The class that can be a model, and ``model_type`` of its text model."""

    family: VLMFamily
    text_family: str


def fitting(job: JobConfig) -> Fitting:
    """The first family that can be the model of ``job``.

    Raises:
        InputError: there is none; the message says why, class by class.
    """
    kinds = () if job.vlm is None else job.vlm.stands_for
    reasons: dict[str, list[str]] = {}
    for family in [VLM_FAMILIES[kind] for kind in kinds] or [one for one in _FAMILIES if one not in (MLLAMA, *DUAL_ENCODERS)]:
        try:
            return Fitting(family, family.check(job))
        except InputError as error:
            reasons.setdefault(str(error), []).append(family.kind)
    listed = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
    raise InputError(f"no class of transformers is this model ({listed})")
