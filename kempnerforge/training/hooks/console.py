"""Progress on stderr: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import math
import sys
import time

from rich.progress import BarColumn, Progress, TaskID, TimeRemainingColumn

from kempnerforge.training.trainer import Hook, StepResult, Trainer
from kempnerforge.util.screen import Screen, TaskText, bars

PLAIN_LINE_S = 10.0
"""Seconds between plain lines."""


class ConsoleProgress(Hook):
    """Step, loss, useful tokens and images per second, time left."""

    def __init__(self) -> None:
        self.console = Screen(sys.stderr)
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._last_line = self._smooth_loss = self._tokens = self._images = self._seconds = self._steps = 0.0
        self._stage = -1

    def start(self, trainer: Trainer) -> None:
        if not trainer.world.is_main:
            self.console.quiet = True
        elif self.console.is_terminal:
            done, said = TaskText("{task.completed}/{task.total}"), TaskText("{task.fields[text]}")
            stage = TaskText("{task.fields[stage]}", "bold")
            self._progress = bars(self.console, stage, BarColumn(), done, said, TimeRemainingColumn())
            self._task = self._progress.add_task(
                "train", total=trainer.total_steps, completed=trainer.step, stage=trainer.stage.name, text=""
            )
            self._progress.start()

    def step(self, trainer: Trainer, result: StepResult) -> None:
        if math.isfinite(result.loss):
            self._smooth_loss = result.loss if not self._smooth_loss else 0.9 * self._smooth_loss + 0.1 * result.loss
        keep = 0.95 if self._seconds else 0.0  # a moving sum, so that the rates follow what happens now
        counts = result.counts
        moving = ((self._tokens, counts.tokens), (self._images, counts.images), (self._seconds, result.seconds), (self._steps, 1))
        self._tokens, self._images, self._seconds, self._steps = (keep * old + new for old, new in moving)
        text = f"loss {self._smooth_loss:.4f}  {self._tokens / self._seconds:,.0f} tokens/s  {self._images / self._seconds:,.0f} images/s"
        if result.skipped:
            self.console.print(f"step {trainer.step}: loss or gradient not finite, step skipped")
        if self._progress is not None:
            self._progress.update(self._task, completed=trainer.step, stage=result.stage.name, text=text)
        elif time.monotonic() - self._last_line > PLAIN_LINE_S or trainer.done or result.stage.index != self._stage:
            self._last_line, self._stage = time.monotonic(), result.stage.index
            left = (trainer.total_steps - trainer.step) * self._seconds / self._steps
            self.console.print(f"{result.stage.name} {trainer.step}/{trainer.total_steps}  {text}  {left:.0f} s left", soft_wrap=True)

    def record(self, trainer: Trainer, values: dict[str, float]) -> None:
        shown = "  ".join(f"{key} {value:.4g}" for key, value in values.items() if key.startswith("eval/"))
        if shown:
            self.console.print(f"step {trainer.step}  {shown}", soft_wrap=True)

    def finish(self, trainer: Trainer) -> None:
        self.close()

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
