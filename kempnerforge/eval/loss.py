"""Held-out loss: what is left to measure where there is no answer to generate; and the perplexity of plain text."""

from __future__ import annotations

import math

import torch

from kempnerforge.config.data import TextConfig
from kempnerforge.config.errors import InputError
from kempnerforge.data.collate import collate
from kempnerforge.data.encode import Encoded, Encoder
from kempnerforge.data.interleave import Layout
from kempnerforge.data.sample import SampleError, Source
from kempnerforge.data.sources.build import build_source
from kempnerforge.data.tokenizer import Tokenizer
from kempnerforge.eval.exact_match import Ranks
from kempnerforge.eval.mode import mode

TOKENS_AT_ONCE = 4096
MAX_EXPONENT = 700.0
"""Of a double."""


@torch.no_grad()
def held_out_loss(
    model: torch.nn.Module, source: Source, encoder: Encoder, ranks: Ranks, device: torch.device, *, rows: int, limit: int
) -> float:
    """Mean cross-entropy in nats per trained token over ``source``.

    Args:
        rows: samples a rank takes at once.
        limit: samples at most, spread evenly over the source; 0 takes all.
    """
    count = min(limit, len(source)) if limit else len(source)
    indices = [i * len(source) // count for i in range(count)]
    step = rows * ranks.size
    loss = tokens = 0.0
    with mode(model, training=False):
        for start in range(0, count, step):
            encoded = []
            for index in indices[start : start + step][ranks.rank :: ranks.size]:
                try:
                    encoded.append(encoder.encode(source[index], seed=index))
                except SampleError:
                    continue
            fill = [] if encoded else [_any_sample(source, encoder)]  # every rank calls the model equally often
            batch = collate(encoded or fill, encoder.tokenizer.pad_id, None).to(device)
            batch_loss = float(model(batch).loss)
            if encoded:
                loss += batch_loss
                tokens += batch.num_targets
    loss, tokens = ranks.sum([loss, tokens])
    return loss / max(1.0, tokens)


class PlainText:
    """A text that a model reads without any image, in windows of which each token but the first of all is predicted once.

    Args:
        path: of the text, UTF-8.
        window: tokens read together.

    Raises:
        ValueError: it cannot be read.
    """

    def __init__(self, path: str, window: int, tokenizer: Tokenizer) -> None:
        try:
            source = build_source(TextConfig(path=path), "train")
        except ValueError as error:
            raise InputError(str(error).replace("data.path", "eval.text_path")) from None
        assert source is not None
        self.windows = source.tokenised(tokenizer, window)
        self._encoder = Encoder(tokenizer, self.windows.cfg, Layout(0, 0, window, window, window), 0)
        self._rows = max(1, TOKENS_AT_ONCE // window)

    def perplexity(self, model: torch.nn.Module, ranks: Ranks, device: torch.device, limit: int) -> float:
        """``exp`` of the mean cross-entropy of a token.

        Args:
            limit: windows at most, spread evenly over the text; 0 takes all.
        """
        loss = held_out_loss(model, self.windows, self._encoder, ranks, device, rows=self._rows, limit=limit)
        return math.exp(min(loss, MAX_EXPONENT))


def _any_sample(source: Source, encoder: Encoder) -> Encoded:
    for index in range(len(source)):
        try:
            return encoder.encode(source[index], seed=index)
        except SampleError:
            continue
    raise InputError(f"data.eval_path: none of {len(source)} held-out samples can be read")
