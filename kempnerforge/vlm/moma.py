"""Experts per modality (MoMa: Lin et al. 2024): one attention over image tokens and words, and separate
feed-forward layers for each of the two.

Shapes: B rows, S positions, D ``model.dim``, E experts of a modality, C tokens that an expert takes of a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kempnerforge.config import ModelConfig, MoMaConfig, registry
from kempnerforge.data.batching.batch import Batch, Kind
from kempnerforge.model.batched import BatchedMLP
from kempnerforge.model.transformer import MLP, Block, Cache, Context, init_weights, separate_draws
from kempnerforge.vlm.base import VLM

EARLIER_FIRST = 1e-5
"""What a position costs when tokens are ranked. Texts of one image begin with the same token in the same
place, so equal scores are common: without it rounding would say which of them an expert takes, and rounding
depends on padding and on the other rows."""


@dataclass(frozen=True)
class Tokens:
    """The tokens of one modality. Sizes are plain numbers, known without looking at the device.

    Attributes:
        here: (B, S) bool, where they are.
        most: how many the row has that has most.
        capacity: (B, 1, 1) fp64, how many of its row each expert takes.
        most_taken: the same for the row that has most.
    """

    here: Tensor
    most: int
    capacity: Tensor
    most_taken: int


@dataclass(frozen=True)
class MoMaContext(Context):
    """Which positions belong to which experts.

    Attributes:
        tokens: by modality.
    """

    tokens: Mapping[str, Tokens] = field(default_factory=dict, kw_only=True)


class Router(nn.Module):
    """One linear layer in fp32, as half precision would make ties.

    NOTE: no ``nn.Linear``, so that Muon, which is for hidden matrices, leaves it to AdamW.
    """

    def __init__(self, in_dim: int, out_dim: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_dim, in_dim) * in_dim**-0.5)
        self.bias = nn.Parameter(torch.zeros(out_dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, E) logits."""
        return F.linear(x.float(), self.weight.float(), None if self.bias is None else self.bias.float())


