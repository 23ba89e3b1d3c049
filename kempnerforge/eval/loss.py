"""Held-out loss: what is left to measure where there is no answer to generate; and the perplexity of plain text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kempnerforge.config.data import TextConfig
from kempnerforge.data.batching.collate import collate
from kempnerforge.data.batching.order import drawn
from kempnerforge.data.sample import SampleError
from kempnerforge.data.source import Source
from kempnerforge.data.sources.build import build_source
from kempnerforge.data.text.encode import Encoded, Encoder
from kempnerforge.data.text.interleave import Layout
from kempnerforge.data.text.tokenizer import Tokenizer
from kempnerforge.eval.exact_match import Ranks
from kempnerforge.eval.mode import mode
from kempnerforge.util.errors import InputError

TOKENS_AT_ONCE = 4096
MAX_EXPONENT = 700.0
"""Of a double."""


@dataclass(frozen=True)
class HeldOutLoss:
    """A mean over samples, on all ranks.

    Attributes:
        nats: mean cross-entropy per trained token.
        samples: that it is of.
        skipped: (sample, reason) of those that were to be read and cannot be.
        left_out: texts of the samples that did not fit into their rows.
    """

    nats: float
    samples: int
    skipped: list[tuple[str, str]]
    left_out: int = 0

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nats, MAX_EXPONENT))


@torch.no_grad()
def held_out_loss(
    model: torch.nn.Module, source: Source, encoder: Encoder, ranks: Ranks, device: torch.device, *, rows: int, limit: int
) -> HeldOutLoss:
    """Mean cross-entropy in nats per trained token over ``source``.

    Args:
        rows: samples a rank takes at once.
        limit: samples at most, drawn by the seed of ``encoder``; 0 takes all.

    Raises:
        ValueError: none can be read.
    """
    indices = drawn(len(source), limit, encoder.seed)
    step = rows * ranks.size
    loss, tokens, samples, left_out, skipped = 0.0, 0, 0, 0, list[tuple[str, str]]()
    with mode(model, training=False):
        for start in range(0, len(indices), step):
            ranks.sum([])  # may break it off
            encoded = []
            for index in indices[start : start + step][ranks.rank :: ranks.size]:
                try:
                    encoded.append(encoder.encode(source[index], seed=index))
                except SampleError as error:
                    skipped.append((str(index), str(error)))
            fill = [] if encoded else [_any_sample(source, encoder)]  # every rank calls the model equally often
            batch = collate(encoded or fill, encoder.tokenizer.pad_id, None).to(device)
            batch_loss = float(model(batch).loss)
            if encoded:
                loss += batch_loss
                tokens += batch.num_targets
                samples += len(encoded)
                left_out += sum(one.left_out for one in encoded)
    loss, tokens, samples, left_out = ranks.sum([loss, tokens, samples, left_out])
    skipped = [sample for theirs in ranks.gather(skipped) for sample in theirs]
    if not samples:
        raise InputError(f"eval: none of {len(indices)} held-out samples can be read{f'; the first: {skipped[0][1]}' if skipped else ''}")
    return HeldOutLoss(loss / max(1.0, tokens), int(samples), skipped, int(left_out))


class PlainText:
    """A text that a model reads without any image, in windows of which each token but the first of all is predicted once.

    Args:
        path: of the text, UTF-8.
        window: tokens read together.
        seed: of the windows that are drawn where not all are read.

    Raises:
        ValueError: it cannot be read.
    """

    def __init__(self, path: str, window: int, tokenizer: Tokenizer, seed: int = 0) -> None:
        try:
            source = build_source(TextConfig(path=path), "train")
        except InputError as error:
            raise InputError(str(error).replace("data.path", "eval.text_path")) from None
        assert source is not None
        self.windows = source.tokenised(tokenizer, window)
        self._encoder = Encoder(tokenizer, self.windows.cfg, Layout(0, 0, window, window, window), seed)
        self._rows = max(1, TOKENS_AT_ONCE // window)

    def measure(self, model: torch.nn.Module, ranks: Ranks, device: torch.device, limit: int) -> HeldOutLoss:
        """The loss of a token, whose ``perplexity`` is that of the text.

        Args:
            limit: windows at most, drawn from all over the text; 0 takes all.
        """
        return held_out_loss(model, self.windows, self._encoder, ranks, device, rows=self._rows, limit=limit)


def _any_sample(source: Source, encoder: Encoder) -> Encoded:
    for index in range(len(source)):
        try:
            return encoder.encode(source[index], seed=index)
        except SampleError:
            continue
    raise InputError(f"data.eval_path: none of {len(source)} held-out samples can be read")
