"""Mixture-of-Transformers (Liang et al. 2024, Algorithm 1): a set of weights for each modality, one attention
over all of them.

The stream is stored sorted by modality, text last: every block cuts it at the same places, so each modality
is one matrix product and nothing is gathered on the way. Where a token is in the stream is known from its
position (RoPE) and from the mask, which compares the original order; attention does not care how keys are
stored.

Shapes: B rows, S positions of the batch, K of the sorted stream, D ``model.dim``, H query heads, G key/value
heads, E head width, T trained positions.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from kempnerforge.config import ModelConfig, MoTConfig, registry
from kempnerforge.config.lora import is_adapter
from kempnerforge.data.batching.batch import Batch, Kind
from kempnerforge.interop import read_weights, take_weights
from kempnerforge.model.rope import Rope
from kempnerforge.model.transformer import MLP, Attention, Block, Cache, Context, init_weights, separate_draws, stream_norm
from kempnerforge.util.errors import InputError
from kempnerforge.vlm.base import VLM

log = logging.getLogger("kempnerforge")

TEXT = "text"


@dataclass(frozen=True)
class SortedContext(Context):
    """Where the sections of the stream are.

    Attributes:
        sizes: positions of each modality, in the order of the towers, text last; the same in every row.
        index: (B, K) int64, the position in the batch of what is stored at each place, -1 is padding. None:
            stored as the batch has it.
        columns: (B, S) int64, the inverse of ``index``: where each position is stored; K for padding.
    """

    sizes: tuple[int, ...] = ()
    index: Tensor | None = None
    columns: Tensor | None = None


class TowerParts(NamedTuple):
    """What a tower computes with."""

    attention_norm: nn.Module
    attention: Attention
    mlp_norm: nn.Module
    mlp: MLP


class Tower(nn.Module):
    """The parts of a block that a modality has for itself, under the names that they have in the block.

    Args:
        untie: some of "attn", "ffn", "norm".
    """

    def __init__(self, cfg: ModelConfig, untie: Sequence[str]) -> None:
        super().__init__()
        if "norm" in untie:
            self.attention_norm = stream_norm(cfg)
            self.mlp_norm = stream_norm(cfg)
        if "attn" in untie:
            self.attention = Attention(cfg)
        if "ffn" in untie:
            self.mlp = MLP(cfg)
        init_weights(self, cfg)


class MoTBlock(Block):
    """A layer with a tower for each modality (Liang et al. 2024, Algorithm 1). The block itself is the text
    tower; each other one is a child with the modality's name.

    Args:
        modalities: names of the towers in the order of the stream's sections, "text" last.
        untie: what the towers do not share.
        norm_placement: "pre", or "paper": H = X + norm(attention(X)), Y = H + norm(FFN(H)).

    Raises:
        ValueError: a modality cannot be the name of a child.
    """

    def __init__(self, cfg: ModelConfig, layer: int, modalities: Sequence[str], untie: Sequence[str], norm_placement: str) -> None:
        super().__init__(cfg, layer)
        self.modalities, self.pre_norm = tuple(modalities), norm_placement == "pre"
        with separate_draws():
            for name in self.modalities[:-1]:
                if hasattr(self, name):
                    raise InputError(f"mot_modalities: {name!r} cannot name a tower, a block has something else of that name")
                self.add_module(name, Tower(cfg, untie))
        # NOTE: a tuple hides the modules from registration: shared parts stay the block's, once.
        self.towers = tuple(self._parts(name) for name in self.modalities)

    def _parts(self, modality: str) -> TowerParts:
        """The parts of ``modality``: its separate ones, and the block's for all others."""
        separate = {} if modality == TEXT else dict(self.get_submodule(modality).named_children())
        shared = dict(self.named_children())
        return TowerParts._make(separate.get(name, shared[name]) for name in TowerParts._fields)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """(B, K, D) -> (B, K, D), sections as ``ctx.sizes`` has them."""
        assert isinstance(ctx, SortedContext)
        sections = x.split(ctx.sizes, dim=1)  # (B, K of the modality, D) each
        ropes = zip(*(table.split(ctx.sizes, dim=2) for table in self.rope(ctx)), strict=True)
        heads = [self._qkv(tower, part, rope) for tower, part, rope in zip(self.towers, sections, ropes, strict=True)]
        q, k, v = (torch.cat(parts, dim=2) for parts in zip(*heads, strict=True))  # (B, H or G, K, E)
        o = self.attend(q, k, v, ctx).split(ctx.sizes, dim=1)  # (B, K of the modality, H * E) each
        answers = [None] * len(o) if ctx.answers is None else ctx.answers.split(ctx.sizes, dim=1)
        return torch.cat([self._mix(*of_one) for of_one in zip(self.towers, sections, o, answers, strict=True)], dim=1)

    def _qkv(self, tower: TowerParts, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        return tower.attention.qkv(tower.attention_norm(x) if self.pre_norm else x, rope)

    def _mix(self, tower: TowerParts, x: Tensor, o: Tensor, answers: Tensor | None) -> Tensor:
        """Output projection and feed-forward of one tower: (B, k, D), (B, k, H * E) -> (B, k, D)."""
        if self.pre_norm:
            x = x + tower.attention.out(o, answers)
            return x + tower.mlp(tower.mlp_norm(x), answers)
        x = x + tower.attention_norm(tower.attention.out(o, answers))
        return x + tower.mlp_norm(tower.mlp(x, answers))


@registry.register_arch("mot")
class MoT(VLM):
    """Image tokens are in one stream with the words, and every token is computed with the weights of its
    modality. Codes of a picture that is written are image tokens, too, by their ids: in training, and step by
    step in generation, where rows may be in different modalities.

    A subclass with further modalities in the stream overrides ``modality_ids`` and ``section_sizes``. A
    modality without positions runs its tower on nothing, so its parameters have gradients of zero.
    """

    shares_rows = True

    @property
    def cfg(self) -> MoTConfig:
        return cast(MoTConfig, self.job.vlm)

    @property
    def modalities(self) -> list[str]:
        """In the order of the stream's sections: by name, not in the order of the config, and text last."""
        return [*sorted(set(self.cfg.mot_modalities) - {TEXT}), TEXT]

    def block(self, cfg: ModelConfig, layer: int) -> Block:
        return MoTBlock(cfg, layer, self.modalities, self.cfg.untie, self.cfg.norm_placement)

    # ---- the sorted stream -----------------------------------------------------------------------

    def modality_ids(self, batch: Batch) -> Tensor:
        """(B, S) int64: the place in ``modalities`` of what is at each position; -1 is padding."""
        ids = torch.full_like(batch.input_ids, len(self.modalities) - 1)
        ids = ids.masked_fill((batch.kinds == Kind.IMAGE) | self.is_code(batch), self.modalities.index("image"))
        return ids.masked_fill(batch.kinds == Kind.PAD, -1)

    def section_sizes(self, batch: Batch) -> tuple[int, ...]:
        """Positions that each of ``modalities`` needs, at most over the rows; known without a look at a
        tensor.
        """
        sizes = {"image": self.image_positions(batch), TEXT: batch.row_words}
        return tuple(sizes.get(name, 0) for name in self.modalities)

    def is_sorted(self, batch: Batch) -> bool:
        """Whether the batch has its modalities in the order of the sections already."""
        return batch.leading_images == batch.row_images and not (self.codes and batch.row_codes)

    def place(self, words: Tensor, features: Tensor | None, batch: Batch, cache: Cache | None) -> tuple[Tensor, Context]:
        x = self.insert(words, features, batch)  # (B, S, D)
        index = columns = None
        if self.is_sorted(batch):
            ctx = self.context(batch, cache, x.dtype)
        else:
            index, columns = self._sort(batch, self.stream_parts(batch))
            place, positions = index.clamp(min=0), self.rope_positions(batch, cache)  # (B, K)
            x = x.gather(1, place[..., None].expand(-1, -1, x.shape[-1]))  # (B, K, D)
            positions = positions.gather(-1, place.expand(*positions.shape[:-1], -1))
            ctx = self.laid_out(self.segments(batch).take(index), positions, batch, cache, x.dtype)
        sizes = self.stream_parts(batch) if ctx.share is None else ctx.share.sizes
        return x, SortedContext(ctx.rope, ctx.mask, cache, sizes, index, columns, share=ctx.share)

    def stream_parts(self, batch: Batch) -> tuple[int, ...]:
        sizes = self.section_sizes(batch)
        return (*sizes[:-1], batch.input_ids.shape[1] - sum(sizes[:-1])) if self.is_sorted(batch) else sizes

    def _sort(self, batch: Batch, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """``index`` and ``columns`` of the sorted stream: each section keeps the order of the row and is
        padded after it.
        """
        ids, total = self.modality_ids(batch), sum(sizes)
        columns = torch.full_like(batch.input_ids, total)  # (B, S)
        for number, start in enumerate(accumulate(sizes[:-1], initial=0)):
            member = ids == number
            columns = torch.where(member, start - 1 + member.cumsum(1), columns)
        steps = torch.arange(columns.shape[1], device=columns.device).expand_as(columns)
        index = torch.full((len(columns), total + 1), -1, dtype=steps.dtype, device=steps.device).scatter(1, columns, steps)
        return index[:, :total], columns  # the last place has taken the padding

    def read(self, x: Tensor, ctx: Context, batch: Batch) -> Tensor:
        assert isinstance(ctx, SortedContext)
        if ctx.columns is None or ctx.share is not None:
            return super().read(x, ctx, batch)
        rows = batch.targets // ctx.columns.shape[1]
        return x[rows, ctx.columns.flatten()[batch.targets].clamp(max=x.shape[1] - 1)]  # (T, D)

    def stored(self, values: Tensor, ctx: Context) -> Tensor:
        assert isinstance(ctx, SortedContext)
        if ctx.index is not None:
            values = values.gather(1, ctx.index.clamp(min=0)).masked_fill(ctx.index < 0, 0)
        return super().stored(values, ctx)

    def last(self, x: Tensor, ctx: Context) -> Tensor:
        assert isinstance(ctx, SortedContext)
        if ctx.index is None:
            return super().last(x, ctx)
        return x[torch.arange(len(x), device=x.device), ctx.index.argmax(1)]  # (B, D)

    # ---- weights to start from -------------------------------------------------------------------

    def warm_start(self) -> None:
        """Loads ``mot_warm_start_path``, if there is one, and copies the text tower into every other one.

        Tensors that the path has for another tower are taken from there. Vision encoder and adapter are taken
        when they fit.

        Raises:
            ValueError: nothing at the path has a place in the model, or a tensor of the backbone has another
                shape.
        """
        if not self.cfg.mot_warm_start_from_text:
            return
        taken: set[str] = set()
        if path := self.cfg.mot_warm_start_path:
            try:
                taken = take_weights(self, read_weights(path, self.job.model), path, optional=("vision_encoder.", "adapter."))
            except ValueError as error:
                raise InputError(f"vlm.mot_warm_start_path: {error}") from None
        self.loaded |= taken
        copied = self._copy_text(taken)
        log.info("mot: %d tensors of other towers are copies of the text tower's", copied)

    @torch.no_grad()
    def _copy_text(self, keep: set[str]) -> int:
        """Copies the tensors of the text tower into the other towers, except into those in ``keep``; returns
        how many were copied.
        """
        parameters, copied = {name: p for name, p in self.named_parameters() if not is_adapter(name)}, 0
        for number in range(len(self.transformer.layers)):
            layer = f"transformer.layers.{number}."
            for name in self.modalities[:-1]:
                tower = f"{layer}{name}."
                for target in [n for n in parameters if n.startswith(tower) and n not in keep]:
                    source = layer + target.removeprefix(tower)
                    parameters[target].copy_(parameters[source])
                    self.loaded |= {target} if source in self.loaded else set()
                    copied += 1
        return copied