class AuxiliaryRouter(nn.Module):
    """Predicts from a token alone which experts would take it: two layers, a quarter of ``dim`` wide in
    between.
    """

    def __init__(self, dim: int, experts: int) -> None:
        super().__init__()
        width = max(1, dim // 4)
        self.hidden, self.out = Router(dim, width, bias=True), Router(width, experts, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, E) logits of the probability."""
        return self.out(F.silu(self.hidden(x)))


class MoMaBlock(Block):
    """A layer whose feed-forward part is a group of experts per modality; ``mlp`` is the first text expert.

    Training (expert choice: Zhou et al. 2022): each expert takes the tokens of its modality that its router
    scores highest, and its output counts with the sigmoid of the score. Evaluation: a token goes to the
    experts for which the auxiliary router says yes.

    NOTE: both take ``topk`` over the row and gather, with sizes that the host knows: capacity in training,
    all tokens of the modality in evaluation, those not chosen with weight 0. Evaluation therefore costs E
    dense layers. Gathering only the chosen ones would cost less, but their number is known on the device
    alone: a wait in every layer, and a graph break under ``torch.compile``.
    """

    def __init__(self, cfg: ModelConfig, layer: int, moma: MoMaConfig) -> None:
        super().__init__(cfg, layer)
        self.aux_loss: Tensor | None = None
        self.router_loss_weight = moma.router_loss_weight
        experts = moma.experts()
        chosen = [modality for modality, count in experts.items() if moma.capacity_factor < count]  # elsewhere every expert takes all
        with separate_draws("moma"):
            self.experts = nn.ModuleDict(
                {modality: nn.ModuleList(MLP(cfg) for _ in range(count - (modality == "text"))) for modality, count in experts.items()}
            )
            self.routers = nn.ModuleDict({modality: Router(cfg.dim, count, bias=False) for modality, count in experts.items()})
            self.auxiliary_routers = nn.ModuleDict({modality: AuxiliaryRouter(cfg.dim, experts[modality]) for modality in chosen})
            init_weights(self.experts, cfg)
        # NOTE: a plain dict hides the modules from registration, as their parts are registered already.
        batched = [modality for modality, count in experts.items() if moma.batched_experts and count > 1]
        self.batched = {modality: BatchedMLP(self.group(modality)) for modality in batched}

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        assert isinstance(ctx, MoMaContext), "MoMaBlock reads the context of MoMa"
        x = x + self.attention.out(self.attend(*self.pre(x, self.rope(ctx)), ctx), ctx.answers)
        h = self.mlp_norm(x)
        mixed, losses = torch.zeros_like(h), []
        for modality, tokens in ctx.tokens.items():
            weights, index, loss = self.route(modality, h, tokens)
            losses += [] if loss is None else [loss]
            places = [at.expand(-1, -1, h.shape[-1]) for at in index[..., None].unbind(1)]  # E of (B, C, D)
            outputs = self.outputs(modality, [h.gather(1, at) for at in places], index, ctx.answers)
            for at, output, weight in zip(places, outputs, weights[..., None].to(h.dtype).unbind(1), strict=True):
                mixed.scatter_add_(1, at, output * weight)  # of one expert at a time: a place is there once, so the sum is in order
        self.aux_loss = self.router_loss_weight * torch.stack(losses).sum() if losses else None
        return x + mixed

    def group(self, modality: str) -> list[MLP]:
        """The experts of ``modality``."""
        added = [cast(MLP, expert) for expert in self.experts[modality].children()]
        return [self.mlp, *added] if modality == "text" else added

    def outputs(self, modality: str, taken: Sequence[Tensor], index: Tensor, answers: Tensor | None) -> Iterable[Tensor]:
        """What the experts of ``modality`` make of their tokens: E of (B, C, D) each.

        Args:
            taken: E of (B, C, D).
            index: (B, E, C), where they are in the row.
            answers: as of ``Context``.
        """
        count = len(taken)
        told = None if answers is None else answers[:, None].expand(-1, count, -1).gather(2, index).transpose(0, 1)  # (E, B, C)
        if modality in self.batched:
            return self.batched[modality](torch.stack([*taken]), told)
        return [
            expert(*of_one) for expert, *of_one in zip(self.group(modality), taken, [None] * count if told is None else told, strict=True)
        ]

    def route(self, modality: str, h: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor | None]:
        """Which tokens each expert of ``modality`` takes.

        Args:
            h: (B, S, D).

        Returns:
            (B, E, C) weights, 0 where there is no token to take; (B, E, C) positions, different ones for each
            expert; and in training the loss of the auxiliary router: binary cross-entropy, a mean over tokens
            and experts.
        """
        logits = self.routers[modality](h).transpose(1, 2).masked_fill(~tokens.here[:, None], -math.inf)  # (B, E, S)
        auxiliary = dict(self.auxiliary_routers.items()).get(modality)
        if not self.training:
            if auxiliary is not None:
                logits = logits.masked_fill(auxiliary(h).transpose(1, 2) <= 0, -math.inf)  # a probability of at most 1/2
            found = logits.topk(tokens.most, dim=-1)  # (B, E, C)
            return found.values.sigmoid(), found.indices, None
        positions = torch.arange(logits.shape[-1], device=h.device)
        index = (logits - EARLIER_FIRST * positions).topk(tokens.most_taken, dim=-1).indices  # (B, E, C), best first
        taken = positions[: tokens.most_taken] < tokens.capacity  # (B, 1, C)
        weights = logits.gather(-1, index).masked_fill(~taken, -math.inf).sigmoid()
        if auxiliary is None:
            return weights, index, None
        want = torch.zeros_like(logits).scatter(-1, index, taken.to(logits.dtype).expand_as(weights))  # (B, E, S)
        guess = auxiliary(h.detach()).transpose(1, 2)
        missed = F.binary_cross_entropy_with_logits(guess, want, reduction="none") * tokens.here[:, None]
        return weights, index, missed.sum() / (tokens.here.sum().clamp(min=1) * missed.shape[1])


@registry.register_arch("moma")
class MoMa(VLM):
    """Image tokens in the stream as in ``joint_decoder``; the feed-forward layers are experts per modality
    (Lin et al. 2024).

    In training an expert chooses its tokens, so what happens to a token depends on the later ones of its row,
    and a little of them leaks through the routing. Evaluation is causal: auxiliary routers predict from a
    token alone whether an expert would have chosen it. It measures another routing than the one that is
    trained, then; how well the two agree shows in ``train/aux_loss``.

    What differs from the paper: an expert chooses within a row, not over the batch, so that a row does not
    depend on its neighbours or on how a batch is split over ranks. Auxiliary routers are trained beside the
    model, on hidden states without gradient, not afterwards with the model frozen; a token goes where their
    probability is above 1/2, with the score of the main router. There is no Gumbel noise, no mixture of
    depths and no upcycling.
    """

    causal_in_training = False

    def block(self, cfg: ModelConfig, layer: int) -> Block:
        return MoMaBlock(cfg, layer, self.config)

    @property
    def config(self) -> MoMaConfig:
        """The ``[vlm]`` section."""
        assert isinstance(self.job.vlm, MoMaConfig), "the loader makes the section of the arch's own class"
        return self.job.vlm

    def place(self, words: Tensor, features: Tensor | None, batch: Batch, cache: Cache | None) -> tuple[Tensor, Context]:
        context, codes = self.context(batch, cache, words.dtype), self.is_code(batch)
        tokens = {
            "text": self.count("text", (batch.kinds >= Kind.PROMPT) & ~codes, batch.row_words),
            "image": self.count("image", (batch.kinds == Kind.IMAGE) | codes, self.image_positions(batch)),
        }
        return self.insert(words, features, batch), MoMaContext(context.rope, context.mask, context.cache, tokens=tokens)

    def count(self, modality: str, here: Tensor, most: int) -> Tokens:
        """How many of the tokens at ``here`` (B, S) an expert takes; ``most`` of them are in the row that has
        most.
        """
        factor, experts = self.config.capacity_factor, self.config.experts()[modality]
        in_row = here.sum(1, dtype=torch.float64)[:, None, None]  # (B, 1, 1); fp64 rounds as Python does
        capacity = (factor * in_row / experts).ceil().minimum(in_row)
        return Tokens(here, most, capacity, min(most, math.ceil(factor * most / experts)))
