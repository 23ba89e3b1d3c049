"""Several vision encoders that look at the same image, as one (Prismatic: Karamcheti et al. 2024, arXiv
2402.07865, section 4.2).

Shapes: N images, H x H pixels, F features of one image, D ``dim``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from kempnerforge.config import VisionEncoderConfig, registry
from kempnerforge.model.vision import VisionEncoder, build_vision_encoder
from kempnerforge.util.errors import InputError


@registry.register_vision_config
@dataclass
class FusedConfig(VisionEncoderConfig):
    """Several encoders that look at the same image, each with its own normalisation; their features are
    joined channel by channel (Prismatic: Karamcheti et al. 2024). The parameters of a part are under its
    type, ``vision_encoder.siglip.*``; those of a second part of one type under ``vision_encoder.siglip_2.*``.

    Attributes:
        parts: two encoders or more, each a table with the keys of its ``type``. All take images of one size
            and give one grid of features. Prismatic's are a ``dinov2`` and a ``siglip``, both with
            ``feature_layer = -2``.
    """

    type: str = "fused"
    parts: list[VisionEncoderConfig] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.feature_layer != -1:
            raise InputError(f"feature_layer = {self.feature_layer}: of type {self.type!r} each of parts has its own; write it there")
        if len(self.parts) < 2:
            raise InputError(f"parts: has {len(self.parts)} encoders, needs two or more")
        same(self, "features of an image", [part.num_tokens() for part in self.parts])

    @property
    def names(self) -> list[str]:
        """The name of each part: its type, numbered from the second of a type on."""
        types = [part.type for part in self.parts]
        return [kind + (f"_{before + 1}" if (before := types[:index].count(kind)) else "") for index, kind in enumerate(types)]

    def num_tokens(self) -> int | None:
        return next((count for part in self.parts if (count := part.num_tokens()) is not None), None)

    def without_weights(self) -> FusedConfig:
        return replace(self, parts=[part.without_weights() for part in self.parts])


def same(cfg: FusedConfig, what: str, counts: list[int | None]) -> None:
    """Refuses parts of which some number differs; None is a number that is not known yet."""
    if len({*counts} - {None}) > 1:
        said = " and ".join(f"{count} of {name!r}" for name, count in zip(cfg.names, counts, strict=True) if count is not None)
        raise InputError(f"parts: {what} must be as many in all of them, not {said}")


@registry.register_vision_encoder("fused")
class Fused(VisionEncoder):
    """The encoders of ``parts``, whose features are joined channel by channel, in their order.

    Where one colour is needed, around an image that does not fill its square, it is the first part's mean.

    Raises:
        ValueError: a part cannot be built, or parts differ in the size of images or the number of features.
    """

    def __init__(self, cfg: FusedConfig) -> None:
        parts = [build_vision_encoder(part) for part in cfg.parts]
        same(cfg, "features of an image", [part.num_tokens for part in parts])
        same(cfg, "pixels along the side of an image", [part.image_size for part in parts])
        first, width = parts[0], sum(part.dim for part in parts)
        mean, std = first.normalisation
        super().__init__(num_tokens=first.num_tokens, dim=width, image_size=first.image_size, mean=mean, std=std)
        for name, part in zip(cfg.names, parts, strict=True):
            self.add_module(name, part)

    @property
    def parts(self) -> list[VisionEncoder]:
        """The encoders, in the order of their channels."""
        return [child for child in self.children() if isinstance(child, VisionEncoder)]

    @property
    def units(self) -> list[nn.Module]:
        return [unit for part in self.parts for unit in part.units]

    @property
    def signature(self) -> str:
        return " ".join(part.signature for part in self.parts)

    def standing_alone(self, cfg: Any) -> FusedConfig:
        return replace(cfg, parts=[part.standing_alone(each) for part, each in zip(self.parts, cfg.parts, strict=True)])

    def pretrained(self, cfg: Any) -> Iterator[str]:
        for name, part, each in zip(cfg.names, self.parts, cfg.parts, strict=True):
            yield from (f"{name}.{inner}" for inner in part.pretrained(each))

    def check_files(self, cfg: Any) -> None:
        for part, each in zip(self.parts, cfg.parts, strict=True):
            part.check_files(each)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, H) uint8 -> (N, F, D)."""
        return torch.cat([part(images) for part in self.parts], dim=-1)
