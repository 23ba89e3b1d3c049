"""Vision-language models of transformers that are one stream of image tokens and words, as data: a table per class, both directions.

What they are here: the class's vision tower under its own names, an adapter, and a text backbone of one of the ``FAMILIES``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from kempnerforge.config.adapter import AdapterConfig, LinearAdapterConfig, MLPAdapterConfig, PixelShuffleConfig
from kempnerforge.config.job import JobConfig
from kempnerforge.config.model import ModelConfig
from kempnerforge.config.template import TurnsConfig
from kempnerforge.config.vision import ClipConfig, HFTowerConfig, SiglipConfig, square_side
from kempnerforge.config.vlm import VLMConfig
from kempnerforge.interop.processors import FRAME
from kempnerforge.interop.settings import complete, hf_config, model_config, text_part
from kempnerforge.util.errors import InputError

BOOKKEEPING = {"initializer_range", "initializer_factor", "projection_dim", "vocab_size", "vision_use_head", "num_image_tokens"}
"""Keys of a tower's config that do not change what its patches are."""

NORM_OF_CLS = ("post_layernorm.weight", "post_layernorm.bias")
"""In CLIP it is for the CLS token alone: our tower has none, and the class wants them all the same."""


class FileLayout(NamedTuple):
    """Where the parts of a model are in its files: prefixes, and the full name of the output head."""

    vision: str
    projector: str
    text: str
    head: str


HUB = FileLayout("vision_tower.vision_model.", "multi_modal_projector.", "language_model.model.", "language_model.lm_head.weight")
SAVED = HUB._replace(vision="vision_tower.")  # what save_pretrained of transformers 5 writes
MEMORY = FileLayout("model.vision_tower.", "model.multi_modal_projector.", "model.language_model.", "lm_head.weight")
CONNECTOR = FileLayout("model.vision_model.", "model.connector.", "model.text_model.", "lm_head.weight")


@dataclass(frozen=True)
class Wrapper:
    """One vision-language class.

    Attributes:
        architecture: its name in transformers.
        families: kinds of text model that it may have; the first that fits is written.
        tower: our config class of its vision tower.
        tower_type: ``model_type`` of that tower in its ``config.json``, and ``tower_aliases`` what older files call it.
        layouts: the forms that its files have had; the first is written.
        adapter: makes ``[adapter]`` from its ``config.json``.
        adapter_config: the inverse: keys of ``config.json`` that say what ``[adapter]`` does.
        adapter_names: our names in the adapter -> theirs.
        mask: ``vlm.attention_mask``.
        data: keys of ``[data]`` that say how its texts are written, with one image in front of the prompt.
        fixed: keys of ``config.json`` -> the one value that can be read.
        images_by_row: its ``pixel_values`` have an axis for the images of a row.
    """

    architecture: str
    families: tuple[str, ...]
    tower: type[HFTowerConfig]
    tower_type: str
    layouts: tuple[FileLayout, ...]
    adapter: Callable[[dict[str, Any]], AdapterConfig]
    adapter_config: Callable[[AdapterConfig], dict[str, Any]]
    adapter_names: Mapping[str, str]
    mask: str
    data: Mapping[str, Any]
    fixed: Mapping[str, Any]
    images_by_row: bool = False
    tower_aliases: tuple[str, ...] = ()


def _idefics(architecture: str, kind: str) -> Wrapper:
    return Wrapper(
        architecture,
        ("llama",),
        SiglipConfig,
        f"{kind}_vision",
        (CONNECTOR,),
        lambda config: PixelShuffleConfig(factor=config["scale_factor"], bias=False),
        lambda adapter: {"scale_factor": getattr(adapter, "factor", 1)},
        {"proj.weight": "modality_projection.proj.weight"},
        "causal",
        {
            "template": "turns",
            "turns": TurnsConfig(
                user=f"User:{FRAME}{{prompt}}<end_of_utterance>\n",
                assistant="Assistant:",
                answer=" {answer}",
                end="<end_of_utterance>",
                separator="\n",
            ),
        },
        {},
        images_by_row=True,
        tower_aliases=(kind,),
    )


