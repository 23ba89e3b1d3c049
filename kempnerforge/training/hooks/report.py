"""``summary.json`` and ``report.html`` when the run is done, and ``complete.json``, which says so."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from kempnerforge.config import to_toml
from kempnerforge.data.batching.order import drawn
from kempnerforge.data.images.decode import load_image
from kempnerforge.data.sample import SampleError
from kempnerforge.eval.answers import Answer, Drawn
from kempnerforge.eval.evaluate import tasks_of
from kempnerforge.eval.task import Score
from kempnerforge.report.charts import Band
from kempnerforge.training.complete import SUMMARY, write_complete
from kempnerforge.training.history import changed_on_the_way
from kempnerforge.training.hooks.checkpoints import Checkpoints
from kempnerforge.training.hooks.evaluation import Evaluation
from kempnerforge.training.report import Example, write_report
from kempnerforge.training.trainer import Hook, Trainer
from kempnerforge.util.files import write_text

LOG = logging.getLogger("kempnerforge")

EXAMPLES = 24
"""Test images in the report."""


class Report(Hook):
    """Writes both files from the recorded metrics and the final evaluation."""

    def __init__(self, run_dir: Path, evaluation: Evaluation, checkpoints: Checkpoints) -> None:
        self.run_dir, self.evaluation, self.checkpoints = run_dir, evaluation, checkpoints

    def finish(self, trainer: Trainer) -> None:
        if not trainer.world.is_main:
            return
        job, final = trainer.job, self.evaluation.final
        summary: dict[str, object] = {
            "arch": job.vlm.arch if job.vlm is not None else "text_only",
            "parameters": sum(p.numel() for p in trainer.model.parameters()),
            "steps": trainer.step,
            "train_s": trainer.seconds,
            "samples": trainer.samples_seen,
            "bad_samples": trainer.samples_bad,
            "world_size": trainer.world.size,
            **{key.removeprefix("eval/"): value for key, value in final.values.items()},
        }
        if self.evaluation.prior is not None:
            summary["question_only_prior"] = self.evaluation.prior
        if (best := self.checkpoints.best) is not None:
            summary["best_checkpoint"] = f"step {best.step}: {best.key} = {best.score:.4g}"
        write_text(self.run_dir / SUMMARY, json.dumps(summary, indent=1) + "\n")
        seeing, blind, size = final.first.seeing, final.first.blind, trainer.assembly.data.layout.image_size
        drawn = [found.seeing for found in final.tasks.values() if found.seeing is not None and any(map(_is_drawn, found.seeing.answers))]
        shown = [seeing, *(score for score in drawn if score is not seeing)] if seeing is not None else []
        path = write_report(
            self.run_dir,
            config_toml=to_toml(job),
            changed=changed_on_the_way(trainer.history, trainer.step),
            stages=[Band(stage.start, stage.end, stage.name) for stage in trainer.stages],
            examples=[one for score in shown for one in examples(score, blind if score is seeing else None, size)],
            summary=summary | {"by_answer": final.by_answer},
            tasks=tasks_of(job.eval),
            remarks=self.evaluation.remarks,
        )
        write_complete(self.run_dir, trainer.step, trainer.history[-1].config)
        LOG.info("report: %s", path)


def examples(seeing: Score, blind: Score | None, image_size: int) -> list[Example]:
    """``EXAMPLES`` answers, drawn from all; up to a third of them are wrong ones."""
    marked = list(zip(seeing.answers, [points == 1 for points in seeing.points], strict=True))
    wrong = _some([one for one in marked if not one[1]], EXAMPLES // 3)
    chosen = _some([one for one in marked if one[1]], EXAMPLES - len(wrong)) + wrong
    blind_text = {a.question: a.text for a in blind.answers} if blind is not None else {}
    return [example for a, right in chosen if (example := _example(a, right, blind_text.get(a.question), image_size)) is not None]


def _some(answers: list[tuple[Answer, bool]], count: int) -> list[tuple[Answer, bool]]:
    return [answers[at] for at in drawn(len(answers), count, 0)]


def _is_drawn(answer: Answer) -> bool:
    return isinstance(answer.text, Drawn)


def _example(answer: Answer, right: bool, blind: str | None, image_size: int) -> Example | None:
    if isinstance(answer.text, Drawn):
        return Example(answer.text.picture, answer.question.prompt, answer.question.truth, answer.text, right, drawn=True)
    if not answer.question.images:
        return None
    try:
        image = load_image(answer.question.images[0], image_size)
    except SampleError:
        return None  # counted by the evaluation
    return Example(image, answer.question.prompt, answer.question.truth, answer.text, right, blind)
