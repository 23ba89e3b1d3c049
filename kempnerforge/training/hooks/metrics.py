"""``metrics.jsonl``: one JSON object a line, each with ``step``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO

from kempnerforge.config import MetricsConfig
from kempnerforge.training.trainer import Hook, StepResult, Trainer


class Metrics(Hook):
    """Gathers steps, records them every ``interval`` steps and at the last one, and writes everything that is recorded.

    ``train/loss`` is that of the step itself; rates are means over the interval, evaluation and saving not counted.
    """

    def __init__(self, cfg: MetricsConfig, run_dir: Path) -> None:
        self.cfg, self.path = cfg, run_dir / "metrics.jsonl"
        self._file: IO[str] | None = None
        self._window: list[StepResult] = []

    def start(self, trainer: Trainer) -> None:
        if trainer.world.is_main:
            keep_until(self.path, trainer.step)
            self._file = self.path.open("a", encoding="utf-8")

    def step(self, trainer: Trainer, result: StepResult) -> None:
        self._window.append(result)
        if trainer.step % self.cfg.interval and not trainer.done:
            return
        seconds = sum(r.seconds for r in self._window)
        trainer.record(
            {
                "train/loss": result.loss,
                "train/grad_norm": result.grad_norm,
                "train/lr": result.lr,
                "train/tokens_per_s": sum(r.tokens for r in self._window) / seconds,
                "train/images_per_s": sum(r.images for r in self._window) / seconds,
                "train/step_s": seconds / len(self._window),
                "train/elapsed_s": trainer.seconds,
                "train/stage": float(trainer.stage.index),
                "train/skipped_steps": float(sum(r.skipped for r in self._window)),
                "data/samples": float(trainer.samples_seen),
                "data/bad_samples": float(trainer.samples_bad),
                "data/texts_left_out": float(sum(r.texts_left_out for r in self._window)),
            }
        )
        self._window.clear()

    def record(self, trainer: Trainer, values: dict[str, float]) -> None:
        if self._file is not None:
            self._file.write(json.dumps({"step": trainer.step, **values}) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def keep_until(path: Path, step: int) -> None:
    """Drops what lies after ``step``, and a line that a kill cut short: the steps behind a checkpoint are about to be written again."""
    if not path.exists():
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
    part = path.with_suffix(".part")
    part.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    os.replace(part, path)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")
