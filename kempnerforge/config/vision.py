"""``[vision_encoder]``: one dataclass per encoder type, selected by ``type``. Sizes in pixels, counts in
tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any

from kempnerforge.config import registry
from kempnerforge.config.checks import at_least, at_most, divides, more_than
from kempnerforge.config.model import MAX_LAYERS
from kempnerforge.util.errors import InputError, show
from kempnerforge.util.paths import PathText
from kempnerforge.util.plugin_returns import check_returns, instance

LARGEST_SIDE = 1 << 14
"""Of an image or a patch in a model's files, in pixels."""


@dataclass
class VisionEncoderConfig:
    """The keys of every encoder. Subclasses register with ``@registry.register_vision_config``.

    Attributes:
        type: which encoder.
        feature_layer: whose output is used: -1 the last layer's with the final norm, -2 the one before it
            without a norm (LLaVA), and so on. An array joins the outputs of several layers channel by
            channel, in its order: [-2, -9] (Molmo).
        deepstack_layers: further layers, counted in the same way (DeepStack: Meng et al. 2024, arXiv
            2406.04334; Qwen3-VL). Each has an adapter like ``[adapter]``, a part of it, whose tokens are
            added to the residual stream, at the positions of the image: the first ones after the first
            layer of the language model, the next after the second.
    """

    type: str = "vit"
    feature_layer: int | list[int] = -1
    deepstack_layers: list[int] = field(default_factory=list, kw_only=True)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        check_returns(cls, num_tokens=instance(Integral | None, "a whole number, or None"))

    def __post_init__(self) -> None:
        main = [self.feature_layer] if isinstance(self.feature_layer, int) else self.feature_layer
        for key, layers in (("feature_layer", main), ("deepstack_layers", self.deepstack_layers)):
            if (not layers and layers is main) or max(layers, default=-1) >= 0:
                raise InputError(f"{key} = {getattr(self, key)}: count from the end, -1 is the last layer")
            if len({*layers}) < len(layers):
                raise InputError(f"{key} = {getattr(self, key)}: names a layer twice")

    @property
    def feature_layers(self) -> list[int]:
        """The layers whose outputs are used, in the order of their channels; ``deepstack_layers`` come last."""
        return [*([self.feature_layer] if isinstance(self.feature_layer, int) else self.feature_layer), *self.deepstack_layers]

    @property
    def layers_used(self) -> list[int]:
        """``feature_layers`` counted from the last layer that is built."""
        return [layer + self.unused_layers for layer in self.feature_layers]

    @property
    def unused_layers(self) -> int:
        """Layers after the last one that is used; they are not built."""
        return -1 - max(self.feature_layers)

    def check_depth(self, layers: int, of: str) -> None:
        """Refuses a layer beyond the first of ``layers``.

        Args:
            of: says how many there are, for the message.
        """
        if -min(self.feature_layers) > layers:
            key = "feature_layer" if min(self.feature_layers) not in self.deepstack_layers else "deepstack_layers"
            raise InputError(f"{key} = {getattr(self, key)}: {of}")

    def num_tokens(self) -> int | None:
        """Tokens for one image, or None when only the built encoder knows."""
        return None

    def without_weights(self) -> VisionEncoderConfig:
        """The same encoder without reading pretrained weights, for weights that come from elsewhere."""
        return self

    @property
    def has_weights(self) -> bool:
        """Whether the encoder reads weights when it is built; otherwise it begins with random ones."""
        return self != self.without_weights()


def check_normalisation(mean: list[float], std: list[float]) -> None:
    """Refuses what is no mean and std of RGB values."""
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise InputError(f"mean = {mean}, std = {std}: each needs three numbers, std above 0")


def square_side(key: str, value: Any) -> int:
    """The side of a square in pixels, in any of the forms that files of transformers say it: n, [n, n],
    {"height": n, "width": n} or {"shortest_edge": n}.

    Args:
        key: its name, for messages.

    Raises:
        ValueError: it is no square, or no size.
    """
    sides = value
    if isinstance(value, dict):
        sides = [value[edge] for edge in ("height", "width", "shortest_edge") if edge in value]
    sides = list(sides) if isinstance(sides, list | tuple) else [sides]
    if not sides or any(not isinstance(side, int) or isinstance(side, bool) or side < 1 for side in sides) or len(set(sides)) > 1:
        raise InputError(f"{key} = {show(value)}: must be the side of a square, as a number or a list of two equal ones")
    if sides[0] > LARGEST_SIDE:
        raise InputError(f"{key} = {sides[0]}: must be at most {LARGEST_SIDE} pixels")
    return sides[0]


