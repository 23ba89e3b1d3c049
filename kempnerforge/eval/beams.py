"""Beam search over any function that scores next tokens.

Shapes: B rows, W beams, C candidates, V vocabulary, L new tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

NEVER = float("-inf")


def beam_search(
    logits: Tensor,
    advance: Callable[[Tensor, Tensor], Tensor],
    *,
    beams: int,
    max_new_tokens: int,
    ends: Tensor,
    length_penalty: float = 1.0,
    all_done: Callable[[bool], bool] = bool,
) -> Tensor:
    """The best continuation of each row, by the rules of ``transformers`` with ``early_stopping = False``: of
    the candidates only the ``beams`` likeliest may end, a text's score is the sum of its log-probabilities
    over its length (its end included) to the power of ``length_penalty``, and a row is done when its
    likeliest open beam, scored so, is no better than the worst of ``beams`` texts that have ended.

    Args:
        logits: (B, V) after the prompts.
        advance: rows (B * W,) of the last call, each continued by one of ids (B * W,), -> their logits
            (B * W, V).
        beams: W.
        ends: (E,) tokens that end a text.
        all_done: see ``generate_stream``; rows that are done go on without a change until it says so.

    Returns:
        (B, max_new_tokens), the first of ``ends`` after the end of each.
    """
    rows, vocab = logits.shape
    texts = logits.new_empty(rows, 1, 0, dtype=torch.int64)  # (B, W, L) of the open beams
    scores = logits.new_zeros(rows, 1, dtype=torch.float32)  # (B, W)
    best = ends[:1].expand(rows, beams, max_new_tokens)  # (B, W, max_new_tokens) texts that have ended
    best_scores = logits.new_full((rows, beams), NEVER, dtype=torch.float32)
    is_open = torch.ones(rows, 1, dtype=torch.bool, device=logits.device)
    for length in range(1, max_new_tokens + 1):
        likelihoods = scores[..., None] + logits.float().log_softmax(-1).view(rows, -1, vocab)  # (B, W, V)
        # so many that enough are left where all likely ones end
        top, at = likelihoods.flatten(1).topk(min(likelihoods[0].numel(), max(2, 1 + len(ends)) * beams))  # (B, C)
        parents, ids = at // vocab, at % vocab
        candidates = torch.cat([_of_beams(texts, parents), ids[..., None]], dim=-1)  # (B, C, L)
        ended = torch.isin(ids, ends) if length < max_new_tokens else torch.ones_like(ids, dtype=torch.bool)

        ending = ended & is_open & (torch.arange(ids.shape[1], device=ids.device) < beams)
        final = torch.where(ending, top / length**length_penalty, NEVER)
        best_scores, chosen = torch.cat([best_scores, final], dim=1).topk(beams)
        whole = pad(candidates, (0, max_new_tokens - length), value=int(ends[0]))
        best = _of_beams(torch.cat([best, whole], dim=1), chosen)

        scores, chosen = top.masked_fill(ended, NEVER).topk(min(beams, ids.shape[1]))
        texts, parents = _of_beams(candidates, chosen), parents.gather(1, chosen)  # (B, W, L), (B, W)
        is_open = is_open & (scores[:, :1] / length**length_penalty > best_scores[:, -1:])
        if all_done(not is_open.any()):
            break
        before = logits.shape[0] // rows * torch.arange(rows, device=ids.device)[:, None]
        logits = advance((before + parents).flatten(), texts[..., -1].flatten())
    return best[:, 0]


def _of_beams(values: Tensor, index: Tensor) -> Tensor:
    """(B, W, L) at ``index`` (B, C) -> (B, C, L)."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))
