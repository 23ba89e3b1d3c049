"""Signals that ask a run to stop: end the step or evaluation, save, end. A second SIGINT: end at once."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

from kempnerforge.checkpoint.store import newest_step
from kempnerforge.training.trainer import Hook, Trainer
from kempnerforge.util.process import STOPS, die_of_interrupt, say

asked_by: set[int] = set()
"""The signals that have asked this process to stop."""


class Signals(Hook):
    """Asks the trainer to stop. The ranks vote in each step and at each token of an evaluation, so that all
    of them stop at the same place, whichever rank got the signal. A report that has begun is finished.

    With ``ends_process`` a second SIGINT ends the process in the handler: an exception in the middle of a
    save would look like a damaged checkpoint. A half-written checkpoint is not taken for one.

    Args:
        ends_process: the process ends with this run. Once it was asked to stop, its handlers stay: a signal
            that reaches this rank late must not change its exit code.
    """

    def __init__(self, run_dir: Path, ends_process: bool = False) -> None:
        self.run_dir, self.ends_process = run_dir, ends_process
        self._before: dict[int, object] = {}
        self._trainer: Trainer | None = None

    def start(self, trainer: Trainer) -> None:
        self._trainer = trainer
        asked_by.clear()

        def ask(number: int, frame: FrameType | None) -> None:
            again = trainer.stop_requested and number == signal.SIGINT
            trainer.stop_requested = True
            asked_by.add(number)
            name = signal.Signals(number).name
            if again and self.ends_process:
                say(f"{name} again: left at once, without saving; {self._newest()}")
                die_of_interrupt()
            if again:
                raise KeyboardInterrupt
            say(f"{name}: saving, then stopping; the run can be continued")

        for number in STOPS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup: it goes on without its terminal
                self._before[number] = signal.signal(number, ask)

    def _newest(self) -> str:
        step = newest_step(self.run_dir / "checkpoints")
        return f"the same command continues at step {step}" if step is not None else "there is no checkpoint yet"

    def close(self) -> None:
        if self.ends_process and self._trainer is not None and self._trainer.stopping:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        self._before.clear()
