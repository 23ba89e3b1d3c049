"""Evaluation on the held-out split: during training on a sample of it, at the end on all of it."""

from __future__ import annotations

import logging

from kempnerforge.config import EvalConfig
from kempnerforge.eval.exact_match import Question, Score, evaluate, question_only_prior, questions
from kempnerforge.eval.loss import held_out_loss
from kempnerforge.training.trainer import Hook, StepResult, Trainer

LOG = logging.getLogger("kempnerforge")

PRIOR_SAMPLES = 50_000
"""Training samples up to which the guess from the question alone is made of them: all have to be read for it."""


class Evaluation(Hook):
    """Exact match of generated answers with and without the images; held-out loss where the data have no questions; perplexity of plain text.

    Attributes:
        seeing, blind: the final scores, once ``finish`` has run.
        prior: exact match of guessing from the question alone, by what the last stage's training data answer most often; None if they are
            more than ``PRIOR_SAMPLES``.
    """

    def __init__(self, cfg: EvalConfig) -> None:
        self.cfg = cfg
        self.seeing: Score | None = None
        self.blind: Score | None = None
        self.values: dict[str, float] = {}
        self.prior: float | None = None
        self._all: list[Question] = []

    def start(self, trainer: Trainer) -> None:
        if trainer.assembly.held_out is not None and (self.cfg.interval or self.cfg.at_end):
            self._all, skipped = questions(trainer.assembly.held_out)
            if skipped and trainer.world.is_main:
                LOG.warning("%d held-out samples cannot be read; the first: %s", len(skipped), skipped[0][1])

    def step(self, trainer: Trainer, result: StepResult) -> None:
        if self.cfg.interval and trainer.step % self.cfg.interval == 0 and not (trainer.done and self.cfg.at_end):
            with trainer.optimizers.averaged():
                self._evaluate(trainer, self.cfg.samples)

    def finish(self, trainer: Trainer) -> None:
        if self.cfg.at_end and trainer.done:
            with trainer.optimizers.averaged():
                self.seeing, self.blind = self._evaluate(trainer, 0)
            known = trainer.assembly.sources[-1]
            if self.blind is not None and trainer.world.is_main and len(known) <= PRIOR_SAMPLES:
                answered, _ = questions(known)
                self.prior = question_only_prior(answered, self._all)

    def _evaluate(self, trainer: Trainer, limit: int) -> tuple[Score | None, Score | None]:
        assembly, world, device, self.values = trainer.assembly, trainer.world, trainer.world.device, {}
        seeing = blind = None
        if assembly.plain_text is not None:
            self.values["eval/text_perplexity"] = assembly.plain_text.perplexity(trainer.model, world, device, limit)
        if assembly.held_out is None:
            if self.values:
                trainer.record(self.values)
            return None, None
        encoder = assembly.encoder(trainer.stages[-1])
        if self._all and self.cfg.exact_match:
            asked = self._all if not limit else [self._all[i * len(self._all) // limit] for i in range(min(limit, len(self._all)))]
            seeing = evaluate(trainer.model, asked, encoder, self.cfg, world, device)
            self.values |= scores(seeing)
            if self.cfg.blind and trainer.model.has_images:
                blind = evaluate(trainer.model, asked, encoder, self.cfg, world, device, blind=True)
                self.values |= scores(blind, "_blind")
        if self.cfg.loss or seeing is None:
            rows = max(1, trainer.stage.train.batch_size // world.size)
            self.values["eval/loss"] = held_out_loss(trainer.model, assembly.held_out, encoder, world, device, rows=rows, limit=limit)
        trainer.record(self.values)
        return seeing, blind


def scores(score: Score, suffix: str = "") -> dict[str, float]:
    """What is recorded of an evaluation; ``suffix`` marks the blind one."""
    values = {f"eval/exact_match{suffix}": score.exact_match}
    if not suffix:
        values["eval/questions"] = float(score.total)
    return values | {f"eval/exact_match{suffix}/{kind}": right / total for kind, (right, total) in sorted(score.by_kind.items()) if total}
