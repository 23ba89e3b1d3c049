"""Adapters: from the vision encoder's features to tokens of the language model's width.

Shapes: N images, F features of one image, s ``factor``, Di ``in_dim``, Do ``out_dim``, T tokens that leave, H
heads, E head width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kempnerforge.config import JobConfig, registry
from kempnerforge.config.adapter import AdapterConfig, GridAdapterConfig, PerceiverConfig
from kempnerforge.model.attention import attend
from kempnerforge.model.transfer import told
from kempnerforge.model.transformer import separate_draws
from kempnerforge.model.vision import VisionEncoder
from kempnerforge.util.errors import InputError, NotBuiltError
from kempnerforge.util.plugin_returns import check_returns, instance


class TwoLayerMLP(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, bias: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_dim, hidden_dim, bias=bias)
        self.activation = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, out_dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_dim) -> (..., out_dim)."""
        return self.fc2(self.activation(self.fc1(x)))


def projection(in_dim: int, hidden_dim: int, out_dim: int, bias: bool) -> nn.Module:
    """One linear layer when ``hidden_dim`` is 0, otherwise a ``TwoLayerMLP`` of that hidden width."""
    return TwoLayerMLP(in_dim, hidden_dim, out_dim, bias) if hidden_dim else nn.Linear(in_dim, out_dim, bias=bias)


