"""``bad_samples.jsonl``: every sample that could not be used, and why."""

from __future__ import annotations

import json
from pathlib import Path

from kempnerforge.config import Stage
from kempnerforge.training.trainer import Hook, StepResult, Trainer
from kempnerforge.util.files import mend_objects, read_objects


class BadSamples(Hook):
    """Appends one line for each bad sample, once. Ranks share the file: a line is one write."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "bad_samples.jsonl"
        self._known: set[str] = set()
        self._trainer: Trainer | None = None

    def start(self, trainer: Trainer) -> None:
        self._trainer = trainer
        if trainer.world.is_main:
            mend_objects(self.path, "id", str)
            if not trainer.step:  # of an attempt without a checkpoint; the data may have been changed since
                self.path.unlink(missing_ok=True)
        trainer.world.barrier()
        if trainer.step and self.path.exists():
            self._known = {row["id"] for row in read_objects(self.path, "id", str)[0]}

    def step(self, trainer: Trainer, result: StepResult) -> None:
        self._write(trainer, result.stage)

    def _write(self, trainer: Trainer, stage: Stage) -> None:
        of_batch = any(trainer.world.once([1.0], of_batch=True))  # others have read the same samples
        for sample_id, reason in trainer.bad_samples if of_batch else ():
            if sample_id not in self._known:
                self._known.add(sample_id)
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"id": sample_id, "source": stage.data.source, "reason": reason}) + "\n")

    def close(self) -> None:
        if self._trainer is not None:  # the step that had too many of them did not end
            self._write(self._trainer, self._trainer.stage)
            self._trainer = None
