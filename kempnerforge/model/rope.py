"""Rotary position embeddings (Su et al. 2021), with the scalings of longer contexts. Tables are fp32.

Shapes: B rows, S positions, H heads, E head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kempnerforge.config.model import ModelConfig, RopeScaling

Rope = tuple[Tensor, Tensor]
"""cos and sin, each (B, 1, S, E / 2) fp32; with ``rope_local_theta`` (B, 1, S, E), the second half for local
layers. With learned positions both are the positions themselves, (B, 1, S, 1) int64, and turn nothing."""


def inverse_frequencies(cfg: ModelConfig, device: torch.device | None = None) -> Tensor:
    """(E / 2,) fp32 radians per position, or as many again for local layers."""
    exponents = -torch.arange(0, cfg.head_width, 2, device=device, dtype=torch.float32) / cfg.head_width
    freqs = cfg.rope_theta**exponents
    if cfg.rope_scaling is not None:
        freqs = _scale(freqs, cfg.rope_scaling)
    return torch.cat([freqs, cfg.rope_local_theta**exponents]) if cfg.rope_local_theta else freqs


def _scale(freqs: Tensor, scaling: RopeScaling) -> Tensor:
    if scaling.type == "linear":
        return freqs / scaling.factor
    # Llama 3.1: keep fast frequencies, divide slow ones, go smoothly from one to the other
    turns = scaling.original_max_seq_len * freqs / (2 * math.pi)
    smooth = ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
    return (1 - smooth) * freqs / scaling.factor + smooth * freqs


def rope_tables(positions: Tensor, cfg: ModelConfig) -> Rope:
    """Tables for ``positions``: (B, S), or (3, B, S) with ``rope_sections``, time, row and column."""
    if cfg.positions == "learned":
        numbers = positions[:, None, :, None]
        return numbers, numbers
    if positions.ndim == 3:
        turns = torch.stack([positions[axis] for axis in cfg.rope_axes * (2 if cfg.rope_local_theta else 1)], dim=-1)[:, None]
    else:
        turns = positions[:, None, :, None]
    angles = turns.float() * inverse_frequencies(cfg, positions.device)  # (B, 1, S, E / 2)
    return angles.cos(), angles.sin()


def rope_of_layer(rope: Rope, cfg: ModelConfig, layer: int) -> Rope:
    """The tables of ``layer``, (B, 1, S, E / 2), selected from the tables of all layers. A layer without
    rotary positions gets angles of 0.
    """
    cos, sin = rope
    if cfg.rope_local_theta:
        part = 0 if (layer + 1) % cfg.rope_global_interval == 0 else 1
        cos, sin = cos.chunk(2, dim=-1)[part], sin.chunk(2, dim=-1)[part]
    if cfg.nope_interval and (layer + 1) % cfg.nope_interval == 0:
        return torch.ones_like(cos), torch.zeros_like(sin)
    return cos, sin


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turns ``x`` (B, H, S, E) by its positions; first half against second half, as Llama does."""
    cos, sin = rope
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
