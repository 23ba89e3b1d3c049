"""Evaluation on the held-out split: during training on a sample of it, at the end on all of it."""

from __future__ import annotations

import logging

from kempnerforge.config import EvalConfig
from kempnerforge.eval.exact_match import question_only_prior
from kempnerforge.eval.measure import Measured, measure
from kempnerforge.eval.questions import questions
from kempnerforge.training.trainer import Hook, StepResult, Trainer

LOG = logging.getLogger("kempnerforge")

PRIOR_SAMPLES = 50_000
"""Training samples up to which the guess from the question alone is made of them: all have to be read for it."""


class Evaluation(Hook):
    """Exact match of generated answers with and without the images; held-out loss where the data have no questions; perplexity of plain text.

    Attributes:
        final: what was measured in the end, once ``finish`` has run.
        prior: exact match of guessing from the question alone, by what the last stage's training data answer most often; None if they are
            more than ``PRIOR_SAMPLES``.
        remarks: what has to be known beside the scores.
    """

    def __init__(self, cfg: EvalConfig) -> None:
        self.cfg = cfg
        self.final = Measured()
        self.prior: float | None = None
        self.remarks: list[str] = []

    def start(self, trainer: Trainer) -> None:
        trainer.assembly.check_held_out()
        if (self.cfg.interval or self.cfg.at_end) and trainer.assembly.examined is not None:
            self._remark(trainer.assembly.examined.remarks())

    def step(self, trainer: Trainer, result: StepResult) -> None:
        if self.cfg.interval and trainer.step % self.cfg.interval == 0 and not (trainer.done and self.cfg.at_end):
            self._evaluate(trainer, self.cfg.samples)

    def finish(self, trainer: Trainer) -> None:
        if not self.cfg.at_end:
            return
        last = trainer.stages[-1]
        self.final = found = self._evaluate(trainer, 0)
        self._remark(found.remarks(last.optimizer.lr))
        known = trainer.assembly.sources[-1]
        if found.seeing is not None and found.blind is not None and trainer.world.is_main and len(known) <= PRIOR_SAMPLES:
            asked = [answer.question for answer in found.seeing.answers]
            self.prior = question_only_prior(questions(known)[0], asked, trainer.assembly.encoder(last))

    def _remark(self, lines: list[str]) -> None:
        self.remarks += lines
        for line in lines:
            LOG.warning("%s", line)

    def _evaluate(self, trainer: Trainer, limit: int) -> Measured:
        assembly, world = trainer.assembly, trainer.world
        with trainer.optimizers.averaged():
            found = measure(
                trainer.model,
                assembly.encoder(trainer.stages[-1]),
                self.cfg,
                world,
                world.device,
                held_out=assembly.examined,
                plain_text=assembly.plain_text,
                rows=max(1, trainer.stage.train.batch_size // world.size),
                limit=limit,
            )
        if found.values:
            trainer.record(found.values)
        return found
