"""What a model gives to the trainer, to evaluation and to generation.

Shapes: B rows, T trained positions, V vocabulary, P pairs of a text and its image, E their width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from kempnerforge.model.transformer import Block, Context
from kempnerforge.util.plugin_returns import check_returns, gives, instance


class Output(NamedTuple):
    """What a forward pass gives.

    NOTE: a tuple, as FSDP2 of torch 2.11 looks for outputs to hang its backward pass on in tuples, not in
    dataclasses.

    Attributes:
        loss: cross-entropy SUMMED over the batch's targets, fp32; the trainer divides by the count over all
            ranks and micro-batches.
        logits: (T, V) fp32 at the targets; with a cache (B, V), of the token after each row. (0, V) in
            training passes that make them piece by piece (``train.logits_at_once``).
        aux_loss: the sum of the auxiliary losses of the model's modules, times the number of targets; None if
            there are none.
        pair_loss: a loss SUMMED over the batch's pairs of a text and its image, fp32; the trainer divides it
            by their count over all ranks and micro-batches. None: the arch has none.
        embeddings: (P, 2, E) of image and text of each pair, of length 1 and without a graph; None: the arch
            makes none.
        weighted_loss: as ``loss``, each target times its weight; None: the batch has no weights. With weights
            ``loss`` is for the record alone, and no gradient flows from it.
    """

    loss: Tensor
    logits: Tensor
    aux_loss: Tensor | None = None
    pair_loss: Tensor | None = None
    embeddings: Tensor | None = None
    weighted_loss: Tensor | None = None

    @property
    def total(self) -> Tensor:
        """All losses that are sums over targets."""
        loss = self.loss if self.weighted_loss is None else self.weighted_loss
        return loss if self.aux_loss is None else loss + self.aux_loss

    def mean(self, targets: float, pairs: int) -> Tensor:
        """What is sent backward: the losses over so many targets (the sum of their weights) and pairs."""
        mean = self.total / (targets or 1)
        return mean if self.pair_loss is None else mean + self.pair_loss / max(1, pairs)


class ArchReturns:
    """Archs of plugins are told by name what they may not return."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        check_returns(cls, block=instance(Block, "a Block"), place=_not_a_stream, forward=instance(Output, "an Output"))


def _not_a_stream(value: Any, *_: Any, **__: Any) -> str:
    if not isinstance(value, tuple) or len(value) != 2:
        return gives(type(value), "a tuple: the stream and a Context")
    stream, context = value
    if not isinstance(stream, Tensor) or stream.ndim != 3:
        return gives(tuple(stream.shape) if isinstance(stream, Tensor) else stream, "a Tensor (B, S, D)", "stream")
    return "" if isinstance(context, Context) else gives(context, "a Context", "context")
