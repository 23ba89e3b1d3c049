"""Generation with a key/value cache, batched over prompts of unequal length.

Shapes: B rows, S prompt positions (left padded), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from kempnerforge.config.training import MOST_LENGTH_PENALTY
from kempnerforge.data.batching.batch import IGNORE, Batch, Kind
from kempnerforge.eval.beams import beam_search
from kempnerforge.model.transformer import Cache
from kempnerforge.util.errors import InputError

TINY = torch.finfo(torch.float32).tiny
UNFINISHED = "\ufffd"
"""What decoders write for bytes that are no character, or the beginning of one."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the most likely token; otherwise logits are divided by it.
        top_k: keep the k most likely; 0 keeps all.
        top_p: keep the fewest most likely tokens whose mass reaches ``top_p``, the one that crosses it
            included (Holtzman et al. 2020, the rule of transformers); 1 keeps all.
        seed: of the draws, a 64-bit integer.
        beams: texts that are followed at once, see ``beam_search``; 1 follows one. Nothing is drawn then.
        length_penalty: with several beams; above 0 it favours long texts, below 0 short ones.
        allowed: the ids that may be taken in each step from the first one on; later steps are free.

    Raises:
        ValueError: one of them cannot be, or two of them not together.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    beams: int = 1
    length_penalty: float = 1.0
    allowed: tuple[range, ...] = ()

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise InputError(
                f"temperature = {self.temperature}, top_k = {self.top_k}, top_p = {self.top_p}: need >= 0, >= 0, and more than 0 up to 1"
            )
        if not -(2**63) <= self.seed < 2**63:
            raise InputError(f"seed = {self.seed}: must be a 64-bit integer")
        if not (self.beams >= 1 and abs(self.length_penalty) <= MOST_LENGTH_PENALTY):
            raise InputError(f"beams = {self.beams}, length_penalty = {self.length_penalty}: need at least 1, and a number from -10 to 10")
        if self.beams > 1 and self.temperature > 0:
            raise InputError(f"beams = {self.beams}: a beam search draws nothing; not with temperature = {self.temperature}")
        if self.beams == 1 and self.length_penalty != 1:
            raise InputError(f"length_penalty = {self.length_penalty}: is only read with beams above 1")
        assert self.beams == 1 or not self.allowed, "a beam search takes any id"


class Prompts(Protocol):
    """Prompts and the token that ends an answer to them, or several."""

    @property
    def batch(self) -> Batch: ...

    @property
    def end_id(self) -> int | Collection[int]: ...


