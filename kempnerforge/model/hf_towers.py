"""Vision towers of transformers: SigLIP, SigLIP 2, CLIP and DINOv2. The library is imported when a tower is
built, not before.

Shapes: N images, H x H pixels, F patches of one image, D width.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kempnerforge.config import registry
from kempnerforge.config.vision import HFTowerConfig, square_side
from kempnerforge.model.hf_checks import check_config, check_room, class_call
from kempnerforge.model.hf_files import find_weights, load_whole, read_named_config
from kempnerforge.model.image_processor import Normalisation, read_image_settings
from kempnerforge.model.vision import VisionEncoder, patch_order
from kempnerforge.util.errors import InputError, cut

UNLOADED = "its weights cannot be loaded"


class HFTower(VisionEncoder):
    """A vision tower of transformers, cut down to what its features need. Patches only: CLS and register
    tokens are dropped. With ``pooled`` the one feature is what the class pools.

    ``feature_layer`` counts as ``hidden_states`` in transformers does: -1 is ``last_hidden_state`` (after the
    final norm of SigLIP and DINOv2; CLIP's norm is for the CLS token alone), -k the output of layer n - k +
    1. Of several layers, D is the sum of their widths, in their order. Layers after the last of them, norms
    that the patches do not pass, pooling heads and mask tokens are left out, so every parameter gets a
    gradient. Parameter names are those in transformers.

    The weights are fp32, whatever the file holds; on the meta device they are not read. Code beside a
    checkpoint is never run.

    Raises:
        ValueError: no such model, another family, weights that are missing or do not fit, a layer that does
            not exist.
    """

    models: ClassVar[dict[str, str]]
    """``model_type`` in ``config.json`` -> class in transformers."""
    final_norm: ClassVar[str]
    """Name of the norm after the last layer."""
    patches_pass_norm: ClassVar[bool] = True
    normalisation: ClassVar[Normalisation]
    """For a checkpoint without an image processor's config."""
    tower: Any

    def __init__(self, cfg: HFTowerConfig) -> None:
        tower = self._load(cfg)
        mean, std = chosen_normalisation(cfg, self.normalisation)
        side, pixels = self.sides(cfg, tower.config)
        layer_dim = tower.config.hidden_size
        width = layer_dim * len(cfg.feature_layers)
        self.pooled = getattr(cfg, "pooled", False)
        super().__init__(num_tokens=1 if self.pooled else side**2, dim=width, image_size=pixels, mean=mean, std=std, layer_dim=layer_dim)
        self.layers_used = cfg.layers_used
        if cfg.unused_layers or not (self.patches_pass_norm or self.pooled):
            setattr(tower, self.final_norm, nn.Identity())
        # NOTE: the tower itself stays outside the module tree and its children are adopted: its own forward
        # runs, with its own names.
        vars(self)["tower"] = tower
        for name, child in tower.named_children():
            self.add_module(name, child)
        assert {id(p) for p in self.parameters()} == {id(p) for p in tower.parameters()}, "a parameter belongs to no child"
        self.train()

    @property
    def signature(self) -> str:
        return self.tower.config.to_json_string()

    def check_files(self, cfg: HFTowerConfig) -> None:
        if cfg.has_weights:
            find_weights(cfg.path, f"{where(cfg)}: {UNLOADED}")

    def standing_alone(self, cfg: HFTowerConfig) -> HFTowerConfig:
        return with_settings(cfg, self.tower.config, self.normalisation)

    def _load(self, cfg: HFTowerConfig) -> Any:
        """The model of transformers with the layers up to the feature layer, without a pooling head."""
        import transformers

        model_class = getattr(transformers, self.models[tower_kind(cfg, self.models)])
        config = tower_config(model_class.config_class, cfg)
        layers = config.num_hidden_layers
        cfg.check_depth(layers, f"the tower in {cfg.path or 'settings'!r} has only {layers} layers")
        config.num_hidden_layers = layers - cfg.unused_layers
        config.vision_use_head = getattr(cfg, "pooled", False)
        return build_tower(model_class, config, cfg)

    def sides(self, cfg: Any, config: Any) -> tuple[int, int]:
        """Patches along one side of an image, and pixels, which may be more than they cover: 384 = 27 * 14 +
        6.

        Args:
            config: the tower's.
        """
        own = self.own_size(config)
        pixels = getattr(cfg, "image_size", 0) or own
        if pixels < config.patch_size:
            raise InputError(f"image_size = {pixels}: must be at least one patch, {config.patch_size} pixels")
        self.is_resized = pixels != own
        return pixels // config.patch_size, pixels

    def own_size(self, config: Any) -> int:
        """Pixels along a side, for which the tower has positions."""
        return config.image_size

    @property
    def units(self) -> list[nn.Module]:
        return list(next(m for m in self.tower.encoder.children() if isinstance(m, nn.ModuleList)))

    def forward(self, images: Tensor, **how: Any) -> Tensor:
        """(N, 3, H, H) uint8 -> (N, F, D); ``how`` is for ``run``."""
        # transformers cannot run on nothing; one image, thrown away, gives every parameter a gradient of zero
        pixels = self.normalise(images if len(images) else images.new_zeros(1, *images.shape[1:]))
        earlier = [layer for layer in self.layers_used if layer != -1]
        found = self.run(pixels, output_hidden_states=earlier or False, **how)
        if self.pooled:
            return found.pooler_output[: len(images), None].clone()  # (N, 1, D); FSDP's hooks do not want a view
        states = [found.last_hidden_state if layer == -1 else found.hidden_states[layer] for layer in self.layers_used]
        first = states[0].shape[1] - self.num_tokens  # after CLS and registers
        return torch.cat([state[: len(images), first:] for state in states], dim=-1)  # (N, F, D); FSDP's hooks do not want a view

    def run(self, pixels: Tensor, **how: Any) -> Any:
        """The tower on normalised pixels (N, 3, H, H); the patches come last among its tokens."""
        return self.tower(pixel_values=pixels, **({"interpolate_pos_encoding": True} if self.is_resized else {}), **how)


@registry.register_vision_encoder("siglip")
class Siglip(HFTower):
    """SigLIP (Zhai et al. 2023)."""

    models: ClassVar = {"siglip": "SiglipVisionModel", "siglip_vision_model": "SiglipVisionModel"}
    final_norm = "post_layernorm"
    normalisation = Normalisation([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])


@registry.register_vision_encoder("siglip2")
class Siglip2(Siglip):
    """SigLIP 2 (Tschannen et al. 2025): SigLIP towers of one resolution, and the NaFlex checkpoints on a
    square grid.
    """

    models: ClassVar = Siglip.models | {"siglip2": "Siglip2VisionModel", "siglip2_vision_model": "Siglip2VisionModel"}

    def sides(self, cfg: Any, config: Any) -> tuple[int, int]:
        side, pixels = super().sides(cfg, config)
        if config.model_type == "siglip2_vision_model" and pixels % config.patch_size:
            raise InputError(f"image_size = {pixels}: must be a multiple of {config.patch_size}, the pixels of a patch")
        if config.model_type == "siglip2_vision_model" and cfg.pooled:
            raise InputError("pooled = true: of a NaFlex tower the patches are used; take a SigLIP 2 of one resolution")
        return side, pixels

    def __init__(self, cfg: HFTowerConfig) -> None:
        super().__init__(cfg)
        self.any_shape = self.tower.config.model_type == "siglip2_vision_model"
        self.side = math.isqrt(self.num_tokens) if self.any_shape else 0

    def forward(self, images: Tensor, grids: Sequence[tuple[int, int]] = (), **how: Any) -> Tensor:
        """With ``grids`` each image has positions for its shape (NaFlex, Tschannen et al. 2025, section 2.4)."""
        if not grids:
            return super().forward(images, **how)
        first = torch.stack([patch_order(grid, self.side, self.joined) for grid in grids]).to(images.device)  # (N, F)
        features = super().forward(images, order=first, shapes=torch.tensor(grids, device="cpu"), **how)
        return features.gather(1, first.argsort(dim=1)[..., None].expand_as(features))

    def own_size(self, config: Any) -> int:
        naflex = config.model_type == "siglip2_vision_model"
        return math.isqrt(config.num_patches) * config.patch_size if naflex else config.image_size

    def run(self, pixels: Tensor, order: Tensor | None = None, shapes: Tensor | None = None, **how: Any) -> Any:
        if self.tower.config.model_type != "siglip2_vision_model":
            return super().run(pixels, **how)
        n, channels = pixels.shape[:2]
        side, patch = math.isqrt(self.num_tokens), self.tower.config.patch_size
        x = pixels.view(n, channels, side, patch, side, patch).permute(0, 2, 4, 3, 5, 1)  # (N, side, side, patch, patch, 3)
        x = x.reshape(n, self.num_tokens, patch * patch * channels)
        mask = None
        if order is None or shapes is None:
            shapes = torch.full((n, 2), side, device="cpu")  # read as Python numbers: on the CPU nothing waits for them
        else:  # the patches of the image come first
            x = x.gather(1, order[..., None].expand_as(x))
            own = torch.arange(self.num_tokens, device=x.device) < shapes.prod(-1, keepdim=True).to(x.device)
            mask = None if x.is_meta else own  # the tower looks whether any is False
        return self.tower(pixel_values=x, pixel_attention_mask=mask, spatial_shapes=shapes, **how)


@registry.register_vision_encoder("clip")
class Clip(HFTower):
    """CLIP (Radford et al. 2021)."""

    models: ClassVar = {"clip": "CLIPVisionModel", "clip_vision_model": "CLIPVisionModel"}
    final_norm = "post_layernorm"
    patches_pass_norm = False
    normalisation = Normalisation([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])


@registry.register_vision_encoder("dinov2")
class Dinov2(HFTower):
    """DINOv2 (Oquab et al. 2023), with or without registers (Darcet et al. 2023)."""

    models: ClassVar = {"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"}
    final_norm = "layernorm"
    normalisation = Normalisation([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])

    def _load(self, cfg: HFTowerConfig) -> Any:
        tower = super()._load(cfg)
        tower.embeddings.mask_token = None  # only its pre-training reads it
        return tower

    def run(self, pixels: Tensor, **how: Any) -> Any:
        return self.tower(pixel_values=pixels, **how)  # it interpolates without being asked


def where(cfg: HFTowerConfig) -> str:
    """What the user wrote, for messages."""
    return f"path = {cfg.path!r}" if cfg.path else "settings"


def tower_kind(cfg: HFTowerConfig, kinds: Collection[str]) -> str:
    """``model_type`` of the tower, if it is among ``kinds``.

    Raises:
        InputError: it is not.
    """
    kind = (cfg.settings or read_named_config(cfg.path)).get("model_type")
    if not isinstance(kind, str) or kind not in kinds:
        raise InputError(f"{where(cfg)}: model_type {cut(repr(kind))} is not of type {cfg.type!r}, which takes {', '.join(kinds)}")
    return kind


def build_tower(model_class: Any, config: Any, cfg: HFTowerConfig) -> Any:
    """A tower of transformers, with all of its weights from ``cfg.path`` where ``cfg`` asks for them, and not
    on the meta device. Other weights at that path (text tower, pooling head, later layers) are passed over.
    """
    what, given = f"{model_class.__name__} cannot be built", config.to_dict()
    check_room(lambda: model_class(config), where(cfg), what, given)
    if cfg.settings or not cfg.pretrained or torch.get_default_device().type == "meta":
        with class_call(where(cfg), what, given):
            return model_class(config)
    return load_whole(model_class, cfg.path, where(cfg), UNLOADED, more=True, config=config)


def chosen_normalisation(cfg: HFTowerConfig, family: Normalisation) -> Normalisation:
    """Mean and std of the config, else of the image processor at ``path``, else of the family."""
    if cfg.mean:
        return Normalisation(cfg.mean, cfg.std)
    files = read_image_settings(cfg.path) if cfg.path else None
    return files.normalisation if files and files.normalisation else family


def plain_settings(known: Any, config: Mapping[str, Any], unread: Collection[str] = ()) -> dict[str, bool | int | float | str]:
    """``vision_encoder.settings``, without ``model_type``: plain values of keys that belong to a tower, not
    to every config.

    Args:
        known: a config of the tower's class.
        config: the values.
        unread: keys that are left out.
    """
    from transformers import PretrainedConfig

    kept = known.to_dict().keys() - PretrainedConfig().to_dict().keys() - {*unread}
    return {key: config[key] for key in sorted(kept) if isinstance(config.get(key), bool | int | float | str)}


def with_settings(cfg: HFTowerConfig, config: Any, normalisation: Sequence[Sequence[float]], **more: Any) -> Any:
    """``cfg`` with the settings of a tower's ``config`` in place of its files, and ``more``."""
    given = config.to_dict()
    settings = plain_settings(type(config)(), given)
    settings |= {"model_type": config.model_type, "num_hidden_layers": given["num_hidden_layers"] + cfg.unused_layers}
    mean, std = normalisation
    return replace(cfg, path="", pretrained=True, settings=settings, mean=list(mean), std=list(std), **more)


def tower_config(config_class: Any, cfg: HFTowerConfig, **more: Any) -> Any:
    """The tower's config in transformers, for square RGB images, from the files at ``path``, or from its
    settings and ``more``.
    """
    if cfg.settings:
        known = vars(config_class())
        if unknown := sorted(cfg.settings.keys() - known.keys() - {"model_type"}):
            raise InputError(f"settings: {unknown[0]!r} is no key of {config_class.__name__}; it has {', '.join(sorted(known))}")
        given = {key: value for key, value in cfg.settings.items() if key != "model_type"}
        check_config(where(cfg), given)
        with class_call(where(cfg), f"{config_class.__name__} does not take them", given):
            config = config_class(**given, **more)
    else:
        with class_call(where(cfg), f"{config_class.__name__} does not take its config.json", read_named_config(cfg.path)):
            config = config_class.from_pretrained(cfg.path)
    own = {"num_channels": "in_channels"} | config.attribute_map  # names of keys in this class
    name = "num_channels" if hasattr(config, "num_channels") else own["num_channels"]
    if (channels := getattr(config, name)) != 3:
        raise InputError(f"{where(cfg)}: {name} = {channels}: only towers for square images with 3 channels can be used")
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        if not isinstance(value := getattr(config, key, 1), int) or value < 1:
            raise InputError(f"{where(cfg)}: {own.get(key, key)} = {value}: must be a whole number above 0")
    for key in ("image_size", "patch_size"):
        if hasattr(config, key):
            setattr(config, key, square_side(f"{where(cfg)}: {key}", getattr(config, key)))
    return config


# NOTE: its tower is a subclass of the one here, so it can only be imported after it.
importlib.import_module("kempnerforge.model.mllama")
