"""``[vision_encoder]``: one dataclass per encoder type, selected by ``type``. Sizes in pixels, counts in tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

from kempnerforge.config import registry
from kempnerforge.config.checks import at_least, divides, more_than


@dataclass
class VisionEncoderConfig:
    """What every encoder has. Subclasses register with ``@registry.register_vision_config``.

    Attributes:
        type: which encoder.
        feature_layer: whose output is used: -1 the last layer's with the final norm, -2 the one before it without a norm (LLaVA), and so on.
    """

    type: str = "vit"
    feature_layer: int = -1

    def __post_init__(self) -> None:
        if self.feature_layer >= 0:
            raise ValueError(f"feature_layer = {self.feature_layer}: count from the end, -1 is the last layer")

    def num_tokens(self) -> int | None:
        """Tokens for one image, or None when only the built encoder knows."""
        return None


@registry.register_vision_config
@dataclass
class ViTConfig(VisionEncoderConfig):
    """Our own vision transformer (SigLIP-style: Zhai et al. 2023), trained from scratch.

    Attributes:
        image_size: images are resized to this square.
        patch_size: kernel of the patch convolution.
        stride: its stride; 0 means ``patch_size``. A smaller stride makes overlapping patches (padding keeps the grid ``image_size/stride``).
        dim, n_layers, n_heads, mlp_dim: widths; ``mlp_dim`` 0 means ``4 * dim``.
        bias: whether the linear layers have biases (SigLIP's do).
        cls_token: prepend a learned token, which stays among the features.
        mean, std: normalisation of RGB values in [0, 1].
    """

    type: str = "vit"
    image_size: int = 224
    patch_size: int = 16
    stride: int = 0
    dim: int = 384
    n_layers: int = 6
    n_heads: int = 6
    mlp_dim: int = 0
    norm_eps: float = 1e-6
    bias: bool = True
    cls_token: bool = False
    mean: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])
    std: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "image_size", "patch_size", "dim", "n_layers", "n_heads")
        at_least(self, 0, "stride", "mlp_dim")
        more_than(self, 0, "norm_eps")
        divides(self, "n_heads", "dim")
        step = self.stride or self.patch_size
        if step > self.patch_size or (self.patch_size - step) % 2:
            raise ValueError(f"stride = {step}: must be at most patch_size = {self.patch_size} and differ from it by an even number")
        if self.image_size % step:
            raise ValueError(f"image_size = {self.image_size}: must be a multiple of {'stride' if self.stride else 'patch_size'} = {step}")
        if -self.feature_layer > self.n_layers:
            raise ValueError(f"feature_layer = {self.feature_layer}: there are only n_layers = {self.n_layers} layers")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean = {self.mean}, std = {self.std}: each needs three numbers, std above 0")

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // (self.stride or self.patch_size)

    def num_tokens(self) -> int:
        return self.grid**2 + self.cls_token


@dataclass
class HFTowerConfig(VisionEncoderConfig):
    """A vision tower of transformers. Image size, widths and normalisation come from the tower itself.

    Attributes:
        path: a local directory with ``config.json`` (and weights), or a hub id where there is a network.
        pretrained: load the weights at ``path``; false builds the same tower with fresh ones.
        settings: instead of ``path``: keys of the tower's ``config.json``. Its weights are fresh, or come from a checkpoint.
        mean, std: normalisation of RGB values in [0, 1]; empty takes that of the image processor at ``path``, or the family's.
    """

    path: str = ""
    pretrained: bool = True
    settings: dict[str, bool | int | float | str] = field(default_factory=dict)
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.path) == bool(self.settings):
            raise ValueError(f"path = {self.path!r}: type {self.type!r} needs a local directory or a hub id, or else a table of settings")
        if (self.mean or self.std) and (len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0):
            raise ValueError(f"mean = {self.mean}, std = {self.std}: each needs three numbers, std above 0")


@registry.register_vision_config
@dataclass
class SiglipConfig(HFTowerConfig):
    """SigLIP (Zhai et al. 2023): all patches, no CLS token."""

    type: str = "siglip"


@registry.register_vision_config
@dataclass
class Siglip2Config(HFTowerConfig):
    """SigLIP 2 at a fixed resolution (Tschannen et al. 2025)."""

    type: str = "siglip2"


@registry.register_vision_config
@dataclass
class ClipConfig(HFTowerConfig):
    """CLIP (Radford et al. 2021); the CLS token is dropped."""

    type: str = "clip"


@registry.register_vision_config
@dataclass
class Dinov2Config(HFTowerConfig):
    """DINOv2 (Oquab et al. 2023), with or without registers; CLS and register tokens are dropped."""

    type: str = "dinov2"
