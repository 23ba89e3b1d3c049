"""Early fusion without a vision encoder (Fuyu: Bavishi et al. 2023), as a plugin: nothing in the package knows this file.

Patches of pixels go through one linear layer and are in the stream like words; the transformer itself learns to see.

Shapes: N images, H x H pixels, p ``patch_size``, F patches of one image, D ``model.dim``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from kempnerforge.config import AdapterConfig, JobConfig, registry
from kempnerforge.config.checks import at_least
from kempnerforge.config.vision import ViTConfig
from kempnerforge.config.vlm import FreezeSpec, VLMConfig, named
from kempnerforge.data.batching.batch import Batch
from kempnerforge.model.adapters import Adapter
from kempnerforge.model.transformer import Cache, Context
from kempnerforge.model.vision import VisionEncoder
from kempnerforge.vlm.base import VLM


@registry.register_vlm_config
@dataclass
class EarlyFusionConfig(VLMConfig):
    """Patches through one linear layer (Bavishi et al. 2023). ``[vision_encoder]`` only says how large images are and how they are
    normalised; ``[adapter]`` is not read. There is no encoder to freeze, so nothing is frozen unless ``freeze`` says so.

    Attributes:
        patch_size: pixels along a patch's side.
        stride: pixels from one patch to the next; 0 means ``patch_size``. Less makes overlapping patches, padded as the ViT's are.
    """

    arch: str = "early_fusion"
    freeze: list[FreezeSpec] = field(default_factory=list)
    module_patterns: dict[str, list[str]] = field(default_factory=lambda: {name: named(name) for name in ("transformer", "adapter")})
    patch_size: int = 8
    stride: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "patch_size")
        at_least(self, 0, "stride")
        if self.step > self.patch_size or (self.patch_size - self.step) % 2:
            raise ValueError(f"stride = {self.stride}: must be at most patch_size = {self.patch_size} and differ from it by an even number")

    @property
    def step(self) -> int:
        """Pixels from one patch to the next."""
        return self.stride or self.patch_size

    def image_tokens(self, job: JobConfig) -> int | None:
        images = job.vision_encoder
        return (images.image_size // self.step) ** 2 if isinstance(images, ViTConfig) else None

    def check(self, job: JobConfig) -> None:
        images = job.vision_encoder
        if not isinstance(images, ViTConfig):
            raise ValueError(
                f"arch = {self.arch!r}: has no encoder like {images.type!r}; vision_encoder.type = 'vit' says how large images are"
            )
        if images.image_size % self.step:
            key = "stride" if self.stride else "patch_size"
            raise ValueError(f"{key} = {self.step}: must divide vision_encoder.image_size = {images.image_size}")


class Patches(VisionEncoder):
    """Cuts images into patches; nothing in it learns."""

    def __init__(self, image_size: int, patch_size: int, step: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__(num_tokens=(image_size // step) ** 2, dim=3 * patch_size**2, image_size=image_size, mean=mean, std=std)
        self.patch_size, self.step = patch_size, step

    @property
    def units(self) -> list[nn.Module]:
        return []

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, H) uint8 -> (N, F, 3 * p * p), row by row, in fp32."""
        pixels = (images.float() / 255 - self.mean.float()) / self.std.float()
        return F.unfold(pixels, self.patch_size, padding=(self.patch_size - self.step) // 2, stride=self.step).transpose(1, 2)


class PatchEmbedding(Adapter):
    """One linear layer. Patches come row by row and the stream counts them; a learned vector for each row and column beside that did not
    lower the loss of the first 120 steps on easy-VQA's captions.
    """

    def __init__(self, patches: Patches, dim: int) -> None:
        super().__init__(AdapterConfig(), patches.dim, dim, patches.num_tokens)
        self.proj = nn.Linear(patches.dim, dim)

    def forward(self, features: Tensor) -> Tensor:
        """(N, F, 3 * p * p) -> (N, F, D) in the dtype of the weights."""
        return self.proj(features.to(self.proj.weight.dtype))


@registry.register_arch("early_fusion")
class EarlyFusion(VLM):
    """A ``joint_decoder`` whose image tokens are patches of pixels."""

    shares_rows = True

    def build_vision(self) -> None:
        cfg, images = self.job.vlm, self.job.vision_encoder
        assert isinstance(cfg, EarlyFusionConfig) and isinstance(images, ViTConfig), "checked when the job was loaded"
        patches = Patches(images.image_size, cfg.patch_size, cfg.step, images.mean, images.std)
        self.vision_encoder, self.adapter = patches, PatchEmbedding(patches, self.job.model.dim)

    def place(self, words: Tensor, features: Tensor | None, batch: Batch, cache: Cache | None) -> tuple[Tensor, Context]:
        return self.insert(words, features, batch), self.context(batch, cache, words.dtype)
