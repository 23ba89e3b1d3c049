"""Files of a processor of transformers that prepares images as our data code does, and where the processor of
a directory differs from it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from kempnerforge.config.images import ImagesConfig
from kempnerforge.interop.vlm_family import FRAMED, LLAVA, LLAVA_NEXT, VLMFamily
from kempnerforge.interop.vlms import VLM_FAMILIES
from kempnerforge.model.image_processor import PREPROCESSOR, PROCESSOR, ImageSettings, processor_classes

BICUBIC = 3


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def image_settings(
    family: VLMFamily, name: str, size: int, normalisation: tuple[Sequence[float], Sequence[float]], images: ImagesConfig
) -> dict[str, Any]:  # fmt: skip
    """The file of an image processor that makes views of ``size`` pixels of an image, for the processor
    ``name``. Arguments: see ``processor_candidates``.
    """
    (mean, std), square = normalisation, _square(size)
    return {
        "processor_class": name,
        "image_processor_type": family.image_processor if images.fit != "crop" else "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size} if images.fit != "squash" else square,
        "resample": BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
        "do_center_crop": images.fit != "squash",
        "crop_size": square,
    }


def processor_candidates(
    kind: str, size: int, normalisation: tuple[Sequence[float], Sequence[float]], images: ImagesConfig, image_tokens: int, placeholder: str
) -> dict[str, dict[str, dict[str, Any]]]:  # fmt: skip
    """Processors that may do what our data code does, the most likely first: class -> its files by name,
    without the tokenizer's.

    Args:
        size: pixels of a view's side.
        normalisation: mean and std.
        images: ``data.images``.
        image_tokens: of one image.
        placeholder: ``data.image_placeholder``.
    """
    family = VLM_FAMILIES.get(kind)
    if family is None or not family.processors:
        return {}
    framed, in_rows = family.processors[0] in FRAMED, family.newline and images.padding == "black"
    if images.fit not in (("squash",) if framed else ("tiles",) if in_rows else ("squash", "crop")):
        return {}
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name in family.processors:
        settings = _settings(name, size, image_tokens, placeholder)
        if settings is None:
            continue
        pixels = image_settings(family, name, size, normalisation, images) | {"image_seq_length": image_tokens}
        if framed:
            del pixels["do_center_crop"], pixels["crop_size"]
            pixels |= {"do_image_splitting": False, "max_image_size": {"longest_edge": size}}
        if in_rows:
            pixels |= {"do_pad": True, "image_grid_pinpoints": [[rows * size, columns * size] for rows, columns in images.pinpoints]}
        found[name] = {PREPROCESSOR: pixels, PROCESSOR: {"processor_class": name, **settings}}
    return found


def _settings(name: str, size: int, image_tokens: int, placeholder: str) -> dict[str, Any] | None:
    """Settings of the processor itself; None: it cannot serve."""
    if name not in (LLAVA, LLAVA_NEXT):
        return ({"image_seq_len": image_tokens} if name in FRAMED else {}) if placeholder == "<image>" else None
    side = math.isqrt(image_tokens)
    patch = size // side  # what it counts the tokens of an image with
    if (size // patch) ** 2 != image_tokens:
        return None
    return {
        "patch_size": patch,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
        "image_token": placeholder,
    }


# ---- reading -------------------------------------------------------------------------------------


def followed_processor(path: Path, kind: str) -> str | None:
    """The class of a directory's processor, among those that we follow for its ``model_type``; None: there is
    none.
    """
    family = VLM_FAMILIES.get(kind)
    if family is None or not family.processors:
        return None
    return next((name for name in processor_classes(path) if name in family.processors), family.processors[0])


def differing_settings(files: ImageSettings, side: int) -> list[str]:
    """Settings of an image processor that do not give one square of ``side`` pixels, bicubic: reasons for
    other pixels.
    """
    wanted: dict[str, Any] = {"do_resize": True, "resample": BICUBIC, "do_image_splitting": False, "do_pad": False}
    if "max_image_size" in files.settings:
        wanted |= {"max_image_size": {"longest_edge": side}}
        del wanted["do_pad"]
    wanted["size"] = {"shortest_edge": side} if files.fit == "crop" else _square(side)
    if files.settings.get("do_center_crop"):
        wanted["crop_size"] = _square(side)
    differing = {key: found for key, value in wanted.items() if (found := files.settings.get(key, value)) != value}
    return [f"{key} = {found.value if isinstance(found, Enum) else json.dumps(found)}" for key, found in differing.items()]
