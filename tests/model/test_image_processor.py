"""Files of image processors, against what the classes of transformers make of the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from kempnerforge.config.vision import square_side
from kempnerforge.model.image_processor import PREPROCESSOR, PROCESSOR, read_image_settings
from kempnerforge.util.errors import InputError, library_call

CLASSES = ("CLIPImageProcessor", "SiglipImageProcessor", "BitImageProcessor", "ViTImageProcessor")
SIDE = 28
KEYS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "own mean": {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
    "factor": {"rescale_factor": 1 / 127.5},
    "no rescale": {"do_rescale": False},
    "no normalize": {"do_normalize": False},
    "neither": {"do_rescale": False, "do_normalize": False},
    "factor alone": {"rescale_factor": 0.01, "do_normalize": False},
}


def write(path: Path, name: str, content: Any) -> None:
    (path / name).write_text(json.dumps(content))


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("name", CLASSES)
def test_mean_and_std_give_the_pixels_of_the_class(name: str, keys: str, tmp_path: Path) -> None:
    size = {"size": {"height": SIDE, "width": SIDE}, "do_center_crop": False}
    write(tmp_path, PREPROCESSOR, {"image_processor_type": name, **size, **KEYS[keys]})
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
    theirs = getattr(transformers, f"{name}Pil")(**size, **KEYS[keys])(images=picture, return_tensors="pt")["pixel_values"][0]
    files = read_image_settings(tmp_path)
    assert files is not None and files.normalisation is not None
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in files.normalisation)
    ours = (torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255 - mean) / std
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max().clamp(min=1)
    assert type(files.processor).__name__ == f"{name}Pil"


def test_nested_settings_come_first(tmp_path: Path) -> None:
    kind = {"image_processor_type": "SiglipImageProcessor"}
    write(tmp_path, PREPROCESSOR, kind | {"image_mean": [0.1] * 3, "image_std": [0.1] * 3})
    write(tmp_path, PROCESSOR, {"processor_class": "LlavaProcessor"})
    write(tmp_path, "video_preprocessor_config.json", {"image_mean": [0.9] * 3})
    assert (files := read_image_settings(tmp_path)) and files.normalisation == ([0.1] * 3, [0.1] * 3)
    write(tmp_path, PROCESSOR, {"image_processor": kind | {"image_mean": [0.2] * 3, "image_std": [0.3] * 3}})
    assert (files := read_image_settings(tmp_path)) and files.normalisation == ([0.2] * 3, [0.3] * 3)


def test_nothing_there_is_nothing_said(tmp_path: Path) -> None:
    assert read_image_settings(tmp_path) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "no JSON object"),
        ({"image_processor_type": "TheirOwnImageProcessor"}, "TheirOwnImageProcessor.*leaves mean and std"),
        ({"image_mean": [0.5], "image_std": [0.5]}, "image_mean"),
        ({"image_mean": [0.5] * 3, "image_std": [0, 1, 1]}, "image_std"),
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 0}, "rescale_factor"),
    ],
)
def test_what_cannot_be_followed_is_named(content: Any, message: str, tmp_path: Path) -> None:
    write(tmp_path, PREPROCESSOR, content)
    with pytest.raises(InputError, match=message):
        read_image_settings(tmp_path)


# ---- sizes, and what libraries say ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [28, [28, 28], (28, 28), {"height": 28, "width": 28}, {"shortest_edge": 28}])
def test_a_square_in_any_form(value: Any) -> None:
    assert square_side("image_size", value) == 28


@pytest.mark.parametrize("value", [None, 0, -1, True, "28", 2.5, [], [28, 14], {"height": 28, "width": 14}, {}, [[28]]])
def test_no_square_is_named(value: Any) -> None:
    with pytest.raises(InputError, match="image_size"):
        square_side("image_size", value)


@pytest.mark.parametrize("error", [KeyError("a"), IndexError("b"), TypeError("c" * 5000), ImportError("\nneeds timm\n"), OSError("d\ne")])
def test_what_a_library_raises_is_one_short_line(error: Exception) -> None:
    with pytest.raises(InputError, match="file: cannot be read; ") as caught, library_call("file", "cannot be read"):
        raise error
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)
