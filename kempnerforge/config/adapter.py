"""``[adapter]``: from vision features to the width of the language model. One dataclass per type."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from kempnerforge.config import registry
from kempnerforge.config.checks import at_least, at_most, only_if
from kempnerforge.config.model import MAX_LAYERS
from kempnerforge.util.errors import InputError
from kempnerforge.util.plugin_returns import check_returns, whole_number


@dataclass
class AdapterConfig:
    """The keys of every adapter. Subclasses register with ``@registry.register_adapter_config``.

    Attributes:
        type: which adapter.
        hidden_dim: 0 makes the projection one linear layer, more makes it linear, GELU, linear with this
            width in between.
        bias: whether the projection's layers have biases.
        keeps_grid: no key: whether tokens are in the order of the features, row by row.
    """

    keeps_grid: ClassVar[bool] = True

    type: str = "mlp_2layer"
    hidden_dim: int = 0
    bias: bool = True

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        check_returns(cls, num_tokens=whole_number)

    def __post_init__(self) -> None:
        at_least(self, 0, "hidden_dim")

    @property
    def of_layers(self) -> AdapterConfig:
        """The config of the adapters of ``vision_encoder.deepstack_layers``."""
        return self

    def num_tokens(self, num_features: int) -> int:
        """Tokens that leave the adapter when ``num_features`` enter it.

        Raises:
            ValueError: this adapter cannot take so many.
        """
        return num_features

    @property
    def view_limits(self) -> tuple[int, int] | None:
        """Views of an image and images of a sample at most (0: any number), if the adapter reads the views of
        an image together and tells images apart; None: it reads each view alone.
        """
        return None

    @property
    def reads_padding(self) -> bool:
        """Whether the adapter must be told where a view shows nothing of its image."""
        return False


@registry.register_adapter_config
@dataclass
class LinearAdapterConfig(AdapterConfig):
    """One linear layer (PaliGemma)."""

    type: str = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_dim:
            raise InputError(f"hidden_dim = {self.hidden_dim}: type 'linear' has no hidden layer; take 'mlp_2layer'")


@registry.register_adapter_config
@dataclass
class NoAdapterConfig(AdapterConfig):
    """The features as they are, for archs that read any width: ``cross_attention`` and ``dual_encoder``."""

    type: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        only_if(self, False, "a type with a projection", "hidden_dim", "bias")


@registry.register_adapter_config
@dataclass
class MLPAdapterConfig(AdapterConfig):
    """Linear, GELU, linear (LLaVA-1.5). ``hidden_dim`` 0 means the language model's width."""

    type: str = "mlp_2layer"


@dataclass
class GridAdapterConfig(AdapterConfig):
    """An adapter that joins neighbours of a square grid of features.

    Attributes:
        factor: factor x factor neighbours become one token.
    """

    factor: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "factor")

    def num_tokens(self, num_features: int) -> int:
        side = math.isqrt(num_features)
        if side * side != num_features:
            raise InputError(f"type = {self.type!r}: needs a square grid of features, the vision encoder gives {num_features}")
        if side % self.factor:
            raise InputError(f"factor = {self.factor}: does not divide the grid of {side} x {side} vision features")
        return (side // self.factor) ** 2


@registry.register_adapter_config
@dataclass
class PixelShuffleConfig(GridAdapterConfig):
    """Space to depth, then a projection (Shi et al. 2016; Idefics3, nanoVLM)."""

    type: str = "pixel_shuffle"


@registry.register_adapter_config
@dataclass
class AvgPoolConfig(GridAdapterConfig):
    """The mean of each window of features, then a projection."""

    type: str = "avg_pool"


@registry.register_adapter_config
@dataclass
class PerceiverConfig(AdapterConfig):
    """The Perceiver resampler (Flamingo: Alayrac et al. 2022): any number of features become a fixed number
    of tokens.

    Attributes:
        latents: learned queries, which is also the number of tokens that come out.
        depth: layers of attention and feed-forward, at the width of the vision features.
        heads, head_dim: of its attention; their product may differ from the width.
        ff_mult: hidden width of the feed-forward, in widths of the vision features.
        project: false: the tokens keep the width of the vision features (OpenFlamingo), for
            ``vlm.arch = "cross_attention"``, whose blocks read any width.
        max_num_frames: rows of a learned table (OpenFlamingo's ``frame_embs``), of which row f is added to
            the features of frame f of a video; 0: there is none.
        max_num_media: the same for the images and videos of a sample (``media_time_embs``). With either, the
            frames of a video are read together and become ``latents`` tokens, not so many each; for archs
            whose images are not in the stream.
    """

    keeps_grid: ClassVar[bool] = False

    type: str = "perceiver"
    latents: int = 64
    depth: int = 6
    heads: int = 8
    head_dim: int = 64
    ff_mult: int = 4
    project: bool = True
    max_num_frames: int = 0
    max_num_media: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        only_if(self, self.project, "project = true", "hidden_dim", "bias")
        at_least(self, 1, "latents", "depth", "heads", "head_dim", "ff_mult")
        at_least(self, 0, "max_num_frames", "max_num_media")
        at_most(self, MAX_LAYERS, "depth")

    def num_tokens(self, num_features: int) -> int:
        """``latents``, whatever ``num_features`` is."""
        return self.latents

    @property
    def view_limits(self) -> tuple[int, int] | None:
        return (self.max_num_frames, self.max_num_media) if self.max_num_frames or self.max_num_media else None