class Adapter(nn.Module, ABC):
    """The contract of adapters: ``num_tokens`` for each image, and a ``forward``.

    Subclasses register with ``@registry.register_adapter(type)``.

    Attributes:
        out_dim: width of what it gives; one that is not the language model's is for archs that read any.

    Args:
        cfg: the ``[adapter]`` section.
        in_dim: width of the features.
        out_dim: width of the language model.
        num_features: features per image.

    Attributes:
        deepstack: adapters of ``vision_encoder.deepstack_layers``.

    Raises:
        ValueError: the adapter cannot take ``num_features``.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        check_returns(cls, forward=instance(Tensor, "a Tensor (N, T, Do)"))

    def __init__(self, cfg: AdapterConfig, in_dim: int, out_dim: int, num_features: int) -> None:
        super().__init__()
        self.num_tokens, self.out_dim = cfg.num_tokens(num_features), out_dim
        self.deepstack = nn.ModuleList()

    @abstractmethod
    def forward(self, features: Tensor) -> Tensor:
        """(N, F, Di) -> (N, T, Do)."""


class ProjectingAdapter(Adapter):
    """An adapter that ends in a projection ``proj``."""

    proj: nn.Module

    def prepare(self, features: Tensor) -> Tensor:
        """(N, F, Di) -> (N, T, the width that ``proj`` takes)."""
        return features

    def forward(self, features: Tensor) -> Tensor:
        return self.proj(self.prepare(features))


@registry.register_adapter("none")
class NoAdapter(Adapter):
    """The features as they are."""

    def __init__(self, cfg: AdapterConfig, in_dim: int, out_dim: int, num_features: int) -> None:
        super().__init__(cfg, in_dim, in_dim, num_features)

    def forward(self, features: Tensor) -> Tensor:
        return features


@registry.register_adapter("linear")
class LinearAdapter(ProjectingAdapter):
    """One linear layer (PaliGemma, Beyer et al. 2024)."""

    def __init__(self, cfg: AdapterConfig, in_dim: int, out_dim: int, num_features: int) -> None:
        super().__init__(cfg, in_dim, out_dim, num_features)
        self.proj = projection(in_dim, 0, out_dim, cfg.bias)


@registry.register_adapter("mlp_2layer")
class MLPAdapter(ProjectingAdapter):
    """Linear, GELU, linear (LLaVA-1.5, Liu et al. 2023b); the hidden width is ``out_dim`` unless the config
    says another.
    """

    def __init__(self, cfg: AdapterConfig, in_dim: int, out_dim: int, num_features: int) -> None:
        super().__init__(cfg, in_dim, out_dim, num_features)
        self.proj = projection(in_dim, cfg.hidden_dim or out_dim, out_dim, cfg.bias)


class GridAdapter(ProjectingAdapter):
    """The base of adapters that join ``factor`` x ``factor`` neighbours of a square grid, which is given row
    by row.
    """

    def __init__(self, cfg: GridAdapterConfig, in_dim: int, out_dim: int, num_features: int) -> None:
        super().__init__(cfg, in_dim, out_dim, num_features)
        self.factor, self.side = cfg.factor, math.isqrt(self.num_tokens)

    def windows(self, features: Tensor) -> Tensor:
        """(N, F, Di) -> (N, rows of windows, s rows in one, columns of windows, s columns in one, Di)."""
        n, _, dim = features.shape
        return features.reshape(n, self.side, self.factor, self.side, self.factor, dim)


@registry.register_adapter("pixel_shuffle")
class PixelShuffleAdapter(GridAdapter):
    """Space to depth (the inverse of Shi et al. 2016, eq. 4), then a projection.

    A token is a window; its channels are the window's features one after the other, row by row: the order of
    Idefics3, SmolVLM, nanoVLM.
    """

    def __init__(self, cfg: GridAdapterConfig, in_dim: int, out_dim: int, num_features: int) -> None:
        super().__init__(cfg, in_dim, out_dim, num_features)
        self.proj = projection(in_dim * cfg.factor**2, cfg.hidden_dim, out_dim, cfg.bias)

    def prepare(self, features: Tensor) -> Tensor:
        """(N, F, Di) -> (N, F / s^2, s^2 * Di)."""
        x = self.windows(features).transpose(2, 3)  # (N, rows, columns, s, s, Di)
        return x.reshape(len(x), self.num_tokens, self.factor**2 * features.shape[-1])


@registry.register_adapter("avg_pool")
class AvgPoolAdapter(GridAdapter):
    """The mean of each window, then a projection."""

    def __init__(self, cfg: GridAdapterConfig, in_dim: int, out_dim: int, num_features: int) -> None:
        super().__init__(cfg, in_dim, out_dim, num_features)
        self.proj = projection(in_dim, cfg.hidden_dim, out_dim, cfg.bias)

    def prepare(self, features: Tensor) -> Tensor:
        """(N, F, Di) -> (N, F / s^2, Di)."""
        return self.windows(features).mean(dim=(2, 4)).flatten(1, 2)


class PerceiverLayer(nn.Module):
    """Latents read the features and themselves, then a feed-forward, each added to them (Alayrac et al. 2022,
    figure 5).
    """

    def __init__(self, cfg: PerceiverConfig, dim: int) -> None:
        super().__init__()
        inner = cfg.heads * cfg.head_dim
        self.head_dim = cfg.head_dim
        self.media_norm, self.latents_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q_proj = nn.Linear(dim, inner, bias=False)
        self.k_proj = nn.Linear(dim, inner, bias=False)
        self.v_proj = nn.Linear(dim, inner, bias=False)
        self.o_proj = nn.Linear(inner, dim, bias=False)
        self.mlp = TwoLayerMLP(dim, cfg.ff_mult * dim, dim, bias=False)

    def heads(self, x: Tensor) -> Tensor:
        """(N, L, H * E) -> (N, H, L, E)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, latents: Tensor, features: Tensor) -> Tensor:
        """(N, T, Di), (N, F, Di) -> (N, T, Di)."""
        queries = self.latents_norm(latents)
        media = torch.cat([self.media_norm(features), queries], dim=1)  # (N, F + T, Di)
        q, k, v = self.heads(self.q_proj(queries)), self.heads(self.k_proj(media)), self.heads(self.v_proj(media))
        latents = latents + self.o_proj(attend(q, k, v, causal=False))
        return latents + self.mlp(self.mlp_norm(latents))


