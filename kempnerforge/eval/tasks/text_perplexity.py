"""Perplexity of plain text: what is left of the language model, or has become of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kempnerforge.config import registry
from kempnerforge.eval.exam import Exam
from kempnerforge.eval.loss import held_out_loss, perplexity
from kempnerforge.eval.task import Found, ReportCurve, Task


@registry.register_task("text_perplexity")
@dataclass
class TextPerplexity(Task):
    """Perplexity of the file ``eval.text_path``, read without any image."""

    reads_held_out: ClassVar[bool] = False

    def measure(self, exam: Exam) -> Found | None:
        if (text := exam.plain_text) is None:
            return None
        loss = held_out_loss(exam, text.windows, text.encoder, text.rows)
        return Found({"eval/text_perplexity": perplexity(loss.nats), "eval/text_windows": loss.samples})

    def curves(self) -> list[ReportCurve]:
        return [ReportCurve("Plain text", "perplexity, without any image", {"eval/text_perplexity": "perplexity"})]
