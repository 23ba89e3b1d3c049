"""``bad_samples.jsonl``: every sample that could not be used, and why."""

from __future__ import annotations

import json
from pathlib import Path

from kempnerforge.training.trainer import Hook, StepResult, Trainer


class BadSamples(Hook):
    """Appends one line for each bad sample, once. Ranks share the file: a line is one write."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "bad_samples.jsonl"
        self._known: set[str] = set()

    def start(self, trainer: Trainer) -> None:
        if self.path.exists():
            self._known = {json.loads(line)["id"] for line in self.path.read_text(encoding="utf-8").splitlines() if line.endswith("}")}

    def step(self, trainer: Trainer, result: StepResult) -> None:
        for sample_id, reason in trainer.bad_samples:
            if sample_id not in self._known:
                self._known.add(sample_id)
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"id": sample_id, "source": trainer.stage.data.source, "reason": reason}) + "\n")
