"""Checkpoints of LLaVA 1.5 under the names of its own code (Liu et al. 2023, arXiv 2310.03744), as in
``liuhaotian/llava-v1.5-7b``: settings, names and checks.

The vision tower is often not in its files, and its sizes never are in its ``config.json``, which only names
it: ``mm_vision_tower``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from kempnerforge.config.job import JobConfig
from kempnerforge.interop.external import ExternalModel, FileTensor, image_job, match_tensors, model_parameters, tied_head
from kempnerforge.interop.families import HF_EMBEDDING, HF_HEAD
from kempnerforge.interop.vlm_family import FileLayout
from kempnerforge.interop.vlms import VLM_FAMILIES, StreamVLM
from kempnerforge.model.hf_files import num_rows, read_config, tensor_files
from kempnerforge.model.image_processor import Normalisation, read_image_settings
from kempnerforge.util.errors import InputError, show

TOWER = "model.vision_tower.vision_tower.vision_model."
"""What the tower's tensors begin with, if they are in the files."""
_LARGE = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "patch_size": 14, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip
KNOWN = {"openai/clip-vit-large-patch14-336": _LARGE | {"image_size": 336}, "openai/clip-vit-large-patch14": _LARGE | {"image_size": 224}}
"""Towers whose sizes need no directory."""
KINDS = ("llava", "llava_llama")
FIXED: dict[str, tuple[Any, ...]] = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_vision_select_feature": ("patch", None),
    "mm_patch_merge_type": ("flat", None),
    "mm_resampler_type": (None,),
    "mm_use_im_start_end": (False, None),
    "mm_use_im_patch_token": (False, None),
    "s2": (False, None),
}
"""Key -> the values that can be read."""
UNREAD = ("mm_hidden_size", "mm_projector_lr", "mm_vision_tower_lr", "mm_vision_tower", "mm_vision_select_layer")
FITS = {"pad": "letterbox", "square": "crop", None: "crop"}
"""``image_aspect_ratio`` -> ``data.images.fit``."""
OWN = ("mm_", "image_", "tune_", "freeze_", "unfreeze_", "use_mm_")
"""Beginnings of keys that are no setting of the language model."""
_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_DATA = {"prompt_template": f"{_SYSTEM} USER: <image>\n{{prompt}} ASSISTANT:", "answer_template": " {answer}"}
NOTE = "prompts have the system prompt and the roles of its template 'vicuna_v1'"


class Tower(NamedTuple):
    """The vision tower: its ``config.json``, its files by the names in them, and what these begin with."""

    config: dict[str, Any]
    files: dict[str, Path]
    prefix: str
    normalisation: Normalisation


def is_one(config: dict[str, Any]) -> bool:
    """Whether this ``config.json`` is LLaVA's own."""
    return "mm_vision_tower" in config


def open_llava(path: Path, config: dict[str, Any], files: dict[str, Path]) -> ExternalModel:
    """A directory of LLaVA 1.5. Reads names, not the weights.

    Raises:
        InputError: ours cannot be this model, its tower cannot be found, or tensors are missing or unknown.
    """
    if (kind := config.get("model_type")) not in KINDS:
        raise InputError(f"model_type = {show(kind)}: of LLaVA's own checkpoints only {' and '.join(KINDS)} are read")
    for key, allowed in FIXED.items():
        if config.get(key) not in allowed:
            raise InputError(f"{key} = {show(config.get(key))}: only {' or '.join(map(repr, allowed))} can be read")
    if unknown := [key for key in config if key.startswith("mm_") and key not in (*FIXED, *UNREAD)]:
        raise InputError(f"{unknown[0]} = {show(config[unknown[0]])}: is not known")
    if (aspect := config.get("image_aspect_ratio")) not in [*FITS]:  # a list, as it may be a table
        raise InputError(f"image_aspect_ratio = {show(aspect)}: only 'pad' and 'square' can be read; views are of LLaVA 1.6 and later")
    if not isinstance(layer := config.get("mm_vision_select_layer"), int) or layer >= 0:
        raise InputError(f"mm_vision_select_layer = {show(layer)}: must be one layer, counted from the end")
    tower = _tower(path, config["mm_vision_tower"], files)
    text = {key: value for key, value in config.items() if not key.startswith(OWN)} | {"model_type": "llama"}
    whole = {"model_type": "llava", "text_config": text, "vision_config": tower.config, "vision_feature_layer": layer}
    whole["tie_word_embeddings"] = config.get("tie_word_embeddings", False)
    known = VLM_FAMILIES["llava"]
    assert isinstance(known, StreamVLM)
    names = {f"proj.fc{k + 1}.{part}": f"{2 * k}.{part}" for k in (0, 1) for part in ("weight", "bias")}
    family = replace(known, adapter_names=names)
    embedding = f"model.{HF_EMBEDDING}"
    sections = family.sections(whole, num_rows(files, embedding) if embedding in files else 0, tower.normalisation)
    job = image_job(JobConfig(**vars(sections)), _DATA, FITS[aspect])
    layout, parameters = FileLayout(tower.prefix, "model.mm_projector.", "model.", HF_HEAD), model_parameters(job)
    wanted = {name: FileTensor(family.tensor_name(name, job, "llama", layout)) for name in parameters}
    used = {f".{source.name.removeprefix(tower.prefix)}" for source in wanted.values() if source.name in tower.files}

    def unread(name: str) -> bool:
        part = f".{name.removeprefix(tower.prefix)}"
        return name == HF_HEAD or (name in tower.files and family.is_unread(part, layout._replace(vision="."), used))

    everything = files | tower.files
    tensors = match_tensors(path, wanted, everything, unread)
    tied = tied_head(tensors, everything, HF_HEAD)
    return ExternalModel(path, "", job, parameters, tensors, everything, tied=tied, notes=(NOTE,))


def _tower(path: Path, name: Any, files: dict[str, Path]) -> Tower:
    if not isinstance(name, str) or not name:
        raise InputError(f"mm_vision_tower = {show(name)}: must be the name or directory of a CLIP vision tower")
    folder = next((place for place in (Path(name).expanduser(), path / name) if place.is_dir()), None)
    inside = {tensor: file for tensor, file in files.items() if tensor.startswith(TOWER)}
    if folder is None:
        what = "its sizes are not known" if inside else "it is not in these files"
        if not inside or name not in KNOWN:
            raise InputError(
                f"mm_vision_tower = {show(name)}: {what}, and this is no directory; download the tower as safetensors, "
                "with its config.json, and write its directory there"
            )
        return Tower(KNOWN[name], inside, TOWER, Normalisation([], []))
    config, images = read_config(folder), read_image_settings(folder)
    config = config.get("vision_config", config)
    if config.get("model_type", "clip_vision_model") != "clip_vision_model":
        raise InputError(f"mm_vision_tower = {show(name)}: holds a {config['model_type']!r}; only CLIP's are read")
    given = tensor_files(folder) if not inside else {}
    prefix = next((start for start in ("vision_model.", "") if any(tensor.startswith(start) for tensor in given)), "")
    found = inside or {tensor: file for tensor, file in given.items() if tensor.startswith(prefix)}
    normalisation = (images.normalisation if images else None) or Normalisation([], [])
    return Tower(config, found, TOWER if inside else prefix, normalisation)
