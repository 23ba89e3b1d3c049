"""Models of transformers that cut an image into a grid of patches and place its tokens by time, row and
column: Qwen2-VL (Wang et al. 2024, arXiv 2409.12191, section 2.1), Qwen2.5-VL and Qwen3-VL, whose features of
inner layers are added in the first layers of the decoder (DeepStack: Meng et al. 2024, arXiv 2406.04334).

Shapes: N images, F tokens of one image, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kempnerforge.data.batching.batch import Batch
from kempnerforge.model.hf_towers import Clip, Siglip
from kempnerforge.model.qwen_vl import cut, known_of_grids
from kempnerforge.model.transformer import Cache
from kempnerforge.util.errors import InputError, show
from kempnerforge.vlm.hf_images import SquareImages, check_multiple
from kempnerforge.vlm.placements import grid_positions

GRID_KINDS = {"qwen2_vl": Clip.normalisation, "qwen2_5_vl": Clip.normalisation, "qwen3_vl": Siglip.normalisation}
"""``model_type`` -> mean and std of its images, where its files do not say."""


class Grid(SquareImages):
    """How a class with grids takes square images, which must be a whole number of tokens.

    Attributes:
        side: tokens along a side of an image.
    """

    any_size = adds_features = reads_kinds = True

    def __init__(self, where: str, model: Any, image_size: int) -> None:
        super().__init__(where, model, image_size)
        _check(model.config)
        vision = model.config.vision_config
        self.patch, self.merge = vision.patch_size, vision.spatial_merge_size
        self.frames: int = vision.temporal_patch_size
        pixels = self.patch * self.merge
        check_multiple(where, model, image_size, pixels)
        self.side = image_size // pixels

    def features(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (N, 3, H, H) -> (N, F, D + L * D): the tokens, and the features that are added to
        them after each of the first L layers.
        """
        arguments = self.arguments(pixels)
        if pixels.is_meta:
            arguments |= known_of_grids(self.model.model.visual, arguments["image_grid_thw"], pixels.device)
        found = self.model.get_image_features(**arguments, return_dict=True)
        deeper = getattr(found, "deepstack_features", None) or []
        return torch.cat([torch.stack(list(each)) for each in (found.pooler_output, *deeper)], dim=-1)

    def arguments(self, pixels: Tensor) -> dict[str, Tensor]:
        """The arguments of the class that hold the normalised ``pixels`` (N, 3, H, H)."""
        cells, device = self.side * self.merge, "cpu" if pixels.is_meta else pixels.device  # the class reads the values of the grid
        patches = cut(pixels, self.patch, self.frames, self.merge).flatten(0, 1)
        return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, cells, cells]] * len(pixels), device=device)}

    def positions(self, batch: Batch, cache: Cache | None) -> Tensor:
        return grid_positions(batch, cache, self.side)


def _check(config: Any) -> None:
    """Refuses sizes with which the class can be built, but not run."""
    where, vision, text = f"path = {config.name_or_path!r}", config.vision_config, config.get_text_config()
    for key in ("patch_size", "spatial_merge_size", "temporal_patch_size", "window_size"):
        if not isinstance(value := getattr(vision, key, 1), int) or value < 1:
            raise InputError(f"{where}: vision_config.{key} = {show(value)}: must be a whole number above 0")
    for key in ("in_channels", "in_chans"):
        if (value := getattr(vision, key, 3)) != 3:
            raise InputError(f"{where}: vision_config.{key} = {show(value)}: only images with 3 channels can be used")
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    parts = (text.rope_parameters or {}).get("mrope_section")
    if parts is not None and (not isinstance(parts, list) or [type(part) for part in parts] != [int] * 3 or 2 * sum(parts) != width):
        raise InputError(
            f"{where}: text_config.rope_parameters.mrope_section = {show(parts)}: must be three whole numbers whose sum is {width // 2},"
            " half the width of a head"
        )