WRAPPERS: dict[str, Wrapper] = {
    "paligemma": Wrapper(
        "PaliGemmaForConditionalGeneration",
        ("gemma", "gemma2"),
        SiglipConfig,
        "siglip_vision_model",
        (HUB, SAVED, MEMORY),
        lambda config: LinearAdapterConfig(),
        lambda adapter: {},
        {"proj.weight": "linear.weight", "proj.bias": "linear.bias"},
        "prefix",
        {"template": "paligemma"},
        {},
    ),
    "llava": Wrapper(
        "LlavaForConditionalGeneration",
        ("llama", "mistral", "qwen2", "qwen3"),
        ClipConfig,
        "clip_vision_model",
        (HUB, SAVED, MEMORY),
        lambda config: MLPAdapterConfig(hidden_dim=config["text_config"]["hidden_size"]),
        lambda adapter: {"projector_hidden_act": "gelu", "multimodal_projector_bias": True, "vision_feature_select_strategy": "default"},
        {f"proj.fc{k}.{part}": f"linear_{k}.{part}" for k in (1, 2) for part in ("weight", "bias")},
        "causal",
        {"prompt_template": "USER: <image>\n{prompt} ASSISTANT:", "answer_template": " {answer}"},
        {"projector_hidden_act": "gelu", "multimodal_projector_bias": True, "vision_feature_select_strategy": "default"},
    ),
    "idefics3": _idefics("Idefics3ForConditionalGeneration", "idefics3"),
    "smolvlm": _idefics("SmolVLMForConditionalGeneration", "smolvlm"),
}
"""``model_type`` -> class. A model of ours is written as the first that can be it."""


@dataclass(frozen=True)
class VLMSections:
    """The sections that a ``config.json`` amounts to."""

    model: ModelConfig
    vision_encoder: HFTowerConfig
    adapter: AdapterConfig
    vlm: VLMConfig


def read_vlm_config(config: dict[str, Any], vocab_size: int, norm: tuple[list[float], list[float]] | None) -> VLMSections:
    """The sections of a model.

    Args:
        config: ``config.json`` as it is, of one of the ``WRAPPERS``.
        vocab_size: rows of the embedding in the files.
        norm: mean and std of the pixels, where the image processor beside it says; else the tower family's.

    Raises:
        ValueError: a kind of its class that ours cannot be.
    """
    kind = config["model_type"]
    wrapper = WRAPPERS[kind]
    for key, allowed in (("text_config", wrapper.families), ("vision_config", (wrapper.tower_type, *wrapper.tower_aliases))):
        if (named := (config.get(key) or {}).get("model_type", allowed[0])) not in allowed:
            raise InputError(f"{key}.model_type = {named!r}: of a {kind} it can be {' or '.join(map(repr, allowed))}")
    full = complete(config)
    if wrong := [f"{key} = {full.get(key)!r}, not {value!r}" for key, value in wrapper.fixed.items() if full.get(key) != value]:
        raise InputError(f"a {kind} with {'; '.join(wrong)}: cannot be read")
    text, vision = complete(text_part(full)), full["vision_config"]
    if vision["model_type"] != wrapper.tower_type:
        raise InputError(f"vision_config.model_type = {vision['model_type']!r}: of a {kind} it can be {wrapper.tower_type!r}")
    text["tie_word_embeddings"] = full.get("tie_word_embeddings", text["tie_word_embeddings"])
    layer = full.get("vision_feature_layer", -1)
    if not isinstance(layer, int) or layer >= 0:
        raise InputError(f"vision_feature_layer = {layer!r}: must be one layer, counted from the end")
    mean, std = norm or ([], [])
    tower = wrapper.tower(feature_layer=layer, settings=tower_settings(vision, wrapper.tower), mean=mean, std=std)
    model = model_config(text, vocab_size)
    return VLMSections(model, tower, wrapper.adapter(full), VLMConfig(attention_mask=wrapper.mask))


def tower_settings(config: dict[str, Any], tower: type[HFTowerConfig]) -> dict[str, bool | int | float | str]:
    """``vision_encoder.settings`` of a tower's ``config.json``."""
    from transformers import CLIPVisionConfig, PretrainedConfig, SiglipVisionConfig

    known = (CLIPVisionConfig if tower is ClipConfig else SiglipVisionConfig)()
    kept = known.to_dict().keys() - PretrainedConfig().to_dict().keys() - BOOKKEEPING
    return {"model_type": known.model_type} | scalars(config, kept)


