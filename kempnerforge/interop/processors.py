"""Processors of transformers as data: the files that make one do what our data code does, and what a directory's own does otherwise."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from kempnerforge.config.images import ImagesConfig
from kempnerforge.model.image_files import PREPROCESSOR, PROCESSOR, ImageFiles
from kempnerforge.util.reading import read_object

LLAVA, PALIGEMMA = "LlavaProcessor", "PaliGemmaProcessor"
FRAMED = ("Idefics3Processor", "SmolVLMProcessor")
"""These write ``FRAME`` in the place of "<image>"."""
FAKE, GLOBAL = "<fake_token_around_image>", "<global-img>"
FRAME = f"{FAKE}{GLOBAL}<image>{FAKE}"
BICUBIC = 3


class Known(NamedTuple):
    """What the processors of one ``model_type`` are.

    Attributes:
        processors: classes that can serve; its own is the first. LLaVA's is the one that writes nothing but the images' tokens into a text.
        images: the class of its image processor.
    """

    processors: tuple[str, ...]
    images: str


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


KNOWN = {
    "paligemma": Known((PALIGEMMA, LLAVA), "SiglipImageProcessor"),
    "llava": Known((LLAVA,), "CLIPImageProcessor"),
    "idefics3": Known(("Idefics3Processor", LLAVA), "Idefics3ImageProcessor"),
    "smolvlm": Known(("SmolVLMProcessor", LLAVA), "SmolVLMImageProcessor"),
}
"""``model_type`` -> its processors. One that is not here has none that makes single views."""


# ---- ours to theirs -------------------------------------------------------------------------------------------------


def processor_candidates(
    kind: str, size: int, normalisation: tuple[Sequence[float], Sequence[float]], images: ImagesConfig, image_tokens: int, placeholder: str
) -> dict[str, dict[str, dict[str, Any]]]:  # fmt: skip
    """Processors that may do what our data code does, the likeliest first: class -> its files by name, without those of the tokenizer.

    Args:
        size: pixels of a view's side.
        normalisation: mean and std.
        images: ``data.images``.
        image_tokens: of one image.
        placeholder: ``data.image_placeholder``.
    """
    known = KNOWN.get(kind)
    framed = known is not None and known.processors[0] in FRAMED
    if known is None or images.fit not in (("squash",) if framed else ("squash", "crop")):
        return {}
    (mean, std), square = normalisation, _square(size)
    pixels: dict[str, Any] = {
        "image_processor_type": known.images if images.fit == "squash" else KNOWN["llava"].images,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size} if images.fit == "crop" else square,
        "resample": BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
        "image_seq_length": image_tokens,
    }
    if framed:
        pixels |= {"do_image_splitting": False, "max_image_size": {"longest_edge": size}}
    else:
        pixels |= {"do_center_crop": images.fit == "crop", "crop_size": square}
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name in known.processors:
        settings = _settings(name, size, image_tokens, placeholder)
        if settings is not None:
            found[name] = {PREPROCESSOR: {"processor_class": name, **pixels}, PROCESSOR: {"processor_class": name, **settings}}
    return found


def _settings(name: str, size: int, image_tokens: int, placeholder: str) -> dict[str, Any] | None:
    """Of a processor's own; None: it cannot serve."""
    if name != LLAVA:
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


# ---- theirs ---------------------------------------------------------------------------------------------------------


def followed_processor(path: Path, kind: str) -> str | None:
    """The class of a directory's processor; None: of a kind that we do not follow.

    Args:
        path: the directory.
        kind: its ``model_type``.
    """
    known = KNOWN.get(kind)
    if known is None:
        return None
    files = [read_object(path / name) for name in (PROCESSOR, PREPROCESSOR) if (path / name).is_file()]
    return next((name for file in files if (name := file.get("processor_class")) in known.processors), known.processors[0])


def differing_settings(files: ImageFiles, side: int) -> list[str]:
    """Settings of an image processor that make anything but one square of ``side`` pixels, bicubic: reasons for other pixels."""
    wanted: dict[str, Any] = {"do_resize": True, "resample": BICUBIC, "do_image_splitting": False, "do_pad": False}
    if "max_image_size" in files.settings:
        wanted |= {"max_image_size": {"longest_edge": side}}
        del wanted["do_pad"]
    wanted["size"] = {"shortest_edge": side} if files.fit == "crop" else _square(side)
    if files.settings.get("do_center_crop"):
        wanted["crop_size"] = _square(side)
    differing = {key: found for key, value in wanted.items() if (found := files.settings.get(key, value)) != value}
    return [f"{key} = {found.value if isinstance(found, Enum) else json.dumps(found)}" for key, found in differing.items()]
