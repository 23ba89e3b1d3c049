"""Losses of held-out samples, each read once by one of the ranks; the likelihood of single answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from kempnerforge.data.batching.batch import Batch
from kempnerforge.data.batching.collate import collate
from kempnerforge.data.batching.order import drawn
from kempnerforge.data.sample import SampleError
from kempnerforge.data.source import Source
from kempnerforge.data.text.encode import Encoded, Encoder
from kempnerforge.eval.exam import BLANK, Exam
from kempnerforge.eval.mode import mode
from kempnerforge.util.errors import InputError

MAX_EXPONENT = 700.0
"""Of a double."""


@dataclass(frozen=True)
class HeldOutLoss:
    """A mean over samples, on all ranks.

    Attributes:
        nats: mean cross-entropy per trained token.
        samples: how many were read.
        skipped: (sample, reason) of those that were to be read and cannot be.
        left_out: texts of the samples that did not fit into their rows.
    """

    nats: float
    samples: int
    skipped: list[tuple[str, str]]
    left_out: int = 0


@dataclass(frozen=True)
class Likelihood:
    """Of an answer.

    Attributes:
        nats: its log-likelihood, summed.
        tokens: that it has.
        greedy: each of them is the likeliest one, so that greedy generation writes it.
    """

    nats: float
    tokens: int
    greedy: bool


def perplexity(nats: float) -> float:
    """Of a loss in nats per token; finite for any."""
    return math.exp(min(nats, MAX_EXPONENT))


@torch.no_grad()
def held_out_loss(exam: Exam, source: Source, encoder: Encoder, rows: int) -> HeldOutLoss:
    """Mean cross-entropy in nats per trained token over ``source``, or over ``exam.limit`` samples of it.

    Args:
        rows: samples a rank takes at once.

    Raises:
        InputError: none can be read.
    """
    ranks = exam.ranks
    indices = drawn(len(source), exam.limit, encoder.seed)
    step = rows * ranks.size
    loss, tokens, samples, left_out, skipped = 0.0, 0, 0, 0, list[tuple[str, str]]()
    with mode(exam.model, training=False):
        for start in range(0, len(indices), step):
            ranks.sum([])  # may end the evaluation
            encoded = []
            for index in indices[start : start + step][ranks.rank :: ranks.size]:
                try:
                    encoded.append(encoder.encode(source[index], seed=index))
                except SampleError as error:
                    skipped.append((str(index), str(error)))
            fill = [] if encoded else [any_sample(source, encoder)]  # every rank calls the model equally often
            batch = collate(encoded or fill, encoder.tokenizer.pad_id, None).to(exam.device)
            batch_loss = float(exam.model(batch).loss)
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


@torch.no_grad()
def log_likelihoods(exam: Exam, samples: Sequence[Encoded], *, blind: bool = False) -> list[float]:
    """Log-likelihood of the trained tokens of each sample, summed, in nats. It calls the model once, without
    samples as well, so that ranks stay in step.

    Args:
        blind: all images are the same grey.
    """
    assert exam.held_out is not None
    rows = samples or [any_sample(exam.held_out.source, exam.encoder)]
    batch = collate(rows, exam.encoder.tokenizer.pad_id, None).to(exam.device)
    if blind and batch.images is not None:
        batch.images.fill_(BLANK)
    return [one.nats for one in likelihoods(exam.model, batch)[: len(samples)]]


@torch.no_grad()
def likelihoods(model: torch.nn.Module, batch: Batch) -> list[Likelihood]:
    """Of the labels of each row."""
    labels = batch.labels.flatten()[batch.targets]  # (T,)
    logits = model(batch).logits.float()  # (T, V)
    nats = -cross_entropy(logits, labels, reduction="none").double().cpu()  # (T,)
    greedy, of_row = (logits.argmax(-1) == labels).cpu(), (batch.targets // batch.labels.shape[1]).cpu()  # (T,)
    rows = [of_row == row for row in range(len(batch.labels))]
    return [Likelihood(float(nats[row].sum()), int(row.sum()), bool(greedy[row].all())) for row in rows]


def any_sample(source: Source, encoder: Encoder) -> Encoded:
    """The first sample of ``source`` that can be encoded."""
    for index in range(len(source)):
        try:
            return encoder.encode(source[index], seed=index)
        except SampleError:
            continue
    raise InputError(f"data.eval_path: none of {len(source)} held-out samples can be read")
