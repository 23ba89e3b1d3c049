"""A model that answers by a rule, and data to ask it about."""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from kempnerforge.config import DataConfig, DistributedConfig, EvalConfig
from kempnerforge.data.batching.batch import IGNORE, Batch, Kind
from kempnerforge.data.sample import Sample, Text
from kempnerforge.data.text.encode import Encoder, Layout
from kempnerforge.data.text.tokenizer import Tokenizer
from kempnerforge.distributed.world import start, stop
from kempnerforge.eval.exam import Exam, Ranks
from kempnerforge.eval.loss import HeldOutLoss, held_out_loss
from kempnerforge.eval.questions import Question, questions
from kempnerforge.eval.task import Score
from kempnerforge.eval.tasks.exact_match import ExactMatch
from kempnerforge.model.transformer import Cache
from kempnerforge.vlm.base import Output
from tests.data.samples import ListSource

TOKENIZER = Tokenizer.train(["what colour?\n", "red", "blue", "yes", "no"] * 4, 300)
ENCODER = Encoder(TOKENIZER, DataConfig(), Layout(image_tokens=4, image_size=8, max_text_len=32, seq_len=64, pad_to=36), seed=0)
TEXT_ENCODER = Encoder(TOKENIZER, DataConfig(), Layout(image_tokens=0, image_size=0, max_text_len=32, seq_len=64, pad_to=32), seed=0)
DEVICE = torch.device("cpu")
BROKEN = b"no image"
Level = int | tuple[int, ...] | None
"""Brightness of the image of a question; of several; None: it has none, or there are none in the job."""


def evaluate(
    model: nn.Module, asked: Sequence[Question], encoder: Encoder, cfg: EvalConfig, ranks: Ranks | None = None, *, blind: bool = False
) -> Score:  # fmt: skip
    """Exact match of ``asked``."""
    exam = Exam(model, encoder, cfg, DEVICE, ranks or Ranks())
    return ExactMatch()._score(exam, dict(enumerate(asked)), blind)


def grey(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (level, level, level)).save(buffer, "PNG")
    return buffer.getvalue()


class Scripted(nn.Module):
    """Generates ``answer(prompt, Level of its images)`` for each row, then EOS; its loss is ``nats`` for each target.

    Attributes:
        asked: (prompt, level) of everything it was asked, in order.
    """

    def __init__(self, answer: Callable[[str, Any], str], nats: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.answer, self.nats = answer, nats
        self.asked: list[tuple[str, Level]] = []
        self.modes: set[bool] = set()
        self.replies: list[list[int]] = []
        self.position = 0

    def forward(self, batch: Batch, cache: Cache | None = None) -> Output:
        self.modes.add(self.training)
        if cache is None:
            assert self.nats is not None
            labels = batch.labels.flatten()[batch.targets]
            assert (labels != IGNORE).all()
            return Output(self.nats(labels).sum(), torch.zeros(len(labels), TOKENIZER.vocab_size))
        if batch.input_ids.shape[1] > 1 or not self.replies:
            self.replies, self.position = [self._reply(batch, row) for row in range(len(batch.input_ids))], 0
            cache.kept["rows"] = torch.arange(len(self.replies))
        replies = [self.replies[row] for row in cache.kept["rows"]]  # with several beams, of the prompt of each
        ids = torch.tensor([reply[self.position] if self.position < len(reply) else TOKENIZER.pad_id for reply in replies])
        self.position += 1
        return Output(torch.zeros(()), nn.functional.one_hot(ids, max(TOKENIZER.vocab_size, 1 + int(ids.max()))).float())

    def _reply(self, batch: Batch, row: int) -> list[int]:
        prompt = TOKENIZER.decode(batch.input_ids[row][batch.kinds[row] == Kind.PROMPT].tolist()).strip()
        level: Level = None
        if batch.images is not None:
            levels = tuple(int(batch.images[k].float().mean()) for k in batch.image_index[batch.image_rows == row].tolist())
            level = levels if len(levels) > 1 else levels[0] if levels else None
        self.asked.append((prompt, level))
        return [*TOKENIZER.encode(self.answer(prompt, level)), TOKENIZER.eos_id]


def shade(prompt: str, level: int | None) -> str:
    return "red" if level is not None and level < 100 else "blue"


def asked_of(samples: Sequence[Sample | None]) -> list[Question]:
    return questions(ListSource(samples))[0]


def held_out(levels: Sequence[int | None]) -> list[Sample]:
    """One question about each grey image, whose truth is ``shade``; None is an image that cannot be read."""
    return [
        Sample(f"s{k}", (BROKEN if level is None else grey(level),), (Text(f"what colour {k % 3}?", shade("", level)),))
        for k, level in enumerate(levels)
    ]


LEVELS = [10, 200, None, 20, 30, None, 240]
"""Seven questions; on two ranks with batches of one, the first rank has more to ask, and each meets one that cannot be read."""


ONE_BY_ONE = EvalConfig(batch_size=1, max_new_tokens=4)


def two_ranks(out: str) -> None:
    """Scores and losses over two ranks; each writes what it knows."""
    code = 0
    try:
        world = start(DistributedConfig(timeout_s=60))
        model = Scripted(shade, lambda labels: labels.double())
        score, loss = both(model, world)
        calls = world.gather(len(model.asked))
        torch.save((calls, facts(score, loss)), f"{out}/{world.rank}.pt")
        beams = facts(*both(model, world, EvalConfig(batch_size=1, max_new_tokens=4, beams=3)))
        assert beams == facts(score, loss), "every rank takes as many steps as the longest search of all"
        stop()
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)


def both(model: Scripted, ranks: Any, cfg: EvalConfig = ONE_BY_ONE) -> tuple[Score, HeldOutLoss]:
    """The score and the loss of ``LEVELS``; the model says "red" where it is dark, also where that is wrong."""
    samples = [
        sample if k != 4 else replace(sample, texts=(Text("what colour?", "blue", kind="odd"),))
        for k, sample in enumerate(held_out(LEVELS))
    ]
    source = ListSource(samples)
    score = evaluate(model, questions(source)[0], ENCODER, cfg, ranks)
    return score, held_out_loss(Exam(model, ENCODER, cfg, DEVICE, ranks), source, ENCODER, rows=1)


def facts(score: Score, loss: HeldOutLoss) -> dict[str, Any]:
    """All that is said of both, as plain values."""
    return {
        "counts": [score.right, score.total, score.too_long],
        "by_truth": score.by_truth,
        "by_kind": {kind: (part.right, part.total) for kind, part in score.kinds().items()},
        "answers": [(a.number, a.question.sample_id, a.text, a.right) for a in score.answers],
        "unreadable": score.skipped,
        "loss": [loss.nats, loss.samples],
        "loss skipped": sorted(loss.skipped),
    }


def written(path: Path) -> tuple[list[int], dict[str, Any]]:
    return torch.load(path, weights_only=True)
