"""The contract between an architecture and everything else: trainer, sharding, evaluation, checkpoints see
only this class.

An arch overrides ``block`` (which block makes layer i) and ``place`` (what enters the residual stream, and
which other inputs blocks get), and seldom more. It *adds* modules and never renames any: when a text
checkpoint is loaded, only the new names are missing. New modules are made within ``separate_draws``, so that
the text weights of a fresh model are the same in every arch.

Shapes: B rows, S positions, D ``model.dim``, N images, M placements of them, F tokens of one image, T trained
positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from kempnerforge.config import JobConfig, ModelConfig
from kempnerforge.data.batching.batch import Batch, Kind
from kempnerforge.data.batching.known_features import KnownFeatures
from kempnerforge.distributed.balance import balanced
from kempnerforge.eval.generate import Prompts, Sampling, generate
from kempnerforge.model.adapters import Adapter, add_deepstack, build_adapter, check_size
from kempnerforge.model.attention import ByWindow, Mask, Segments
from kempnerforge.model.aux_loss import HasAuxLoss, take_losses, with_aux_loss
from kempnerforge.model.buffers import ExactBuffers
from kempnerforge.model.rope import rope_tables
from kempnerforge.model.row_share import share_row
from kempnerforge.model.transformer import Block, Cache, Context, Transformer
from kempnerforge.model.vision import VisionEncoder, build_vision_encoder
from kempnerforge.util.errors import InputError
from kempnerforge.vlm.masks import mask_structure
from kempnerforge.vlm.output import ArchReturns, Output
from kempnerforge.vlm.placements import grid_positions, image_columns, own_targets, told_views, with_answers
from kempnerforge.vlm.word_loss import loss_in_pieces, word_loss


class VLM(ExactBuffers, ArchReturns):
    """A vision-language model around one text backbone. Children: ``transformer``, ``vision_encoder``,
    ``adapter``.

    Args:
        job: the resolved config, ``model.vocab_size`` set.

    Attributes:
        loaded: names of the parameters with weights from elsewhere; all others are random. Code that loads
            some adds their names.
        logits_at_once: as ``train.logits_at_once``.
    """

    has_images = True
    """Whether the arch reads images; a text-only one builds no encoder and no adapter."""

    causal_in_training: ClassVar[bool] = True
    """False: in training (never in evaluation) a position may depend on later ones, for instance through
    expert-choice routing."""

    shares_rows: ClassVar[bool] = False
    """Whether ranks can have some positions of each row (``distributed.context_parallel``): every value that
    ``place`` gives for positions is of ``Context.share``, where there is one."""

    row_ranks: DeviceMesh | None = None
    """The ranks that share the rows of a batch in training; None: this one has them alone."""
    pair_ranks: DeviceMesh | None = None
    """The ranks whose pairs are compared in training, each with samples of its own; None: all ranks."""
    token_side = 0
    """Tokens along a side of an image, if they are a grid that ``insert`` may take parts of; else 0."""

    cell = 0
    """Pixels along a side of a token, where images may have fewer rows and columns of them; else 0."""
    reads_any_width: ClassVar[bool] = False
    """Whether it takes images that are not ``model.dim`` wide."""

    hf_model: Any = None
    """The model of transformers that all of this is, if it is one."""

    def __init__(self, job: JobConfig) -> None:
        super().__init__()
        self.job = job
        self.num_image_tokens = 0
        self.loaded: set[str] = set()
        self.logits_at_once = job.train.logits_at_once
        if self.logits_at_once and "words" not in self.gives:
            raise InputError(f"train.logits_at_once = {self.logits_at_once}: the model makes no logits; leave it out")
        self.build()
        if self.has_images:
            job.check_sequence(self.num_image_tokens)

    # ---- what an arch overrides ------------------------------------------------------------------

    def block(self, cfg: ModelConfig, layer: int) -> Block:
        """Makes layer ``layer``."""
        return Block(cfg, layer)

    def place(self, words: Tensor, features: Tensor | None, batch: Batch, cache: Cache | None) -> tuple[Tensor, Context]:
        """Builds the residual stream.

        Args:
            words: (B, S, D) embedded ``batch.input_ids``.
            features: (N, F, D) adapted images. If the batch has no image, this is one dummy image that is
                placed nowhere; None if this pass encodes no images.

        Returns:
            The stream, (B, S, D), and the other inputs of the blocks. With ``Context.share`` the stream is whole
            and the other inputs are of this rank's positions.
        """
        raise NotImplementedError

    def build(self) -> None:
        """Makes all children and sets ``num_image_tokens``. An arch with other children overrides
        ``forward``, ``encode``, ``image_size``, ``normalisation``, ``normalise`` and ``shard_units`` as well.
        """
        self.transformer = Transformer(self.job.model, self.block)
        if self.has_images:
            self.build_vision()
            add_deepstack(self.adapter, self.job, self.vision_encoder)
            self.num_image_tokens = self.adapter.num_tokens
            side, encoder = math.isqrt(self.num_image_tokens), self.vision_encoder
            if self.job.adapter.keeps_grid and side**2 == self.num_image_tokens:
                self.token_side = side
            if encoder.side and self.job.adapter.keeps_grid and not encoder.side % side and not encoder.image_size % encoder.side:
                self.cell, encoder.joined = encoder.image_size // side, encoder.side // side

    def build_vision(self) -> None:
        """Sets ``vision_encoder`` and ``adapter``."""
        self.vision_encoder: VisionEncoder = build_vision_encoder(self.job.vision_encoder)
        self.loaded |= {f"vision_encoder.{name}" for name in self.vision_encoder.pretrained(self.job.vision_encoder)}
        cfg, encoder = self.job.vision_encoder, self.vision_encoder
        deeper = len(cfg.deepstack_layers) * encoder.layer_dim
        self.adapter: Adapter = build_adapter(self.job.adapter, encoder.dim - deeper, self.job.model.dim, encoder.num_tokens)
        if self.adapter.out_dim != self.job.model.dim and not self.reads_any_width:
            width = f"gives tokens {self.adapter.out_dim} wide, and vlm.arch = {self.job.vlm.arch if self.job.vlm else None!r}"
            raise InputError(f"adapter.type = {self.job.adapter.type!r}: {width} takes model.dim = {self.job.model.dim}")

    def read(self, x: Tensor, ctx: Context, batch: Batch) -> Tensor:
        """The stream where it is scored: (B, S, D) -> (T, D) at ``batch.targets``."""
        return x.flatten(0, 1)[batch.targets if ctx.share is None else ctx.share.scored]

    def stored(self, values: Tensor, ctx: Context) -> Tensor:
        """``values`` (B, S) of the batch's positions in the order in which the stream has them, (B, K), or with
        ``Context.share`` those of this rank.
        """
        return values if ctx.share is None else ctx.share.take(values)

    def stream_parts(self, batch: Batch) -> Sequence[int]:
        """Positions of each part of the stream of which every rank that shares it gets some."""
        return batch.input_ids.shape[1:]

    def last(self, x: Tensor, ctx: Context) -> Tensor:
        """The stream at the last token of each row, when generating: (B, S, D) -> (B, D)."""
        return x[:, -1]

    def warm_start(self) -> None:
        """Replaces fresh weights by better ones and adds their names to ``loaded``; called once at the start
        of a run, before the model is sharded.

        Raises:
            ValueError: what the config names cannot be used.
        """

    # ---- what it may use -------------------------------------------------------------------------

    def insert(self, words: Tensor, features: Tensor | None, batch: Batch) -> Tensor:
        """``words`` (B, S, D) with the tokens of each image at its places."""
        if features is None:
            return words
        columns = image_columns(batch, features.shape[1], nowhere=(length := words.shape[1]))  # (M, F)
        rows, tokens = batch.image_rows[:, None].expand_as(columns), features[batch.image_index].to(words.dtype)
        if not batch.image_parts:
            return words.index_put((rows, columns), tokens)
        # a view would be one graph more to compile
        return F.pad(words, (0, 0, 0, 1)).index_put((rows, columns), tokens).narrow_copy(1, 0, length)

    def read_positions(self, batch: Batch) -> int:
        """Positions of images that are read, in the row that has most."""
        return batch.row_image_tokens if batch.image_parts else batch.row_images * self.num_image_tokens

    @cached_property
    def codes(self) -> range:
        """Ids that are codes of a written picture."""
        return self.job.model.codes

    def is_code(self, batch: Batch) -> Tensor:
        """(B, S) bool: where codes of a written picture are."""
        ids = batch.input_ids
        return (ids >= self.codes.start) & (ids < self.codes.stop) & (batch.kinds > Kind.IMAGE)

    def image_positions(self, batch: Batch) -> int:
        """Positions of the modality "image" in a row at most, those of written pictures among them; known
        without a look at a tensor.
        """
        return self.read_positions(batch) + (batch.row_codes if self.codes else 0)

    @property
    def gives(self) -> frozenset[str]:
        """What a task may read of it: "words", which it writes and scores; "embeddings" of images and texts."""
        return frozenset({"words"})

    @property
    def attention_mask(self) -> str:
        """Who sees whom: one of ``MASKS``."""
        return self.job.vlm.attention_mask if self.job.vlm is not None else "causal"

    @property
    def image_size(self) -> int:
        """Pixels along each side of the images that it takes."""
        return self.vision_encoder.image_size

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and std of RGB values in [0, 1]."""
        return self.vision_encoder.normalisation

    def normalise(self, images: Tensor) -> Tensor:
        """(N, 3, H, H) uint8 -> the same shape, normalised."""
        return self.vision_encoder.normalise(images)

    def with_image_ids(self, batch: Batch, image_id: int) -> Tensor:
        """``batch.input_ids`` (B, S) with the token of an image at its positions, as classes of transformers
        take them.
        """
        return batch.input_ids.masked_fill(batch.kinds == Kind.IMAGE, image_id)

    def segments(self, batch: Batch) -> Segments:
        """Who sees whom in a stream that is laid out as ``batch`` says."""
        text_ids, groups, ahead = mask_structure(self.attention_mask, batch)
        return Segments(
            batch.sample_ids,
            text_ids,
            groups,
            has_documents=batch.has_documents,
            documents=batch.documents or None,
            positions=batch.positions if any(self.job.model.windows) else None,
            windows=self.job.model.windows,
            ahead=ahead,
        )

    def mask(self, segments: Segments, batch: Batch, cache: Cache | None, dtype: torch.dtype) -> Mask | ByWindow | None:
        """The mask of a stream with the structure ``segments``, in its cheapest form; None is plain causal."""
        queries = segments.num_keys
        if cache is not None:
            cache.segments = segments if cache.segments is None else cache.segments.extend(segments)
            return cache.segments.mask(queries, dtype)
        one_group = self.attention_mask == "image_bidirectional" and batch.leading_images == 1
        return segments.mask(queries, dtype, self.read_positions(batch) if one_group else 0)

    def rope_positions(self, batch: Batch, cache: Cache | None) -> Tensor:
        """Positions that turn queries and keys: (B, S), or (3, B, S) with ``model.rope_sections``."""
        side = math.isqrt(self.job.vlm.residual_stream_image_tokens(self.num_image_tokens)) if self.job.vlm is not None else 0
        return grid_positions(batch, cache, side) if side and self.job.model.rope_sections else batch.positions

    def context(self, batch: Batch, cache: Cache | None, dtype: torch.dtype) -> Context:
        """Positions and mask of a stream that is laid out as ``batch`` says."""
        return self.laid_out(self.segments(batch), self.rope_positions(batch, cache), batch, cache, dtype)

    def laid_out(self, segments: Segments, positions: Tensor, batch: Batch, cache: Cache | None, dtype: torch.dtype) -> Context:
        """The context of a stream with the structure ``segments`` and ``positions`` as of ``rope_positions``."""
        if self.row_ranks is None or not self.training:
            return Context(rope_tables(positions, self.job.model), self.mask(segments, batch, cache, dtype), cache)
        share = share_row(self.stream_parts(batch), self.row_ranks, positions.device)
        mask = segments.shared(share.index).mask(share.length, dtype, first=share.first)  # own queries, all keys
        return Context(rope_tables(share.take(positions, -1), self.job.model), mask, share=share)

    # ---- the same for every arch -----------------------------------------------------------------

    @cached_property
    def with_aux_loss(self) -> list[HasAuxLoss]:
        """The modules that may add an auxiliary loss."""
        return with_aux_loss(self)

    def encode(self, images: Tensor, known: KnownFeatures | None = None, grids: Sequence[tuple[int, int]] = (), **told: Any) -> Tensor:
        """Images (N, 3, H, W) uint8 -> (N, F, D + L * D): the tokens, and with L ``deepstack_layers`` the
        features of each. A frozen encoder saves nothing for a backward pass.

        Args:
            known: features of images that are known already.
            grids: rows and columns of tokens of each image; empty: all.
            told: for the adapter.
        """
        encoder = self.vision_encoder
        patches = encoder.side // math.isqrt(self.num_image_tokens)  # along a side of a token
        if known is not None and known.complete:
            return self.adapt(known.all(encoder.num_tokens, encoder.dim, images.device), **told)
        encode = partial(balanced, encoder) if self.training and self.job.distributed.balance_images else encoder
        learns = any(parameter.requires_grad for parameter in encoder.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            features = encoder(images, [(rows * patches, columns * patches) for rows, columns in grids]) if grids else encode(images)
        return self.adapt(features if known is None else known.merge(features), **told)

    def adapt(self, features: Tensor, **told: Any) -> Tensor:
        """All features of the encoder, (N, F, E), through their adapters -> as of ``encode``."""
        check_size(self.vision_encoder, features, self.vision_encoder.dim)
        if not self.adapter.deepstack:
            return check_size(self.adapter, self.adapter(features, **told), self.adapter.out_dim)
        adapters, width = [self.adapter, *self.adapter.deepstack], self.vision_encoder.layer_dim
        deeper = [width] * len(self.adapter.deepstack)
        parts = features.split([features.shape[-1] - sum(deeper), *deeper], dim=-1)
        return torch.cat([check_size(each, each(part), each.out_dim) for each, part in zip(adapters, parts, strict=True)], dim=-1)

    def features(self, batch: Batch) -> Tensor | None:
        """The adapted images of ``batch``, as of ``encode``; the first D channels are for ``place``.

        NOTE: a batch whose ``images`` is empty (not None) encodes one blank image all the same, which is
        nowhere: every rank must call the same modules, forward and backward, or sharded ones wait for each
        other forever.
        """
        if not self.has_images or batch.images is None:
            return None
        images = batch.images if len(batch.images) else batch.images.new_zeros(1, *batch.images.shape[1:])
        return self.encode(images, batch.known_features, **told_views(batch, math.isqrt(self.num_image_tokens), self.image_size))

    def forward(self, batch: Batch, cache: Cache | None = None) -> Output:
        """Training and evaluation without ``cache``; one step of generation with it."""
        words = self.transformer.embed(batch.input_ids)  # (B, S, D)
        features, deeper = self.features(batch), ()
        if features is not None:
            features, *deeper = features.split(self.adapter.out_dim, dim=-1)  # (N, F, D) each
        x, ctx = self.place(words, features, batch, cache)
        own = batch
        if ctx.share is not None:
            x = ctx.share.take(x)
            ctx, own = own_targets(ctx, batch, self.stored)
        x = self.run(x, with_answers(ctx, batch, self.job.model, self.stored), batch, deeper)
        if cache is not None:
            logits = self.transformer.unembed(self.last(x, ctx))  # (B, V)
            return Output(logits.new_zeros(()), logits)
        aux = None if ctx.share is None else self.extra_loss(batch)  # of means over own positions
        output = self.score_stream(self.read(x, ctx, own), own)  # the head runs on trained positions only
        return output if ctx.share is None or aux is None else output._replace(aux_loss=aux / ctx.share.ranks)

    def run(self, x: Tensor, ctx: Context, batch: Batch, deeper: Sequence[Tensor]) -> Tensor:
        """All layers: (B, K, D) -> (B, K, D). After layer i the features ``deeper[i]`` (N, F, D) are added to
        the tokens of their images (DeepStack: Meng et al. 2024, arXiv 2406.04334).
        """
        if not deeper:
            return self.transformer.run(x, ctx)
        n, f, _ = deeper[0].shape
        numbers = torch.arange(1, n * f + 1, device=x.device).view(n, f, 1)
        at = self.stored(self.insert(torch.zeros_like(batch.input_ids)[..., None], numbers, batch)[..., 0], ctx)  # (B, K), 0 elsewhere
        for layer, features in enumerate(deeper):
            x = self.transformer.run(x, ctx, slice(layer, layer + 1))
            x = x + F.embedding(at, F.pad(features.flatten(0, 1), (0, 0, 1, 0)), padding_idx=0).to(x.dtype)
        return self.transformer.run(x, ctx, slice(len(deeper), None))

    def score_stream(self, x: Tensor, batch: Batch, head: Callable[[Tensor], Tensor] | None = None) -> Output:
        """The loss of the stream at ``batch.targets``, (T, D), piece by piece or of all logits at once.

        Args:
            head: (t, D) -> (t, V) fp32, as of ``loss_in_pieces``; None: ``transformer.unembed``.
        """
        head = self.transformer.unembed if head is None else head
        if not self.in_pieces(batch):
            return self.score(head(x), batch)
        found = loss_in_pieces(head, x, batch.labels.flatten()[batch.targets], batch.target_weights, self.logits_at_once)
        with torch.no_grad():
            logits = head(x.detach()[:0])  # (0, V)
        return Output(found.loss, logits, self.extra_loss(batch), weighted_loss=found.weighted)

    def in_pieces(self, batch: Batch) -> bool:
        """Whether this pass makes the logits of ``batch.targets`` piece by piece."""
        return self.training and torch.is_grad_enabled() and 0 < self.logits_at_once < batch.num_targets

    def score(self, logits: Tensor, batch: Batch) -> Output:
        """The loss of ``logits`` (T, V) at ``batch.targets``."""
        found = word_loss(logits, batch.labels.flatten()[batch.targets], batch.target_weights)
        return Output(found.loss, logits, self.extra_loss(batch), weighted_loss=found.weighted)

    def extra_loss(self, batch: Batch) -> Tensor | None:
        """``Output.aux_loss`` of the pass that has just run."""
        extra = [loss for loss in take_losses(self.with_aux_loss) if loss is not None]
        return torch.stack(extra).sum() * batch.weight if extra else None

    def generate(self, prompts: Prompts, *, max_new_tokens: int = 64, sampling: Sampling | None = None) -> list[list[int]]:
        """Continues prompts, greedily unless ``sampling`` says otherwise.

        Args:
            prompts: what a processor of ``load_pretrained`` makes.

        Returns:
            New ids of each row, without the one that ended it.
        """
        batch = prompts.batch.to(next(self.parameters()).device)
        return generate(self, batch, max_new_tokens=max_new_tokens, eos_id=prompts.end_id, sampling=sampling)

    def shard_units(self) -> Iterator[nn.Module]:
        """The modules that are sharded, checkpointed and compiled one by one. They do not overlap; the root
        takes what is left.
        """
        if self.has_images:
            yield from self.vision_encoder.units
        yield from self.transformer.layers
