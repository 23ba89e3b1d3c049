"""Held-out loss: what is left to measure where there is no answer to generate."""

from __future__ import annotations

from dataclasses import dataclass

from kempnerforge.config import registry
from kempnerforge.eval.exam import Exam
from kempnerforge.eval.loss import held_out_loss, perplexity
from kempnerforge.eval.task import Found, ReportRow, Task
from kempnerforge.report.facts import Facts
from kempnerforge.util.numbers import format_number


@registry.register_task("loss")
@dataclass
class Loss(Task):
    """Mean cross-entropy of the held-out answers, with ``eval.loss`` or if nothing else is measured."""

    def measure(self, exam: Exam) -> Found | None:
        if exam.held_out is None or not (exam.cfg.loss or not (exam.answered or exam.cfg.tasks)):
            return None
        loss = held_out_loss(exam, exam.held_out.source, exam.encoder, exam.rows)
        values = {"eval/loss": loss.nats, "eval/loss_samples": loss.samples, "eval/loss_unreadable": len(loss.skipped)}
        return Found(values | ({"eval/loss_texts_left_out": loss.left_out} if loss.left_out else {}))

    def rows(self, facts: Facts) -> list[ReportRow]:
        loss = facts.result("loss")
        if loss is None:
            return []
        counts = facts.beside("loss_samples", "samples") + facts.beside("loss_unreadable", "could not be read")
        about = f"nats a token; perplexity {format_number(perplexity(loss))}{counts}"
        return [ReportRow("Held-out loss", f"{loss:.4g}", about=about, lead=True)]
