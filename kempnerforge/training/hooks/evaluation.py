"""Evaluation on the held-out split: during training on a sample of it, at the end on all of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from kempnerforge.config import EvalConfig
from kempnerforge.eval.evaluate import Measured
from kempnerforge.eval.exam import Ranks
from kempnerforge.eval.questions import questions
from kempnerforge.eval.tasks.exact_match import question_only_prior
from kempnerforge.training.trainer import Hook, StepResult, Trainer

LOG = logging.getLogger("kempnerforge")

PRIOR_SAMPLES = 50_000
"""With more training samples the guess from the question alone is left out: it needs all of them."""


class Interrupted(Exception):
    """A rank was asked to stop during an evaluation. It is raised on all ranks at the same place."""


class Voting(Ranks):
    """The ranks of an evaluation, which ends when one of them is asked to stop."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.rank, self.size = trainer, trainer.world.part, trainer.world.parts

    def sum(self, values: Sequence[float]) -> list[float]:
        totals = self.trainer.sum(self.trainer.world.once(values))
        if self.trainer.stopping:
            raise Interrupted
        return totals

    def gather(self, value: Any) -> list[Any]:
        return self.trainer.world.gather_parts(value)


class Evaluation(Hook):
    """Measures the tasks of ``[eval]``.

    Attributes:
        final: the results of the evaluation at the end, once ``finish`` has run.
        prior: exact match of the most frequent answers of the last stage's training data; None if it has more
            than ``PRIOR_SAMPLES`` samples.
        remarks: lines that belong beside the scores.
    """

    def __init__(self, cfg: EvalConfig) -> None:
        self.cfg = cfg
        self.final = Measured()
        self.prior: float | None = None
        self.remarks: list[str] = []

    def start(self, trainer: Trainer) -> None:
        trainer.assembly.data.check_held_out()
        if (self.cfg.interval or self.cfg.at_end) and (held_out := trainer.assembly.data.examined) is not None:
            self._remark(held_out.remarks())
        if trainer.unevaluated:
            self._evaluate_if_due(trainer)

    def step(self, trainer: Trainer, result: StepResult) -> None:
        self._evaluate_if_due(trainer)

    def _evaluate_if_due(self, trainer: Trainer) -> None:
        due = self.cfg.interval and trainer.step % self.cfg.interval == 0 and not (trainer.done and self.cfg.at_end)
        trainer.unevaluated = bool(due) and self._evaluate(trainer, self.cfg.samples) is None

    def finish(self, trainer: Trainer) -> None:
        found = self._evaluate(trainer, 0) if self.cfg.at_end else None
        if found is None:
            return
        self.final, last = found, trainer.stages[-1]
        self._remark(found.remarks(last.optimizer.lr))
        known = trainer.assembly.data.sources[-1]
        exact = found.tasks.get("exact_match")
        if exact and exact.seeing and exact.blind and trainer.world.is_main and len(known) <= PRIOR_SAMPLES:
            asked = [answer.question for answer in exact.seeing.answers]
            self.prior = question_only_prior(questions(known)[0], asked, trainer.assembly.data.encoder(last))

    def _remark(self, lines: list[str]) -> None:
        self.remarks += lines
        for line in lines:
            LOG.warning("%s", line)

    def _evaluate(self, trainer: Trainer, limit: int) -> Measured | None:
        """Evaluates and records the values; None: the run is asked to stop."""
        ranks = Voting(trainer)
        rows = max(1, trainer.stage.train.step_rows // (ranks.size * trainer.stage.train.grad_accum_steps))
        try:
            ranks.sum([])
            with trainer.optimizers.averaged():
                found = trainer.assembly.evaluate(ranks, trainer.world.device, rows=rows, limit=limit)
        except Interrupted:
            return None
        if found.values:
            trainer.record(found.values)
        return found
