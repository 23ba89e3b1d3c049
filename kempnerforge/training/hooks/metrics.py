"""``metrics.jsonl``: one JSON object a line, each with ``step``."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import IO, Any

from kempnerforge.config import MetricsConfig
from kempnerforge.training.trainer import Hook, StepResult, Trainer
from kempnerforge.util.digest import content_digest
from kempnerforge.util.files import mend_objects
from kempnerforge.util.reading import parse_json

LOG = logging.getLogger("kempnerforge")
NAME = "metrics.jsonl"


class Metrics(Hook):
    """Records every ``interval`` steps and at the last one, and writes everything that is recorded.

    ``train/loss`` is the step's own; rates are means over the interval, without evaluation and saving.
    """

    def __init__(self, cfg: MetricsConfig, run_dir: Path) -> None:
        self.cfg, self.path = cfg, run_dir / NAME
        self._file: IO[str] | None = None
        self._window: list[StepResult] = []

    def start(self, trainer: Trainer) -> None:
        if trainer.world.is_main:
            again = trainer.unevaluated or (trainer.done and trainer.job.eval.at_end)
            keep_until(self.path, trainer.step, evaluates_again=again)
            if trainer.recorded and not again and not was_written(self.path, trainer.recorded, trainer.step):
                LOG.warning("%s: is not what this run had written by step %d; the report shows it as it is", self.path, trainer.step)
            self._file = self.path.open("a", encoding="utf-8")

    def step(self, trainer: Trainer, result: StepResult) -> None:
        self._window.append(result)
        if trainer.step % self.cfg.interval and not trainer.done:
            return
        seconds = sum(r.seconds for r in self._window)
        trainer.record(
            {
                "train/loss": result.loss,
                **({"train/weighted_loss": result.weighted_loss} if result.weighted_loss is not None else {}),
                **({"train/pair_loss": result.pair_loss} if result.pair_loss not in (0, result.loss) else {}),
                **({"train/aux_loss": result.aux_loss} if result.aux_loss else {}),
                "train/grad_norm": result.grad_norm,
                **{f"train/{key}": rate for key, rate in result.rates.items()},
                "train/tokens_per_s": sum(r.counts.tokens for r in self._window) / seconds,
                "train/images_per_s": sum(r.counts.images for r in self._window) / seconds,
                "train/step_s": seconds / len(self._window),
                "train/elapsed_s": trainer.seconds,
                "train/stage": float(result.stage.index),
                "train/skipped_steps": float(sum(r.skipped for r in self._window)),
                "data/samples": float(trainer.samples_seen),
                **{f"data/samples/{part}": float(count) for part, count in trainer.samples_of.items()},
                "data/bad_samples": float(trainer.samples_bad),
                "data/texts_left_out": float(sum(r.counts.texts_left_out for r in self._window)),
            }
        )
        self._window.clear()

    def record(self, trainer: Trainer, values: dict[str, float]) -> None:
        if self._file is not None:
            numbers = {key: value if math.isfinite(value) else None for key, value in values.items()}  # JSON has no NaN
            self._file.write(json.dumps({"step": trainer.step, **numbers}) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def metrics_digest(run_dir: Path) -> str:
    """A digest of all lines that a run has written so far; empty if there are none."""
    path = run_dir / NAME
    return content_digest(path.read_bytes()).hex() if path.is_file() else ""


def was_written(path: Path, digest: str, step: int) -> bool:
    """Whether ``path`` is what had the ``digest`` when ``step`` was saved, or this and a later evaluation of the
    step: the final one of a run that was cut short comes after its last save.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    later = bool(lines) and (row := parse_json(lines[-1], str(path)))["step"] == step and any(key.startswith("eval/") for key in row)
    return digest in {content_digest(b"".join(lines[: len(lines) - cut])).hex() for cut in range(1 + later)}


def keep_until(path: Path, step: int, *, evaluates_again: bool = False) -> None:
    """Drops what will be written again: steps after ``step``, a last line that a kill cut short, and, if the
    evaluation of ``step`` is repeated, its values. Damaged lines are named in a warning.
    """

    def is_done(row: dict[str, Any]) -> bool:
        repeated = evaluates_again and any(key.startswith("eval/") for key in row)
        return row["step"] <= step - repeated

    mend_objects(path, "step", int, is_done)
