"""Vision encoders: the contract, and the way from a config to a built one.

Shapes: N images, H x H pixels, F features (tokens) of one image, D ``dim``.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kempnerforge.config import registry
from kempnerforge.config.vision import VisionEncoderConfig
from kempnerforge.model.buffers import ExactBuffers
from kempnerforge.model.transfer import told
from kempnerforge.util.errors import NotBuiltError
from kempnerforge.util.plugin_returns import check_returns, instance, sequence_of


class VisionEncoder(ExactBuffers, ABC):
    """The contract of vision encoders: uint8 pixels in, one sequence of features per image out.

    Subclasses register with ``@registry.register_vision_encoder(type)``, take the section's config as their
    only argument, and implement ``forward`` and ``units``.

    Args:
        num_tokens: features per image.
        dim: their width.
        image_size: pixels along each side of the images that it takes.
        mean, std: normalisation of RGB values in [0, 1], three numbers each; ``normalisation`` are both, as
            plain numbers.
        layer_dim: channels of each of ``deepstack_layers``, which are the last ones of ``dim``; 0: it gives
            the features of no other layers.
        side: patches along a side, if ``forward`` takes ``grids`` as well: how many rows and columns of patches
            each image has, in the upper left of the square. None of these sees another patch, and what the
            others give is not used. 0: it takes whole images alone.
        any_shape: with ``side``: an image may have more rows or columns than that, of ``side ** 2`` patches in
            all. Its squares of ``joined`` x ``joined`` patches are then, row by row, in rows of the square.

    Attributes:
        joined: patches along a side of what the adapter makes one token; set by who knows the adapter.
    """

    mean: Tensor
    std: Tensor

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        check_returns(cls, forward=instance(Tensor, "a Tensor (N, F, D)"), units=sequence_of(nn.Module, "a list of modules"))

    def __init__(
        self,
        *,
        num_tokens: int,
        dim: int,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        layer_dim: int = 0,
        side: int = 0,
        any_shape: bool = False,
    ) -> None:
        super().__init__()
        self.num_tokens, self.dim, self.image_size, self.layer_dim = num_tokens, dim, image_size, layer_dim
        self.side, self.any_shape, self.joined = side, any_shape, 1
        self.normalisation = (tuple(mean), tuple(std))
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(3, 1, 1), persistent=False)

    @property
    @abstractmethod
    def units(self) -> list[nn.Module]:
        """Modules, disjoint and called one after the other, that may each be sharded, compiled or recomputed
        on its own.
        """

    @property
    def signature(self) -> str:
        """The settings that decide the features, without weights and buffers; for ``train.feature_cache``."""
        return repr(self)

    def standing_alone(self, cfg: Any) -> VisionEncoderConfig:
        """``cfg`` changed so that the same encoder can be built without the files that were read, for weights
        from a checkpoint.
        """
        return cfg.without_weights()

    def pretrained(self, cfg: Any) -> Iterable[str]:
        """Names of the parameters whose weights were read when it was built from ``cfg``."""
        return [name for name, _ in self.named_parameters()] if cfg.has_weights else []

    def check_files(self, cfg: Any) -> None:
        """Refuses weights that ``cfg`` names and that cannot be loaded, as far as names and shapes tell it; called
        when this was built on the meta device, which reads none.
        """

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Features of ``images``.

        Args:
            images: (N, 3, H, H) uint8 RGB; N may be 0.

        Returns:
            (N, F, D) in the dtype of the weights.
        """

    def normalise(self, images: Tensor) -> Tensor:
        """(N, 3, H, H) uint8 -> ``(images / 255 - mean) / std`` of the same shape, computed in fp32, in the
        dtype of the weights.
        """
        assert images.dtype == torch.uint8, f"images come as uint8, got {images.dtype}"
        assert images.shape[1:] == (3, self.image_size, self.image_size), f"image shape {tuple(images.shape)}, size {self.image_size}"
        pixels = images.float().div_(255).sub_(self.mean.float()).div_(self.std.float())
        return pixels.to(next(self.parameters()).dtype)


def inside(grids: Sequence[tuple[int, int]], side: int, device: torch.device) -> Tensor:
    """(N, side, side) bool: which patches each image of ``grids`` has."""
    sizes, steps = told(grids, device)[..., None, None], torch.arange(side, device=device)  # (N, 2, 1, 1)
    return (steps[:, None] < sizes[:, 0]) & (steps < sizes[:, 1])


def patch_order(grid: tuple[int, int], side: int, joined: int) -> Tensor:
    """(side ** 2,) int64: where in the square the patches of an image are, row by row, and then the others;
    see ``any_shape``.
    """
    rows, columns = grid
    row, column = torch.arange(rows, device="cpu")[:, None], torch.arange(columns, device="cpu")
    if max(grid) > side:
        token = row // joined * (columns // joined) + column // joined
        row, column = (token // (side // joined) * joined + row % joined), (token % (side // joined) * joined + column % joined)
    at = (row * side + column).flatten()
    other = torch.ones(side**2, dtype=torch.bool, device="cpu").index_fill(0, at, False)
    return torch.cat([at, other.nonzero().flatten()])


def build_vision_encoder(cfg: VisionEncoderConfig) -> VisionEncoder:
    """The encoder that ``cfg.type`` names, with fresh or pretrained weights as ``cfg`` says.

    Raises:
        NotImplementedError: the type has a config but no model.
        ValueError: the model refuses the config, for instance a tower that is not where ``path`` points.
    """
    if cfg.type not in registry.vision_encoders:
        known = registry.vision_encoders.known(cfg.type)
        raise NotBuiltError(f"vision_encoder.type = {cfg.type!r}: has a config but no model; {known}")
    encoder = registry.vision_encoders.get(cfg.type)(cfg)
    assert isinstance(encoder, VisionEncoder), f"{type(encoder).__name__} is not a VisionEncoder"
    assert cfg.num_tokens() in (None, encoder.num_tokens), f"{cfg.type}: config and encoder disagree on the number of tokens"
    return encoder


# NOTE: importing these registers the encoders of this package. It is last because they import VisionEncoder
# from here.
for _name in ("vit", "hf_towers", "efficientnet"):
    importlib.import_module(f"kempnerforge.model.{_name}")