def choose(logits: Tensor, sampling: Sampling, rng: torch.Generator) -> Tensor:
    """(B, V) -> (B,) token ids."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / max(sampling.temperature, TINY)  # the largest is 0 at any temperature
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
def generate_stream(
    model: torch.nn.Module,
    prompts: Batch,
    *,
    max_new_tokens: int,
    eos_id: int | Collection[int],
    sampling: Sampling | None = None,
    all_done: Callable[[bool], bool] = bool,
) -> Iterator[Tensor]:
    """Continues each prompt until ``eos_id`` or ``max_new_tokens``, a token at a time. Generation stops with
    the iteration. With several beams the first token comes when all are known.

    Args:
        model: called as ``model(batch, cache)``; images are encoded once, with the prompt.
        prompts: left padded rows.
        eos_id: the token that ends an answer, or several.
        all_done: turns "all rows of this rank have ended" into "of all ranks": sharded models must take the
            same number of steps.

    Yields:
        (B,) the next id of each row; rows that have ended repeat one of ``eos_id``.
    """
    sampling = sampling or Sampling()
    device = prompts.input_ids.device
    rng = torch.Generator(device).manual_seed(sampling.seed)
    cache, batch = Cache(), prompts

    def advance(rows: Tensor, ids: Tensor) -> Tensor:
        nonlocal batch
        cache.take(rows)
        batch = _following(batch, ids, rows)
        return model(batch, cache).logits

    done = torch.zeros(len(prompts.input_ids), dtype=torch.bool, device=device)  # (B,)
    ends = torch.tensor(_ends(eos_id), device=device)
    if sampling.beams > 1 and max_new_tokens:
        search = {"beams": sampling.beams, "length_penalty": sampling.length_penalty, "all_done": all_done}
        found = beam_search(model(batch, cache).logits, advance, max_new_tokens=max_new_tokens, ends=ends, **search)
        longest = int((~torch.isin(found, ends)).cumprod(1).sum(1).max())
        yield from found[:, : longest + 1].unbind(1)
        return
    for step in range(max_new_tokens):
        logits = model(batch, cache).logits  # (B, V)
        for ids in sampling.allowed[step : step + 1]:
            logits = torch.full_like(logits, float("-inf")).index_copy(
                1, torch.arange(ids.start, ids.stop, device=device), logits[:, ids.start : ids.stop]
            )
        ids = choose(logits, sampling, rng).masked_fill(done, _ends(eos_id)[0])
        done = done | torch.isin(ids, ends)
        yield ids
        if all_done(bool(done.all())):
            return
        batch = _following(batch, ids)


@torch.inference_mode()
def tokens_of(
    model: torch.nn.Module, prompt: Batch, *, max_new_tokens: int, eos_id: int | Collection[int], sampling: Sampling | None = None
) -> Iterator[int]:
    """``generate_stream`` of a batch of one row, for a model that is not trained in this process: in
    inference mode a small operation costs about a sixth less, but no gradient may ever flow through a tensor
    that was made in it.
    """
    for ids in generate_stream(model, prompt, max_new_tokens=max_new_tokens, eos_id=eos_id, sampling=sampling):
        yield int(ids[0])


def generate(
    model: torch.nn.Module,
    prompts: Batch,
    *,
    max_new_tokens: int,
    eos_id: int | Collection[int],
    sampling: Sampling | None = None,
    on_token: Callable[[Tensor], None] | None = None,
    all_done: Callable[[bool], bool] = bool,
) -> list[list[int]]:
    """``generate_stream`` to its end.

    Args:
        on_token: called with each step's ids (B,).

    Returns:
        New ids of each row, without the one that ended it.
    """
    steps: list[Tensor] = []
    for ids in generate_stream(model, prompts, max_new_tokens=max_new_tokens, eos_id=eos_id, sampling=sampling, all_done=all_done):
        steps.append(ids)
        if on_token is not None:
            on_token(ids)
    rows = torch.stack(steps, dim=1).tolist() if steps else [[] for _ in range(len(prompts.input_ids))]
    ends = set(_ends(eos_id))
    return [row[: next((k for k, id_ in enumerate(row) if id_ in ends), None)] for row in rows]


def _ends(eos_id: int | Collection[int]) -> list[int]:
    return [eos_id] if isinstance(eos_id, int) else sorted(eos_id)


class TextStream:
    """Text of tokens as they come, a character at a time at the finest: together the pieces are the text of
    all tokens at once. What later tokens may still change is held back: a character whose bytes lie in
    several tokens, and a run of byte tokens, of which a decoder of byte fallback makes replacement
    characters, all of them, if one is stray.

    Only the tokens since the last piece but one are decoded at each step, so the work grows with the length
    of the text, not with its square.

    Args:
        decode: ids -> text.
        byte_ids: tokens of byte fallback, as ``Tokenizer.byte_ids``.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], byte_ids: Collection[int] = ()) -> None:
        self.ids: list[int] = []
        self._decode, self._byte_ids = decode, byte_ids
        self._in_bytes = False  # the last token that is written is one of them
        # ids[:_shown] have been given out, and decoding begins a piece earlier, as some decoders trim the
        # first token
        self._begin = self._shown = 0
        self._before = ""  # the text of ids[_begin:_shown]
        self._given = 0  # characters

    def push(self, token: int) -> str:
        """The text that ``token`` adds, which may be none yet."""
        self.ids.append(token)
        self._in_bytes = token in self._byte_ids or (self._in_bytes and not self._decode([token]))
        if self._in_bytes:
            return ""
        text = self._decode(self.ids[self._begin :])
        return "" if text.endswith(UNFINISHED) else self._give(text)

    def finish(self) -> str:
        """What was held back."""
        return self._give(self._decode(self.ids[self._begin :]))

    def _give(self, text: str) -> str:
        piece = text[len(self._before) :]
        if not text.startswith(self._before):  # a decoder that changes what is out already: no word after it may be lost
            piece = self._decode(self.ids)[self._given :]
        if piece:
            self._begin, self._shown = self._shown, len(self.ids)
            self._before = self._decode(self.ids[self._begin :])
            self._given += len(piece)
        return piece


def _following(batch: Batch, ids: Tensor, rows: Tensor | slice = slice(None)) -> Batch:
    """The one-token batch after ``rows`` of ``batch``: ``ids`` (B,) one position further on, in the text of
    the last one.
    """
    column = ids[:, None]
    nothing = column.new_zeros(0)
    last = {name: getattr(batch, name)[rows, -1:] for name in ("positions", "sample_ids", "text_ids", "kinds")}  # (B, 1) each
    return replace(
        batch,
        input_ids=column,
        labels=torch.full_like(column, IGNORE),
        positions=last["positions"] + 1,
        sample_ids=last["sample_ids"],
        text_ids=last["text_ids"],
        kinds=torch.full_like(last["kinds"], Kind.ANSWER),
        targets=nothing,
        images=None,
        image_index=nothing,
        image_rows=nothing,
        image_starts=nothing,
        image_text_ids=nothing,
        image_sample_ids=nothing,
        image_slots=nothing,
        row_images=0,
        image_parts=(),
        row_words=1,
        row_codes=1,
        leading_images=0,
    )