def scalars(config: Mapping[str, Any], kept: Iterable[str]) -> dict[str, bool | int | float | str]:
    """The settings of a tower's ``config.json`` among ``kept``, sizes as one number.

    Raises:
        ValueError: a size is no square.
    """
    sizes = {key: square_side(f"vision_config.{key}", config[key]) for key in ("image_size", "patch_size") if key in config}
    found = {**config, **sizes}
    return {key: found[key] for key in sorted(kept) if isinstance(found.get(key), bool | int | float | str)}


# ---- ours to theirs -------------------------------------------------------------------------------------------------


def fitting(job: JobConfig) -> str:
    """The ``model_type`` that can be the model of ``job``.

    Raises:
        ValueError: there is none; the message says why, class by class.
    """
    reasons: dict[str, list[str]] = {}
    for kind in WRAPPERS:
        try:
            text_family(job, kind)
            return kind
        except InputError as error:
            reasons.setdefault(str(error), []).append(kind)
    said = "; ".join(f"{', '.join(kinds)}: {reason}" for reason, kinds in reasons.items())
    raise InputError(f"no class of transformers is this model ({said})")


def text_family(job: JobConfig, kind: str) -> str:
    """The ``model_type`` of its text model, if a ``kind`` can be the model of ``job``.

    Raises:
        ValueError: it cannot.
    """
    wrapper = WRAPPERS[kind]
    if job.vlm is None or job.vlm.arch != VLMConfig.arch:
        raise InputError(f"vlm.arch is not {VLMConfig.arch!r}")
    if job.vlm.attention_mask != wrapper.mask:
        raise InputError(f"vlm.attention_mask = {job.vlm.attention_mask!r}, not {wrapper.mask!r}")
    if not isinstance(job.vision_encoder, wrapper.tower):
        raise InputError(f"vision_encoder.type = {job.vision_encoder.type!r}, not {wrapper.tower.type!r}")
    if wrapper.tower is SiglipConfig and job.vision_encoder.feature_layer != -1:
        raise InputError(f"vision_encoder.feature_layer = {job.vision_encoder.feature_layer}, not -1")
    like = wrapper.adapter({"text_config": {"hidden_size": job.model.dim}, "scale_factor": getattr(job.adapter, "factor", 1)})
    ours = job.adapter
    if isinstance(ours, MLPAdapterConfig):
        ours = MLPAdapterConfig(hidden_dim=ours.hidden_dim or job.model.dim, bias=ours.bias)
    if ours != like:
        raise InputError(f"[adapter] is {ours}, not {like}")
    problems = []
    for family in wrapper.families:
        try:
            hf_config(job.model, family)
            return family
        except InputError as error:
            problems.append(str(error))
    raise InputError(problems[0])


def write_vlm_config(
    job: JobConfig, kind: str, tower: Any, image_tokens: int, image_id: int, ids: Mapping[str, int | None]
) -> dict[str, Any]:
    """The ``config.json`` of ``job``'s model as a ``kind``.

    Args:
        tower: the config of our tower in transformers, with the layers that ours has.
        image_tokens: of one image.
        image_id: the token at their places.
        ids: "bos_token_id", "eos_token_id" and "pad_token_id".

    Raises:
        ValueError: it cannot be one.
    """
    wrapper = WRAPPERS[kind]
    text = hf_config(job.model, text_family(job, kind)) | dict(ids)
    del text["architectures"]
    vision = tower_settings(tower.to_dict(), wrapper.tower) | {
        "model_type": wrapper.tower_type,
        "num_hidden_layers": tower.num_hidden_layers,
    }
    config: dict[str, Any] = {
        "architectures": [wrapper.architecture],
        "model_type": kind,
        "tie_word_embeddings": job.model.tie_embeddings,
        "text_config": text,
        "vision_config": vision,
        **wrapper.adapter_config(job.adapter),
        **ids,
    }
    if kind == "paligemma":
        width = {"projection_dim": job.model.dim, "num_image_tokens": image_tokens}
        config |= {"image_token_index": image_id, "hidden_size": job.model.dim, "projection_dim": job.model.dim}
        config["vision_config"] = vision | width | {"vision_use_head": False}
        config["text_config"] = text | {"num_image_tokens": image_tokens}
    elif kind == "llava":
        config |= {"image_token_index": image_id, "image_seq_length": image_tokens, "vision_feature_layer": -1}
    else:
        config |= {"image_token_id": image_id}
    return config