@registry.register_vision_config
@dataclass
class ViTConfig(VisionEncoderConfig):
    """Our own vision transformer (SigLIP-style: Zhai et al. 2023), trained from scratch.

    Attributes:
        image_size: images are resized to this square.
        patch_size: kernel of the patch convolution.
        stride: its stride; 0 means ``patch_size``. A smaller stride makes overlapping patches (padding keeps
            the grid ``image_size/stride``).
        dim, n_layers, n_heads, mlp_dim: widths; ``mlp_dim`` 0 means ``4 * dim``.
        norm_eps: added to the variance in layer norms.
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
        at_most(self, MAX_LAYERS, "n_layers")
        at_least(self, 0, "stride", "mlp_dim")
        more_than(self, 0, "norm_eps")
        divides(self, "n_heads", "dim")
        step = self.stride or self.patch_size
        if step > self.patch_size or (self.patch_size - step) % 2:
            raise InputError(f"stride = {step}: must be at most patch_size = {self.patch_size} and differ from it by an even number")
        if self.image_size % step:
            raise InputError(f"image_size = {self.image_size}: must be a multiple of {'stride' if self.stride else 'patch_size'} = {step}")
        self.check_depth(self.n_layers, f"there are only n_layers = {self.n_layers} layers")
        check_normalisation(self.mean, self.std)

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // (self.stride or self.patch_size)

    def num_tokens(self) -> int:
        return self.grid**2 + self.cls_token


@registry.register_vision_config
@dataclass
class EfficientNetLite0Config(VisionEncoderConfig):
    """EfficientNet-Lite0 (Tan and Le 2019): a pretrained convolutional network, small enough for a laptop.
    Its last feature map gives (image_size / 32)^2 tokens of 1280 channels.

    Attributes:
        path: the safetensors file that ``kempnerforge data fetch efficientnet-lite0`` makes.
        pretrained: load the weights at ``path``; false builds the network with fresh ones.
        image_size: pixels along each side, a multiple of 32; it was trained at 224.
        mean, std: normalisation of RGB values in [0, 1].
    """

    type: str = "efficientnet_lite0"
    path: PathText = ""
    pretrained: bool = True
    image_size: int = 224
    mean: list[float] = field(default_factory=lambda: [127 / 255] * 3)
    std: list[float] = field(default_factory=lambda: [128 / 255] * 3)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.feature_layer != -1:
            raise InputError(f"feature_layer = {self.feature_layer}: type {self.type!r} gives its last feature map alone, -1")
        if self.image_size < 32 or self.image_size % 32:
            raise InputError(f"image_size = {self.image_size}: must be a multiple of 32")
        if self.pretrained != bool(self.path):
            raise InputError(
                f"path = {self.path!r}: pretrained = {str(self.pretrained).lower()} {'needs' if self.pretrained else 'reads no'} file"
            )
        check_normalisation(self.mean, self.std)

    def num_tokens(self) -> int:
        return (self.image_size // 32) ** 2

    def without_weights(self) -> EfficientNetLite0Config:
        return replace(self, path="", pretrained=False)


@dataclass
class HFTowerConfig(VisionEncoderConfig):
    """A vision tower of transformers. Image size, widths and normalisation come from the tower itself.

    Attributes:
        path: a local directory with ``config.json`` (and weights), or a hub id where there is a network.
        pretrained: load the weights at ``path``; false builds the same tower with fresh ones.
        settings: instead of ``path``: keys of the tower's ``config.json``. Its weights are fresh, or come
            from a checkpoint.
        mean, std: normalisation of RGB values in [0, 1]; empty takes the values of the image processor at
            ``path``, or else of the family.
    """

    path: PathText = ""
    pretrained: bool = True
    settings: dict[str, bool | int | float | str] = field(default_factory=dict)
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.path) == bool(self.settings):
            raise InputError(f"path = {self.path!r}: type {self.type!r} needs a local directory or a hub id, or else a table of settings")
        if self.mean or self.std:
            check_normalisation(self.mean, self.std)

    def without_weights(self) -> HFTowerConfig:
        return replace(self, pretrained=False)

    @property
    def has_weights(self) -> bool:
        return self.pretrained and bool(self.path)


@dataclass
class ResizedTowerConfig(HFTowerConfig):
    """A tower with learned positions on one grid.

    Attributes:
        image_size: pixels of a side; 0 means the tower's own. For another size its positions are
            interpolated: PaliGemma's tower of 224 sees 448 pixels, DINOv2's of 518 sees 224.
        pooled: an image is one feature, the ``pooler_output`` of its class: CLIP's and DINOv2's CLS token
            after the last norm, SigLIP's attention pooling with an MLP.
    """

    image_size: int = 0
    pooled: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pooled and self.feature_layers != [-1]:
            raise InputError(f"pooled = true: is made of the last layer, feature_layer = -1 alone, not of {self.feature_layers}")
        at_least(self, 0, "image_size")
        at_most(self, LARGEST_SIDE, "image_size")


@registry.register_vision_config
@dataclass
class SiglipConfig(ResizedTowerConfig):
    """SigLIP (Zhai et al. 2023): all patches, no CLS token."""

    type: str = "siglip"


@registry.register_vision_config
@dataclass
class Siglip2Config(ResizedTowerConfig):
    """SigLIP 2 at a fixed resolution (Tschannen et al. 2025)."""

    type: str = "siglip2"


@registry.register_vision_config
@dataclass
class ClipConfig(ResizedTowerConfig):
    """CLIP (Radford et al. 2021); the CLS token is dropped, or all but it."""

    type: str = "clip"


@registry.register_vision_config
@dataclass
class Dinov2Config(ResizedTowerConfig):
    """DINOv2 (Oquab et al. 2023), with or without registers; CLS and register tokens are dropped."""

    type: str = "dinov2"


@registry.register_vision_config
@dataclass
class MllamaTowerConfig(HFTowerConfig):
    """The tower of Llama 3.2 Vision (Llama Team 2024, section 7): each patch has the last layer's features
    and, beside them, the features of some earlier layers. An image is one tile; the empty tiles after it are
    encoded as well, as patches of the first tile see them.

    Attributes:
        intermediate_layers: those earlier layers, from 0. Read with ``settings``; at ``path`` they are in
            ``config.json``.
    """

    type: str = "mllama"
    intermediate_layers: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.feature_layer != -1:
            raise InputError(f"feature_layer = {self.feature_layer}: type {self.type!r} gives the last layer and intermediate_layers, -1")
        if bool(self.settings) != bool(self.intermediate_layers) or any(layer < 0 for layer in self.intermediate_layers):
            raise InputError(f"intermediate_layers = {self.intermediate_layers}: layers from 0, at least one with settings, none with path")