@registry.register_adapter("perceiver")
class PerceiverAdapter(ProjectingAdapter):
    """The Perceiver resampler (Alayrac et al. 2022, section 2.1): learned latents take in any number of
    features, in any order.

    It works at the width of the vision features, as Flamingo's does; a projection to the language model's
    width follows, unless ``project`` is false.

    Attributes:
        frame_embs: (``max_num_frames``, Di), added to each frame of a video; None: there are none.
        media_time_embs: (``max_num_media``, 1, Di), added to each image or video of a sample.
    """

    def __init__(self, cfg: PerceiverConfig, in_dim: int, out_dim: int, num_features: int) -> None:
        super().__init__(cfg, in_dim, out_dim, num_features)
        self.latents = nn.Parameter(torch.randn(cfg.latents, in_dim))
        self.frame_embs = nn.Parameter(torch.randn(cfg.max_num_frames, in_dim)) if cfg.max_num_frames else None
        self.media_time_embs = nn.Parameter(torch.randn(cfg.max_num_media, 1, in_dim)) if cfg.max_num_media else None
        self.layers = nn.ModuleList(PerceiverLayer(cfg, in_dim) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(in_dim)
        self.out_dim = out_dim if cfg.project else in_dim
        self.proj = projection(in_dim, cfg.hidden_dim, out_dim, cfg.bias) if cfg.project else nn.Identity()

    def prepare(self, features: Tensor) -> Tensor:
        x = self.latents.expand(len(features), -1, -1)  # (N, T, Di)
        for layer in self.layers:
            x = layer(x, features)
        return self.norm(x)

    def forward(self, features: Tensor, views: Sequence[tuple[int, int]] = ()) -> Tensor:
        """(N, F, Di) -> (N, T, Do).

        Args:
            views: (image of its sample, view of its image) of each of the N, if there are embeddings of
                them; the views of an image follow one another, and their tokens are at the first of them,
                zeros at the others. Empty: each is the only view of a first image.
        """
        if self.frame_embs is None and self.media_time_embs is None:
            return super().forward(features)
        views = views or [(0, 0)] * len(features)
        firsts = [number for number, (_, view) in enumerate(views) if not view]
        sizes = [end - first for first, end in zip(firsts, [*firsts[1:], len(views)], strict=True)]
        order, found = list[int](), list[Tensor]()
        for count in sorted(set(sizes)):
            alike = [first for first, size in zip(firsts, sizes, strict=True) if size == count]
            x = torch.stack([features[first : first + count] for first in alike])  # (images, views of one, F, Di)
            if self.frame_embs is not None:
                x = x + self.frame_embs[:count, None]
            x = x.flatten(1, 2)
            if self.media_time_embs is not None:
                x = x + self.media_time_embs[[views[first][0] for first in alike]]
            order += alike
            found.append(super().forward(x))
        tokens = torch.cat(found)
        return tokens.new_zeros(len(features), *tokens.shape[1:]).index_put((told(order, tokens.device),), tokens)


def build_adapter(cfg: AdapterConfig, in_dim: int, out_dim: int, num_features: int) -> Adapter:
    """The adapter that ``cfg.type`` names.

    Args:
        cfg: the ``[adapter]`` section.
        in_dim: width of the vision features.
        out_dim: width of the language model.
        num_features: vision features per image.

    Raises:
        NotImplementedError: the type has a config but no model.
        ValueError: the adapter cannot take ``num_features``, for instance because a CLS token is among them.
    """
    if cfg.type not in registry.adapters:
        raise NotBuiltError(f"adapter.type = {cfg.type!r}: has a config but no model; {registry.adapters.known(cfg.type)}")
    try:
        adapter = registry.adapters.get(cfg.type)(cfg, in_dim, out_dim, num_features)
    except InputError as error:
        grid = math.isqrt(num_features - 1)
        if num_features > 1 and grid**2 == num_features - 1:
            hint = f"that is {grid} x {grid} and one more: leave out the CLS token, or take an adapter that needs no grid"
            raise InputError(f"{error} ({hint})") from error
        raise
    assert isinstance(adapter, Adapter), f"{type(adapter).__name__} is not an Adapter"
    return adapter


def add_deepstack(adapter: Adapter, job: JobConfig, encoder: VisionEncoder) -> None:
    """Gives ``adapter`` one more adapter for each of ``vision_encoder.deepstack_layers``.

    Raises:
        InputError: the encoder does not give them.
    """
    layers = job.vision_encoder.deepstack_layers
    if layers and not encoder.layer_dim:
        raise InputError(f"vision_encoder.deepstack_layers = {layers}: {type(encoder).__name__} gives no inner layers")
    with separate_draws("deepstack"):
        for _ in layers:
            adapter.deepstack.append(build_adapter(job.adapter.of_layers, encoder.layer_dim, job.model.dim, encoder.num_tokens))


def check_size(module: VisionEncoder | Adapter, given: Tensor, width: int) -> Tensor:
    """``given``, which ``module`` has returned: (N, its ``num_tokens``, ``width``). More tokens than that would
    lie on words, fewer would leave places of an image empty.

    Raises:
        InputError: it has another shape.
    """
    if given.shape[1:] != (module.num_tokens, width):
        name, said = type(module).__name__.removeprefix("FSDP"), f"(N, {module.num_tokens}, {width})"
        raise InputError(f"{name}.forward: gives the shape {tuple(given.shape)}; by its num_tokens and width it must be {said}")
    return given
