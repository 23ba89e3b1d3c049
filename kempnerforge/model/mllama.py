"""The vision tower of Llama 3.2 Vision, as transformers has it. The library is imported when a tower is
built, not before.

Shapes: N images, H x H pixels, T tiles, P tokens of one tile (its patches after a CLS token), D width of the
features.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kempnerforge.config import registry
from kempnerforge.config.vision import MllamaTowerConfig
from kempnerforge.model.hf_towers import Clip, build_tower, chosen_normalisation, tower_config, tower_kind, where, with_settings
from kempnerforge.model.vision import VisionEncoder
from kempnerforge.util.errors import InputError

MOST_TILES = 64


def grids(tiles: int) -> list[list[int]]:
    """The grids that an image of at most ``tiles`` tiles may be cut into, in the order of their numbers,
    which begin with 1.

    Raises:
        ValueError: so many tiles no image has.
    """
    if not 1 <= tiles <= MOST_TILES:
        raise InputError(f"max_num_tiles = {tiles}: must be 1 to {MOST_TILES}")
    sides = range(1, tiles + 1)
    return [[columns, rows] for columns in sides for rows in sides if columns * rows <= tiles]


@registry.register_vision_encoder("mllama")
class MllamaTower(VisionEncoder):
    """The tower with an image as the only tile of its grid. It gives the features of all T tiles, the image's
    first.

    NOTE: the empty tiles are no waste: in transformers only padding does not see padding, so the image's
    patches see them, and words that see no image read them (``vlm.cross_attention_blind = "attention"``).

    Raises:
        ValueError: no such model, another family, or a config that the class does not take.
    """

    models: ClassVar = ("mllama", "mllama_vision_model")
    """``model_type`` in ``config.json``: the whole model or its tower."""

    def __init__(self, cfg: MllamaTowerConfig) -> None:
        tower = self._load(cfg)
        config = tower.config
        self.tiles: int = config.max_num_tiles
        self.tile_tokens: int = tower.num_patches
        mean, std = chosen_normalisation(cfg, Clip.normalisation)
        tokens, width = self.tiles * self.tile_tokens, config.hidden_size * (1 + len(config.intermediate_layers_indices))
        super().__init__(num_tokens=tokens, dim=width, image_size=config.image_size, mean=mean, std=std)
        self.tower = tower
        self.train()

    @property
    def signature(self) -> str:
        return self.tower.config.to_json_string()

    def standing_alone(self, cfg: MllamaTowerConfig) -> MllamaTowerConfig:
        layers = list(self.tower.config.intermediate_layers_indices)
        return with_settings(cfg, self.tower.config, self.normalisation, intermediate_layers=layers)

    @property
    def units(self) -> list[nn.Module]:
        return [*self.tower.transformer.layers, *self.tower.global_transformer.layers]

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, H) uint8 -> (N, T * P, D)."""
        pixels = self.normalise(images if len(images) else images.new_zeros(1, *images.shape[1:]))  # transformers cannot run on nothing
        tiles = pixels.new_zeros(len(pixels), 1, self.tiles, *pixels.shape[1:])  # (N, 1, T, 3, H, H)
        tiles[:, 0, 0] = pixels
        tile_mask = torch.zeros(len(pixels), 1, self.tiles, dtype=torch.long, device=pixels.device)
        tile_mask[..., 0] = 1
        found = self.tower(pixel_values=tiles, aspect_ratio_ids=tile_mask[..., 0], aspect_ratio_mask=tile_mask)  # grid 1: one tile
        return found.last_hidden_state[: len(images)].flatten(1, 3).clone()  # (N, T * P, D); FSDP's hooks do not want a view

    def _load(self, cfg: MllamaTowerConfig) -> Any:
        from transformers import MllamaVisionModel

        tower_kind(cfg, self.models)
        return build_tower(MllamaVisionModel, self._config(cfg), cfg)

    @staticmethod
    def _config(cfg: MllamaTowerConfig) -> Any:
        """The tower's config in transformers, if it is one for square images and the usual grids."""
        from transformers.models.mllama.configuration_mllama import MllamaVisionConfig

        tiles = int(cfg.settings.get("max_num_tiles", 4))
        lists = {"supported_aspect_ratios": grids(tiles), "intermediate_layers_indices": list(cfg.intermediate_layers)}
        config = tower_config(MllamaVisionConfig, cfg, **lists)
        check_mllama_config(where(cfg), config)
        return config


def check_mllama_config(name: str, config: Any) -> None:
    """Refuses a ``MllamaVisionConfig`` with grids or layers that ours does not have.

    Args:
        name: whose it is.

    Raises:
        ValueError: naming the key.
    """
    if config.supported_aspect_ratios != grids(config.max_num_tiles):
        raise InputError(f"{name}: supported_aspect_ratios = {config.supported_aspect_ratios}, not {grids(config.max_num_tiles)}")
    layers = config.intermediate_layers_indices
    if not layers or not all(0 <= layer < config.num_hidden_layers for layer in layers):
        raise InputError(f"{name}: intermediate_layers_indices = {layers}: there are num_hidden_layers = {config.num_hidden_layers}")
