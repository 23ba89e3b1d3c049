"""Evaluation on the held-out split: during training on a sample of it, at the end on all of it."""

from __future__ import annotations

import logging

from kempnerforge.config import EvalConfig
from kempnerforge.eval.exact_match import Question, Score, evaluate, question_only_prior, questions
from kempnerforge.eval.loss import held_out_loss
from kempnerforge.training.trainer import Hook, StepResult, Trainer

LOG = logging.getLogger("kempnerforge")


class Evaluation(Hook):
    """Exact match of generated answers with and without the images; held-out loss where the data have no questions.

    Attributes:
        seeing, blind: the final scores, once ``finish`` has run.
        prior: exact match of guessing from the question alone, by what the last stage's training data answer most often.
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
            if self.blind is not None and trainer.world.is_main:
                known, _ = questions(trainer.assembly.sources[-1])
                self.prior = question_only_prior(known, self._all)

    def _evaluate(self, trainer: Trainer, limit: int) -> tuple[Score | None, Score | None]:
        if trainer.assembly.held_out is None:
            return None, None
        encoder = trainer.assembly.encoder(trainer.stages[-1])
        world, device = trainer.world, trainer.world.device
        if not self._all:
            rows = max(1, trainer.stage.train.batch_size // world.size)
            loss = held_out_loss(trainer.model, trainer.assembly.held_out, encoder, world, device, rows=rows, limit=limit)
            self.values = {"eval/loss": loss}
            trainer.record(self.values)
            return None, None
        asked = self._all if not limit else [self._all[i * len(self._all) // limit] for i in range(min(limit, len(self._all)))]
        seeing = evaluate(trainer.model, asked, encoder, self.cfg, world, device)
        self.values = {"eval/exact_match": seeing.exact_match, "eval/questions": float(seeing.total)}
        blind = None
        if self.cfg.blind and trainer.model.has_images:
            blind = evaluate(trainer.model, asked, encoder, self.cfg, world, device, blind=True)
            self.values["eval/exact_match_blind"] = blind.exact_match
        trainer.record(self.values)
        return seeing, blind
