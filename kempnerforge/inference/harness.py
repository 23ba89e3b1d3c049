"""Prompts of evaluation harnesses, answered in batches. Their adapters share it; it imports none of them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from typing import NamedTuple, TypeVar

from kempnerforge.data.batching.collate import collate
from kempnerforge.data.text.encode import Encoded
from kempnerforge.eval.generate import Sampling
from kempnerforge.eval.lm_eval_task import MARK
from kempnerforge.eval.loss import Likelihood, likelihoods
from kempnerforge.inference.processor import Picture, Processor
from kempnerforge.util.errors import InputError
from kempnerforge.vlm.base import VLM

LOG = logging.getLogger("kempnerforge")
T = TypeVar("T")


class Ask(NamedTuple):
    """One prompt, and how it is answered.

    Attributes:
        images: of each "<image>" in the prompt; in front of it, or where training has them, if it has none.
        until: strings before which the answer ends.
    """

    prompt: str
    images: Sequence[Picture]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    until: tuple[str, ...] = ()
    beams: int = 1


def rows_at_once(batch_size: int | str) -> int:
    """``batch_size`` of a harness; raises InputError if it is no number, as "auto"."""
    if not str(batch_size).isdecimal() or int(batch_size) < 1:
        raise InputError(f"batch_size = {batch_size!r}: must be a whole number, at least 1")
    return int(batch_size)


def stops(until: str | Sequence[str] | None) -> tuple[str, ...]:
    """``until`` of a task, which may be one string or none."""
    return (until,) if isinstance(until, str) else tuple(until or ())


def marked(prompt: str, processor: Processor) -> str:
    """``prompt`` with the model's own placeholder in place of "<image>"."""
    return prompt.replace(MARK, processor.placeholder)


def chunks(rows: Iterable[T], size: int) -> Iterator[list[T]]:
    """``rows`` in lists of ``size``, the last one shorter; each is read when it is needed."""
    rows = iter(rows)
    while chunk := list(islice(rows, size)):
        yield chunk


def scored(model: VLM, rows: Iterable[Encoded], pad_id: int, batch_size: int) -> list[Likelihood]:
    """The likelihood of the labels of each row."""
    device = next(model.parameters()).device
    return [one for chunk in chunks(rows, batch_size) for one in likelihoods(model, collate(chunk, pad_id, None).to(device))]


def answers(model: VLM, processor: Processor, asked: Iterable[Ask], batch_size: int) -> list[str]:
    """The answer to each prompt. Neighbours with the same options are asked together."""
    found = list[str]()
    for _, same in groupby(asked, key=lambda ask: ask[2:]):
        for chunk in chunks(same, batch_size):
            found += _answers(model, processor, chunk, seed=len(found))
    return found


def _answers(model: VLM, processor: Processor, asked: Sequence[Ask], seed: int) -> list[str]:
    _, _, most, temperature, top_p, until, beams = asked[0]
    inputs = processor(images=[list(ask.images) for ask in asked], text=[marked(ask.prompt, processor) for ask in asked])
    rooms = (processor.assembly.job.model.max_seq_len - inputs.attention_mask.sum(1)).tolist()
    limit = max(0, min(most, *rooms))
    made = model.generate(inputs, max_new_tokens=limit, sampling=Sampling(temperature, top_p=top_p, seed=seed, beams=beams))
    found = list[str]()
    for ask, room, ids in zip(asked, rooms, made, strict=True):
        if limit < min(most, room) and (len(ids) == limit or beams > 1):  # a longer prompt beside it has cut the answer
            found += _answers(model, processor, [ask], seed)
            continue
        if room < 1:
            LOG.warning("no room for an answer, so it is empty: %r", ask.prompt)
        found.append(_up_to(processor.decode(ids), until))
    return found


def _up_to(text: str, until: Sequence[str]) -> str:
    for stop in filter(None, until):
        text = text.split(stop)[0]
    return text
