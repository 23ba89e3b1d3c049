"""Archs as a plugin would add them, each broken in one way that the contract suite must notice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kempnerforge.config import ModelConfig, registry
from kempnerforge.config.vlm import VLMConfig
from kempnerforge.data.batching.batch import Batch
from kempnerforge.model.transformer import Block, Cache, Context
from kempnerforge.vlm.base import Output
from kempnerforge.vlm.joint_decoder import JointDecoder


def arch(name: str) -> Callable[[type], type]:
    """Registers a config and its model."""
    registry.register_vlm_config(
        dataclass(type("Config", (VLMConfig,), {"__annotations__": {"arch": str}, "arch": name, "__qualname__": name}))
    )
    return registry.register_arch(name)


@arch("sound")
class Sound(JointDecoder):
    """Nothing is wrong with it."""


@arch("renames")
class Renames(JointDecoder):
    def block(self, cfg: ModelConfig, layer: int) -> Any:
        return Wrapped(Block(cfg, layer))


class Wrapped(nn.Module):
    def __init__(self, inner: Block) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        return self.inner(x, ctx)


@arch("looks_ahead")
class LooksAhead(JointDecoder):
    def place(self, words: Tensor, features: Tensor | None, batch: Batch, cache: Cache | None) -> tuple[Tensor, Context]:
        x, ctx = super().place(words, features, batch, cache)
        return x + 0.1 * x.roll(-1, 1), ctx


@arch("mixes_texts")
class MixesTexts(JointDecoder):
    def context(self, batch: Batch, cache: Cache | None, dtype: torch.dtype) -> Context:
        return super().context(replace(batch, text_ids=torch.zeros_like(batch.text_ids)), cache, dtype)


@arch("mixes_samples")
class MixesSamples(JointDecoder):
    def context(self, batch: Batch, cache: Cache | None, dtype: torch.dtype) -> Context:
        return super().context(replace(batch, sample_ids=batch.sample_ids.clamp(max=0), documents=()), cache, dtype)


@arch("mixes_images")
class MixesImages(JointDecoder):
    def place(self, words: Tensor, features: Tensor | None, batch: Batch, cache: Cache | None) -> tuple[Tensor, Context]:
        return super().place(words, features if features is None else features.flip(0), batch, cache)


@arch("is_blind")
class IsBlind(JointDecoder):
    def place(self, words: Tensor, features: Tensor | None, batch: Batch, cache: Cache | None) -> tuple[Tensor, Context]:
        return super().place(words, None, batch, cache)


@arch("cuts_the_graph")
class CutsTheGraph(JointDecoder):
    def forward(self, batch: Batch, cache: Cache | None = None) -> Output:
        empty = batch.images is not None and not len(batch.images)
        return super().forward(replace(batch, images=None) if empty else batch, cache)


@arch("overlaps")
class Overlaps(JointDecoder):
    def shard_units(self) -> Iterator[nn.Module]:
        yield from super().shard_units()
        yield self.transformer.layers[0].mlp  # type: ignore[misc]


@arch("forgets")
class Forgets(JointDecoder):
    """Computes with random numbers that no checkpoint holds."""

    def __init__(self, job: Any) -> None:
        super().__init__(job)
        self.register_buffer("hidden", torch.randn(job.model.dim), persistent=False)

    def place(self, words: Tensor, features: Tensor | None, batch: Batch, cache: Cache | None) -> tuple[Tensor, Context]:
        return super().place(words + self.hidden, features, batch, cache)


@arch("miscounts_the_cache")
class MiscountsTheCache(JointDecoder):
    def context(self, batch: Batch, cache: Cache | None, dtype: torch.dtype) -> Context:
        later = cache is not None and cache.segments is not None
        return super().context(replace(batch, positions=batch.positions + 1) if later else batch, cache, dtype)


@arch("averages")
class Averages(JointDecoder):
    def forward(self, batch: Batch, cache: Cache | None = None) -> Output:
        output = super().forward(batch, cache)
        return Output(output.loss / max(1, batch.num_targets), output.logits)
