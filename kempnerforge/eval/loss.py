"""Held-out loss: what is left to measure where there is no answer to generate."""

from __future__ import annotations

import torch

from kempnerforge.data.collate import collate
from kempnerforge.data.encode import Encoded, Encoder
from kempnerforge.data.sample import SampleError, Source
from kempnerforge.eval.exact_match import Ranks
from kempnerforge.eval.mode import mode


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


def _any_sample(source: Source, encoder: Encoder) -> Encoded:
    for index in range(len(source)):
        try:
            return encoder.encode(source[index], seed=index)
        except SampleError:
            continue
    raise ValueError(f"data.eval_path: none of {len(source)} held-out samples can be read")
