"""Generation with a key/value cache, batched over prompts of unequal length.

Shapes: B rows, S prompt positions (left padded), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kempnerforge.data.batch import IGNORE, Batch, Kind
from kempnerforge.model.transformer import Cache


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the most likely token; otherwise logits are divided by it.
        top_k: keep the k most likely; 0 keeps all.
        top_p: keep the fewest most likely tokens whose mass reaches ``top_p``, the one that crosses it included (Holtzman et al. 2020, the
            rule of transformers); 1 keeps all.
        seed: of the draws.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"temperature = {self.temperature}, top_k = {self.top_k}, top_p = {self.top_p}: need >= 0, >= 0, and more than 0 up to 1"
            )


def choose(logits: Tensor, sampling: Sampling, rng: torch.Generator) -> Tensor:
    """(B, V) -> (B,) token ids."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / sampling.temperature
    if sampling.top_k:
        kth = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if sampling.top_p < 1:
        values, order = logits.sort(descending=True)
        before = values.softmax(-1).cumsum(-1) - values.softmax(-1)  # mass of the more likely ones
        dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= sampling.top_p)
        logits = logits.masked_fill(dropped, float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=rng)[:, 0]


@torch.no_grad()
def generate(
    model: torch.nn.Module,
    prompts: Batch,
    *,
    max_new_tokens: int,
    eos_id: int,
    sampling: Sampling | None = None,
    on_token: Callable[[Tensor], None] | None = None,
    all_done: Callable[[bool], bool] = bool,
) -> list[list[int]]:
    """Continues each prompt until EOS or ``max_new_tokens``.

    Args:
        model: called as ``model(batch, cache)``; images are encoded once, with the prompt.
        prompts: left padded rows.
        on_token: called with each step's ids (B,), for streaming; rows that have ended repeat ``eos_id``.
        all_done: turns "all rows of this rank have ended" into "of all ranks": sharded models must take the same number of steps.

    Returns:
        New ids of each row, without EOS.
    """
    sampling = sampling or Sampling()
    device = prompts.input_ids.device
    rng = torch.Generator(device).manual_seed(sampling.seed)
    cache = Cache()
    logits = model(prompts, cache).logits  # (B, V)
    done = torch.zeros(len(logits), dtype=torch.bool, device=device)
    steps: list[Tensor] = []
    batch = prompts
    for _ in range(max_new_tokens):
        ids = choose(logits, sampling, rng).masked_fill(done, eos_id)
        done = done | (ids == eos_id)
        steps.append(ids)
        if on_token is not None:
            on_token(ids)
        if all_done(bool(done.all())) or len(steps) == max_new_tokens:
            break
        batch = _following(batch, ids)
        logits = model(batch, cache).logits
    rows = torch.stack(steps, dim=1).tolist() if steps else [[] for _ in range(len(logits))]
    return [row[: row.index(eos_id)] if eos_id in row else row for row in rows]


def _following(batch: Batch, ids: Tensor) -> Batch:
    """The one-token batch after ``batch``: ``ids`` (B,) one position further on, in the text of the last one."""
    column = ids[:, None]
    nothing = column.new_zeros(0)
    return replace(
        batch,
        input_ids=column,
        labels=torch.full_like(column, IGNORE),
        positions=batch.positions[:, -1:] + 1,
        sample_ids=batch.sample_ids[:, -1:],
        text_ids=batch.text_ids[:, -1:],
        kinds=torch.full_like(batch.kinds[:, -1:], Kind.ANSWER),
        targets=nothing,
        images=None,
        image_index=nothing,
        image_rows=nothing,
        image_starts=nothing,
        image_text_ids=nothing,
        image_sample_ids=nothing,
        image_slots=nothing,
        row_images=0,
        row_words=1,
        leading_images=0,
    )
